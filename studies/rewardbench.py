"""Benchmarks of the interpretable reward: the gate, its baselines and single attributes compared.

--pairs       RewardBench 1: accuracy of each subset, of each section (subsets weighted by the
              official counts), and overall
--prior_sets  anthropic_helpful, anthropic_hhh, shp and summarize, which count one half in the
              overall score of the leaderboard
--groups      best of n in the manner of RewardBench 2: responses to a prompt, of which the label
              `correct` marks the right ones; a prompt counts as right when all responses that score
              highest are right
--styles      RM-Bench: three rows for each prompt, one after another: concise, detailed, detailed
              with markdown; 3 x 3 styles
--domains     any other pairs with subset names
A tie counts as wrong. Intervals come from resampling the prompts of each subset, the same resamples
for every method. Rows with prompts that the gate or the attribute heads were fitted on are left out
and counted, where the files tell.

Reads   prepared files as above; MODEL_DIR of interpretable_gating.py
Writes  OUTPUT_DIR/rewardbench_results.json
Example python studies/rewardbench.py --pairs prepared/reward_bench.safetensors \\
            --model_dir interpretable_out
        python studies/rewardbench.py --domains llmbar=prepared/llmbar.safetensors \\
            --model_dir interpretable_out
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewardlib import artifacts
from rewardlib.cli import console, kinds, tables
from rewardlib.errors import InputError
from studies.interpretable import (
    attribute_data,
    flag_values,
    gating,
    multi_objective,
    rewardbench,
)

RESULTS = "rewardbench_results.json"
CORRECT = "correct"
REWARDBENCH, PAIRS, PRIOR = "rewardbench", "pairs", "prior sets"
READ_FROM_MODEL_DIR = (multi_objective.HEADS, gating.GATE, gating.RECORD, gating.SPLIT)
COLUMNS_SHOWN = 4  # side by side; further columns follow below


def make_parser():
    """The parser of all flags. Flags that contradict each other pass; parse_args refuses them."""
    parser = console.parser(__doc__)
    group = parser.add_argument_group("benchmarks (prepared files)")
    group.add_argument("--pairs", help="pairs of RewardBench 1, with its subset names")
    group.add_argument(
        "--prior_sets", help="pairs of the prior sets, with their subset names; needs --pairs"
    )
    for flag, content in (
        ("--groups", "responses for best of n, with the label correct"),
        ("--styles", "pairs in three styles, as in RM-Bench"),
        ("--domains", "other pairs"),
    ):
        group.add_argument(
            flag,
            type=flag_values.named_file,
            nargs="+",
            default=[],
            metavar="NAME=FILE",
            help=content,
        )
    group = parser.add_argument_group("inputs and outputs")
    group.add_argument(
        "--model_dir",
        default="interpretable_out",
        help="folder with the gate and the attribute heads",
    )
    group.add_argument("--output_dir", help="folder for the results; None: --model_dir")
    group.add_argument("--seed", type=kinds.seed, default=6, help="random seed of the intervals")
    return parser


def parse_args(argv=None):
    """The parsed flags; InputError where they contradict each other."""
    args = make_parser().parse_args(argv)
    if args.prior_sets and not args.pairs:
        raise InputError(
            "--prior_sets needs --pairs; to score the sets by themselves, give --domains"
        )
    names = [name for name, _ in args.groups + args.styles + args.domains]
    if not args.pairs and not names:
        raise InputError("no benchmark; give --pairs, --groups, --styles or --domains")
    if len({REWARDBENCH, PAIRS, PRIOR, *names}) < 3 + len(names):
        raise InputError(
            f"expected names that differ from each other and from {REWARDBENCH}, {PAIRS} and "
            f"{PRIOR}, found {', '.join(names)}"
        )
    return args


def main(argv=None):
    args = parse_args(argv)
    output_dir = artifacts.writable_dir(args.output_dir or args.model_dir)
    gated, benchmarks = open_benchmarks(args)
    inputs = {
        f"{name} {file}": digest
        for name, benchmark in benchmarks.items()
        for file, digest in benchmark.data.digests.items()
    }
    inputs |= {name: artifacts.sha256(Path(args.model_dir) / name) for name in READ_FROM_MODEL_DIR}
    kinds_of_names = {
        kind: sorted(name for name, _ in getattr(args, kind))
        for kind in ("groups", "styles", "domains")
    }
    settings = {**kinds_of_names, "seed": args.seed}
    with (
        artifacts.lock(output_dir),
        artifacts.work(output_dir, "rewardbench", __file__, settings, inputs) as work,
    ):
        if work is None:
            report(artifacts.read_json(output_dir / RESULTS, "studies/rewardbench.py"))
            return
        results = {
            "seed": args.seed,
            "ties": "wrong",
            "benchmarks": score(args, gated, benchmarks),
            "best_single": gated.single,
            "weights": {
                REWARDBENCH if name == PAIRS else name: gating.weights_by_subset(
                    gated, benchmark.data, benchmark.rows
                )
                for name, benchmark in benchmarks.items()
            },
            "rows": {name: benchmark.counts() for name, benchmark in benchmarks.items()},
        }
        work.write_json(RESULTS, results)
    report(results)
    print(f"rewardbench: wrote {RESULTS} to {output_dir}")


# ------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class Benchmark:
    """A prepared file, its rows with unseen prompts, and whether all seen prompts are known."""

    data: attribute_data.Rated
    rows: np.ndarray
    overlap_is_known: bool

    def scores(self, gated):
        """({method: scores}, subset names, prompt numbers) of the rows."""
        subsets = [self.data.subsets[i] for i in self.rows]
        return gating.rewards(gated, self.data, self.rows), subsets, self.data.groups[self.rows]

    def counts(self):
        """What the results say about the rows."""
        return {
            "scored": len(self.rows),
            "of_prompts_trained_on": len(self.data.ids) - len(self.rows),
            "overlap_is_known": self.overlap_is_known,
            "too_long": len(self.data.left_out),
        }


def open_benchmarks(args):
    """(GatedModel, {name: Benchmark}); InputError where a file does not fit the model."""
    named_files = dict(args.groups + args.styles + args.domains)
    paths = {PAIRS: args.pairs, PRIOR: args.prior_sets, **named_files}
    rated_names = dict(args.groups)
    files = {name: read(path, name in rated_names) for name, path in paths.items() if path}
    for data in files.values():
        gated = gating.load(args.model_dir, data)  # refuses data of other dimensions
    benchmarks = {}
    for name, data in files.items():
        seen, is_complete = gating.prompts_of_gate(args.model_dir, data)
        benchmarks[name] = Benchmark(data, unseen(data, seen), is_complete)
    return gated, benchmarks


def read(path, rated):
    """A prepared file of pairs, or, if `rated`, of responses with the label `correct`.

    Where the file names no subsets, all rows belong to the subset "all".
    """
    data = attribute_data.read(path, pairs=not rated, labels=True if rated else None)
    if rated:
        data.column(CORRECT)
    return replace(data, subsets=data.subsets or ["all"] * len(data.ids))


def unseen(data, seen):
    """Rows of `data` whose prompts are not among the prompt numbers `seen`."""
    rows = np.flatnonzero(~np.isin(data.groups, seen))
    if not len(rows):
        raise InputError(
            f"{data.path}: no prompts that the gate was not fitted on; give other data"
        )
    return rows


def right_ones(data):
    """(n,) bool: which responses the label `correct` marks."""
    labels = data.labels[:, data.column(CORRECT)]
    bad = ~np.isin(labels, (0, 1))
    if bad.any():
        row = int(np.argmax(bad))
        raise InputError(
            f"{data.path}: {CORRECT}: expected 0 or 1 in every row, found {labels[row]} "
            f"in row {row}"
        )
    return labels == 1


# ------------------------------------------------------------------------------------------ scoring


def score(args, gated, benchmarks):
    """{name: {"kind", "methods": tables, ...}} of all benchmarks."""
    scored = {name: benchmark.scores(gated) for name, benchmark in benchmarks.items()}
    results = {}
    if args.pairs:
        prior = scored.get(PRIOR)
        results[REWARDBENCH] = {
            "kind": "rewardbench",
            "missing_subsets": rewardbench.missing_subsets(scored[PAIRS][1]),
            "methods": rewardbench.rewardbench(*scored[PAIRS], args.seed, prior),
        }
    for name, _ in args.groups:
        scores, subsets, groups = scored[name]
        right = right_ones(benchmarks[name].data)[benchmarks[name].rows]
        table = rewardbench.best_of_groups(scores, right, subsets, groups, args.seed, name)
        results[name] = {"kind": "groups", "methods": table}
    for name, _ in args.styles:
        table = rewardbench.style_table(*scored[name], args.seed, name)
        results[name] = {"kind": "styles", "styles": rewardbench.STYLES, "methods": table}
    for name, _ in args.domains:
        table = rewardbench.domains(*scored[name], args.seed, name)
        results[name] = {"kind": "domains", "methods": table}
    return results


# ------------------------------------------------------------------------------------------- report


def report(results):
    """Print rows that were left out, then a table of each benchmark."""
    for name, counts in results["rows"].items():
        report_rows(name, counts)
    for name, benchmark in results["benchmarks"].items():
        print(f"{name}: accuracy [95 % interval], ties are wrong")
        methods = benchmark["methods"]
        report_table(methods, columns_of(benchmark), results["best_single"])
        for section, subsets in benchmark.get("missing_subsets", {}).items():
            print(f"  no score for {section}: {', '.join(subsets)} missing")
        if benchmark["kind"] == "rewardbench":
            report_subsets(methods["gate"]["subsets"], methods["uniform"]["subsets"])


def report_rows(name, counts):
    if counts["too_long"]:
        print(
            f"rewardbench: {name}: {counts['too_long']} rows were too long to prepare and are not "
            "scored"
        )
    if counts["of_prompts_trained_on"]:
        print(
            f"rewardbench: {name}: {counts['of_prompts_trained_on']} rows with prompts that were "
            "trained on are left out"
        )
    if not counts["overlap_is_known"]:
        print(
            f"rewardbench: {name}: the files do not tell whether all of its prompts are new to the "
            "gate and the attribute heads"
        )


def report_table(methods, columns, best_single):
    """Print a line for each method, COLUMNS_SHOWN of the columns at a time."""
    columns = list(columns.items())
    for start in range(0, len(columns), COLUMNS_SHOWN):
        shown = columns[start : start + COLUMNS_SHOWN]
        print(f"{'':39}" + "".join(f"{title[-27:]:>28}" for title, _ in shown))
        for method, table in methods.items():
            label = f"{method} ({best_single})" if method == "best_single" else method
            cells = (tables.with_interval(*cell(table)) for _, cell in shown)
            print(f"  {label[:36]:37}" + "".join(f"{text:>28}" for text in cells))


def report_subsets(gate, uniform):
    """Print the accuracy of gate and uniform weights on each subset of RewardBench."""
    for subset, row in gate.items():
        is_complete = row["n"] == row["n_official"]
        count = str(row["n"]) if is_complete else f"{row['n']} of {row['n_official']}"
        cells = [tables.with_interval(table[subset], "accuracy") for table in (gate, uniform)]
        print(f"  {subset:24}{count:>12}{'gate':>8}{cells[0]:>24}{'uniform':>10}{cells[1]:>24}")


def columns_of(benchmark):
    """{title: function of the table of a method that gives (metrics, name of the metric)}."""
    columns = {"rewardbench": rewardbench_columns, "styles": style_columns}
    return columns.get(benchmark["kind"], domain_columns)(benchmark["methods"]["gate"])


def rewardbench_columns(gate):
    # The default argument binds the section of this turn; a closure would see the last one.
    columns = {s: lambda table, s=s: (table["sections"][s], "accuracy") for s in gate["sections"]}
    columns["overall"] = lambda table: (table, "overall")
    if "prior_sets" in gate:
        columns["prior sets"] = lambda table: (table["prior_sets"], "accuracy")
        columns["overall, prior sets"] = lambda table: (table, "overall_with_prior_sets")
    return columns


def style_columns(gate):
    metrics = {"all": "accuracy", **{level: level for level in rewardbench.LEVELS}}
    return {
        f"{subset}, {title}": lambda table, s=subset, name=name: (table[s], name)
        for subset in gate
        for title, name in metrics.items()
    }


def domain_columns(gate):
    columns = {s: lambda table, s=s: (table["domains"][s], "accuracy") for s in gate["domains"]}
    if len(columns) > 1:
        columns["mean"] = lambda table: (table, "mean_of_domains")
        columns["all examples"] = lambda table: (table, "all")
    return columns


if __name__ == "__main__":
    console.run(main, "rewardbench")
