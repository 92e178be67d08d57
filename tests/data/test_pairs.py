"""pairs.py: published values of the annotator, ranks from rewards, and the pairs that are drawn."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardlib.data import pairs
from rewardlib.errors import InputError

# Unsorted rewards: the ranks of the columns are 2 0 3 1 and 1 3 0 2.
REWARDS = np.array([[3.0, 1, 4, 2], [0.2, 0.4, 0.1, 0.3]])


def rng(seed=0):
    return np.random.default_rng(seed)


def built(rewards, folds=None, **changed):
    options = {
        "pairing": "xprompt",
        "consider_first_n": 2,
        "n_pairs": 3,
        "quality": -1.0,
        "scale": 1.0,
        "rng": rng(),
    }
    folds = np.zeros(len(rewards), int) if folds is None else folds
    return pairs.build(rewards, folds, **{**options, **changed})


# ---------------------------------------------------------------------------------------- annotator


@pytest.mark.parametrize(
    ("beta_s_squared", "quality"),
    [(1, 0.6749), (2, 0.7251), (4, 0.7781), (10, 0.8428)],
    ids=["1", "2", "4", "10"],
)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_annotation_quality_is_the_published_one(beta_s_squared, quality, scale):
    """E[sigmoid(beta |dr|)] for dr ~ N(0, s^2), integrated over the probabilities of `annotate`."""
    z = np.linspace(0, 12, 20_001)
    density = np.exp(-z * z / 2)
    beta, s = 2.0, np.sqrt(beta_s_squared) / 2.0
    _, probability = pairs.annotate(z * s * scale, beta, scale, rng())
    assert np.trapezoid(probability * density) / np.trapezoid(density) == pytest.approx(
        quality, abs=1.5e-4
    )


@pytest.mark.parametrize(
    ("quality", "error"), [(0.5, 0.369), (1, 0.275), (3, 0.122), (5, 0.076), (10, 0.039)], ids=str
)
def test_label_error_on_standard_normal_rewards(quality, error):
    rewards = rng(1).standard_normal((2, 200_000))
    difference = rewards[0] - rewards[1]
    labels, probability = pairs.annotate(difference, quality, 1.0, rng())
    assert np.mean((labels == 1) != (difference > 0)) == pytest.approx(error, abs=0.0035)
    assert np.minimum(probability, 1 - probability).mean() == pytest.approx(error, abs=0.0025)


def test_probabilities_are_of_side_0_and_turn_with_the_sides():
    difference = np.array([2.0, -2, 0, 1e4, -1e4])
    labels, probability = pairs.annotate(difference, 3.0, 2.0, rng())
    np.testing.assert_allclose(
        probability, [1 / (1 + np.exp(-3)), 1 / (1 + np.exp(3)), 0.5, 1, 0], atol=1e-15
    )
    assert labels[3:].tolist() == [1, 0]
    np.testing.assert_allclose(
        pairs.annotate(-difference, 3.0, 2.0, rng())[1], 1 - probability, atol=1e-15
    )


def test_quality_0_is_a_coin_and_below_0_the_golden_order():
    difference = rng().standard_normal(20_000)
    labels, probability = pairs.annotate(difference, 0.0, 1.0, rng(1))
    assert (probability == 0.5).all() and labels.mean() == pytest.approx(0.5, abs=0.015)
    labels, probability = pairs.annotate(difference, -1.0, 1.0, rng(1))
    np.testing.assert_array_equal(labels, difference > 0)
    np.testing.assert_array_equal(probability, labels)


# --------------------------------------------------------------------------------------- candidates


def test_ranks_come_from_the_rewards_not_from_the_file_order():
    assert pairs.candidates(REWARDS, -1).tolist() == [[1, 2], [2, 1]]
    assert pairs.candidates(REWARDS, -2).tolist() == [[3, 0], [0, 3]]
    assert pairs.candidates(REWARDS, 2).tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(("consider_first_n", "ranks"), [(-1, (0, 9)), (-2, (4, 5))])
def test_diverse_and_similar_of_ten_are_the_published_ranks(consider_first_n, ranks):
    rewards = np.array([rng(seed).permutation(10) for seed in range(30)]).astype(float)
    chosen = pairs.candidates(rewards, consider_first_n)
    assert [tuple(row[at]) for row, at in zip(rewards, chosen, strict=True)] == [ranks] * 30


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_diverse_and_similar_are_two_responses_whatever_k(k):
    rewards = rng().permuted(np.tile(np.arange(k, dtype=float), (6, 1)), axis=1)
    by_rank = np.argsort(rewards, axis=1)
    assert pairs.candidates(rewards, -1).tolist() == by_rank[:, [0, k - 1]].tolist()
    middle = pairs.candidates(rewards, -2)
    ranks = np.take_along_axis(rewards, middle, 1)
    assert (np.diff(ranks) == 1).all() and np.abs(ranks.mean(1) - (k - 1) / 2).max() <= 0.5


# -------------------------------------------------------------------------- variance of the rewards


def test_the_share_between_prompts_by_hand():
    """The variance within prompts is 2; the means 1 and 5 have variance 8.

    Of these 8, 2 / 2 comes from within prompts: 7 / (7 + 2) lies between prompts.
    """
    rewards = np.array([[0.0, 2], [4, 6]])
    assert pairs.between_prompt_share(rewards) == pytest.approx(7 / 9)
    assert pairs.between_prompt_share(100 - 5 * rewards[:, ::-1]) == pytest.approx(7 / 9)


def test_the_share_between_prompts_lies_between_0_and_1():
    assert pairs.between_prompt_share(np.array([[0.0, 2], [2, 0], [1, 1]])) == 0
    assert pairs.between_prompt_share(np.array([[1.0, 1], [2, 2]])) == 1
    assert pairs.between_prompt_share(np.ones((3, 4))) == 0


def test_the_share_between_prompts_is_that_of_the_population():
    rewards = np.sqrt(0.3) * rng().standard_normal((8000, 1)) + np.sqrt(0.7) * rng(
        1
    ).standard_normal((8000, 4))
    assert pairs.between_prompt_share(rewards) == pytest.approx(0.3, abs=0.02)


# -------------------------------------------------------------------------------------- same prompt


@given(st.integers(1, 5), st.integers(2, 6), st.data())
@settings(deadline=None)
def test_same_prompt_pairs_are_different_unordered_and_within_the_pool(n, size, data):
    n_pairs = data.draw(st.integers(1, size * (size - 1) // 2))
    pool = 10 + np.tile(np.arange(size), (n, 1))
    prompts, responses = pairs.same_prompt(pool, n_pairs, rng(data.draw(st.integers(0, 99))))
    assert prompts.tolist() == [[p, p] for p in range(n) for _ in range(n_pairs)]
    assert np.isin(responses, pool).all()
    for p in range(n):
        own = {frozenset(pair) for pair in responses[prompts[:, 0] == p].tolist()}
        assert len(own) == n_pairs and all(len(pair) == 2 for pair in own)


def test_all_45_pairs_of_ten_responses_once_each():
    _, responses = pairs.same_prompt(np.tile(np.arange(10), (3, 1)), 45, rng())
    expected = sorted(combinations(range(10), 2))
    for own in responses.reshape(3, 45, 2):
        assert sorted(tuple(sorted(pair)) for pair in own.tolist()) == expected


def test_same_prompt_pairs_are_drawn_evenly():
    _, responses = pairs.same_prompt(np.tile(np.arange(4), (6000, 1)), 2, rng())
    counts = np.unique(np.sort(responses, 1), axis=0, return_counts=True)[1]
    assert len(counts) == 6
    np.testing.assert_allclose(counts, 2000, atol=150)


@pytest.mark.parametrize(
    ("consider_first_n", "most", "size"), [(2, 45, 10), (-1, 1, 2), (-2, 1, 2)]
)
def test_too_many_same_prompt_pairs_are_refused_with_the_maximum(consider_first_n, most, size):
    rewards = rng().standard_normal((5, 10))
    options = {"pairing": "sameprompt", "consider_first_n": consider_first_n}
    assert len(built(rewards, n_pairs=most, **options).labels) == 5 * most
    message = f"expected at most {most} same-prompt pairs from {size} responses, found {most + 1}"
    with pytest.raises(InputError, match=message):
        built(rewards, n_pairs=most + 1, **options)


# ------------------------------------------------------------------------------------- cross prompt


@given(st.lists(st.integers(2, 7), min_size=1, max_size=3), st.integers(1, 12), st.integers(0, 99))
@settings(deadline=None)
def test_cross_prompt_pairs_join_different_prompts_of_one_fold_each_once_a_side(
    sizes, n_pairs, seed
):
    """The pool is so large that no pair comes twice by chance."""
    folds = rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    pool = np.tile(7 + np.arange(10_000), (len(folds), 1))
    prompts, responses = pairs.cross_prompt(pool, folds, n_pairs, rng(seed))
    assert prompts.shape == responses.shape == (len(folds) * n_pairs, 2)
    assert (prompts[:, 0] != prompts[:, 1]).all()
    np.testing.assert_array_equal(folds[prompts[:, 0]], folds[prompts[:, 1]])
    assert responses.min() >= 7 and responses.max() < 10_007
    for turn in prompts.reshape(n_pairs, len(folds), 2):
        for side in turn.T:
            assert sorted(side) == list(range(len(folds)))


@pytest.mark.parametrize(
    ("n", "size", "n_pairs"), [(2, 4, 3), (3, 1, 1), (4, 2, 3), (6, 2, 4), (20, 1, 5), (20, 2, 30)]
)
def test_no_pair_comes_twice_in_either_order(n, size, n_pairs):
    """The pools are so small that pairs and mirrored pairs would often repeat by chance."""
    pool, folds = np.tile(np.arange(size), (n, 1)), np.zeros(n, int)
    for seed in range(5):
        prompts, responses = pairs.cross_prompt(pool, folds, n_pairs, rng(seed))
        sides = np.stack([prompts, responses], -1).tolist()
        assert len({frozenset(map(tuple, pair)) for pair in sides}) == n * n_pairs
        assert (prompts[:, 0] != prompts[:, 1]).all()
        for turn in prompts.reshape(n_pairs, n, 2):
            assert sorted(turn[:, 0]) == list(range(n))


def test_more_cross_prompt_pairs_than_there_are_is_refused():
    """Four prompts with two responses have 24 pairs; 7 rounds would need 28."""
    with pytest.raises(
        InputError, match="7 pairs for each of 4 prompts could not all be made different"
    ):
        pairs.cross_prompt(np.tile([0, 1], (4, 1)), np.zeros(4, int), 7, rng())


def test_cross_prompt_responses_are_drawn_evenly_from_the_pool():
    pool = np.tile([0, 2, 7], (3000, 1))
    _, responses = pairs.cross_prompt(pool, np.zeros(3000, int), 2, rng())
    values, counts = np.unique(responses, return_counts=True)
    assert values.tolist() == [0, 2, 7]
    np.testing.assert_allclose(counts, 4000, atol=200)


def test_a_prompt_alone_in_its_fold_is_refused():
    with pytest.raises(InputError, match="expected at least 2 prompts in a fold, found 1"):
        built(rng().standard_normal((3, 4)), np.array([0, 1, 1]))


# -------------------------------------------------------------------------------------------- build


@pytest.mark.parametrize("pairing", ["xprompt", "sameprompt"])
def test_labels_say_which_side_won_and_sides_are_random(pairing):
    rewards = rng(1).standard_normal((400, 6))
    annotated = built(rewards, np.arange(400) % 5, pairing=pairing)
    gain = rewards[tuple(np.stack([annotated.prompts, annotated.responses])[:, :, 0])]
    gain -= rewards[tuple(np.stack([annotated.prompts, annotated.responses])[:, :, 1])]
    np.testing.assert_array_equal(annotated.reward_diff, gain)
    np.testing.assert_array_equal(annotated.labels, gain > 0)
    assert annotated.label_error == 0 and annotated.n_equal == 0 and len(annotated.labels) == 1200
    assert annotated.labels.mean() == pytest.approx(0.5, abs=0.05)
    np.testing.assert_array_equal(annotated.folds, annotated.prompts[:, 0] % 5)
    np.testing.assert_array_equal(annotated.folds, annotated.prompts[:, 1] % 5)


@pytest.mark.parametrize("pairing", ["xprompt", "sameprompt"])
def test_sides_are_random_where_the_pool_is_sorted_by_reward(pairing):
    rewards = np.sort(rng().standard_normal((600, 10)), axis=1)
    annotated = built(rewards, pairing=pairing, consider_first_n=-1, n_pairs=1)
    assert annotated.labels.mean() == pytest.approx(0.5, abs=0.07)
    assert set(annotated.responses.ravel()) == {0, 9}


@pytest.mark.parametrize("pairing", ["xprompt", "sameprompt"])
def test_diverse_pairs_differ_more_than_random_and_similar_ones(pairing):
    rewards = rng().standard_normal((300, 10))
    gaps = [
        np.abs(
            built(rewards, pairing=pairing, consider_first_n=first, n_pairs=1).reward_diff
        ).mean()
        for first in (-2, 2, -1)
    ]
    assert gaps == sorted(gaps) and gaps[2] > 1.5 * gaps[1]


def test_same_prompt_rows_hold_no_pair_twice_nor_its_mirror():
    annotated = built(rng().standard_normal((20, 5)), pairing="sameprompt", n_pairs=10)
    rows = [
        (p, frozenset(pair))
        for (p, _), pair in zip(
            annotated.prompts.tolist(), annotated.responses.tolist(), strict=True
        )
    ]
    assert len(set(rows)) == len(rows) == 200


def test_the_label_error_counts_labels_against_the_golden_order():
    annotated = pairs.Pairs(
        None, None, np.array([1.0, 0, 1, 0]), None, np.array([2.0, -1, -3, -1]), None, 0
    )
    assert annotated.label_error == 0.25
    noisy = built(rng().standard_normal((3000, 4)), quality=1.0, n_pairs=2)
    assert noisy.label_error == pytest.approx(0.275, abs=0.02)


def test_the_scale_divides_the_differences():
    rewards = rng().standard_normal((50, 4))
    small, large = built(rewards, quality=2.0), built(100 * rewards, quality=2.0, scale=100.0)
    np.testing.assert_allclose(large.probability, small.probability, rtol=1e-12)
    np.testing.assert_array_equal(large.labels, small.labels)


def test_equal_rewards_are_left_out_and_counted():
    """All pairs of 0, 0, 1: one of three is a tie."""
    annotated = built(np.tile([0.0, 0, 1], (7, 1)), pairing="sameprompt", n_pairs=3)
    assert annotated.n_equal == 7 and len(annotated.labels) == 14
    assert np.abs(annotated.reward_diff).tolist() == [1] * 14
    assert (
        len(annotated.prompts)
        == len(annotated.responses)
        == len(annotated.probability)
        == len(annotated.folds)
        == 14
    )


@pytest.mark.parametrize("pairing", ["xprompt", "sameprompt"])
def test_one_reward_everywhere_is_refused(pairing):
    with pytest.raises(InputError, match="both sides of all 12 pairs have the same reward"):
        built(np.full((4, 3), 0.1), pairing=pairing)


def test_one_generator_state_gives_one_set_of_pairs():
    rewards = rng().standard_normal((20, 5))
    a, b, other = (built(rewards, quality=1.0, rng=rng(seed)) for seed in (3, 3, 4))
    for name in ("prompts", "responses", "labels", "probability"):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes()
    assert a.responses.tobytes() != other.responses.tobytes()
