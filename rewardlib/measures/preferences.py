"""Metrics of recorded preferences: accuracy, negative log-likelihood, Brier score, calibration.

One value per pair, (n,): `difference` is score(preferred response) - score(other response),
`log_odds` are the predicted log-odds of the recorded choice.
"""

import numpy as np
from scipy.special import expit

from rewardlib.measures import intervals
from rewardlib.measures.scale import BINS


def preference_losses(log_odds: np.ndarray) -> dict[str, np.ndarray]:
    """{"nll", "brier"}: losses (n,) of P = sigmoid(log_odds), the probability of the choices.

    nll: -log P, in nats; brier: (1 - P) ** 2. A model with P = 0.5 everywhere has nll log 2 and
    brier 0.25. Neither loss depends on which response of a pair comes first.
    """
    log_odds = np.asarray(log_odds, float)
    return {"nll": np.logaddexp(0, -log_odds), "brier": expit(-log_odds) ** 2}


def preference_reliability(log_odds: np.ndarray, bins: int = BINS) -> dict:
    """Predicted and observed preferences in equally wide bins of the probability.

    log_odds: (n,) of the recorded choice. Each pair enters twice, as (P, 1) and with its sides
    swapped as (1 - P, 0), so that the result does not depend on which response comes first. ece is
    the mean over pairs, and mce the maximum over the bins that are not empty, of |mean P in the bin
    - share preferred in the bin|. ece_if_calibrated is the expected ece of calibrated probabilities
    with these values: sampling alone leaves a gap of sqrt(2 sum P(1 - P) / pi) / count in a bin, in
    the normal approximation for independent pairs.
    """
    probability = expit(np.concatenate([log_odds, np.negative(log_odds)]))
    preferred = np.repeat([1.0, 0.0], len(log_odds))
    bin_of = np.minimum((probability * bins).astype(int), bins - 1)
    bin_of = np.unique(bin_of, return_inverse=True)[1]  # renumbers the bins that are not empty
    count = np.bincount(bin_of)
    predicted = np.bincount(bin_of, probability) / count
    observed = np.bincount(bin_of, preferred) / count
    gap = np.abs(predicted - observed)
    noise = np.sqrt(2 / np.pi * np.bincount(bin_of, probability * (1 - probability)))
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


def preference_accuracy(
    difference: np.ndarray,
    prompts: np.ndarray,
    weights: np.ndarray,
    subset: np.ndarray | None = None,
) -> dict:
    """Share of the pairs whose recorded choice has the higher score, as a JSON-able dict.

    Equal scores count one half. difference: (n,) score of the recorded choice minus score of the
    other response; prompts: (n,) numbers 0 ... G - 1; weights: (B, G) resamples of the prompts, see
    `resample_weights`; subset: (n,) names for the accuracy by subset, or None.
    """
    n_prompts = weights.shape[1]
    correct = 0.5 + 0.5 * np.sign(difference)

    def accuracy(mask):
        n_correct = np.bincount(prompts[mask], correct[mask], n_prompts)
        count = np.bincount(prompts[mask], np.ones(mask.sum()), n_prompts)
        ratio, ci = intervals.ratio_with_ci(n_correct, count, weights)
        counts = {"n_pairs": int(mask.sum()), "n_prompts": int((count > 0).sum())}
        return counts | intervals.entry("accuracy", ratio, ci)

    result = accuracy(np.ones(len(correct), bool))
    if subset is not None:
        result["by_subset"] = {str(name): accuracy(subset == name) for name in np.unique(subset)}
    return result


def preference_metrics(log_odds: np.ndarray, prompts: np.ndarray, weights: np.ndarray) -> dict:
    """NLL and Brier score with 95 % intervals, and `preference_reliability`, as a JSON-able dict.

    log_odds: (n,) of the recorded choice; prompts and weights as in `preference_accuracy`.
    """
    n_prompts = weights.shape[1]
    count, result = np.bincount(prompts, minlength=n_prompts).astype(float), {}
    for name, losses in preference_losses(log_odds).items():
        loss_by_prompt = np.bincount(prompts, losses, n_prompts)
        mean, ci = intervals.ratio_with_ci(loss_by_prompt, count, weights)
        result |= intervals.entry(name, mean, ci)
    return result | preference_reliability(log_odds)
