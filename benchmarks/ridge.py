"""Speed of the multi-objective ridge regression against the loop over scikit-learn's Ridge, and that both agree.

Both choose among nine strengths per attribute by squared error on validation rows and fit again on
all rows. The loop fits attributes x 9 + attributes times. They run in turn in one process, on the
same rows: once with all labels there, once with each attribute labelled by one of --sources, which
share no rows, as in a mixture of rated data sets.

Reads   nothing
Writes  --output, where it is given: the numbers as JSON
Example python3 -m benchmarks.ridge --n 8000 --dimensions 1024 --attributes 19 --output ridge.json
"""

import time
import tracemalloc

import numpy as np
from sklearn.linear_model import Ridge
from threadpoolctl import threadpool_info

from rewardlib import artifacts
from rewardlib.cli import console, kinds
from studies.interpretable import attribute_data, multi_objective

STRENGTHS = multi_objective.STRENGTHS


def parse_args(argv=None):
    parser = console.parser(__doc__)
    parser.add_argument(
        "--n", type=kinds.count, default=8000, help="rows, a fifth of them for validation"
    )
    parser.add_argument("--dimensions", type=kinds.count, default=1024, help="of the embeddings")
    parser.add_argument("--attributes", type=kinds.count, default=19, help="columns of labels")
    parser.add_argument(
        "--sources",
        type=kinds.count,
        default=4,
        help="patterns of missing labels, 1: only the full case",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float64",
        help="of the loop's rows; ours sums in float64",
    )
    parser.add_argument(
        "--repeats", type=kinds.count, default=3, help="runs of each, in turn; medians count"
    )
    parser.add_argument("--seed", type=kinds.seed, default=0, help="of rows and labels")
    parser.add_argument("--output", help="JSON file; None: print only")
    return parser.parse_args(argv)


def make_data(args, sources):
    """Rows whose directions fall off as those of embeddings do, and noisy linear labels."""
    rng = np.random.default_rng(args.seed)
    x = rng.standard_normal((args.n, args.dimensions), np.float32)
    x *= np.float32(np.arange(1, args.dimensions + 1) ** -0.5)
    labels = x @ rng.standard_normal((args.dimensions, args.attributes), np.float32)
    labels += labels.std() * rng.standard_normal(labels.shape, np.float32)
    labels[rng.integers(sources, size=args.n)[:, None] != np.arange(args.attributes) % sources] = (
        np.nan
    )
    names = [f"attribute {a}" for a in range(args.attributes)]
    ids = [str(i) for i in range(args.n)]
    return attribute_data.Rated([x], np.arange(args.n), ids, labels=labels, attributes=names)


def loop(x, labels, fit, held):
    """Heads (A, D) by one Ridge per attribute and strength."""
    heads = []
    for y in labels.T:
        known = ~np.isnan(y)
        rows, others = fit[known[fit]], held[known[held]]
        errors = []
        for strength in STRENGTHS:
            model = Ridge(alpha=strength, fit_intercept=False).fit(x[rows], y[rows])
            errors.append(np.mean((model.predict(x[others]) - y[others]) ** 2))
        both = np.concatenate([rows, others])
        best = STRENGTHS[int(np.argmin(errors))]
        heads.append(Ridge(alpha=best, fit_intercept=False).fit(x[both], y[both]).coef_)
    return np.array(heads)


def timed(call):
    """(result, wall seconds, CPU seconds) of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def peak_memory(call):
    """Bytes that the arrays of one call take at most, the rows themselves left out."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure(args, sources):
    data = make_data(args, sources)
    x, labels = data.embeddings[0].astype(args.dtype), data.labels.astype(args.dtype)
    fit, held = np.arange(args.n)[: args.n * 4 // 5], np.arange(args.n)[args.n * 4 // 5 :]
    calls = {
        "ours": lambda: multi_objective.fit_ridge(data, fit, held).heads,
        "loop": lambda: loop(x, labels, fit, held),
    }
    runs = {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, call in calls.items():
            heads, *seconds = timed(call)
            runs[name].append((heads, *seconds))
    heads = {name: run[-1][0] for name, run in runs.items()}
    found = {"patterns": sources}
    for name in calls:
        wall, cpu = np.median([run[1:] for run in runs[name]], axis=0)
        found |= {f"{name}_wall_seconds": wall, f"{name}_cpu_seconds": cpu}
    found["ratio_wall"] = found["loop_wall_seconds"] / found["ours_wall_seconds"]
    found["ratio_cpu"] = found["loop_cpu_seconds"] / found["ours_cpu_seconds"]
    found["ours_peak_gb"] = peak_memory(calls["ours"]) / 1e9
    found["loop_peak_gb"] = peak_memory(lambda: loop(x, labels[:, :1], fit, held)) / 1e9
    found["largest_difference"] = (
        np.abs(heads["ours"] - heads["loop"]).max() / np.abs(heads["loop"]).max()
    )
    return found


def main(argv=None):
    args = parse_args(argv)
    threads = max(
        (pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1
    )
    print(
        f"{args.n} rows x {args.dimensions} dimensions, {args.attributes} attributes, {len(STRENGTHS)} strengths"
    )
    print(f"loop in {args.dtype}, {threads} threads, median of {args.repeats}")
    found = [measure(args, sources) for sources in sorted({1, args.sources})]
    for name in found[0]:
        print(f"{name:22}" + "".join(f"{row[name]:>12.3g}" for row in found))
    if args.output:
        artifacts.write_json(
            args.output, {"settings": vars(args), "threads": threads, "found": found}
        )


if __name__ == "__main__":
    console.run(main, "ridge")
