"""How much of this machine's matrix rate training and scoring reach, in float32 and bfloat16.

The matrix rate is that of (rows, D) x (D, 1024) products, the first layer's, at the best of several
numbers of rows. Work is counted as the products need it: forward 2 per weight and row; backward as
much again for the weights, and as much for the inputs of every layer but the first.

Reads   nothing
Writes  --output, where it is given: the numbers as JSON
Example python -m benchmarks.roofline --output roofline.json
"""

import resource
import statistics
import time

import torch

from benchmarks.cpu_pipeline import describe_machine
from rewardlib import artifacts
from rewardlib.cli import console, kinds
from rewardlib.nets import mlp
from rewardlib.nets.training import Training, train_ensemble

RATE_ROWS = (1000, 2000, 4000, 8192)
SCORED_ROWS = 16_384


def parse_args(argv=None):
    parser = console.parser(__doc__)
    parser.add_argument("--dim", type=kinds.count, default=2048, help="embedding dimensions, D")
    parser.add_argument(
        "--hidden", type=kinds.count, nargs=2, default=list(mlp.HIDDEN), help="hidden units"
    )
    parser.add_argument(
        "--batch_size", type=kinds.count, default=1000, help="pairs per training step"
    )
    parser.add_argument(
        "--seconds", type=kinds.positive, default=2.0, help="length of one measurement"
    )
    parser.add_argument(
        "--repeats", type=kinds.count, default=5, help="measurements; the median counts"
    )
    parser.add_argument("--num_threads", type=kinds.count, help="None: as torch chooses")
    parser.add_argument("--output", help="JSON file; None: print only")
    return parser.parse_args(argv)


def rate(work, flops, seconds):
    """(GFLOP per second, GFLOP per CPU second) of work(), called over and over for `seconds`."""
    work()
    usage, started, calls = _cpu(), time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        work()
        calls += 1
    return calls * flops / 1e9 / (time.perf_counter() - started), calls * flops / 1e9 / (
        _cpu() - usage
    )


def _cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def matrix(rows, dim, width, dtype, generator):
    a, b = (torch.randn(n, dim, generator=generator).to(dtype) for n in (rows, width))
    return lambda: torch.nn.functional.linear(a, b), 2 * rows * dim * width


def training(args, dtype, generator):
    """One pass of networks.train_ensemble over eight batches of pairs, and its work."""
    n = 8 * args.batch_size
    rows = torch.randn(2 * n, args.dim, generator=generator).to(dtype)
    pairs = torch.randperm(2 * n, generator=generator).reshape(n, 2).numpy()
    labels = torch.randint(2, (n,), generator=generator).numpy()
    settings = Training(1, 1e-3, args.batch_size)
    member = [(range(n), [], 0)]

    def work():
        list(train_ensemble(rows, pairs, labels, member, "bt", settings, tuple(args.hidden)))

    first, rest = args.dim * args.hidden[0], args.hidden[0] * args.hidden[1] + args.hidden[1]
    return work, 2 * n * (4 * first + 6 * rest)


def scoring(args, dtype, generator):
    rows = torch.randn(SCORED_ROWS, args.dim, generator=generator).to(dtype)
    model = mlp.MLP(args.dim, tuple(args.hidden), generator)
    weights = sum(layer.weight.numel() for layer in (model.fc1, model.fc2, model.fc3))
    return lambda: mlp.predict(model, rows, dtype), 2 * SCORED_ROWS * weights


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
    print(
        f"{results['machine']}; {results['threads']} threads; auto: {mlp.choose_precision('auto')}"
    )
    print(
        f"{'':6}{'matrix rate':>14}{'training':>12}{'share':>8}{'scoring':>12}{'share':>8}  GFLOP/s (per CPU second)"
    )
    for name, dtype in mlp.TYPES.items():
        jobs = {
            f"matrix {n}": matrix(n, args.dim, args.hidden[0], dtype, generator) for n in RATE_ROWS
        }
        jobs |= {
            "training": training(args, dtype, generator),
            "scoring": scoring(args, dtype, generator),
        }
        runs = [
            {job: rate(*work, args.seconds) for job, work in jobs.items()}
            for _ in range(args.repeats)
        ]
        found = {
            job: [statistics.median(run[job][i] for run in runs) for i in (0, 1)] for job in jobs
        }
        best = [max(found[f"matrix {n}"][i] for n in RATE_ROWS) for i in (0, 1)]
        shares = {job: found[job][0] / best[0] for job in ("training", "scoring")}
        results[name] = {
            "matrix": best,
            **{job: found[job] for job in shares},
            "shares": shares,
            "runs": runs,
        }
        cells = [f"{best[0]:7.0f} ({best[1]:4.0f})"]
        cells += [
            f"{found[job][0]:5.0f} ({found[job][1]:4.0f}){shares[job]:8.0%}" for job in shares
        ]
        print(f"{name:6}" + " ".join(cells))
    if args.output:
        artifacts.write_json(args.output, results)


if __name__ == "__main__":
    console.run(main, "roofline")
