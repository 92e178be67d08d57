"""Intervals over prompts: resampling by hand, coverage, paired differences."""

import math

import numpy as np
import pytest
from measure_data import weights_for

from rewardlib.measures import intervals


def test_resamples_draw_n_prompts_from_n_and_repeat_under_one_seed():
    weights = weights_for(7)
    assert weights.shape == (200, 7)
    assert weights.sum(1).tolist() == [7] * 200
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.25)
    assert weights.max() > 2
    np.testing.assert_array_equal(weights, weights_for(7))
    assert (weights != weights_for(7, seed=1)).any()


def test_resamples_in_blocks_are_those_in_one_piece(monkeypatch):
    """Weights take one byte per prompt and resample; only one block is in float64 at a time."""
    weights, values = weights_for(30, 201), np.random.default_rng(1).standard_normal((30, 3))
    assert weights.dtype == np.uint8
    sums = intervals.resampled_sums(values, weights)
    np.testing.assert_allclose(sums, weights.astype(float) @ values)
    found = intervals.paired_difference(
        values[:, 0] / 3, 0 * values[:, 1], weights, np.random.default_rng(2)
    )
    # blocks of 8 resamples of 30 prompts; the last block has one resample
    monkeypatch.setattr(intervals, "CELLS", 250)
    np.testing.assert_allclose(intervals.resampled_sums(values, weights), sums)
    again = intervals.paired_difference(
        values[:, 0] / 3, 0 * values[:, 1], weights, np.random.default_rng(2)
    )
    assert again["p_value"] == found["p_value"] and 0 < found["p_value"] < 1
    monkeypatch.setattr(intervals, "CELLS", 7)  # fewer cells than prompts: one resample at a time
    np.testing.assert_allclose(intervals.resampled_sums(values, weights), sums)


def test_the_interval_covers_the_truth_95_times_in_100():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        values = rng.exponential(1.0, 80)
        mean, (low, high) = intervals.mean_with_ci(values, intervals.resample_weights(80, rng, 500))
        assert low < mean < high and mean == pytest.approx(values.mean())
        covered += low <= 1 <= high
    assert 0.90 <= covered / 200 <= 0.98


def test_prompts_without_a_value_are_left_out_of_mean_and_interval():
    values = np.array([1.0, np.nan, 3, np.nan])
    weights = np.array([[1, 1, 1, 1], [4, 0, 0, 0], [0, 1, 3, 0], [0, 2, 0, 2]], np.float32)
    mean, ci = intervals.mean_with_ci(values, weights)
    assert mean == 2
    np.testing.assert_allclose(ci, np.percentile([2, 1, 3], [2.5, 97.5]))
    nothing, bounds = intervals.mean_with_ci(np.full(4, np.nan), weights)
    assert math.isnan(nothing) and np.isnan(bounds).all()


def test_a_ratio_is_of_sums_not_a_mean_of_ratios():
    value, ci = intervals.ratio_with_ci(
        np.array([1.0, 9]), np.array([1.0, 3]), np.array([[1, 1], [2, 0], [0, 2]])
    )
    assert value == 2.5
    np.testing.assert_allclose(ci, np.percentile([2.5, 1, 3], [2.5, 97.5]))


def test_identical_inputs_differ_by_nothing():
    values = np.random.default_rng(0).random(30)
    found = intervals.paired_difference(values, values, weights_for(30), np.random.default_rng(1))
    assert found == {"difference": 0, "ci95": (0, 0), "p_value": 1}


def test_a_clear_difference_has_a_small_p_value_and_is_turned_by_swapping():
    rng = np.random.default_rng(0)
    b = rng.random(40)
    a = b + 0.1 + 0.1 * rng.normal(size=40)
    found = intervals.paired_difference(a, b, weights_for(40), np.random.default_rng(1))
    assert found["p_value"] == 1 / (1 + intervals.RESAMPLES), (
        "never 0: the data are one of the sign patterns"
    )
    assert 0 < found["ci95"][0] < found["difference"] < found["ci95"][1]
    turned = intervals.paired_difference(b, a, weights_for(40), np.random.default_rng(1))
    assert turned["difference"] == pytest.approx(-found["difference"])
    assert turned["p_value"] == found["p_value"]


def test_the_p_value_is_that_of_all_sign_flips():
    """Undefined prompts are left out; the nine others have 512 equally likely sign patterns."""
    difference = np.array([0.4, -0.1, 0.3, 0.2, np.nan, -0.2, 0.5, 0.1, 0.05, 0.3])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 9)).reshape(9, -1)
    d = difference[np.isfinite(difference)]
    exact = np.mean(np.abs(d @ signs) >= abs(d.sum()) - 1e-12)
    found = intervals.paired_difference(
        difference, np.zeros(10), weights_for(10), np.random.default_rng(0)
    )
    assert found["difference"] == pytest.approx(d.mean())
    assert found["p_value"] == pytest.approx(exact, abs=0.02)
    assert exact > 0.03
