"""From score differences to probabilities of the recorded choice: temperature and isotonic map.

A difference is score(preferred) - score(other), in logits. One map is a temperature,
p = sigmoid(d / T) (Guo et al., arXiv 1706.04599), the other a centred isotonic map fitted to every
pair and its mirror image. Both are odd, p(-d) = 1 - p(d), so that the order in which two responses
are shown does not matter.
"""

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit

from rewardlib import calibration


def fit_temperature(difference: np.ndarray) -> float:
    """Temperature T > 0 that minimises the NLL of sigmoid(difference / T) over pairs (m,).

    inf where the differences are not positive on average: then 1/2 is the best probability for
    every pair. 1.0 where all differences are 0. Where all, or nearly all, differences are positive,
    the optimum is 0, a certainty that m pairs cannot show: a difference of mean size then gets odds
    of m + 1 to 1.
    """
    difference = np.asarray(difference, float)
    size = np.abs(difference).mean()
    if size == 0:
        return 1.0
    if difference.mean() <= 0:
        return math.inf

    def slope(inverse):
        return np.mean(difference / size * expit(-inverse * difference / size))

    steepest = math.log(len(difference) + 1)
    return float(size / (steepest if slope(steepest) >= 0 else brentq(slope, 0, steepest)))


def fit_map(difference: np.ndarray) -> dict:
    """Centred isotonic map of differences (m,) to the probability of the recorded choice.

    Fitted to (d, 1) and (-d, 0) for every pair. Returns the map as numbers that JSON can hold.
    """
    mirrored = np.concatenate([difference, np.negative(difference)])
    fitted = calibration.make("centred").fit(mirrored, np.repeat([1.0, 0.0], len(difference)))
    return {**calibration.to_numbers(fitted), "n_pairs": len(difference)}


def probability(numbers: dict, difference: np.ndarray) -> np.ndarray:
    """P(first response preferred) from score differences first - second of any shape.

    numbers: the map, from `fit_map`. The probability rises with the difference and adds up to 1
    with that of the swapped pair. It stays 1 / (m + 2) away from 0 and 1, by the rule of
    succession: m calibration pairs cannot show that a choice never happens.
    """
    edge = 1 / (numbers["n_pairs"] + 2)
    return np.clip(calibration.from_numbers(numbers)(np.asarray(difference, float)), edge, 1 - edge)


def calibrated(difference: np.ndarray, temperature: float, numbers: dict) -> dict[str, np.ndarray]:
    """{variant: log-odds (m,) of the recorded choice}.

    The variants are uncalibrated, temperature_scaled and isotonic (by the map `numbers`).
    """
    return {
        "uncalibrated": difference,
        "temperature_scaled": difference / temperature,
        "isotonic": logit(probability(numbers, difference)),
    }


def out_of_fold(difference: np.ndarray, folds: np.ndarray) -> dict[str, np.ndarray]:
    """`calibrated` log-odds of every fold, by the temperature and the map of the other folds.

    difference, folds: (m,).
    """
    by_variant = {}
    for fold in np.unique(folds):
        inside = folds == fold
        rest = difference[~inside]
        in_fold = calibrated(difference[inside], fit_temperature(rest), fit_map(rest))
        for name, log_odds in in_fold.items():
            by_variant.setdefault(name, np.empty(len(difference)))[inside] = log_odds
    return by_variant
