"""From a score difference to the probability of the recorded choice: a temperature, an isotonic map.

A difference is score(preferred) - score(other), in logits. Both maps are odd, p(-d) = 1 - p(d), so
that the order in which two responses are shown means nothing: one temperature, sigmoid(d / T) (Guo
et al., arXiv 1706.04599), and a centred isotonic map fitted to every pair and its mirror image.
"""

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit

from rewardlib import calibration


def fit_temperature(difference):
    """T > 0 that minimises the NLL of sigmoid(difference / T) over pairs (m,).

    inf where the differences point the wrong way on average: then 1/2 is the best answer
    everywhere. Where (nearly) all are right the optimum is 0, a certainty that m pairs cannot show:
    a difference of mean size then gets the odds m + 1 to 1. 1.0 where all differences are 0.
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


def fit_map(difference):
    """Centred isotonic map of differences (m,) to the probability of the recorded choice, as JSON-able numbers.

    It is fitted to (d, 1) and (-d, 0) of every pair.
    """
    mirrored = np.concatenate([difference, np.negative(difference)])
    fitted = calibration.make("centred").fit(mirrored, np.repeat([1.0, 0.0], len(difference)))
    return {**calibration.to_numbers(fitted), "n_pairs": len(difference)}


def probability(numbers, difference):
    """P(first response preferred) by the map of `fit_map`, from score differences first - second of any shape.

    Rises with the difference and adds to 1 with the swapped pair. Kept 1 / (m + 2) away from 0 and
    1, the rule of succession: m calibration pairs cannot show that a choice never happens.
    """
    edge = 1 / (numbers["n_pairs"] + 2)
    return np.clip(calibration.from_numbers(numbers)(np.asarray(difference, float)), edge, 1 - edge)


def calibrated(difference, temperature, numbers):
    """{variant: (m,) log-odds of the recorded choice}: uncalibrated, after temperature, after the isotonic map."""
    return {
        "uncalibrated": difference,
        "temperature_scaled": difference / temperature,
        "isotonic": logit(probability(numbers, difference)),
    }


def out_of_fold(difference, folds):
    """`calibrated` with temperature and map of every fold fitted on the other folds. difference, folds: (m,)."""
    found = {}
    for fold in np.unique(folds):
        inside = folds == fold
        rest = difference[~inside]
        for name, values in calibrated(
            difference[inside], fit_temperature(rest), fit_map(rest)
        ).items():
            found.setdefault(name, np.empty(len(difference)))[inside] = values
    return found
