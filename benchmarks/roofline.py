"""Share of this machine's matrix rate that training and scoring reach, in float32 and bfloat16.

The matrix rate is that of the first layer's products, (rows, D) x (D, 1024), at the fastest of
several numbers of rows. Operations are counted as the products need them: 2 per weight and row in
the forward pass; as many again in the backward pass for the gradients of the weights, and as many
for the gradients of the inputs of every layer but the first.

Reads   nothing
Writes  --output, where it is given: the numbers as JSON
Example python -m benchmarks.roofline --output roofline.json
"""

import resource
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.cpu_pipeline import describe_machine
from rewardlib import artifacts
from rewardlib.cli import console, kinds
from rewardlib.nets import mlp
from rewardlib.nets.training import Training, train_ensemble

RATE_ROWS = (1000, 2000, 4000, 8192)
SCORED_ROWS = 16_384


Job = tuple[Callable[[], object], int]  # work to be timed, and its floating-point operations


def parse_args(argv=None):
    parser = console.parser(__doc__)
    parser.add_argument(
        "--dim", type=kinds.count, default=2048, help="number of embedding dimensions, D"
    )
    parser.add_argument(
        "--hidden",
        type=kinds.count,
        nargs=2,
        default=list(mlp.HIDDEN),
        help="numbers of units of the two hidden layers",
    )
    parser.add_argument(
        "--batch_size", type=kinds.count, default=1000, help="number of pairs per training step"
    )
    parser.add_argument(
        "--seconds", type=kinds.positive, default=2.0, help="duration of one measurement, seconds"
    )
    parser.add_argument(
        "--repeats",
        type=kinds.count,
        default=5,
        help="number of measurements, of which the median is reported",
    )
    parser.add_argument(
        "--num_threads", type=kinds.count, help="number of threads; None: as torch chooses"
    )
    parser.add_argument("--output", help="JSON file for the results; None: print them only")
    return parser.parse_args(argv)


def rate(work: Callable[[], object], flops: int, seconds: float) -> tuple[float, float]:
    """(GFLOP per second, GFLOP per CPU second) of work(), called repeatedly for `seconds`."""
    work()  # warms up
    cpu_start, start, calls = _cpu(), time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        calls += 1
    gflops = calls * flops / 1e9
    return gflops / (time.perf_counter() - start), gflops / (_cpu() - cpu_start)


def _cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def matrix(rows: int, dim: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> Job:
    """One product (rows, dim) x (dim, width), in the layout of a linear layer."""
    a, b = (torch.randn(n, dim, generator=generator).to(dtype) for n in (rows, width))
    return lambda: torch.nn.functional.linear(a, b), 2 * rows * dim * width


def training(args, dtype: torch.dtype, generator: torch.Generator) -> Job:
    """One epoch of train_ensemble, of one member, over eight batches of pairs."""
    n = 8 * args.batch_size
    emb_RD = torch.randn(2 * n, args.dim, generator=generator).to(dtype)
    pairs = torch.randperm(2 * n, generator=generator).reshape(n, 2).numpy()
    labels = torch.randint(2, (n,), generator=generator).numpy()
    settings = Training(1, 1e-3, args.batch_size)
    member = [(range(n), [], 0)]

    def work():
        list(train_ensemble(emb_RD, pairs, labels, member, "bt", settings, tuple(args.hidden)))

    first, rest = args.dim * args.hidden[0], args.hidden[0] * args.hidden[1] + args.hidden[1]
    # 2 n rows: forward and weight gradients of all layers, input gradients of all but the first
    return work, 2 * n * (4 * first + 6 * rest)


def scoring(args, dtype: torch.dtype, generator: torch.Generator) -> Job:
    """Scores of SCORED_ROWS embeddings by one MLP."""
    emb_RD = torch.randn(SCORED_ROWS, args.dim, generator=generator).to(dtype)
    model = mlp.MLP(args.dim, tuple(args.hidden), generator)
    weights = sum(layer.weight.numel() for layer in (model.fc1, model.fc2, model.fc3))
    return lambda: mlp.predict(model, emb_RD, dtype), 2 * SCORED_ROWS * weights


def measure(args, dtype: torch.dtype, generator: torch.Generator) -> dict:
    """Rates of one data type: "matrix", "training" and "scoring", their shares, and every run.

    A rate is [GFLOP per second, GFLOP per CPU second], the median over the runs.
    """
    width = args.hidden[0]
    jobs = {f"matrix {n}": matrix(n, args.dim, width, dtype, generator) for n in RATE_ROWS}
    matrix_names = list(jobs)
    jobs["training"] = training(args, dtype, generator)
    jobs["scoring"] = scoring(args, dtype, generator)
    runs = [
        {name: rate(*job, args.seconds) for name, job in jobs.items()} for _ in range(args.repeats)
    ]
    rates = {
        name: [statistics.median(run[name][unit] for run in runs) for unit in (0, 1)]
        for name in jobs
    }
    best = [max(rates[name][unit] for name in matrix_names) for unit in (0, 1)]
    training_and_scoring = {name: rates[name] for name in ("training", "scoring")}
    shares = {name: value[0] / best[0] for name, value in training_and_scoring.items()}
    return {"matrix": best, **training_and_scoring, "shares": shares, "runs": runs}


def table_row(name: str, result: dict) -> str:
    """One line of the table: the rates and shares of one data type."""
    cells = [f"{result['matrix'][0]:7.0f} ({result['matrix'][1]:4.0f})"]
    cells += [
        f"{result[job][0]:5.0f} ({result[job][1]:4.0f}){share:8.0%}"
        for job, share in result["shares"].items()
    ]
    return f"{name:6}" + " ".join(cells)


def main(argv=None):
    args = parse_args(argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    generator = torch.Generator().manual_seed(0)
    results = {
        "machine": describe_machine(),
        "arguments": vars(args),
        "threads": torch.get_num_threads(),
    }
    precision = mlp.choose_precision("auto")
    print(f"{results['machine']}; {results['threads']} threads; auto: {precision}")
    columns = f"{'':6}{'matrix rate':>14}{'training':>12}{'share':>8}{'scoring':>12}{'share':>8}"
    print(f"{columns}  GFLOP/s (per CPU second)")
    for name, dtype in mlp.TYPES.items():
        results[name] = measure(args, dtype, generator)
        print(table_row(name, results[name]))
    if args.output:
        artifacts.write_json(args.output, results)


if __name__ == "__main__":
    console.run(main, "roofline")
