"""Speed of the multi-objective ridge regression beside a loop over scikit-learn's Ridge.

Both choose one of nine penalties for each attribute by squared error on validation rows, and fit
again on all rows; the loop makes attributes x 9 + attributes fits. They run in turn in one process
on the same rows: once with all labels present, and once with each attribute labelled in one of
--sources, which share no rows, as in a mixture of rated data sets. The largest difference between
the weights of both is reported.

Reads   nothing
Writes  --output, where it is given: the numbers as JSON
Example python3 -m benchmarks.ridge --n 8000 --dimensions 1024 --attributes 19 --output ridge.json
"""

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

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
        "--n",
        type=kinds.count,
        default=8000,
        help="number of rows, a fifth of them for validation",
    )
    parser.add_argument(
        "--dimensions", type=kinds.count, default=1024, help="number of embedding dimensions"
    )
    parser.add_argument(
        "--attributes", type=kinds.count, default=19, help="number of label columns"
    )
    parser.add_argument(
        "--sources",
        type=kinds.count,
        default=4,
        help="number of patterns of missing labels; 1: only the case of complete labels",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float64",
        help="data type of the rows in the loop; ours sums in float64",
    )
    parser.add_argument(
        "--repeats",
        type=kinds.count,
        default=3,
        help="number of runs of each, in turn, of which the median is reported",
    )
    parser.add_argument(
        "--seed", type=kinds.seed, default=0, help="random seed of the rows and labels"
    )
    parser.add_argument("--output", help="JSON file for the results; None: print them only")
    return parser.parse_args(argv)


def make_data(args, sources: int) -> attribute_data.Rated:
    """Rows whose variances fall off as those of embeddings do, with noisy linear labels.

    The labels of attribute a are missing (NaN) outside source a mod `sources`.
    """
    rng = np.random.default_rng(args.seed)
    x_ND = rng.standard_normal((args.n, args.dimensions), np.float32)
    x_ND *= np.float32(np.arange(1, args.dimensions + 1) ** -0.5)
    labels_NA = x_ND @ rng.standard_normal((args.dimensions, args.attributes), np.float32)
    labels_NA += labels_NA.std() * rng.standard_normal(labels_NA.shape, np.float32)
    source_N = rng.integers(sources, size=args.n)
    labels_NA[source_N[:, None] != np.arange(args.attributes) % sources] = np.nan
    names = [f"attribute {a}" for a in range(args.attributes)]
    ids = [str(i) for i in range(args.n)]
    return attribute_data.Rated([x_ND], np.arange(args.n), ids, labels=labels_NA, attributes=names)


def loop(x_ND: np.ndarray, labels_NA: np.ndarray, fit: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Heads (A, D) from one Ridge for each attribute and strength.

    fit, held: indices of the rows to fit on and of the validation rows.
    """
    heads_AD = []
    for y in labels_NA.T:
        is_known = ~np.isnan(y)
        rows, others = fit[is_known[fit]], held[is_known[held]]
        errors = []
        for strength in STRENGTHS:
            model = Ridge(alpha=strength, fit_intercept=False).fit(x_ND[rows], y[rows])
            errors.append(np.mean((model.predict(x_ND[others]) - y[others]) ** 2))
        both = np.concatenate([rows, others])
        best = STRENGTHS[int(np.argmin(errors))]
        heads_AD.append(Ridge(alpha=best, fit_intercept=False).fit(x_ND[both], y[both]).coef_)
    return np.array(heads_AD)


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, wall seconds, CPU seconds) of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def peak_memory(call: Callable[[], Any]) -> int:
    """Peak bytes of the arrays that one call allocates; the rows themselves do not count."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def measure(args, sources: int) -> dict[str, float]:
    """Times, memory and agreement of both on labels from `sources` sources."""
    data = make_data(args, sources)
    x_ND, labels_NA = data.embeddings[0].astype(args.dtype), data.labels.astype(args.dtype)
    fit, held = np.split(np.arange(args.n), [args.n * 4 // 5])
    calls = {
        "ours": lambda: multi_objective.fit_ridge(data, fit, held).heads,
        "loop": lambda: loop(x_ND, labels_NA, fit, held),
    }
    heads_AD, seconds = {}, {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, call in calls.items():
            heads_AD[name], *wall_and_cpu = timed(call)
            seconds[name].append(wall_and_cpu)
    row = {"patterns": sources}
    for name in calls:
        wall, cpu = np.median(seconds[name], axis=0)
        row |= {f"{name}_wall_seconds": wall, f"{name}_cpu_seconds": cpu}
    row["ratio_wall"] = row["loop_wall_seconds"] / row["ours_wall_seconds"]
    row["ratio_cpu"] = row["loop_cpu_seconds"] / row["ours_cpu_seconds"]
    row["ours_peak_gb"] = peak_memory(calls["ours"]) / 1e9
    # the loop holds the arrays of one attribute at a time
    row["loop_peak_gb"] = peak_memory(lambda: loop(x_ND, labels_NA[:, :1], fit, held)) / 1e9
    largest = np.abs(heads_AD["ours"] - heads_AD["loop"]).max()
    row["largest_difference"] = largest / np.abs(heads_AD["loop"]).max()
    return row


def main(argv=None):
    args = parse_args(argv)
    blas_threads = (pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
    threads = max(blas_threads, default=1)
    print(
        f"{args.n} rows x {args.dimensions} dimensions, {args.attributes} attributes, "
        f"{len(STRENGTHS)} strengths"
    )
    print(f"loop in {args.dtype}, {threads} threads, median of {args.repeats} runs")
    rows = [measure(args, sources) for sources in sorted({1, args.sources})]
    for name in rows[0]:
        print(f"{name:22}" + "".join(f"{row[name]:>12.3g}" for row in rows))
    if args.output:
        results = {"settings": vars(args), "threads": threads, "found": rows}
        artifacts.write_json(args.output, results)


if __name__ == "__main__":
    console.run(main, "ridge")
