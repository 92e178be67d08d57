"""What every result is compared with: a random scorer, one constant, response length, a linear probe on the pairs."""

import numpy as np

from rewardlib import seeds
from rewardlib.measures import ranking
from rewardlib.measures.scale import scale_metrics
from rewardlib.models import solvers
from rewardlib.models.solvers import STRENGTHS


def fit_linear_probe(rows, pairs, labels, folds):
    """Weights (D,) of a linear Bradley-Terry model: logistic loss of (x_0 - x_1) w, ridge penalty, no intercept.

    rows: (R, D) float32; pairs: (M, 2) row numbers; labels: (M,) in {0, 1}; folds: (M,) the
    strength is chosen by the loss on the first fold, then all pairs are fitted. Pair differences
    are never stored.
    """
    pairs, held, best = np.asarray(pairs), folds == folds.min(), 0
    penalties = np.multiply(STRENGTHS, max(solvers.moments(rows)[1], 1e-12))
    if not held.all():
        logits = solvers.held_out_logits(
            solvers.fit_bt, rows, pairs, labels, folds, [folds.min()], penalties
        )[:, held]
        best = int(np.argmin(solvers.logistic_loss(logits, labels[held]).sum(1)))
    return solvers.fit_bt(rows, pairs, labels, penalties[best] * len(pairs))[0]


def scores(responses, prompts, probe, constant, seed):
    """{baseline: (n, K) scores} for n prompts; length only where the lengths of the responses are known.

    probe: (n, K) scores of the linear probe.
    """
    shape = len(prompts), responses.shape[1]
    result = {
        "random": seeds.rng(seed, "random scorer").random(shape),
        "mean_reward": np.full(shape, constant),
    }
    if responses.lengths is not None:
        result["length"] = responses.lengths[prompts]
    return result | {"linear_probe": probe}


def evaluate(responses, prompts, probe, constant, seed, weights):
    """{baseline: ranking metrics}; mean_reward, a constant `constant`, has scale metrics as well."""
    golden = responses.rewards[prompts]
    found = scores(responses, prompts, probe, constant, seed)
    result = {
        name: ranking.ranking_metrics(values, golden, weights) for name, values in found.items()
    }
    result["mean_reward"] |= scale_metrics(found["mean_reward"], golden, weights)
    return result
