"""From the scores of several reward models on one scale to one score. Arrays alone; ensembles.py has the models.

mean, worst case (min) and uncertainty-weighted optimisation (uwo): arXiv 2310.02743; lcb is the
lower confidence bound of bandits and Bayesian optimisation.
"""

UWO_LAMBDA = 0.5
LCB_C = 1.0


def aggregate(scores, uwo_lambda=UWO_LAMBDA, lcb_c=LCB_C):
    """{aggregation: (...)} of member scores (E, ...) on one scale.

    mean; min; uwo: mean - uwo_lambda * variance; lcb: mean - lcb_c * standard deviation (both over
    the E members, divided by E); first: the first member alone.
    """
    mean, variance = scores.mean(0), scores.var(0)
    return {
        "mean": mean,
        "min": scores.min(0),
        "uwo": mean - uwo_lambda * variance,
        "lcb": mean - lcb_c * variance**0.5,
        "first": scores[0],
    }
