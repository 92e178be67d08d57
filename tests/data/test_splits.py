"""splits.py and seeds.py: 60 / 20 / 20 by prompt, duplicates on one side, reproducible splits."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardlib import seeds
from rewardlib.data import splits
from rewardlib.errors import InputError

ROLES = ["calibration", "student_train", "held_out"]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("n", "sizes"),
    [(10, [6, 2, 2]), (12, [7, 3, 2]), (100, [60, 20, 20]), (4099, [2459, 820, 820])],
)
def test_sizes(n, sizes):
    split = splits.split_prompts(np.arange(n), 6)
    assert list(split) == ROLES
    assert [len(split[role]) for role in ROLES] == sizes


@given(st.lists(st.integers(0, 12), min_size=10, max_size=60), st.integers(0, 10**9))
@settings(deadline=None)
def test_every_prompt_once_and_groups_on_one_side(labels, seed):
    groups = np.unique(labels, return_inverse=True)[1]
    try:
        split = splits.split_prompts(groups, seed)
    except InputError as error:
        assert "expected enough distinct prompts for three parts" in str(error)
        return
    assert np.sort(np.concatenate(list(split.values()))).tolist() == list(range(len(groups)))
    assert all((np.diff(part) > 0).all() for part in split.values())
    owners = [set(groups[part]) for part in split.values()]
    assert sum(len(owner) for owner in owners) == groups.max() + 1
    largest = np.bincount(groups).max()
    for part, share in zip(split.values(), (0.6, 0.2, 0.2), strict=True):
        assert abs(len(part) - share * len(groups)) <= largest + 1


def test_one_seed_one_deal_another_seed_another():
    groups = np.arange(50)
    a, b, other = (splits.split_prompts(groups, seed) for seed in (6, 6, 7))
    for role in ROLES:
        np.testing.assert_array_equal(a[role], b[role])
    assert set(a["held_out"]) != set(other["held_out"])


def test_every_prompt_is_held_out_under_some_seed_and_not_under_others():
    held = np.zeros(20)
    for seed in range(100):
        held[splits.split_prompts(np.arange(20), seed)["held_out"]] += 1
    assert held.sum() == 400 and held.min() >= 8 and held.max() <= 35


@pytest.mark.parametrize("n", [0, 9])
def test_too_few_prompts_are_refused(n):
    with pytest.raises(
        InputError, match=f"expected at least 10 prompts to split 60 / 20 / 20, found {n}"
    ):
        splits.split_prompts(np.arange(n), 6)


def test_two_distinct_prompts_cannot_make_three_parts():
    with pytest.raises(InputError, match="three parts, found 2 distinct prompts among 20"):
        splits.split_prompts(np.arange(20) % 2, 6)


# -------------------------------------------------------------------------------------------- folds


@given(st.integers(2, 60), st.integers(2, 6), st.integers(0, 99))
@settings(deadline=None)
def test_folds_of_distinct_prompts_differ_by_one_at_most(n, n_folds, seed):
    folds = splits.assign_folds(np.arange(n), n_folds, rng(seed))
    sizes = np.bincount(folds, minlength=n_folds)
    assert sizes.sum() == n and len(sizes) == n_folds and np.ptp(sizes) <= 1


@given(st.lists(st.integers(0, 20), min_size=5, max_size=60), st.integers(2, 5), st.integers(0, 99))
@settings(deadline=None)
def test_folds_keep_groups_whole_and_nearly_balanced(labels, n_folds, seed):
    groups = np.array(labels)
    folds = splits.assign_folds(groups, n_folds, rng(seed))
    assert all(len(set(folds[groups == g])) == 1 for g in set(labels))
    sizes = np.bincount(folds, minlength=n_folds)
    assert len(sizes) == n_folds and np.ptp(sizes) <= np.bincount(groups).max()


def test_folds_are_dealt_at_random():
    a, b, other = (splits.assign_folds(np.arange(30), 5, rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != other).any() and (np.diff(a) != 1).any()


# --------------------------------------------------------------------------------------- save, load


def test_a_saved_split_comes_back(tmp_path):
    split = splits.split_prompts(np.arange(23), 6)
    splits.save(tmp_path, split, 6)
    content = json.loads((tmp_path / "prompt_split.json").read_text())
    assert content["seed"] == 6 and content["n_prompts"] == 23
    found = splits.load(tmp_path, 23)
    assert list(found) == ROLES
    for role in ROLES:
        np.testing.assert_array_equal(found[role], split[role])


@pytest.mark.parametrize("n", [22, 24])
def test_the_split_of_other_data_is_refused(tmp_path, n):
    splits.save(tmp_path, splits.split_prompts(np.arange(23), 6), 6)
    message = f"expected each of {n} prompts once; this split belongs to another data set: run step"
    with pytest.raises(InputError, match=message):
        splits.load(tmp_path, n)


def test_a_split_with_a_prompt_on_two_sides_is_refused(tmp_path):
    split = splits.split_prompts(np.arange(20), 6)
    split["calibration"][0] = split["held_out"][0]
    splits.save(tmp_path, split, 6)
    with pytest.raises(InputError, match="expected each of 20 prompts once"):
        splits.load(tmp_path, 20)


def test_no_split_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"prompt_split\.json not found; it is written by step 5"):
        splits.load(tmp_path, 20)


# -------------------------------------------------------------------------------------------- seeds


def test_streams_are_told_apart_by_seed_and_names():
    names = [("a",), ("b",), ("a", "b"), ("b", "a"), ("a", 1), ("a", 2), ("ab",)]
    draws = {(seed, *name): seeds.rng(seed, *name).random() for seed in (0, 6) for name in names}
    assert len(set(draws.values())) == len(draws)
    assert len({seeds.torch_seed(seed, *name) for seed in (0, 6) for name in names}) == len(draws)


def test_streams_repeat_and_torch_seeds_fit_torch():
    assert seeds.rng(6, "a", 3).bytes(64) == seeds.rng(6, "a", 3).bytes(64)
    found = [seeds.torch_seed(6, "member", i) for i in range(200)]
    assert found == [seeds.torch_seed(6, "member", i) for i in range(200)]
    assert len(set(found)) == 200 and all(0 <= seed < 2**63 for seed in found)
