"""Prompt splits. Prompts are the unit: a prompt is on one side, with all its responses and all its duplicates."""

from pathlib import Path

import numpy as np

from rewardlib import artifacts, seeds
from rewardlib.errors import InputError

FILE = "prompt_split.json"
SHARES = {"calibration": 0.6, "student_train": 0.2, "held_out": 0.2}
MIN_PROMPTS = 10


def split_prompts(groups, seed):
    """Deal prompts 60 / 20 / 20 to calibration, student_train and held_out, whole groups at a time.

    groups: (N,) integers, equal for prompts that must stay on one side. Returns {role: sorted (n,)
    indices}.
    """
    n = len(groups)
    if n < MIN_PROMPTS:
        raise InputError(
            f"expected at least {MIN_PROMPTS} prompts to split 60 / 20 / 20, found {n}; add prompts"
        )
    order = seeds.rng(seed, "prompt split").permutation(groups.max() + 1)
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    dealt = np.argsort(position[groups], kind="stable")
    ends = np.cumsum(np.bincount(position[groups]))
    bounds = np.round(np.cumsum(list(SHARES.values()))[:-1] * n)
    cuts = [int(ends[np.argmin(np.abs(ends - bound))]) for bound in bounds]
    parts = dict(zip(SHARES, np.split(dealt, cuts), strict=True))
    if any(len(part) == 0 for part in parts.values()):
        raise InputError(
            f"expected enough distinct prompts for three parts, found {len(order)} distinct of {n}"
        )
    return {role: np.sort(part) for role, part in parts.items()}


def assign_folds(groups, n_folds, rng):
    """(N,) fold numbers of nearly equal size, whole groups at a time."""
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    fold, sizes = np.empty(len(groups), int), np.zeros(n_folds, int)
    for member in (members[i] for i in rng.permutation(len(members))):
        smallest = int(np.argmin(sizes))
        fold[member] = smallest
        sizes[smallest] += len(member)
    return fold


def save(output_dir, split, seed):
    content = {"seed": seed, "n_prompts": sum(len(part) for part in split.values()), **split}
    artifacts.write_json(Path(output_dir) / FILE, content)


def load(output_dir, n_prompts):
    """The split that step 5 made, {role: (n,) indices}; InputError unless it covers exactly `n_prompts` prompts."""
    path = Path(output_dir) / FILE
    content = artifacts.read_json(path, "step 5")
    split = {role: np.array(content[role], int) for role in SHARES}
    if not np.array_equal(np.sort(np.concatenate(list(split.values()))), np.arange(n_prompts)):
        raise InputError(
            f"{path}: expected each of {n_prompts} prompts once, found another data set; run step 5 again"
        )
    return split
