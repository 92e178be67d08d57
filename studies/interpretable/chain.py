"""The chain of studies/interpretable.sh: prepare, regression, gating, benchmarks, examples, report.

Every stage is planned and its flags are checked before the first one starts. Settings are
environment variables; studies/README.md lists them. Lists are separated by semicolons.

Reads   RATED and PAIRS, and the benchmarks that are given
Writes  OUTPUT_DIR: what the stages write; logs/{stage}.log, what each of them printed
Example RATED=rated.safetensors PAIRS=pairs.safetensors bash studies/interpretable.sh
"""

import argparse
import glob
import importlib
import os
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from rewardlib.cli import chain, console, kinds, settings
from rewardlib.cli.chain import Stage
from rewardlib.errors import InputError
from rewardlib.llm import loading

# Settings of each command by the flag they set; MODEL_DIR and the files come from the chain.
FLAGS = {
    "prepare": {
        "seed": "SEED",
        "share": "SHARE",
        "pairs_from": "PAIRS_FROM",
        "min_gap": "MIN_GAP",
        "pairs_per_prompt": "PAIRS_PER_PROMPT",
        "labels": "LABELS",
        "attribute_names": "ATTRIBUTE_NAMES",
        "prompt_embeddings": "PROMPT_EMBEDDINGS",
        "attributes": "ATTRIBUTES",
        "model": "MODEL",
        "chat_template": "CHAT_TEMPLATE",
        "max_length": "MAX_LENGTH",
        "batch_tokens": "BATCH_TOKENS",
        "dtype": "DTYPE",
        "storage_dtype": "STORAGE_DTYPE",
    },
    "regression": {
        "seed": "SEED",
        "labels": "LABEL_KIND",
        "attributes": "ATTRIBUTES",
        "intercept": "INTERCEPT",
        "verbosity_attribute": "VERBOSITY",
        "threshold": "THRESHOLD",
        "penalty_search": "PENALTY_SEARCH",
        "allow_unreached": "ALLOW_UNREACHED",
        "output_dir": "OUTPUT_DIR",
    },
    "gating": {
        "seed": "SEED",
        "drop": "DROP",
        "freeze": "FREEZE",
        "temperature": "TEMPERATURE",
        "dropout": "DROPOUT",
        "hidden": "HIDDEN",
        "epochs": "EPOCHS",
        "learning_rate": "LEARNING_RATE",
        "model_dir": "OUTPUT_DIR",
    },
    "rewardbench": {"seed": "SEED", "model_dir": "OUTPUT_DIR"},
    "explain": {"model_dir": "OUTPUT_DIR"},
}
SCRIPTS = {
    "prepare": "studies/interpretable_prepare",
    "regression": "studies/interpretable_regression",
    "gating": "studies/interpretable_gating",
    "rewardbench": "studies/rewardbench",
    "explain": "studies/interpretable_explain",
    "report": "studies/interpretable_report",
}
ARRAY_SETTINGS = ("labels", "attribute_names", "prompt_embeddings")
PAIR_SETTINGS = ("pairs_from", "min_gap", "pairs_per_prompt")
CHAT_SETTINGS = ("chat_template", "model", "max_length", "batch_tokens", "dtype", "storage_dtype")


def make_parser() -> argparse.ArgumentParser:
    """The settings of the chain itself."""
    parser = console.parser(__doc__)
    parser.add_argument(
        "--prepare",
        type=kinds.bit,
        default=False,
        help="1: make prepared files of arrays and conversations, in PREPARED_DIR",
    )
    parser.add_argument(
        "--force", type=kinds.bit, default=False, help="1: repeat stages that are finished"
    )
    parser.add_argument("--prepared_dir", help="prepared files; None: OUTPUT_DIR/prepared")
    parser.add_argument("--rated", help="rated responses; see the table above for their forms")
    parser.add_argument(
        "--pairs", help="preference pairs; without these, PAIRS_FROM makes pairs of the ratings"
    )
    parser.add_argument("--rewardbench", help="pairs of RewardBench 1, with its subset names")
    parser.add_argument(
        "--prior_sets",
        help="pairs of the prior sets, which count one half in the leaderboard of RewardBench 1",
    )
    parser.add_argument("--domains", help="other benchmarks of pairs: NAME=FILE;NAME=FILE")
    parser.add_argument("--styles", help="benchmarks in three styles: NAME=FILE;NAME=FILE")
    parser.add_argument("--best_of", help="benchmarks of best of n: NAME=FILE;NAME=FILE")
    parser.add_argument(
        "--reference",
        help="responses on which penalties are found; None: a part of RATED",
    )
    parser.add_argument(
        "--explain",
        default="pairs=0",
        help="examples: NAME=ROW or NAME=SUBSET, several with semicolons; NAME is rated, pairs, "
        "rewardbench or the name of a benchmark",
    )
    return parser


def command_parser(command: str) -> argparse.ArgumentParser:
    return load(command).make_parser()


def load(command: str):
    return importlib.import_module(SCRIPTS[command].replace("/", "."))


def actions_of(command: str, flags: Collection[str] | None = None) -> dict:
    """{variable: flag} of a command, or of some of its flags."""
    variables, chosen = FLAGS[command], FLAGS[command] if flags is None else flags
    actions = command_parser(command)._actions
    return {variables[action.dest]: action for action in actions if action.dest in chosen}


def all_actions() -> dict[str, argparse.Action]:
    """{variable: flag} of the chain and its commands."""
    actions = settings.variables_of(make_parser(), {})
    for command in FLAGS:
        actions |= {n: action for n, action in actions_of(command).items() if n not in actions}
    return actions


def table() -> str:
    return settings.table(all_actions(), separator=";")


def main() -> None:
    settings.print_help_or_refuse(sys.argv[1:], __doc__, table)
    settings.refuse_misspelt(os.environ, all_actions())
    # An empty EXPLAIN means no examples; other settings that are empty are not set.
    values = {
        name: os.environ[name]
        for name in all_actions()
        if os.environ.get(name) or (name == "EXPLAIN" and name in os.environ)
    }
    plan = Plan(values)
    plan.check()
    chain.run_all("interpretable.sh", plan.stages, plan.output_dir)


class Plan:
    """The stages that the settings ask for, collected one after another."""

    def __init__(self, values: Mapping[str, str]):
        self.values, self.stages = values, []
        own = settings.variables_of(make_parser(), {})
        argv = settings.flags_from(own, values)
        self.args = settings.parse_named(make_parser().parse_args, own, argv)
        check_contradictions(self.args, values)
        regression = command_parser("regression")
        self.output_dir = Path(values.get("OUTPUT_DIR") or regression.get_default("output_dir"))
        self.prepared_dir = Path(self.args.prepared_dir or self.output_dir / "prepared")
        self.benchmark_flags, self.known = [], {}
        self.add_training_stages(*self.training_files())
        self.add_examples()
        self.add("report", SCRIPTS["report"], [str(self.output_dir)])

    def add(self, name: str, script: str, argv: list[str]) -> None:
        self.stages.append(Stage(name, script, argv))

    def flags_of(self, command: str, flags: Collection[str] | None = None) -> list[str]:
        return settings.flags_from(actions_of(command, flags), self.values, separator=";")

    # ------------------------------------------------------------------------------ prepared files

    def training_files(self) -> tuple[str, str]:
        """Prepared files of rated responses and of pairs."""
        rated = self.prepared("RATED", "rated", self.args.rated)
        if self.args.pairs:
            pairs = self.prepared("PAIRS", "pairs", self.args.pairs)
        else:
            flags = ["--source", "prepared", "--prepared", rated]
            flags += self.flags_of("prepare", ["share", "seed"])
            rated = str(self.prepared_dir / "rated-first.safetensors")
            pairs = str(self.prepared_dir / "pairs-from-second.safetensors")
            first = [*flags, "--prompts", "first", "--output", rated]
            self.add("prepare-first", SCRIPTS["prepare"], first)
            second = [*flags, "--prompts", "second", *self.flags_of("prepare", PAIR_SETTINGS)]
            self.add("prepare-pairs", SCRIPTS["prepare"], [*second, "--output", pairs])
        self.known |= {"rated": rated, "pairs": pairs}
        return rated, pairs

    def prepared(self, setting: str, name: str, source: str) -> str:
        """The prepared file of a setting, with the stage that makes it where there is none yet."""
        if source.endswith(".safetensors"):
            if not glob.glob(source):
                raise InputError(
                    f"{setting}: {source}: expected a prepared file (or shards), found none"
                )
            return source
        is_array = source.endswith((".npy", ".npz"))
        if (is_array or source.endswith(".jsonl")) and not Path(source).is_file():
            raise InputError(f"{setting}: {source}: expected a file, found none")
        if not self.args.prepare:
            raise InputError(
                f"{setting}: expected a prepared .safetensors file, found {source!r}; "
                "PREPARE=1 makes one of it"
            )
        file = str(self.prepared_dir / f"{name}.safetensors")
        flags = self.array_flags if is_array else self.chat_flags
        argv = [*self.flags_of("prepare", ["seed"]), *flags(setting, source), "--output", file]
        self.add(f"prepare-{name}", SCRIPTS["prepare"], argv)
        return file

    def array_flags(self, setting: str, source: str) -> list[str]:
        flags = ["--source", "arrays", "--embeddings", source, *self.flags_of("prepare", ["model"])]
        if setting == "RATED" and source.endswith(".npy"):
            if "LABELS" not in self.values:
                raise InputError(f"LABELS: expected ATTRIBUTES_*.npy for RATED={source}")
            flags += self.flags_of("prepare", ARRAY_SETTINGS)
        return flags

    def chat_flags(self, setting: str, source: str) -> list[str]:
        if "MODEL" not in self.values:
            raise InputError(f"MODEL: expected the model that embeds {setting}={source}")
        dataset, _, split = source.rpartition("@")
        if Path(source).exists() or not dataset:
            flags = ["--dataset", source]
        else:
            flags = ["--dataset", dataset, "--dataset_split", split]
        if setting == "RATED" and self.values.get("LABEL_KIND") == "pairwise":
            flags += self.flags_of("prepare", ["attributes"])  # concept labels of pairs
        return flags + self.flags_of("prepare", CHAT_SETTINGS)

    # ------------------------------------------------------------------------------- other stages

    def add_training_stages(self, rated: str, pairs: str) -> None:
        """Regression, gating and benchmarks; the benchmarks' files are prepared before these."""
        if self.args.rewardbench:
            file = self.prepared("REWARDBENCH", "rewardbench", self.args.rewardbench)
            self.known["rewardbench"] = file
            self.benchmark_flags += ["--pairs", file]
        if self.args.prior_sets:
            file = self.prepared("PRIOR_SETS", "prior_sets", self.args.prior_sets)
            self.benchmark_flags += ["--prior_sets", file]
        for setting, flag in (
            ("DOMAINS", "--domains"),
            ("STYLES", "--styles"),
            ("BEST_OF", "--groups"),
        ):
            self.add_benchmarks(setting, flag, getattr(self.args, setting.lower()))
        regression = ["--data", rated, *self.flags_of("regression")]
        if self.args.reference:
            file = self.prepared("REFERENCE", "reference", self.args.reference)
            regression += ["--reference", file]
        self.add("regression", SCRIPTS["regression"], regression)
        self.add("gating", SCRIPTS["gating"], ["--pairs", pairs, *self.flags_of("gating")])
        if self.benchmark_flags:
            argv = [*self.benchmark_flags, *self.flags_of("rewardbench")]
            self.add("rewardbench", SCRIPTS["rewardbench"], argv)

    def add_benchmarks(self, setting: str, flag: str, text: str | None) -> None:
        files = []
        for item in settings.split_list(text or "", ";"):
            name, _, source = item.partition("=")
            if not name or not source or "/" in name:
                raise InputError(f"{setting}: expected NAME=FILE;NAME=FILE, found {item!r}")
            file = self.prepared(setting, f"benchmark-{name}", source)
            files.append(f"{name}={file}")
            self.known[name] = file
        if files:
            self.benchmark_flags += [flag, *files]

    def add_examples(self) -> None:
        for item in settings.split_list(self.args.explain, ";"):
            name, _, choice = item.partition("=")
            if name not in self.known or not choice:
                raise InputError(
                    "EXPLAIN: expected NAME=ROW or NAME=SUBSET with NAME among "
                    f"{' '.join(self.known)}, found {item!r}"
                )
            chosen = ["--index" if re.fullmatch("[0-9]+", choice) else "--subset", choice]
            argv = ["--data", self.known[name], *chosen, *self.flags_of("explain")]
            stage = "explain-" + re.sub(r"[^\w.-]", "-", item, flags=re.ASCII)
            self.add(stage, SCRIPTS["explain"], argv)

    # -------------------------------------------------------------------------------------- check

    def check(self) -> None:
        """Parse the flags of every stage, and look up the models; InputError otherwise."""
        commands, models = {script: command for command, script in SCRIPTS.items()}, set()
        for stage in self.stages:
            command = commands[stage.module]
            actions = actions_of(command) if command in FLAGS else {}
            args = settings.parse_named(load(command).parse_args, actions, stage.argv)
            if getattr(args, "source", None) == "chat":
                models.add(args.model)
        for model in sorted(models):
            loading.fingerprint(model)


def check_contradictions(args: argparse.Namespace, values: Mapping[str, str]) -> None:
    """InputError where settings that belong together are not given together."""
    if not args.rated:
        raise InputError(
            "RATED: expected a prepared file of ratings (or, with PREPARE=1, what to make it of)"
        )
    if not args.pairs and "PAIRS_FROM" not in values:
        raise InputError(
            "PAIRS: expected preference pairs, or PAIRS_FROM with an attribute of RATED"
        )
    if args.pairs and "PAIRS_FROM" in values:
        raise InputError(
            "PAIRS_FROM: expected no PAIRS beside it, found both; leave one of them out"
        )
    names = [name.upper() for name in ARRAY_SETTINGS]
    if any(name in values for name in names) and not args.rated.endswith(".npy"):
        raise InputError(
            f"{', '.join(names)}: expected RATED=EMBD_*.npy beside them, found {args.rated!r}; "
            "leave them out"
        )


if __name__ == "__main__":
    console.run(main, "interpretable.sh")
