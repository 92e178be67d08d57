"""Metrics of recorded choices: accuracy, negative log-likelihood, Brier score, calibration of a probability.

Differences are score(preferred) - score(other), log-odds those of the recorded choice, both (n,)
with one value a pair.
"""

import numpy as np
from scipy.special import expit

from rewardlib.measures import intervals
from rewardlib.measures.scale import BINS


def preference_losses(log_odds):
    """{"nll", "brier"}: (n,) loss of P(recorded choice) = sigmoid(log_odds) on each pair.

    nll: -log P, in nats; brier: (1 - P) ** 2. A chance model has log 2 and 0.25. Swapping a pair
    changes neither.
    """
    log_odds = np.asarray(log_odds, float)
    return {"nll": np.logaddexp(0, -log_odds), "brier": expit(-log_odds) ** 2}


def preference_reliability(log_odds, bins=BINS):
    """Predicted and observed preference in equally wide bins of the probability, over every pair and its mirror image.

    log_odds: (n,) of the recorded choice. A pair enters as (P, 1) and, swapped, as (1 - P, 0), so
    that the result does not depend on which response comes first. ece is the mean over pairs, mce
    the maximum over bins that are not empty, of |bin mean P - bin share preferred|.
    ece_if_calibrated is what ece would be on average if these probabilities were right: n pairs
    leave sqrt(2 sum P(1 - P) / pi) / count in a bin (normal approximation, independent pairs).
    """
    probability = expit(np.concatenate([log_odds, np.negative(log_odds)]))
    preferred = np.repeat([1.0, 0.0], len(log_odds))
    at = np.minimum((probability * bins).astype(int), bins - 1)
    at = np.unique(at, return_inverse=True)[1]  # bins that are not empty
    count = np.bincount(at)
    predicted, observed = np.bincount(at, probability) / count, np.bincount(at, preferred) / count
    gap, noise = (
        np.abs(predicted - observed),
        np.sqrt(2 / np.pi * np.bincount(at, probability * (1 - probability))),
    )
    return {
        "ece": float(count @ gap / count.sum()),
        "mce": float(gap.max()),
        "ece_if_calibrated": float(noise.sum() / count.sum()),
        "bins": {
            "predicted": predicted.tolist(),
            "observed": observed.tolist(),
            "count": count.tolist(),
        },
    }


def preference_accuracy(difference, prompts, weights, subset=None):
    """How often the recorded choice has the higher score, as one JSON-able dict; equal scores count one half.

    difference: (n,) score of the recorded choice minus score of the other; prompts: (n,) numbers 0
    ... G - 1; weights: (B, G) resamples of the prompts, see `resample_weights`; subset: (n,) names
    for accuracy by subset, or None.
    """
    right = 0.5 + 0.5 * np.sign(difference)

    def entry(at):
        numerator, count = (
            np.bincount(prompts[at], x, weights.shape[1]) for x in (right[at], np.ones(at.sum()))
        )
        n = {"n_pairs": int(at.sum()), "n_prompts": int((count > 0).sum())}
        return n | intervals.entry("accuracy", *intervals.ratio_with_ci(numerator, count, weights))

    result = entry(np.ones(len(right), bool))
    if subset is not None:
        result["by_subset"] = {str(name): entry(subset == name) for name in np.unique(subset)}
    return result


def preference_metrics(log_odds, prompts, weights):
    """NLL and Brier score with 95 % intervals, and `preference_reliability`, as one JSON-able dict.

    log_odds: (n,) of the recorded choice; prompts and weights as in `preference_accuracy`.
    """
    count, result = np.bincount(prompts, minlength=weights.shape[1]).astype(float), {}
    for name, losses in preference_losses(log_odds).items():
        result |= intervals.entry(
            name,
            *intervals.ratio_with_ci(
                np.bincount(prompts, losses, weights.shape[1]), count, weights
            ),
        )
    return result | preference_reliability(log_odds)
