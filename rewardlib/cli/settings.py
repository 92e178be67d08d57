"""The settings of run_all.sh: environment variables, each a flag of some step, in capitals.

The parsers of the steps hold name, default, type and help of every setting; a variable that is not
set is not passed on. `python -m rewardlib.cli.settings` prints the tables of docs/settings.md.
"""

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType

from rewardlib import artifacts
from rewardlib.cli import console, kinds
from rewardlib.errors import InputError

STAGES = {
    "convert": "convert_embeddings",
    "step1": "step1_sft",
    "step2": "step2_gen_sample",
    "step3": "step3_reward_annotation",
    "step3.5": "step3.5_processing_data",
    "step4": "step4_gen_embeddings",
    "step5": "step5_train_rms",
    "step6": "step6_eval_rms",
    "step7": "step7_isotonic_distillation",
    "step8": "step8_validate_distillation",
}

# Flags whose variable is not their name in capitals: one variable for one thing, whatever a step
# calls it, and no variable for two things.
RENAMED = {
    "convert": {
        "embd_dir": "EMBD_REPO_DIR",
        "embed_model": "MODEL_NAME",
        "gen_model": "REPO_GEN_MODEL",
        "output_dir": "DATA_DIR",
        "dtype": "STORAGE_DTYPE",
    },
    "step1": {
        "model_name": "GEN_PREF_MODEL",
        "data_dir": "SOURCE_DIR",
        "output_dir": "SFT_DIR",
        "epochs": "SFT_EPOCHS",
        "learning_rate": "SFT_LEARNING_RATE",
        "batch_size": "SFT_BATCH_SIZE",
        "max_length": "SFT_MAX_LENGTH",
    },
    "step2": {"model_name": "GEN_PREF_MODEL", "data_dir": "SOURCE_DIR", "output_dir": "GEN_DIR"},
    "step4": {
        "n_samples": "N_TRAIN_RESPONSES",
        "n_test_samples": "N_TEST_RESPONSES",
        "output_dir": "DATA_DIR",
    },
}
EVERYWHERE = {"embed_model_name": "MODEL_NAME", "gen_pref_model_name": "GEN_PREF_MODEL"}

# The chain itself passes these; no variable does.
NO_SETTING = {
    "convert": {"embd_file", "reward_file", "split"},
    "step2": {"n_samples", "data_class", "split"},
    "step3": {"data_class", "split"},
    "step3.5": {"n_samples", "data_class"},
    "step4": {"train_test", "split"},
}


def make_parser() -> argparse.ArgumentParser:
    """The settings of the chain itself."""
    parser = console.parser(__doc__)
    group = parser.add_argument_group("the chain")
    steps = ("1", "2", "3", "3.5", "4", "5", "6", "7", "8")
    group.add_argument("--start_step", choices=steps, default="1", help="first step to run")
    group.add_argument("--stop_step", choices=steps, default="8", help="last step to run")
    group.add_argument(
        "--force", type=kinds.bit, default=False, help="1: repeat steps that are finished"
    )
    group.add_argument(
        "--run_gpu_steps",
        type=kinds.bit,
        default=False,
        help="1: make the embeddings from prompts first, steps 1 to 4",
    )
    group.add_argument(
        "--use_repo_embd",
        type=kinds.bit,
        default=False,
        help="1: convert published files of EMBD_REPO_DIR into DATA_DIR first",
    )
    group.add_argument(
        "--report", type=kinds.bit, default=True, help="1: write report.html after step 8"
    )
    return parser


def print_help_or_refuse(argv: Sequence[str], doc: str) -> None:
    """--help prints the settings and ends the process; InputError for other arguments."""
    if argv and argv[0] in ("-h", "--help"):
        print(f"{doc}\n{tables()}", end="")
        sys.exit(0)
    if argv:
        raise InputError(
            f"expected settings as environment variables, found {' '.join(argv)}; --help lists them"
        )


@cache
def load_script(name: str) -> ModuleType:
    """The module of a script in the root. step3.5_processing_data is no name to import by."""
    if name.isidentifier():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, artifacts.ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def actions_of(stage: str) -> dict[str, argparse.Action]:
    """{variable: flag} of one stage."""
    parser = make_parser() if stage == "chain" else load_script(STAGES[stage]).make_parser()
    hidden = NO_SETTING.get(stage, set()) | {"help", "debug"}
    renamed = {**EVERYWHERE, **RENAMED.get(stage, {})}
    return {
        renamed.get(action.dest, action.dest.upper()): action
        for action in parser._actions
        if action.dest not in hidden
    }


@cache
def all_names() -> frozenset[str]:
    return frozenset(name for stage in ("chain", *STAGES) for name in actions_of(stage))


def read(environment: Mapping[str, str]) -> dict[str, str]:
    """{variable: text} of the settings that are set, those included that follow from others.

    InputError for a variable that looks like a mistyped setting.
    """
    for name in environment:
        nearest = name not in all_names() and nearest_setting(name)
        if nearest:
            raise InputError(f"{name}: no such setting; did you mean {nearest}? Otherwise unset it")
    values = {name: environment[name] for name in sorted(all_names()) if environment.get(name)}
    task = values.get("TASK")
    if task in ("helpful", "harmless"):
        values.setdefault("DATASET", f"hh-rlhf-{task}-gpt4")
    elif task and "DATASET" not in values:
        raise InputError(f"TASK={task}: expected DATASET beside it (helpful and harmless have one)")
    return values


def parse(stage: str, values: Mapping[str, str], more: Sequence[str] = ()) -> argparse.Namespace:
    """The checked arguments of a stage; InputError that names the variable beside the flag."""
    argv = [*flags_of(stage, values), *more]
    try:
        if stage == "chain":
            return make_parser().parse_args(argv)
        return load_script(STAGES[stage]).parse_args(argv)
    except InputError as error:
        variables = {action.dest: name for name, action in actions_of(stage).items()}
        text = re.sub(
            r"^argument --(\w+):",
            lambda match: f"{variables.get(match[1], match[1].upper())} (--{match[1]}):",
            str(error).removesuffix("; --help lists the flags"),
        )
        raise InputError(text) from None


def flags_of(stage: str, values: Mapping[str, str]) -> list[str]:
    """The flags of a stage that its variables set."""
    flags = []
    for name, action in actions_of(stage).items():
        if name not in values:
            continue
        if action.nargs == 0:  # a flag without a value
            flags += [action.option_strings[0]] if read_bit(name, values[name]) else []
        else:
            texts = values[name].split() if action.nargs else [values[name]]
            flags += [action.option_strings[0], *texts]
    return flags


def read_bit(name: str, text: str) -> bool:
    try:
        return kinds.bit(text)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{name}: {error}") from None


def nearest_setting(name: str) -> str | None:
    """The setting that `name` is a misspelling of: one edit away, or two where the name is long."""
    limit = 1 if len(name) <= 8 else 2
    distances = {
        setting: edit_distance(name, setting)
        for setting in sorted(all_names())
        if abs(len(name) - len(setting)) <= limit
    }
    nearest = min(distances, key=distances.get, default=None)
    return nearest if nearest and distances[nearest] <= limit else None


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that turn `a` into `b`."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


# ------------------------------------------------------------------------------------------- tables

TABLES = {
    "The chain": ("chain",),
    "Steps 5 to 8": ("step5", "step6", "step7", "step8"),
    "Steps 1 to 4 (`RUN_GPU_STEPS=1`)": ("step1", "step2", "step3", "step3.5", "step4"),
    "Published files (`USE_REPO_EMBD=1`)": ("convert",),
}


def tables() -> str:
    """All settings as Markdown, each once: variable, default, meaning."""
    known, parts = set(), []
    for title, stages in TABLES.items():
        rows = {}
        for stage in stages:
            rows |= {
                name: action
                for name, action in actions_of(stage).items()
                if name not in known | set(rows)
            }
        known |= set(rows)
        lines = [
            f"| `{name}` | {default_text(action)} | {meaning(action)} |"
            for name, action in rows.items()
        ]
        parts.append(
            "\n".join(
                [f"## {title}", "", "| variable | default | meaning |", "|---|---|---|", *lines]
            )
        )
    return "\n\n".join(parts) + "\n"


def default_text(action: argparse.Action) -> str:
    value = action.default
    if isinstance(value, bool):
        return str(int(value))
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def meaning(action: argparse.Action) -> str:
    text = action.help[0].upper() + action.help[1:] if action.help[0].islower() else action.help
    choices = ""
    if action.choices:
        choices = " (" + ", ".join(f"`{choice}`" for choice in action.choices) + ")"
    return (text + choices).replace("|", "\\|")


if __name__ == "__main__":
    print(tables(), end="")
