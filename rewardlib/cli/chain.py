"""The chain of run_all.sh: embeddings if there are none, then steps 5 to 8 and their report.

Every stage is planned and its flags are checked before the first one starts. Steps 1 to 4 and the
scripts that fill DATA_DIR run in processes of their own; steps 5 to 8 share this one, in which
Python, torch and scipy start once. Settings are environment variables; docs/settings.md lists them.

Reads   what the steps read
Writes  what the steps write; OUTPUT_DIR/logs/{stage}.log   what each of them printed
Example DATA_DIR=data OUTPUT_DIR=distill_out bash run_all.sh
"""

import importlib
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rewardlib import api, artifacts
from rewardlib.cli import console, flags, preflight, settings
from rewardlib.data import embeddings
from rewardlib.errors import InputError
from rewardlib.llm import loading
from rewardlib.models.names import check_names

LAST_LINES = 8
INTERRUPTED = 130


@dataclass(frozen=True)
class Stage:
    """One stage: the name of its log; a script in the root or a module of the library; flags."""

    name: str
    module: str
    argv: list[str]
    shares_process: bool = False

    @property
    def command(self) -> list[str]:
        """Arguments of Python that run this stage alone."""
        if self.module.startswith("rewardlib."):
            return ["-m", self.module, *self.argv]
        return [f"{self.module}.py", *self.argv]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    settings.print_help_or_refuse(sys.argv[1:], __doc__, settings.tables)
    values = settings.read(os.environ)
    chain = settings.parse("chain", values)
    run_all("run_all.sh", *plan(chain, values))


# --------------------------------------------------------------------------------------------- plan


def plan(chain: Namespace, values: Mapping[str, str]) -> tuple[list[Stage], Path]:
    """The stages that the settings ask for, and OUTPUT_DIR. Flags of all stages are parsed here.

    InputError where a value is refused, settings contradict each other, or a model is missing.
    """
    if chain.run_gpu_steps and chain.use_repo_embd:
        raise InputError(
            "RUN_GPU_STEPS and USE_REPO_EMBD: expected at most one of them, found both"
        )
    first, last = steps_of(chain, values)
    values = with_derived(chain, values)
    for stage in ("convert", "step5", "step6", "step8"):  # a bad value is never ignored
        settings.parse(stage, values)
    run_args = settings.parse("step7", values)
    check_names(run_args.rm_model, run_args.rm_objective)
    flags.distillation_settings(run_args)
    if last < 5 and not (chain.run_gpu_steps or chain.use_repo_embd):
        raise InputError(
            f"STOP_STEP={chain.stop_step}: steps 1 to 4 run with RUN_GPU_STEPS=1; nothing to do"
        )
    stages = []
    if "PAIRS" not in values and first <= 5:
        stages += stages_of_data(chain, values, first, last)
    for name in (f"step{number}" for number in range(max(first, 5), last + 1)):
        argv = settings.flags_of(name, values)
        stages.append(Stage(name, settings.STAGES[name], argv, shares_process=True))
    if last == 8 and chain.report:
        argv = [run_args.output_dir]
        stages.append(Stage("report", "rewardlib.cli.report", argv, shares_process=True))
    return stages, Path(run_args.output_dir)


def steps_of(chain: Namespace, values: Mapping[str, str]) -> tuple[int, int]:
    """First and last step. Step 3.5 goes with step 3: a chain ends with both or begins after."""
    first = 4 if chain.start_step == "3.5" else int(chain.start_step)
    last = 3 if chain.stop_step == "3.5" else int(chain.stop_step)
    if first > last:
        raise InputError(
            f"START_STEP: expected at most STOP_STEP={chain.stop_step}, found {chain.start_step}"
        )
    if "PAIRS" not in values:
        return first, last
    # Recorded pairs have no golden rewards to calibrate to: steps 7 and 8 have nothing to do.
    if chain.run_gpu_steps or chain.use_repo_embd:
        raise InputError(
            "PAIRS: expected RUN_GPU_STEPS and USE_REPO_EMBD to be 0, found one of them 1"
        )
    if first > 6:
        raise InputError(f"START_STEP: expected at most 6 with PAIRS, found {first}")
    return max(first, 5), min(last, 6)


def with_derived(chain: Namespace, values: Mapping[str, str]) -> dict[str, str]:
    """The settings with those that follow from others: data sets, generator, published files."""
    values = dict(values)
    task = settings.parse("step5", values).task
    has_dataset = task in loading.REWARD_MODELS
    if not has_dataset and "DATASET" not in values:
        raise InputError(f"TASK={task}: expected DATASET beside it (helpful and harmless have one)")
    if chain.run_gpu_steps and values.keys() & {"TASK", "DATASET"}:
        values.setdefault("EVAL_DATASET", f"hh-rlhf-{task}")
        values.setdefault("DATASET", f"hh-rlhf-{task}-gpt4")
    if chain.run_gpu_steps and "MODEL_NAME" in values:  # one model answers and embeds
        values.setdefault("GEN_PREF_MODEL", values["MODEL_NAME"])
    if chain.use_repo_embd:
        values.setdefault("EMBD_REPO_DIR", str(api.USUAL_ROOT))
        values["GEN_PREF_MODEL"] = settings.parse("convert", values).gen_model
    return values


def stages_of_data(
    chain: Namespace, values: Mapping[str, str], first: int, last: int
) -> list[Stage]:
    """What fills DATA_DIR: steps 1 to 4, the conversion of published files, or demo data."""
    if chain.run_gpu_steps:
        return stages_of_prompts(chain, values, first, last) if first <= 4 else []
    if chain.use_repo_embd:
        argv = settings.flags_of("convert", values)
        return [Stage("convert", settings.STAGES["convert"], argv)]
    data_dir = settings.parse("step5", values).data_dir
    if last < 5 or not needs_demo_data(data_dir):
        return []
    if data_dir != flags.DATA_DIR:
        raise InputError(
            f"DATA_DIR={data_dir}: no EMBD-TRAIN-split_0.npy and so on; fill the folder with "
            "convert_embeddings.py (or USE_REPO_EMBD=1), or with generate_demo_data.py "
            f"--output_dir {data_dir}"
        )
    print(f"no embeddings in {data_dir}: making demo data, whose true reward is known")
    return [Stage("demo", "generate_demo_data", ["--output_dir", data_dir])]


def needs_demo_data(data_dir: str) -> bool:
    unfinished = (Path(data_dir) / embeddings.UNFINISHED).exists()
    return unfinished or not embeddings.find_splits(data_dir, "train")


def in_own_process(function: Callable, **arguments) -> None:
    """Call a function that may touch a GPU, of which this long-lived process keeps nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(function, **arguments).result()


def stages_of_prompts(
    chain: Namespace, values: Mapping[str, str], first: int, last: int
) -> list[Stage]:
    """Stages of steps 1 to 4; steps 2, 3 and 3.5 run twice, for train and for test prompts.

    InputError names every model, package and file that is missing.
    """
    tune, score, embed = (settings.parse(step, values) for step in ("step1", "step3", "step4"))
    sample, sizes = {}, {}
    n_responses = {"train": chain.n_train_responses, "test": chain.n_test_responses}
    for data_class, n in n_responses.items():
        sizes[data_class] = ["--n_samples", str(n)] if n else []
        class_flags = ["--data_class", data_class, *sizes[data_class]]
        sample[data_class] = settings.parse("step2", values, class_flags)
    prompts = sample["train"]
    for folder in (tune.output_dir, prompts.output_dir, embed.output_dir):
        artifacts.writable_dir(folder)
    in_own_process(
        preflight.check,
        models={
            "generator": prompts.model_name,
            "reward": score.reward_model,
            "embedder": embed.embed_model_name,
        },
        dataset=prompts.dataset,
        eval_dataset=prompts.eval_dataset,
        data_dir=prompts.data_dir,
        adapter_name=prompts.adapter_name,
        n_responses={data_class: args.n_samples for data_class, args in sample.items()},
        max_prompts=prompts.max_prompts,
        folder=prompts.output_dir,
    )

    def stage(step, name=None, more=()):
        return Stage(name or step, settings.STAGES[step], [*settings.flags_of(step, values), *more])

    stages = []
    if first <= 1 <= last and prompts.adapter_name == "sft":
        stages.append(stage("step1"))
    for data_class, size in sizes.items():
        class_flag = ["--data_class", data_class]
        if first <= 2 <= last:
            stages.append(stage("step2", f"step2-{data_class}", class_flag + size))
        if first <= 3 <= last:
            stages.append(stage("step3", f"step3-{data_class}", class_flag))
            stages.append(stage("step3.5", f"step3.5-{data_class}", class_flag + size))
    if first <= 4 <= last:
        test_size = ["--n_test_samples", *sizes["test"][1:]] if sizes["test"] else []
        stages.append(stage("step4", more=[*sizes["train"], *test_size]))
    return stages


# ---------------------------------------------------------------------------------------------- run


def run_all(command: str, stages: Iterable[Stage], output_dir: Path) -> None:
    """Run the stages one after another, holding the lock of OUTPUT_DIR.

    The first stage that fails ends the process, with its status and a line that names `command`.
    """
    logs = artifacts.writable_dir(output_dir / "logs")
    with hold(output_dir) as lock_file:
        for stage in stages:
            if stage.name == "demo" and not needs_demo_data(stage.argv[-1]):
                continue  # another run has made the data in the meantime
            run(command, stage, logs, lock_file)


@contextmanager
def hold(output_dir: Path) -> Iterator[TextIO]:
    """Hold the lock of OUTPUT_DIR for this process and for stages that inherit its descriptor."""
    with open(output_dir / ".lock", "a") as file:
        artifacts.take_lock(file, output_dir)
        os.environ[artifacts.LOCK_ENV] = str(output_dir)
        yield file


def run(command: str, stage: Stage, logs: Path, lock_file: TextIO) -> None:
    """Run a stage with its output copied to logs/{name}.log; end this process where it fails.

    A stage that was killed ends this process with status 1: a status above 128 would say that this
    process was killed itself.
    """
    print(f"\n==> {stage.name}: {shlex.join(['python', *stage.command])}", flush=True)
    path, started = logs / f"{stage.name}.log", time.time()
    with open(path, "w") as log:
        if stage.shares_process:
            status = run_here(stage, log)
        else:
            status = run_apart(stage, log, lock_file)
    if status:
        lines = path.read_text(errors="replace").splitlines()[-LAST_LINES:]
        last = "".join(f"    {line}\n" for line in lines)
        print(
            f"\n{command}: {stage.name} failed after {time.time() - started:.0f} s; its last "
            f"lines:\n{last}the whole log: {path}\n"
            "the same command goes on from here; finished steps are skipped",
            file=sys.stderr,
        )
        sys.exit(1 if status > 128 and status != INTERRUPTED else status)


def run_here(stage: Stage, log: TextIO) -> int:
    """Exit status of main(argv) of a step, called in this process."""
    with redirect_stdout(Tee(sys.stdout, log)), redirect_stderr(Tee(sys.stderr, log)):
        try:
            console.run(lambda: importlib.import_module(stage.module).main(stage.argv), stage.name)
        except SystemExit as error:
            return error.code
    return 0


def run_apart(stage: Stage, log: TextIO, lock_file: TextIO) -> int:
    """Exit status of a script run in a process of its own, which holds the lock with this one."""
    command = [sys.executable, str(artifacts.ROOT / stage.command[0]), *stage.argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    sys.stdout.flush()
    with subprocess.Popen(command, pass_fds=[lock_file.fileno()], **pipes) as process:
        try:
            while output := process.stdout.read1(1 << 16):  # bytes as they are, of any encoding
                for stream in (sys.stdout.buffer, log.buffer):
                    stream.write(output)
                    stream.flush()
        except BaseException:
            process.terminate()
            raise
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


class Tee:
    """A text stream whose lines are copied to a log, except progress bars, which redraw a line."""

    def __init__(self, stream: TextIO, log: TextIO):
        self.stream, self.log = stream, log

    def write(self, text: str) -> int:
        if "\r" not in text:
            self.log.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.log.flush()
        self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


if __name__ == "__main__":
    console.run(main, "run_all.sh")
