"""From a score difference to a probability: a temperature, an isotonic map, out of fold."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from preference_data import rng, strict_json
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from rewardlib.pipeline import preference_maps


@pytest.mark.parametrize(("right", "n"), [(6, 10), (9, 10), (51, 100)])
def test_temperature_by_hand(right, n):
    """All differences are +-2: sigmoid(2 / T) has to be the share that is right."""
    difference = np.where(np.arange(n) < right, 2.0, -2.0)
    assert preference_maps.fit_temperature(difference) == pytest.approx(2 / logit(right / n))


def test_temperature_is_that_of_logistic_regression():
    difference = rng().normal(0.5, 2, size=300)
    both, label = np.concatenate([difference, -difference])[:, None], np.repeat([1, 0], 300)
    slope = (
        LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(both, label).coef_[0, 0]
    )
    assert preference_maps.fit_temperature(difference) == pytest.approx(1 / slope, rel=1e-5)
    assert preference_maps.fit_temperature(1e6 * difference) == pytest.approx(1e6 / slope, rel=1e-5)


def test_temperature_where_there_is_no_optimum():
    assert preference_maps.fit_temperature(np.array([1.0, -2])) == math.inf, (
        "wrong on average: one half everywhere"
    )
    assert preference_maps.fit_temperature(np.zeros(3)) == 1.0
    all_right = np.array([1.0, 2, 3])
    assert expit(2 / preference_maps.fit_temperature(all_right)) == pytest.approx(4 / 5), (
        "odds of 4 to 1 from three pairs"
    )


def test_the_map_by_hand():
    """|d| = 1 is right in one pair of two, |d| = 3 in both.

    With the mirror images, the map is 0 at -3, 1/2 from -1 to 1, and 1 at 3.
    """
    numbers = strict_json(preference_maps.fit_map(np.array([1.0, -1, 3, 3])))
    assert numbers["x"] == pytest.approx([-3, 0, 3]) and numbers["y"] == pytest.approx([0, 0.5, 1])
    found = preference_maps.probability(numbers, np.array([0, 0.6, -0.6, 1.8, 3, 50, -50]))
    np.testing.assert_allclose(found, [0.5, 0.6, 0.4, 0.8, 5 / 6, 5 / 6, 1 / 6])


@given(arrays(float, st.integers(1, 40), elements=st.floats(-1e3, 1e3).map(lambda x: round(x, 3))))
@settings(deadline=None)
def test_the_map_is_odd_and_rises_and_does_not_know_which_response_comes_first(difference):
    numbers = strict_json(preference_maps.fit_map(difference))
    grid = np.concatenate([np.linspace(-1100, 1100, 101), difference, np.linspace(-2, 2, 41)])
    grid = np.sort(np.concatenate([grid, -grid]))
    found = preference_maps.probability(numbers, grid)
    np.testing.assert_allclose(found + found[::-1], 1, atol=1e-6)
    assert (np.diff(found) >= 0).all() and preference_maps.probability(
        numbers, 0.0
    ) == pytest.approx(0.5, abs=1e-6)
    edge = 1 / (len(difference) + 2)
    assert found.min() >= edge and found.max() <= 1 - edge


def test_a_map_of_the_truth_is_the_truth():
    gap = rng().normal(size=20_000)
    difference = np.where(rng(1).random(20_000) < expit(3 * gap), gap, -gap)
    numbers = preference_maps.fit_map(difference)
    grid = np.array([0.1, 0.3, 0.6, 1.0])
    np.testing.assert_allclose(
        preference_maps.probability(numbers, grid), expit(3 * grid), atol=0.03
    )
    assert preference_maps.fit_temperature(difference) == pytest.approx(1 / 3, rel=0.05)


def test_scores_that_point_the_wrong_way_say_one_half():
    difference = rng().normal(-1, 0.5, size=50)
    numbers = preference_maps.fit_map(difference)
    np.testing.assert_allclose(preference_maps.probability(numbers, difference), 0.5, atol=1e-4)
    found = preference_maps.calibrated(
        difference, preference_maps.fit_temperature(difference), numbers
    )
    assert (found["temperature_scaled"] == 0).all() and np.abs(found["isotonic"]).max() < 1e-3


def test_no_fold_enters_its_own_calibration():
    difference, folds = rng().normal(0.5, 1, size=60), np.arange(60) % 5
    before = preference_maps.out_of_fold(difference, folds)
    changed = np.where(folds == 2, -7 * difference, difference)
    after = preference_maps.out_of_fold(changed, folds)
    rest = difference[folds != 2]
    np.testing.assert_array_equal(after["uncalibrated"], changed)
    expected = changed / preference_maps.fit_temperature(rest)
    np.testing.assert_array_equal(after["temperature_scaled"][folds == 2], expected[folds == 2])
    expected = logit(preference_maps.probability(preference_maps.fit_map(rest), changed))
    np.testing.assert_array_equal(after["isotonic"][folds == 2], expected[folds == 2])
    for name in ("temperature_scaled", "isotonic"):
        assert (after[name][folds == 1] != before[name][folds == 1]).any()
