"""Metrics of recorded choices: values by hand, parity with scikit-learn, intervals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from preference_data import rng, strict_json
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from rewardlib.measures import intervals, preferences


def weights_for(n, resamples=200, seed=0):
    return intervals.resample_weights(n, rng(seed), resamples)


# ------------------------------------------------------------------------------------------ metrics


differences = arrays(float, st.integers(2, 30), elements=st.floats(-6, 6))


def test_losses_by_hand():
    found = preferences.preference_losses(np.array([0.0, np.log(3), -np.log(3), 1000.0, -1000.0]))
    np.testing.assert_allclose(found["nll"], [np.log(2), np.log(4 / 3), np.log(4), 0, 1000])
    np.testing.assert_allclose(found["brier"], [1 / 4, 1 / 16, 9 / 16, 0, 1])


@given(differences, st.integers(0, 99))
@settings(deadline=None)
def test_losses_are_scikit_learns_whichever_response_comes_first(log_odds, seed):
    shown = rng(seed).random(len(log_odds)) < 0.5  # the recorded choice is shown second
    label, p = np.where(shown, 0, 1), expit(np.where(shown, -log_odds, log_odds))
    found = preferences.preference_metrics(log_odds, np.arange(len(p)), weights_for(len(p)))
    assert found["nll"] == pytest.approx(log_loss(label, p, labels=[0, 1]))
    assert found["brier"] == pytest.approx(brier_score_loss(label, p, labels=[0, 1]))


def test_reliability_by_hand():
    """Probability 0.9 three times, right twice, and 0.6 once, right.

    The bins at 0.1, 0.4, 0.6 and 0.9 observe 1/3, 0, 1 and 2/3.
    """
    found = preferences.preference_reliability(
        logit(np.array([0.9001, 0.9001, 0.0999, 0.6001])), bins=10
    )
    assert found["bins"]["count"] == [3, 1, 1, 3]
    np.testing.assert_allclose(found["bins"]["predicted"], [0.0999, 0.3999, 0.6001, 0.9001])
    np.testing.assert_allclose(found["bins"]["observed"], [1 / 3, 0, 1, 2 / 3])
    assert found["ece"] == pytest.approx((3 * (0.9001 - 2 / 3) + 1 * 0.3999) / 4)
    assert found["mce"] == pytest.approx(0.3999)


@given(differences)
@settings(deadline=None)
def test_reliability_is_scikit_learns_on_pairs_and_mirror_images(log_odds):
    # Away from the edges of the bins, which the two close on different sides.
    log_odds = log_odds + 1e-3 * math.pi
    p, y = expit(np.concatenate([log_odds, -log_odds])), np.repeat([1, 0], len(log_odds))
    observed, predicted = calibration_curve(y, p, n_bins=20)
    found = preferences.preference_reliability(log_odds)
    np.testing.assert_allclose(found["bins"]["predicted"], predicted)
    np.testing.assert_allclose(found["bins"]["observed"], observed)
    gap = np.abs(observed - predicted)
    assert found["ece"] == pytest.approx(np.average(gap, weights=found["bins"]["count"]))
    assert found["mce"] == pytest.approx(gap.max())


def test_a_certain_model_fills_the_outermost_bins():
    right, wrong = (preferences.preference_reliability(np.full(4, x)) for x in (800.0, -800.0))
    assert (
        right["bins"]["count"] == [4, 4]
        and right["ece"] == right["mce"] == 0
        and wrong["ece"] == wrong["mce"] == 1
    )
    assert preferences.preference_reliability(np.array([800.0, logit(0.97)]))["bins"]["count"] == [
        2,
        2,
    ]


def test_the_error_of_perfect_calibration_is_that_of_labels_drawn_from_the_probabilities():
    p = rng().uniform(0.5, 0.95, size=400)
    drawn = [logit(np.where(rng(i).random(400) < p, p, 1 - p)) for i in range(300)]
    found = [preferences.preference_reliability(x) for x in drawn]
    assert np.mean([f["ece"] for f in found]) == pytest.approx(
        found[0]["ece_if_calibrated"], rel=0.05
    )


def test_accuracy_by_subset_by_hand():
    """Prompt 0 is right and right, prompt 1 wrong and tied, prompt 2 right.

    Subset b is the tie of prompt 1 and prompt 2.
    """
    difference, prompts = np.array([1.0, 2, -1, 0, 3]), np.array([0, 0, 1, 1, 2])
    weights = np.array([[1, 1, 1], [2, 1, 0], [0, 3, 0], [0, 0, 3]])
    found = strict_json(
        preferences.preference_accuracy(
            difference, prompts, weights, np.array(["a", "a", "a", "b", "b"])
        )
    )
    assert (found["accuracy"], found["n_pairs"], found["n_prompts"]) == (0.7, 5, 3)
    np.testing.assert_allclose(
        found["accuracy_ci95"], np.percentile([0.7, 4.5 / 6, 0.25, 1], [2.5, 97.5])
    )
    a, b = found["by_subset"]["a"], found["by_subset"]["b"]
    assert (a["accuracy"], a["n_pairs"], a["n_prompts"]) == (pytest.approx(2 / 3), 3, 2)
    assert (b["accuracy"], b["n_pairs"], b["n_prompts"]) == (0.75, 2, 2)
    np.testing.assert_allclose(b["accuracy_ci95"], np.percentile([0.75, 0.5, 0.5, 1], [2.5, 97.5]))
    assert "by_subset" not in preferences.preference_accuracy(difference, prompts, weights)


def test_intervals_are_over_prompts_not_pairs():
    difference = rng().normal(0.3, 1, size=100)
    alone = preferences.preference_accuracy(difference, np.arange(100), weights_for(100))
    thrice = preferences.preference_accuracy(
        np.repeat(difference, 3), np.repeat(np.arange(100), 3), weights_for(100)
    )
    assert (
        thrice["accuracy_ci95"] == pytest.approx(alone["accuracy_ci95"])
        and thrice["n_pairs"] == 300
    )
    losses = [
        preferences.preference_metrics(
            np.repeat(difference, n), np.repeat(np.arange(100), n), weights_for(100)
        )
        for n in (1, 3)
    ]
    for name in ("nll", "nll_ci95", "brier", "brier_ci95", "ece", "mce"):
        assert losses[0][name] == pytest.approx(losses[1][name]), name
