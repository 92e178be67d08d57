"""The settings of run_all.sh: environment variables, each a flag of some step, in capitals.

The parsers of the steps hold name, default, type and help of every setting; a variable that is not
set is not passed on. `python -m rewardlib.cli.settings` prints the tables of docs/settings.md.
"""

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
    "step4": {"output_dir": "DATA_DIR"},
}
EVERYWHERE = {"embed_model_name": "MODEL_NAME", "gen_pref_model_name": "GEN_PREF_MODEL"}

# Flags that no variable sets: the chain passes them itself, or has no use for them.
NO_SETTING = {
    "convert": {"embd_file", "reward_file", "split"},
    "step2": {"n_samples", "data_class", "split"},
    "step3": {"data_class", "split"},
    "step3.5": {"n_samples", "data_class"},
    "step4": {"n_samples", "n_test_samples", "train_test", "split"},
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
    for data_class in ("train", "test"):
        group.add_argument(
            f"--n_{data_class}_responses",
            type=kinds.count,
            help=f"number of responses to each {data_class} prompt that steps 2 to 4 sample, score "
            "and embed; None: the default of step 2",
        )
    group.add_argument(
        "--report", type=kinds.bit, default=True, help="1: write report.html after step 8"
    )
    return parser


def print_help_or_refuse(argv: Sequence[str], doc: str, tables: Callable[[], str]) -> None:
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
    parser = make_parser() if stage == "chain" else script_of(stage).make_parser()
    renamed = {**EVERYWHERE, **RENAMED.get(stage, {})}
    return variables_of(parser, renamed, NO_SETTING.get(stage, ()))


@cache
def all_names() -> frozenset[str]:
    return frozenset(name for stage in ("chain", *STAGES) for name in actions_of(stage))


def read(environment: Mapping[str, str]) -> dict[str, str]:
    """{variable: text} of the settings that are set; InputError for one that looks mistyped."""
    refuse_misspelt(environment, all_names())
    return {name: environment[name] for name in sorted(all_names()) if environment.get(name)}


def flags_of(stage: str, values: Mapping[str, str]) -> list[str]:
    """The flags of a stage that its variables set."""
    return flags_from(actions_of(stage), values)


def parse(stage: str, values: Mapping[str, str], more: Sequence[str] = ()) -> argparse.Namespace:
    """The checked arguments of a stage; InputError that names the variable beside the flag."""
    parse_args = make_parser().parse_args if stage == "chain" else script_of(stage).parse_args
    actions = actions_of(stage)
    return parse_named(parse_args, actions, [*flags_from(actions, values), *more])


def script_of(stage: str) -> ModuleType:
    return load_script(STAGES[stage])


# ------------------------------------------------------------------------ from variables to flags


def variables_of(
    parser: argparse.ArgumentParser, renamed: Mapping[str, str], hidden: Collection[str] = ()
) -> dict[str, argparse.Action]:
    """{variable: flag} of a parser; renamed: {name of a flag: its variable}, others in capitals."""
    return {
        renamed.get(action.dest, action.dest.upper()): action
        for action in parser._actions
        if action.dest not in {*hidden, "help", "debug"}
    }


def flags_from(
    actions: Mapping[str, argparse.Action], values: Mapping[str, str], separator: str | None = None
) -> list[str]:
    """The flags whose variables are set; values of a list stand between separators (or spaces)."""
    flags = []
    for name, action in actions.items():
        if name not in values:
            continue
        flag, text = action.option_strings[0], values[name]
        if action.nargs == 0:  # a flag without a value
            flags += [flag] if read_bit(name, text) else []
        elif action.nargs:
            flags += [flag, *split_list(text, separator)]
        else:
            flags += [flag, text]
    return flags


def split_list(text: str, separator: str | None) -> list[str]:
    return [item for item in text.split(separator) if item]


def read_bit(name: str, text: str) -> bool:
    try:
        return kinds.bit(text)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{name}: {error}") from None


def parse_named(
    parse_args: Callable, actions: Mapping[str, argparse.Action], argv: list[str]
) -> argparse.Namespace:
    """parse_args(argv), where an InputError about a flag names its variable as well."""
    variables = {action.dest: name for name, action in actions.items()}

    def named(match):
        return f"{variables.get(match[1], match[1].upper())} (--{match[1]}):"

    try:
        return parse_args(argv)
    except InputError as error:
        text = str(error).removesuffix("; --help lists the flags")
        raise InputError(re.sub(r"^argument --(\w+):", named, text)) from None


def refuse_misspelt(environment: Iterable[str], names: Collection[str]) -> None:
    """InputError for a variable that is one edit away from a setting; two, where it is long.

    The first letter must agree: it is seldom mistyped, and other programs have short names too.
    """
    for name in environment:
        limit = 1 if len(name) < 12 else 2
        near = [n for n in names if n[0] == name[:1] and abs(len(name) - len(n)) <= limit]
        distances = {other: edit_distance(name, other) for other in sorted(near)}
        nearest = min(distances, key=distances.get, default=None)
        if nearest and 0 < distances[nearest] <= limit:
            raise InputError(f"{name}: no such setting; did you mean {nearest}? Otherwise unset it")


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
    known, parts = {}, []
    for title, stages in TABLES.items():
        actions = {}
        for stage in stages:
            actions |= {
                name: action
                for name, action in actions_of(stage).items()
                if name not in known and name not in actions
            }
        known |= actions
        parts.append(f"## {title}\n\n{table(actions)}")
    return "\n".join(parts)


def table(actions: Mapping[str, argparse.Action], separator: str = " ") -> str:
    """{variable: flag} as a Markdown table; separator: between the values of a list."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, action in actions.items():
        rows.append(f"| `{name}` | {default_text(action, separator)} | {meaning(action)} |")
    return "\n".join(rows) + "\n"


def default_text(action: argparse.Action, separator: str) -> str:
    value = action.default
    if isinstance(value, bool):
        return str(int(value))
    return separator.join(map(str, value)) if isinstance(value, list) else str(value)


def meaning(action: argparse.Action) -> str:
    text = action.help[0].upper() + action.help[1:] if action.help[0].islower() else action.help
    choices = ""
    if action.choices:
        choices = " (" + ", ".join(f"`{choice}`" for choice in action.choices) + ")"
    return (text + choices).replace("|", "\\|")


if __name__ == "__main__":
    print(tables(), end="")
