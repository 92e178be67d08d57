"""Splits of the prompts. A prompt is on one side, with all its responses and all its duplicates."""

from pathlib import Path

import numpy as np

from rewardlib import artifacts, seeds
from rewardlib.errors import InputError

FILE = "prompt_split.json"
SHARES = {"calibration": 0.6, "student_train": 0.2, "held_out": 0.2}
MIN_PROMPTS = 10


def split_prompts(groups: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Split of the prompts into calibration (60 %), student_train (20 %) and held_out (20 %).

    groups: (N,) non-negative integers, equal for prompts that must stay on one side. No group is
    divided, so the shares are only as exact as the sizes of the groups allow. Returns {role: (n,)
    sorted indices}. Raises InputError for fewer than MIN_PROMPTS prompts, or for an empty part.
    """
    n = len(groups)
    if n < MIN_PROMPTS:
        raise InputError(
            f"expected at least {MIN_PROMPTS} prompts to split 60 / 20 / 20, found {n}; add prompts"
        )
    order = seeds.rng(seed, "prompt split").permutation(groups.max() + 1)
    rank_of_group = np.empty_like(order)
    rank_of_group[order] = np.arange(len(order))
    ranks = rank_of_group[groups]
    shuffled = np.argsort(ranks, kind="stable")
    group_ends = np.cumsum(np.bincount(ranks))
    ideal_cuts = np.round(np.cumsum(list(SHARES.values()))[:-1] * n)
    # cut at the end of the group that is nearest to the ideal cut
    cuts = [int(group_ends[np.argmin(np.abs(group_ends - cut))]) for cut in ideal_cuts]
    parts = dict(zip(SHARES, np.split(shuffled, cuts), strict=True))
    if any(len(part) == 0 for part in parts.values()):
        raise InputError(
            f"expected enough distinct prompts for three parts, found {len(order)} distinct "
            f"prompts among {n}; add prompts"
        )
    return {role: np.sort(part) for role, part in parts.items()}


def assign_folds(groups: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Fold numbers (N,) of the prompts, in folds of nearly equal size that divide no group.

    Groups come in random order, and each goes to the fold that is the smallest so far.
    """
    order = np.argsort(groups, kind="stable")
    prompts_by_group = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    folds, sizes = np.empty(len(groups), int), np.zeros(n_folds, int)
    for i in rng.permutation(len(prompts_by_group)):
        prompts, smallest = prompts_by_group[i], int(np.argmin(sizes))
        folds[prompts] = smallest
        sizes[smallest] += len(prompts)
    return folds


def save(output_dir: Path | str, split: dict[str, np.ndarray], seed: int) -> None:
    """Write the split and its random seed to FILE in `output_dir`."""
    content = {"seed": seed, "n_prompts": sum(len(part) for part in split.values()), **split}
    artifacts.write_json(Path(output_dir) / FILE, content)


def load(output_dir: Path | str, n_prompts: int) -> dict[str, np.ndarray]:
    """The split that step 5 saved, {role: (n,) indices}.

    Raises InputError unless the split holds each of `n_prompts` prompts exactly once.
    """
    path = Path(output_dir) / FILE
    content = artifacts.read_json(path, "step 5")
    split = {role: np.array(content[role], int) for role in SHARES}
    if not np.array_equal(np.sort(np.concatenate(list(split.values()))), np.arange(n_prompts)):
        raise InputError(
            f"{path}: expected each of {n_prompts} prompts once; this split belongs to another "
            "data set: run step 5 again"
        )
    return split
