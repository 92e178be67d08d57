"""What step 5 leaves for the steps after it: names of the reward-model files and the record of the ensemble.

A run is named by its settings (task, objective, pairing, ...): the dict that scripts build from
their flags.
"""

from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.data import splits
from rewardlib.errors import InputError

FOLDS = 5
# Isotonic maps are fitted on prompts that no member trained on where at least this many are left.
MIN_UNSEEN = 50


def stem(settings, n_sample, member=None):
    """File name stem of a run; with `member`, of one member's checkpoint. Numbers are written in one way, whatever the
    flag's spelling."""
    s = settings
    prefix = {"xprompt": "XPrompt", "sameprompt": "SamePrompt", "human": "HumanPairs"}[s["pairing"]]
    index = "" if member is None else f"_{member}"
    drawn = f"_firstn_{s['consider_first_n']}_n_{n_sample}_pair_{s['n_pairs']}"
    if s["pairing"] == "human":  # recorded, not drawn
        drawn = f"_n_{n_sample}"
    return (
        f"{prefix}_{s['rm_model']}_{s['rm_objective']}{index}_seed{s['seed']}{drawn}"
        f"_replacement_{str(s['replacement']).lower()}_epoch{s['training_epochs']}_lr{s['learning_rate']:g}"
    )


def resolve_n_sample(n_sample, split):
    """How many prompts the reward models train on; None takes all. InputError above what may be fitted on."""
    available = len(split["student_train"]) + len(split["calibration"])
    if n_sample is not None and not 4 <= n_sample <= available:
        raise InputError(
            f"n_sample: expected 4 to {available} (calibration and student-train prompts of this data), "
            f"found {n_sample}; "
            "N_SAMPLE=all takes every one"
        )
    return n_sample or available


def choose_prompts(split, n_sample, rng):
    """The prompts reward models train on: student-train prompts first, so that calibration prompts stay unseen."""
    order = np.concatenate(
        [rng.permutation(split["student_train"]), rng.permutation(split["calibration"])]
    )
    return np.sort(order[:n_sample])


def read(output_dir, settings):
    """The record of the ensemble that `settings` name, in `output_dir`.

    Returns a dict: prompts and folds (n,), members [{"file", "validation_fold", ...}], pairs {...}.
    InputError when step 5 has not written it, or wrote it with other settings.
    """
    output_dir = Path(output_dir)
    entry = artifacts.read_manifest(output_dir).get("step5")
    if entry is None:
        raise InputError(
            f"{output_dir}: no finished reward models found; run step 5 with the same settings first"
        )
    told = entry["arguments"]
    different = [
        f"{key} {told.get(key)!r}, not {settings[key]!r}"
        for key in settings
        if told.get(key) != settings[key]
    ]
    if different:
        raise InputError(
            f"{output_dir}: expected reward models of these settings, found {'; '.join(different)}; "
            "run step 5 with the settings you want"
        )
    record = artifacts.read_json(output_dir / entry["record"], "step 5")
    return {**record, "prompts": np.array(record["prompts"]), "folds": np.array(record["folds"])}


def seen_by_members(record, prompts):
    """(E, n) True where member e trained on the prompt: it is one of its prompts outside its validation fold."""
    fold_of = dict(zip(record["prompts"].tolist(), record["folds"].tolist(), strict=True))
    folds = np.array([fold_of.get(int(prompt), -1) for prompt in prompts])
    held = np.array([member["validation_fold"] for member in record["members"]])
    return (folds[None, :] >= 0) & (folds[None, :] != held[:, None])


def open_run(output_dir, settings, train):
    """The prompt split and the record of step 5 for `settings`, whose "n_sample" is resolved in place."""
    split = splits.load(output_dir, train.shape[0])
    settings["n_sample"] = resolve_n_sample(settings["n_sample"], split)
    record = read(output_dir, settings)
    told = artifacts.read_manifest(output_dir)["step5"]["inputs"]
    changed = sorted(
        name
        for name in told.keys() | train.digests.keys()
        if told.get(name) != train.digests.get(name)
    )
    if changed:
        raise InputError(
            f"{output_dir}: expected the data its reward models were trained on, found other data ({changed[0]}); "
            "run step 5 again, or use another output folder"
        )
    check_split(record, split)
    return split, record


def check_split(record, split):
    """InputError unless the reward models were fitted on prompts that this split allows."""
    leaked = np.intersect1d(record["prompts"], split["held_out"])
    if len(leaked):
        raise InputError(
            f"leakage: {len(leaked)} held-out prompts (first: {leaked[0]}) entered the training of the reward models; "
            f"{splits.FILE} was changed after step 5: run step 5 again"
        )
