"""Steps 5 to 8 beside a plain reference: CPU seconds, wall time, peak memory, ranking.

Both sides run as whole commands, in turn, on the same train prompts and the same labelled pairs,
which are the pairs that our step 5 draws. The reference (benchmarks/reference.py) starts Python for
each of its steps, as released pipelines do; ours runs all steps in one process, as run_all.sh does.
CPU seconds are the user and system time of the processes. After each run, untimed, the checkpoints
of both sides score fresh prompts of the same case. With --with_test these prompts are in DATA_DIR
too, where our steps 6 and 8 evaluate them and the reference does not. Step 6 of the reference
scores all train prompts, as released code does; our step 6 scores the held-out prompts.

Reads   --case_dir, which is made where it is missing
Writes  --output, where it is given: every run and the medians as JSON, updated after each repeat
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
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks import case, reference
from rewardlib import artifacts
from rewardlib.cli import console, kinds, settings
from rewardlib.data import embeddings
from rewardlib.measures import ranking
from rewardlib.models import model_files, scoring
from rewardlib.nets import mlp

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("step5", "step6", "step7", "step8")
RESPONSES = 10  # K of the case
VARIANTS = {
    "1024 512": "--training_epochs 3",
    "fp32": "--training_epochs 3 --precision fp32",
    "hidden 256 64": "--training_epochs 4 --hidden 256 64 --learning_rate 0.002",
}


def parse_args(argv=None):
    parser = console.parser(__doc__)
    parser.add_argument(
        "--repeats",
        type=kinds.count,
        default=5,
        help="runs of each side, of which the medians are reported",
    )
    parser.add_argument(
        "--n_prompts", type=kinds.count, default=5000, help="number of train prompts, N"
    )
    parser.add_argument(
        "--dim", type=kinds.count, default=2048, help="number of embedding dimensions, D"
    )
    parser.add_argument(
        "--n_test_prompts",
        type=kinds.count,
        default=case.TEST_PROMPTS,
        help="number of fresh prompts on which both sides are ranked",
    )
    parser.add_argument(
        "--n_members", type=kinds.count, default=10, help="number of ensemble members of each side"
    )
    parser.add_argument(
        "--n_pairs", type=kinds.count, default=5000, help="number of preference pairs of each side"
    )
    parser.add_argument(
        "--reference_epochs",
        type=kinds.count,
        default=30,
        help="maximum number of epochs of the reference",
    )
    parser.add_argument(
        "--variant",
        action="append",
        help='a setting of our steps to measure, as "NAME=flags"; may be given several times; '
        "None: the published size, the same in fp32, and a smaller one",
    )
    parser.add_argument(
        "--seed",
        type=kinds.seed,
        default=6,
        help="random seed of both sides; another seed draws other pairs",
    )
    parser.add_argument(
        "--with_test", action="store_true", help="let our steps evaluate the fresh prompts as well"
    )
    parser.add_argument("--case_dir", help="folder of the case; None: a temporary folder")
    parser.add_argument("--output", help="JSON file for the results; None: print them only")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------ running


def measure(
    command: list[str], output_dir: str | Path, variables: Mapping[str, str] = MappingProxyType({})
) -> dict[str, float]:
    """Run a command to its end: {"cpu" and "wall" in seconds, "peak_mb" of resident memory}."""
    log_path = Path(output_dir) / "benchmark.log"
    started = time.perf_counter()
    with open(log_path, "a") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        )
        # not process.wait(): wait4 reports the resources that this child used
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {log_path.read_text()[-2000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"cpu": cpu, "wall": time.perf_counter() - started, "peak_mb": usage.ru_maxrss / 1024}


def run_reference(args, case_dir: Path, output_dir: str, pairs: Path) -> dict[str, dict]:
    """Run the reference on the labelled pairs of a file: {step: measures}."""
    flags = ["--data_dir", case_dir, "--output_dir", output_dir, "--members", args.n_members]
    flags += ["--pairs", pairs, "--epochs", args.reference_epochs, "--seed", args.seed]
    command = [sys.executable, "-m", "benchmarks.reference"]
    return {step: measure([*command, step, *map(str, flags)], output_dir) for step in STEPS}


def run_ours(args, case_dir: Path, output_dir: str, flags: str, alone: bool) -> dict[str, dict]:
    """Run our steps in one process: {"all": measures}.

    With `alone` each step also runs in a process of its own, which adds {step: measures}.
    """
    common = our_flags(args, case_dir, output_dir) + flags.split()
    by_step = run_alone(common, output_dir) if alone else {}
    # finished steps would be skipped: the run of all steps starts from an empty folder
    shutil.rmtree(output_dir)
    Path(output_dir).mkdir()
    command = [sys.executable, "-m", "rewardlib.cli.chain"]
    variables = {"START_STEP": "5", "REPORT": "0", **variables_of(common)}
    return {"all": measure(command, output_dir, variables)} | by_step


def variables_of(flags: list[str]) -> dict[str, str]:
    """The flags of the steps as the settings of their chain."""
    variables = {}
    for item in flags:
        if item.startswith("--"):
            name = item.removeprefix("--").upper()
            variables[name] = ""
        else:
            variables[name] = f"{variables[name]} {item}".strip()
    return variables


def our_flags(args, case_dir: Path, output_dir: str | Path) -> list[str]:
    """The flags that every variant of our steps shares."""
    flags = ["--data_dir", case_dir, "--output_dir", output_dir, "--seed", args.seed]
    flags += ["--ensemble_number", args.n_members]
    flags += ["--n_sample", args.n_pairs // 2, "--n_pairs", 2]
    return [str(flag) for flag in flags]


def draw_pairs(args, case_dir: Path, output_dir: Path) -> Path:
    """The file of labelled pairs that our step 5 draws, the same for every variant."""
    # only the pairs of this run are used, so the smallest model will do
    quick = ["--ensemble_number", "1", "--training_epochs", "1", "--hidden", "8", "4"]
    command = [sys.executable, f"{settings.STAGES['step5']}.py"]
    measure([*command, *our_flags(args, case_dir, output_dir), *quick], output_dir)
    [path] = Path(output_dir).glob("pairs_*.npy")
    return path


def run_alone(flags: list[str], output_dir: str | Path) -> dict[str, dict]:
    """Run our steps, each in a process of its own: {step: measures}."""
    return {
        step: measure([sys.executable, f"{settings.STAGES[step]}.py", *flags], output_dir)
        for step in STEPS
    }


def in_own_process(function: Callable, *args) -> Any:
    """function(*args), called in a new process so that this process stays small.

    A child starts with the peak memory of its parent, so data loaded here would be counted in the
    peak of every command measured later.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def make_case(folder: str | Path, *size: int) -> None:
    """Write the case and read it once, so that its rewards are parsed before any measurement."""
    case.make(folder, *size)
    embeddings.load_pair(folder)


# ------------------------------------------------------------------------------------------ ranking


def rank_reference(fresh_dir: Path, output_dir: str) -> dict[str, dict]:
    """Metrics {model: metrics} of the reference's models, which rank fresh prompts."""
    emb_NKD, golden_NK = reference.load_data(fresh_dir, "TEST")
    dim = emb_NKD.shape[2]
    emb_RD = emb_NKD.reshape(-1, dim)
    scores_NK = {
        path.stem: reference.score_rows(reference.load_model(path, dim), emb_RD).reshape(
            golden_NK.shape
        )
        for path in sorted(Path(output_dir).glob("*.ckpt"))
    }
    student = scores_NK.pop("student")
    scores_by_model = {
        "members": list(scores_NK.values()),
        "ensemble": [np.mean(list(scores_NK.values()), 0)],
        "student": [student],
    }
    return {name: _ranking(scores, golden_NK) for name, scores in scores_by_model.items()}


def rank_ours(fresh_dir: Path, output_dir: str) -> dict[str, dict]:
    """Metrics {model: metrics} of our models, which rank the same fresh prompts."""
    fresh, folder = embeddings.load(fresh_dir, "test"), Path(output_dir)
    [path] = folder.glob("orm_*.json")
    record = artifacts.read_json(path, "step 5")
    dtype = mlp.TYPES[record["settings"]["precision"]]
    ensemble = scoring.load_members(folder, record, fresh.shape[2], dtype)
    [student_path] = folder.glob("distilled_rm_*.ckpt")
    student = model_files.load_mlp(student_path, fresh.shape[2])
    probe = np.load(folder / "linear_probe.npy")
    raw_MNK = scoring.score_raw(
        [*ensemble.models, student, probe], fresh, np.arange(fresh.shape[0]), dtype
    )
    members_ENK = scoring.on_scale(ensemble, raw_MNK[:-2])
    scores_by_model = {
        "members": members_ENK,
        "ensemble": [members_ENK.mean(0)],
        "student": raw_MNK[-2:-1],
        "linear probe": raw_MNK[-1:],
    }
    return {name: _ranking(scores, fresh.rewards) for name, scores in scores_by_model.items()}


def _ranking(scores_MNK, golden_NK):
    """Metrics averaged over prompts, then over the M models."""
    rho = [np.nanmean(ranking.spearman(scores_NK, golden_NK)) for scores_NK in scores_MNK]
    accuracy = [np.nanmean(ranking.pair_accuracy(scores_NK, golden_NK)) for scores_NK in scores_MNK]
    return {"spearman": float(np.mean(rho)), "pair_accuracy": float(np.mean(accuracy))}


# ---------------------------------------------------------------------------------------- reporting


def medians(runs: list[dict[str, dict]]) -> dict[str, dict]:
    """Median over runs of every measure, {part: {"cpu", "wall", "peak_mb"}}."""
    return {
        part: {name: statistics.median(run[part][name] for run in runs) for name in runs[0][part]}
        for part in runs[0]
    }


def describe_machine() -> str:
    """One line: processor, cores, vector instructions, versions of Python, torch and numpy."""
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.*)", lines)
    flags = set(re.search(r"flags\s*:\s*(.*)", lines)[1].split()) if "flags" in lines else set()
    vector = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    versions = artifacts.package_versions()
    processor = model[1] if model else platform.processor()
    return (
        f"{processor}, {len(os.sched_getaffinity(0))} cores ({', '.join(vector)}), "
        f"Python {platform.python_version()}, torch {versions['torch']}, numpy {versions['numpy']}"
    )


def line(side: str, step: str, row: dict[str, float]) -> str:
    """The first columns of a row of the table: side, step, CPU seconds, wall seconds."""
    return f"{side:16}{step:>10}{row['cpu']:10.1f}{row['wall']:10.1f}"


def report(results: dict) -> None:
    """Print the medians of both sides, and their ranking of fresh prompts."""
    print(results["machine"])
    plain = results["reference"]["medians"]
    total = {name: sum(plain[step][name] for step in STEPS) for name in ("cpu", "wall")}
    columns = f"{'':16}{'step':>10}{'CPU s':>10}{'wall s':>10}{'peak MB':>10}{'ratio':>8}"
    print(f"{columns}  (ratio of CPU seconds)")
    for step in STEPS:
        print(line("reference", step, plain[step]) + f"{plain[step]['peak_mb']:10.0f}")
    print(line("reference", "5-8", total))
    for name, side in results["ours"].items():
        for part, row in side["medians"].items():
            is_whole_run = part == "all"
            reference_cpu = total["cpu"] if is_whole_run else plain[part]["cpu"]
            cells = line(name, "5-8" if is_whole_run else part, row)
            print(cells + f"{row['peak_mb']:10.0f}{reference_cpu / row['cpu']:8.1f}")
    print(f"\n{'fresh prompts':16}{'':>14}{'Spearman':>10}{'accuracy':>10}")
    for name, side in {"reference": results["reference"], **results["ours"]}.items():
        for model, row in side["ranking"].items():
            print(f"{name:16}{model:>14}{row['spearman']:10.4f}{row['pair_accuracy']:10.4f}")


def summary(args, variants, plain, ours, metrics):
    """The results so far as one JSON-able dict."""
    return {
        "machine": describe_machine(),
        "arguments": vars(args),
        "reference": {"medians": medians(plain), "ranking": metrics["reference"], "runs": plain},
        "ours": {
            name: {
                "flags": flags,
                "medians": medians(ours[name]),
                "ranking": metrics[name],
                "runs": ours[name],
            }
            for name, flags in variants.items()
        },
    }


# --------------------------------------------------------------------------------------------- main


def make_data(args, case_dir: Path) -> tuple[Path, Path]:
    """Make the DATA_DIR of both sides and the folder of fresh prompts; return the two folders."""
    data_dir, fresh_dir = case_dir / ("both" if args.with_test else "train"), case_dir / "fresh"
    n_test = args.n_test_prompts if args.with_test else 0
    in_own_process(make_case, data_dir, args.n_prompts, RESPONSES, args.dim, n_test)
    in_own_process(case.make, fresh_dir, 0, RESPONSES, args.dim, args.n_test_prompts)
    return data_dir, fresh_dir


def main(argv=None):
    args = parse_args(argv)
    variants = dict(text.split("=", 1) for text in args.variant) if args.variant else VARIANTS
    with tempfile.TemporaryDirectory() as scratch:
        data_dir, fresh_dir = make_data(args, Path(args.case_dir or f"{scratch}/case"))
        pairs = draw_pairs(args, data_dir, artifacts.writable_dir(f"{scratch}/pairs"))
        plain, ours, metrics = [], {name: [] for name in variants}, {}
        for repeat in range(args.repeats):
            print(f"run {repeat + 1} of {args.repeats}", file=sys.stderr)
            # both sides in turn, so that a slow phase of the machine does not hit one side alone
            for name in ("reference", *variants):
                output_dir = f"{scratch}/{repeat} {name}"
                Path(output_dir).mkdir()
                if name == "reference":
                    plain.append(run_reference(args, data_dir, output_dir, pairs))
                    metrics[name] = in_own_process(rank_reference, fresh_dir, output_dir)
                else:
                    alone = name == next(iter(variants))
                    run = run_ours(args, data_dir, output_dir, variants[name], alone)
                    ours[name].append(run)
                    metrics[name] = in_own_process(rank_ours, fresh_dir, output_dir)
                shutil.rmtree(output_dir)
            results = summary(args, variants, plain, ours, metrics)
            if args.output:
                artifacts.write_json(args.output, results)
    report(results)


if __name__ == "__main__":
    console.run(main, "cpu_pipeline")
