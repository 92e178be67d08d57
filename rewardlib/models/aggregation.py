"""Aggregation of the scores of several reward models into one score, on arrays alone.

mean, min (worst case) and uwo (uncertainty-weighted optimisation): arXiv 2310.02743. lcb: the lower
confidence bound of bandits and Bayesian optimisation. scoring.py brings models to one scale first.
"""

import numpy as np

UWO_LAMBDA = 0.5
LCB_C = 1.0


def aggregate(
    scores: np.ndarray, uwo_lambda: float = UWO_LAMBDA, lcb_c: float = LCB_C
) -> dict[str, np.ndarray]:
    """{aggregation: scores (...)} from member scores (E, ...) on one scale.

    mean: mean of the E members; min: lowest member score; uwo: mean - uwo_lambda * variance; lcb:
    mean - lcb_c * standard deviation; first: score of the first member. Variances divide by E.
    """
    mean, variance = scores.mean(0), scores.var(0)
    return {
        "mean": mean,
        "min": scores.min(0),
        "uwo": mean - uwo_lambda * variance,
        "lcb": mean - lcb_c * variance**0.5,
        "first": scores[0],
    }
