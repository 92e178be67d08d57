"""What step 5 leaves for the later steps: names of reward-model files, record of the ensemble.

A run is named by its settings (task, objective, pairing, ...), a dict that scripts build from their
flags.
"""

from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.data import splits
from rewardlib.data.embeddings import Responses
from rewardlib.errors import InputError

FOLDS = 5
# Isotonic maps are fitted on prompts that no member trained on where at least this many are left.
MIN_UNSEEN = 50


def stem(settings: dict, member: int | None = None) -> str:
    """File name stem of a run, or of one member's files.

    Numbers are written in one way, however a flag spells them. Settings that the kind of model does
    not have are not part of the name.
    """
    s = settings
    prefix = {"xprompt": "XPrompt", "sameprompt": "SamePrompt", "human": "HumanPairs"}[s["pairing"]]
    parts = [prefix, s["rm_model"], s["rm_objective"]]
    if member is not None:
        parts.append(str(member))
    parts.append(f"seed{s['seed']}")
    if s["pairing"] == "human":  # recorded, not drawn
        parts.append(f"n_{s['n_sample']}")
    else:
        n_pairs, first_n = s["n_pairs"], s["consider_first_n"]
        parts.append(f"firstn_{first_n}_n_{s['n_sample']}_pair_{n_pairs}")
    parts.append(f"replacement_{str(s['replacement']).lower()}")
    if "training_epochs" in s:
        parts.append(f"epoch{s['training_epochs']}_lr{s['learning_rate']:g}")
    return "_".join(parts)


def resolve_n_sample(n_sample: int | None, split: dict) -> int:
    """Number of prompts to label; None takes all that may be fitted on, InputError above these."""
    available = len(split["student_train"]) + len(split["calibration"])
    if n_sample is not None and not 4 <= n_sample <= available:
        raise InputError(
            f"n_sample: expected 4 to {available} (calibration and student-train prompts of this "
            f"data), found {n_sample}; N_SAMPLE=all takes every one"
        )
    return n_sample or available


def choose_prompts(split: dict, n_sample: int, rng: np.random.Generator) -> np.ndarray:
    """(n_sample,) prompts to label, ascending.

    Student-train prompts come first: calibration prompts that no reward model has seen are worth
    more, because isotonic maps are fitted on them.
    """
    order = np.concatenate(
        [rng.permutation(split["student_train"]), rng.permutation(split["calibration"])]
    )
    return np.sort(order[:n_sample])


def read(output_dir: Path, settings: dict) -> dict:
    """The record of the ensemble that `settings` name: prompts, folds (n,), members, pairs, scale.

    InputError where step 5 has not written it, or wrote it with other settings.
    """
    output_dir = Path(output_dir)
    entry = artifacts.read_manifest(output_dir).get("step5")
    if entry is None:
        raise InputError(
            f"{output_dir}: no finished reward models; run step 5 with the same settings first"
        )
    if different := differences(entry["arguments"], settings):
        raise InputError(
            f"{output_dir}: expected reward models of these settings, found {different}; "
            "run step 5 with the settings you want"
        )
    record = artifacts.read_json(output_dir / entry["record"], "step 5")
    return {**record, "prompts": np.array(record["prompts"]), "folds": np.array(record["folds"])}


def differences(recorded: dict, settings: dict) -> str:
    """ "name old, not new; ..." of the settings that were recorded with another value."""
    return "; ".join(
        f"{name} {recorded.get(name)!r}, not {value!r}"
        for name, value in settings.items()
        if recorded.get(name) != value
    )


def seen_by_members(record: dict, prompts: np.ndarray) -> np.ndarray:
    """(E, n) True where member e trained on the prompt.

    A member trains on all prompts of the record outside its validation fold.
    """
    fold_of = dict(zip(record["prompts"].tolist(), record["folds"].tolist(), strict=True))
    folds_N = np.array([fold_of.get(int(prompt), -1) for prompt in prompts])
    held_E = np.array([member["validation_fold"] for member in record["members"]])
    return (folds_N[None, :] >= 0) & (folds_N[None, :] != held_E[:, None])


def open_run(output_dir: Path, settings: dict, train: Responses) -> tuple[dict, dict]:
    """The prompt split and the record of step 5; "n_sample" of `settings` is resolved in place.

    InputError where step 5 ran on other data, or on prompts that the split holds out.
    """
    split = splits.load(output_dir, train.shape[0])
    settings["n_sample"] = resolve_n_sample(settings["n_sample"], split)
    record = read(output_dir, settings)
    recorded = artifacts.read_manifest(output_dir)["step5"]["inputs"]
    names = sorted(recorded.keys() | train.digests.keys())
    changed = [name for name in names if recorded.get(name) != train.digests.get(name)]
    if changed:
        raise InputError(
            f"{output_dir}: expected the data its reward models were trained on, found other data "
            f"({changed[0]}); run step 5 again, or use another output folder"
        )
    check_split(record, split)
    return split, record


def check_split(record: dict, split: dict) -> None:
    """InputError where the reward models were fitted on held-out prompts of this split."""
    leaked = np.intersect1d(record["prompts"], split["held_out"])
    if len(leaked):
        raise InputError(
            f"leakage: {len(leaked)} held-out prompts (first: {leaked[0]}) entered the training of "
            f"the reward models; {splits.FILE} was changed after step 5: run step 5 again"
        )
