"""Benchmarks of the interpretable reward: the gate, uniform weights, single attributes and baselines side by side.

--pairs    RewardBench 1: accuracy of each subset, sections weighted by the official counts, overall score
--prior_sets  anthropic_helpful, anthropic_hhh, shp, summarize, which count one half in the leaderboard's overall score
--groups   best-of-n in the manner of RewardBench 2: responses to a prompt, of which the label `correct` marks the right
           ones; right when all that score highest are right
--styles   RM-Bench: rows prompt-major, of each prompt concise, detailed, detailed with markdown; 3 x 3 styles
--domains  any other pairs with subset names
A tie counts as wrong. Intervals come from resampling the prompts of each subset, on the same draws for every method.
Rows whose prompts the gate or the attribute heads were fitted on are left out and counted, where that can be told.

Reads   prepared files as above; MODEL_DIR as interpretable_gating.py leaves it
Writes  OUTPUT_DIR/rewardbench_results.json
Example python studies/rewardbench.py --pairs prepared/reward_bench.safetensors --model_dir interpretable_out
        python studies/rewardbench.py --domains llmbar=prepared/llmbar.safetensors --model_dir interpretable_out
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewardlib import artifacts
from rewardlib.cli import console, kinds, tables
from rewardlib.errors import InputError
from studies.interpretable import attribute_data, gating, multi_objective, rewardbench

RESULTS = "rewardbench_results.json"
CORRECT = "correct"
REWARDBENCH, PAIRS, PRIOR = "rewardbench", "pairs", "prior sets"
READ_FROM_MODEL_DIR = (multi_objective.HEADS, gating.GATE, gating.RECORD, gating.SPLIT)


def parse_args(argv=None):
    parser = console.parser(__doc__)
    group = parser.add_argument_group("benchmarks (prepared files)")
    group.add_argument("--pairs", help="RewardBench 1, with its subset names")
    group.add_argument(
        "--prior_sets", help="the prior sets, with their subset names; needs --pairs"
    )
    group.add_argument(
        "--groups", type=named_file, nargs="+", default=[], metavar="NAME=FILE", help="best of n"
    )
    group.add_argument(
        "--styles", type=named_file, nargs="+", default=[], metavar="NAME=FILE", help="3 x 3 styles"
    )
    group.add_argument(
        "--domains", type=named_file, nargs="+", default=[], metavar="NAME=FILE", help="other pairs"
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--model_dir",
        default="interpretable_out",
        help="where the gate and the attribute heads are",
    )
    group.add_argument("--output_dir", help="results; None: --model_dir")
    group.add_argument("--seed", type=kinds.seed, default=6, help="of the intervals")
    args = parser.parse_args(argv)
    if args.prior_sets and not args.pairs:
        raise InputError(
            "--prior_sets: expected --pairs beside it, found none; without it give --domains"
        )
    names = [name for name, _ in args.groups + args.styles + args.domains]
    if not args.pairs and not names:
        raise InputError(
            "expected at least one benchmark, found none; give --pairs, --groups, --styles or --domains"
        )
    if len({REWARDBENCH, PAIRS, PRIOR, *names}) < 3 + len(names):
        raise InputError(
            f"expected names that differ from each other and from {REWARDBENCH}, {PAIRS} and {PRIOR}, found "
            f"{', '.join(names)}"
        )
    return args


def named_file(text):
    name, found, path = text.partition("=")
    if not found or not name:
        raise InputError(f"expected NAME=FILE, found {text!r}")
    return name, path


def main(argv=None):
    args = parse_args(argv)
    output_dir = artifacts.writable_dir(args.output_dir or args.model_dir)
    paths = {
        PAIRS: args.pairs,
        PRIOR: args.prior_sets,
        **dict(args.groups + args.styles + args.domains),
    }
    rated = {name for name, _ in args.groups}
    data = {name: read(path, name in rated) for name, path in paths.items() if path}
    for each in data.values():
        gated = gating.load(args.model_dir, each)
    seen = {name: gating.prompts_of_gate(args.model_dir, each) for name, each in data.items()}
    rows = {name: unseen(each, seen[name][0]) for name, each in data.items()}
    inputs = {
        f"{name} {file}": digest
        for name, each in data.items()
        for file, digest in each.digests.items()
    }
    inputs |= {name: artifacts.sha256(Path(args.model_dir) / name) for name in READ_FROM_MODEL_DIR}
    told = {
        k: sorted(name for name, _ in getattr(args, k)) for k in ("groups", "styles", "domains")
    }
    with artifacts.lock(output_dir):
        work = artifacts.identity(__file__, {**told, "seed": args.seed}, inputs)
        if artifacts.is_finished(output_dir, "rewardbench", work):
            report(artifacts.read_json(output_dir / RESULTS, "studies/rewardbench.py"))
            print(f"rewardbench: already done in {output_dir} (FORCE=1 redoes it)")
            return
        started = time.time()
        of = {}
        for name, each in data.items():
            subsets = [each.subsets[i] for i in rows[name]]
            of[name] = gating.rewards(gated, each, rows[name]), subsets, each.groups[rows[name]]

        results = {"seed": args.seed, "ties": "wrong", "benchmarks": {}}
        if args.pairs:
            prior = of.get(PRIOR)
            table = rewardbench.rewardbench(*of[PAIRS], args.seed, prior)
            missing = rewardbench.missing_subsets(of[PAIRS][1])
            results["benchmarks"][REWARDBENCH] = {
                "kind": "rewardbench",
                "missing_subsets": missing,
                "methods": table,
            }
        for name, _ in args.groups:
            scores, *where = of[name]
            right = right_ones(data[name])[rows[name]]
            table = rewardbench.best_of_groups(scores, right, *where, args.seed, name)
            results["benchmarks"][name] = {"kind": "groups", "methods": table}
        for name, _ in args.styles:
            table = rewardbench.style_table(*of[name], args.seed, name)
            results["benchmarks"][name] = {
                "kind": "styles",
                "styles": rewardbench.STYLES,
                "methods": table,
            }
        for name, _ in args.domains:
            table = rewardbench.domains(*of[name], args.seed, name)
            results["benchmarks"][name] = {"kind": "domains", "methods": table}
        results["best_single"] = gated.single
        results["weights"] = {
            REWARDBENCH if name == PAIRS else name: gating.weights_by_subset(
                gated, each, rows[name]
            )
            for name, each in data.items()
        }
        results["rows"] = {
            name: {
                "scored": len(rows[name]),
                "of_prompts_trained_on": len(each.ids) - len(rows[name]),
                "overlap_is_known": seen[name][1],
                "too_long": len(each.left_out),
            }
            for name, each in data.items()
        }

        artifacts.write_json(output_dir / RESULTS, results)
        artifacts.record(output_dir, "rewardbench", work, [RESULTS], started)
        report(results)
        print(f"rewardbench: wrote {RESULTS} to {output_dir}")


def read(path, rated):
    """A prepared file of pairs, or of rated responses with the label `correct`; subset "all" where it names none."""
    data = attribute_data.read(path, pairs=not rated, labels=True if rated else None)
    if rated:
        data.column(CORRECT)
    subsets = data.subsets or ["all"] * len(data.ids)
    return attribute_data.Rated(**{**vars(data), "subsets": subsets})


def unseen(data, seen):
    """The rows of `data` whose prompts are not among `seen`."""
    rows = np.flatnonzero(~np.isin(data.groups, seen))
    if not len(rows):
        raise InputError(
            f"{data.path}: expected prompts that the gate was not fitted on, found none; give other data"
        )
    return rows


def right_ones(data):
    """(n,) bool: which responses the label `correct` marks."""
    labels = data.labels[:, data.column(CORRECT)]
    bad = ~np.isin(labels, (0, 1))
    if bad.any():
        row = int(np.argmax(bad))
        raise InputError(
            f"{data.path}: {CORRECT}: expected 0 or 1 in every row, found {labels[row]} in row {row}"
        )
    return labels == 1


def report(results):
    for name, rows in results["rows"].items():
        if rows["too_long"]:
            print(
                f"rewardbench: {name}: {rows['too_long']} rows were too long to prepare and are not scored"
            )
        if rows["of_prompts_trained_on"]:
            print(
                f"rewardbench: {name}: {rows['of_prompts_trained_on']} rows of prompts that were trained on left out"
            )
        if not rows["overlap_is_known"]:
            print(
                f"rewardbench: {name}: whether its prompts were trained on cannot be told of all from the files"
            )
    for name, benchmark in results["benchmarks"].items():
        methods, kind = benchmark["methods"], benchmark["kind"]
        columns = {"rewardbench": rewardbench_columns, "styles": style_columns}.get(
            kind, domain_columns
        )(methods)
        print(f"{name}: accuracy [95 % interval], ties are wrong")
        labels = {
            m: f"{m} ({results['best_single']})" if m == "best_single" else m for m in methods
        }
        for start in range(0, len(columns), 4):
            shown = list(columns.items())[start : start + 4]
            print(f"{'':39}" + "".join(f"{title[-27:]:>28}" for title, _ in shown))
            for method, row in methods.items():
                cells = (tables.with_interval(*cell(row)) for _, cell in shown)
                print(f"  {labels[method][:36]:37}" + "".join(f"{text:>28}" for text in cells))
        for section, subsets in benchmark.get("missing_subsets", {}).items():
            print(f"  no score for {section}: {', '.join(subsets)} missing")
        if kind == "rewardbench":
            for subset, row in methods["gate"]["subsets"].items():
                count = (
                    row["n"]
                    if row["n"] == row["n_official"]
                    else f"{row['n']} of {row['n_official']}"
                )
                told = [
                    tables.with_interval(methods[m]["subsets"][subset], "accuracy")
                    for m in ("gate", "uniform")
                ]
                print(
                    f"  {subset:24}{count!s:>12}{'gate':>8}{told[0]:>24}{'uniform':>10}{told[1]:>24}"
                )


def rewardbench_columns(methods):
    gate = methods["gate"]
    sections = {s: (lambda row, s=s: (row["sections"][s], "accuracy")) for s in gate["sections"]}
    prior = {"prior sets": lambda row: (row["prior_sets"], "accuracy")}
    prior |= {"overall, prior sets": lambda row: (row, "overall_with_prior_sets")}
    return (
        sections
        | {"overall": lambda row: (row, "overall")}
        | (prior if "prior_sets" in gate else {})
    )


def style_columns(methods):
    return {
        f"{subset}, {level}": (lambda row, s=subset, k=key: (row[s], k))
        for subset in methods["gate"]
        for level, key in {
            "all": "accuracy",
            **{level: level for level in rewardbench.LEVELS},
        }.items()
    }


def domain_columns(methods):
    named = {
        s: (lambda row, s=s: (row["domains"][s], "accuracy")) for s in methods["gate"]["domains"]
    }
    both = {"mean": lambda row: (row, "mean_of_domains"), "all examples": lambda row: (row, "all")}
    return named | both if len(named) > 1 else named


if __name__ == "__main__":
    console.run(main, "rewardbench")
