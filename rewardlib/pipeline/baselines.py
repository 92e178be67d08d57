"""Baselines beside every result: random scores, a constant, response length, a linear probe."""

import numpy as np

from rewardlib import seeds
from rewardlib.data.embeddings import Responses
from rewardlib.measures import ranking
from rewardlib.measures.scale import scale_metrics
from rewardlib.models import solvers
from rewardlib.models.solvers import STRENGTHS


def fit_linear_probe(
    rows: np.ndarray, pairs: np.ndarray, labels: np.ndarray, folds: np.ndarray
) -> np.ndarray:
    """Weights (D,) of a linear Bradley-Terry model with a ridge penalty and no intercept.

    rows: (R, D) float32; pairs: (M, 2) row numbers; labels: (M,) 1 where side 0 was preferred, else
    0; folds: (M,) fold of each pair. The penalty is the one of STRENGTHS with the lowest loss on
    the first fold; then all pairs are fitted. Pair differences are never stored.
    """
    pairs, held, best = np.asarray(pairs), folds == folds.min(), 0
    penalties = np.multiply(STRENGTHS, max(solvers.moments(rows)[1], 1e-12))
    if not held.all():
        logits_SM = solvers.held_out_logits(
            solvers.fit_bt, rows, pairs, labels, folds, [folds.min()], penalties
        )[:, held]
        best = int(np.argmin(solvers.logistic_loss(logits_SM, labels[held]).sum(1)))
    return solvers.fit_bt(rows, pairs, labels, penalties[best] * len(pairs))[0]


def scores(
    responses: Responses, prompts: np.ndarray, probe: np.ndarray, constant: float, seed: int
) -> dict[str, np.ndarray]:
    """{baseline: scores (n, K)} of the responses to n prompts.

    probe: (n, K) scores of the linear probe; constant: score of mean_reward for every response.
    "length" is there only if the lengths of the responses are known.
    """
    shape = len(prompts), responses.shape[1]
    by_baseline = {
        "random": seeds.rng(seed, "random scorer").random(shape),
        "mean_reward": np.full(shape, constant),
    }
    if responses.lengths is not None:
        by_baseline["length"] = responses.lengths[prompts]
    return by_baseline | {"linear_probe": probe}


def evaluate(
    responses: Responses,
    prompts: np.ndarray,
    probe: np.ndarray,
    constant: float,
    seed: int,
    weights: np.ndarray,
) -> dict[str, dict]:
    """{baseline: ranking metrics}, with scale metrics for mean_reward too.

    Arguments as in `scores`; weights: (B, n) resamples of the prompts, for the intervals.
    """
    golden = responses.rewards[prompts]
    by_baseline = scores(responses, prompts, probe, constant, seed)
    metrics = {
        name: ranking.ranking_metrics(values, golden, weights)
        for name, values in by_baseline.items()
    }
    metrics["mean_reward"] |= scale_metrics(by_baseline["mean_reward"], golden, weights)
    return metrics
