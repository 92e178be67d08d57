"""Steps 5 to 8 against a plain reference on one case: CPU seconds, wall time, peak memory, ranking on fresh prompts.

Both sides run as whole commands, alternating, on the same train prompts and the same labelled
pairs, those that our step 5 draws. The reference (benchmarks/reference.py) starts Python for each
of its steps, as released pipelines do; ours runs them in one process, as run_all.sh does. CPU
seconds are user and system time of the processes. Fresh prompts of the same case are scored
afterwards, untimed, with the checkpoints of either side; --with_test puts them into DATA_DIR as
well, where our steps 6 and 8 evaluate them and the reference does not. Step 6 of the reference
scores all train prompts, as released code does; ours scores the held-out ones.

Reads   --case_dir, which is made where it is missing
Writes  --output, where it is given: every run and the medians as JSON, anew after each repeat
Example python -m benchmarks.cpu_pipeline --repeats 5 --output cpu_pipeline.json
"""

import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import case
from rewardlib import artifacts
from rewardlib.cli import chain, console, kinds
from rewardlib.data import embeddings
from rewardlib.measures import ranking
from rewardlib.models import model_files, scoring
from rewardlib.nets import mlp

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("step5", "step6", "step7", "step8")


def parse_args(argv=None):
    parser = console.parser(__doc__)
    parser.add_argument(
        "--repeats", type=kinds.count, default=5, help="runs of either side; medians count"
    )
    parser.add_argument("--n_prompts", type=kinds.count, default=5000, help="train prompts, N")
    parser.add_argument("--dim", type=kinds.count, default=2048, help="embedding dimensions, D")
    parser.add_argument(
        "--n_test_prompts", type=kinds.count, default=case.TEST_PROMPTS, help="fresh prompts"
    )
    parser.add_argument(
        "--n_members", type=kinds.count, default=10, help="ensemble members of either side"
    )
    parser.add_argument(
        "--n_pairs", type=kinds.count, default=5000, help="preference pairs of either side"
    )
    parser.add_argument(
        "--reference_epochs", type=kinds.count, default=30, help="most epochs of the reference"
    )
    parser.add_argument(
        "--variant",
        action="append",
        help='ours, as "NAME=flags of the steps"; may be given several times; None: published size, fp32, a small one',
    )
    parser.add_argument(
        "--seed", type=kinds.seed, default=6, help="of either side; another one draws other pairs"
    )
    parser.add_argument(
        "--with_test", action="store_true", help="our steps evaluate the fresh prompts as well"
    )
    parser.add_argument("--case_dir", help="None: a temporary folder")
    parser.add_argument("--output", help="JSON file; None: print only")
    return parser.parse_args(argv)


VARIANTS = {
    "1024 512": "--training_epochs 3",
    "fp32": "--training_epochs 3 --precision fp32",
    "hidden 256 64": "--training_epochs 4 --hidden 256 64 --learning_rate 0.002",
}


def measure(command, output_dir):
    """Run a command to its end: {"cpu", "wall"} seconds, "peak_mb" resident."""
    started = time.perf_counter()
    log = open(Path(output_dir) / "benchmark.log", "a")  # noqa: SIM115
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    _, status, usage = os.wait4(process.pid, 0)
    log.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed: {(Path(output_dir) / 'benchmark.log').read_text()[-2000:]}"
        )
    cpu = usage.ru_utime + usage.ru_stime
    return {"cpu": cpu, "wall": time.perf_counter() - started, "peak_mb": usage.ru_maxrss / 1024}


def run_reference(args, case_dir, output_dir, pairs):
    """{step: measures} of one run on the labelled pairs of a file."""
    flags = ["--data_dir", case_dir, "--output_dir", output_dir, "--members", args.n_members]
    flags += ["--pairs", pairs, "--epochs", args.reference_epochs, "--seed", args.seed]
    command = [sys.executable, "-m", "benchmarks.reference"]
    return {step: measure([*command, step, *map(str, flags)], output_dir) for step in STEPS}


def run_ours(args, case_dir, output_dir, flags, alone):
    """{"all": measures of one process for all steps} of one run; `alone`: also of each step in a process of its own."""
    common = our_flags(args, case_dir, output_dir) + flags.split()
    found = run_alone(common, output_dir) if alone else {}
    shutil.rmtree(output_dir)
    Path(output_dir).mkdir()
    command = [sys.executable, "-m", "rewardlib.cli.chain", "5", "8", "--report", "0"]
    return {"all": measure([*command, *common], output_dir)} | found


def our_flags(args, case_dir, output_dir):
    flags = [
        "--data_dir",
        case_dir,
        "--output_dir",
        output_dir,
        "--ensemble_number",
        args.n_members,
    ]
    flags += ["--n_sample", args.n_pairs // 2, "--n_pairs", 2, "--seed", args.seed]
    return [str(flag) for flag in flags]


def draw_pairs(args, case_dir, output_dir):
    """The file of labelled pairs that our step 5 draws, whatever its other flags."""
    quick = ["--ensemble_number", "1", "--training_epochs", "1", "--hidden", "8", "4"]
    measure(
        [sys.executable, f"{chain.STEPS[5]}.py", *our_flags(args, case_dir, output_dir), *quick],
        output_dir,
    )
    [path] = Path(output_dir).glob("pairs_*.npy")
    return path


def run_alone(flags, output_dir):
    """{step: measures} of our steps, each in a process of its own."""
    return {
        step: measure([sys.executable, f"{chain.STEPS[int(step[-1])]}.py", *flags], output_dir)
        for step in STEPS
    }


def elsewhere(function, *args):
    """function(*args) in a process of its own: a process starts with the peak memory of the one that started it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def make_case(folder, *size):
    """Write the case and read it once, so that its rewards are parsed before anything is measured."""
    case.make(folder, *size)
    embeddings.load_pair(folder)


def rank_reference(fresh_dir, output_dir):
    """Spearman and pair accuracy of the reference on fresh prompts."""
    from benchmarks import reference  # torch; the measuring process stays small

    rows, golden = reference.load_data(fresh_dir, "TEST")
    flat = rows.reshape(-1, rows.shape[2])
    scores = {
        path.stem: reference.score_rows(reference.load_model(path, flat.shape[1]), flat).reshape(
            golden.shape
        )
        for path in sorted(Path(output_dir).glob("*.ckpt"))
    }
    student = scores.pop("student")
    table = {
        "members": list(scores.values()),
        "ensemble": [np.mean(list(scores.values()), 0)],
        "student": [student],
    }
    return {name: _ranking(values, golden) for name, values in table.items()}


def rank_ours(fresh_dir, output_dir):
    """The same of ours."""

    fresh, output_dir = embeddings.load(fresh_dir, "test"), Path(output_dir)
    [path] = output_dir.glob("orm_*.json")
    record = artifacts.read_json(path, "step 5")
    dtype = mlp.TYPES[record["settings"]["precision"]]
    ensemble = scoring.load_members(output_dir, record, fresh.shape[2], dtype)
    [student] = output_dir.glob("distilled_rm_*.ckpt")
    others = [
        model_files.load_mlp(student, fresh.shape[2]),
        np.load(output_dir / "linear_probe.npy"),
    ]
    raw = scoring.score_raw([*ensemble.models, *others], fresh, np.arange(fresh.shape[0]), dtype)
    members = scoring.on_scale(ensemble, raw[:-2])
    table = {
        "members": members,
        "ensemble": [members.mean(0)],
        "student": raw[-2:-1],
        "linear probe": raw[-1:],
    }
    return {name: _ranking(values, fresh.rewards) for name, values in table.items()}


def _ranking(scores, golden):
    return {
        "spearman": float(np.mean([np.nanmean(ranking.spearman(s, golden)) for s in scores])),
        "pair_accuracy": float(
            np.mean([np.nanmean(ranking.pair_accuracy(s, golden)) for s in scores])
        ),
    }


def medians(runs):
    """{part: {"cpu", "wall", "peak_mb"}} over runs."""
    return {
        part: {name: statistics.median(run[part][name] for run in runs) for name in runs[0][part]}
        for part in runs[0]
    }


def describe_machine():
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.*)", lines)
    flags = set(re.search(r"flags\s*:\s*(.*)", lines)[1].split()) if "flags" in lines else set()
    found = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    versions = artifacts.package_versions()
    return (
        f"{model[1] if model else platform.processor()}, {len(os.sched_getaffinity(0))} cores ({', '.join(found)}), "
        f"Python {platform.python_version()}, torch {versions['torch']}, numpy {versions['numpy']}"
    )


def line(side, step, row):
    return f"{side:16}{step:>10}{row['cpu']:10.1f}{row['wall']:10.1f}"


def report(results):
    print(results["machine"])
    plain = results["reference"]["medians"]
    total = {name: sum(plain[step][name] for step in STEPS) for name in ("cpu", "wall")}
    print(
        f"{'':16}{'step':>10}{'CPU s':>10}{'wall s':>10}{'peak MB':>10}{'ratio':>8}  (ratio of CPU seconds)"
    )
    for step in STEPS:
        print(line("reference", step, plain[step]) + f"{plain[step]['peak_mb']:10.0f}")
    print(line("reference", "5-8", total))
    for name, side in results["ours"].items():
        for part, row in side["medians"].items():
            against = total["cpu"] if part == "all" else plain[part]["cpu"]
            ratio = against / row["cpu"]
            print(
                line(name, "5-8" if part == "all" else part, row)
                + f"{row['peak_mb']:10.0f}{ratio:8.1f}"
            )
    print(f"\n{'fresh prompts':16}{'':>14}{'Spearman':>10}{'accuracy':>10}")
    for name, side in {"reference": results["reference"], **results["ours"]}.items():
        for who, row in side["ranking"].items():
            print(f"{name:16}{who:>14}{row['spearman']:10.4f}{row['pair_accuracy']:10.4f}")


def main(argv=None):
    args = parse_args(argv)
    variants = dict(text.split("=", 1) for text in args.variant) if args.variant else VARIANTS
    with tempfile.TemporaryDirectory() as scratch:
        case_dir = Path(args.case_dir or f"{scratch}/case")
        data_dir, fresh_dir = case_dir / ("both" if args.with_test else "train"), case_dir / "fresh"
        elsewhere(
            make_case,
            data_dir,
            args.n_prompts,
            10,
            args.dim,
            args.n_test_prompts if args.with_test else 0,
        )
        elsewhere(case.make, fresh_dir, 0, 10, args.dim, args.n_test_prompts)
        pairs = draw_pairs(args, data_dir, artifacts.writable_dir(f"{scratch}/pairs"))
        plain, ours = [], {name: [] for name in variants}
        ranking = {}
        for repeat in range(args.repeats):
            print(f"run {repeat + 1} of {args.repeats}", file=sys.stderr)
            for name in ("reference", *variants):
                output_dir = f"{scratch}/{repeat} {name}"
                Path(output_dir).mkdir()
                if name == "reference":
                    plain.append(run_reference(args, data_dir, output_dir, pairs))
                    ranking[name] = elsewhere(rank_reference, fresh_dir, output_dir)
                else:
                    ours[name].append(
                        run_ours(
                            args, data_dir, output_dir, variants[name], name == next(iter(variants))
                        )
                    )
                    ranking[name] = elsewhere(rank_ours, fresh_dir, output_dir)
                shutil.rmtree(output_dir)
            results = summary(args, variants, plain, ours, ranking)
            if args.output:
                artifacts.write_json(args.output, results)
    report(results)


def summary(args, variants, plain, ours, ranking):
    return {
        "machine": describe_machine(),
        "arguments": vars(args),
        "reference": {"medians": medians(plain), "ranking": ranking["reference"], "runs": plain},
        "ours": {
            name: {
                "flags": flags,
                "medians": medians(ours[name]),
                "ranking": ranking[name],
                "runs": ours[name],
            }
            for name, flags in variants.items()
        },
    }


if __name__ == "__main__":
    console.run(main, "cpu_pipeline")
