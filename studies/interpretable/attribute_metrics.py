"""Metrics of attribute scores, with 95 % intervals from resampling prompts.

Unlike rewardlib.measures, whose arrays hold K responses to each of N prompts, a prompt has any
number of rows here, told by the prompt number of each row, and labels may be missing. All rows of a
resampled prompt are drawn together. An undefined number is null.
"""

import numpy as np

from rewardlib.artifacts import null_if_nan
from rewardlib.measures import intervals, ranking

RANK_RESAMPLES = 500  # fewer than RESAMPLES: each resample ranks all rows again
CELLS = 1 << 22  # resamples x rows, or x prompts, that are held at once


def of_ratings(
    predicted: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    constant: float,
    rng: np.random.Generator,
) -> dict:
    """Errors and rank correlation of predicted ratings (m,) with labels (m,), NaN where missing.

    groups: (m,) prompt numbers; constant: the rating that the baseline predicts throughout, the
    mean of the training labels. r2 is relative to the mean of `labels`. Returns {"n", "mse", "r2",
    "spearman", their "_ci95", "baseline": {"mse", "r2", ...}}.
    """
    known = ~np.isnan(labels)
    predicted, labels, groups = predicted[known], labels[known].astype(float), groups[known]
    names = ("mse", "r2", "baseline mse", "baseline r2")
    if len(labels) < 2:
        metrics = _undefined(names)
    else:
        metrics = _with_ci(
            names, _rating_columns(predicted, labels, constant), groups, _rating_metrics, rng
        )
    rho = spearman(predicted, labels, groups, rng)
    baseline = metrics["baseline mse"] | metrics["baseline r2"]
    return {"n": len(labels)} | metrics["mse"] | metrics["r2"] | rho | {"baseline": baseline}


def _rating_columns(predicted, labels, constant):
    """Columns (m,) whose sums over rows give the metrics of `_rating_metrics`."""
    # Centred: the spread is a difference of two sums, which cancels for labels far from 0.
    centred = labels - labels.mean()
    errors, constant_errors = (predicted - labels) ** 2, (constant - labels) ** 2
    return [np.ones(len(labels)), errors, constant_errors, centred, centred**2]


def _rating_metrics(sums):
    """[mse, r2, baseline mse, baseline r2] of sums (..., 5) of `_rating_columns`."""
    n, squared, constant_squared, total, squares = sums.T
    spread = squares - total**2 / n
    constant_r2 = 1 - constant_squared / spread
    return [squared / n, 1 - squared / spread, constant_squared / n, constant_r2]


def of_preferences(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    constant: float,
    rng: np.random.Generator,
) -> dict:
    """Log loss and accuracy of logits (m,) of P(response 0 is preferred) on labels (m,) in [0, 1].

    labels: NaN where missing; groups: (m,) prompt numbers; constant: the logit that the baseline
    gives throughout. Labels of 1/2 do not count in the accuracy, and logits of 0 count one half.
    Returns {"n", "log_loss", "accuracy", their "_ci95", "baseline": {"log_loss", "accuracy", ...}}.
    """
    known = ~np.isnan(labels)
    logits, labels, groups = logits[known], labels[known].astype(float), groups[known]
    names = ("log_loss", "accuracy", "baseline log_loss", "baseline accuracy")
    if not len(labels):
        metrics = _undefined(names)
    else:
        columns = _preference_columns(logits, labels, constant)
        metrics = _with_ci(names, columns, groups, _preference_metrics, rng)
    baseline = metrics["baseline log_loss"] | metrics["baseline accuracy"]
    return {"n": len(labels)} | metrics["log_loss"] | metrics["accuracy"] | {"baseline": baseline}


def _preference_columns(logits, labels, constant):
    """Columns (m,) whose sums over rows give the metrics of `_preference_metrics`."""
    side = np.sign(labels - 0.5)  # 1 where response 0 is preferred, -1 where response 1 is
    columns = [np.ones(len(labels)), side**2]
    for z in (logits, np.full(len(labels), constant)):
        columns += [np.logaddexp(0, z) - labels * z, side**2 * (0.5 + 0.5 * side * np.sign(z))]
    return columns


def _preference_metrics(sums):
    """[log loss, accuracy, baseline log loss, baseline accuracy] of sums (..., 6)."""
    n, decided, loss, right, constant_loss, constant_right = sums.T
    return [loss / n, right / decided, constant_loss / n, constant_right / decided]


def spearman(a: np.ndarray, b: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> dict:
    """{"spearman", "spearman_ci95"} of a and b (m,), with average ranks for ties.

    groups: (m,) prompt numbers. The rows of every resample are ranked among themselves.
    """
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return _entry("spearman", np.nan, [np.nan])
    group = np.unique(groups, return_inverse=True)[1]
    n_groups, step = group.max() + 1, max(1, CELLS // len(a))
    blocks = [_tie_blocks(x) for x in (a, b)]
    resampled = []
    for start in range(0, RANK_RESAMPLES, step):
        n_resamples = min(step, RANK_RESAMPLES - start)
        weights_Bm = intervals.resample_weights(n_groups, rng, n_resamples)[:, group]
        x, y = (_weighted_ranks(weights_Bm, *block) for block in blocks)
        n = weights_Bm.sum(1, keepdims=True)
        x, y = (ranks - (weights_Bm * ranks).sum(1, keepdims=True) / n for ranks in (x, y))
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.sqrt((weights_Bm * x * x).sum(1) * (weights_Bm * y * y).sum(1))
            resampled.append((weights_Bm * x * y).sum(1) / spread)
    rho = ranking.global_spearman(np.asarray(a, float), np.asarray(b, float))
    return _entry("spearman", rho, np.concatenate(resampled))


def _tie_blocks(x):
    """(sorting order, start of each run of equal values in this order, run of each row)."""
    order = np.argsort(x, kind="stable")
    is_first = np.r_[True, np.diff(x[order]) != 0]
    run = np.empty(len(x), int)
    run[order] = np.cumsum(is_first) - 1
    return order, np.flatnonzero(is_first), run


def _weighted_ranks(weights, order, starts, run):
    """Average ranks (B, m), up to a constant, where row i counts weights[:, i] times."""
    mass = np.add.reduceat(weights[:, order].astype(float), starts, axis=1)
    return (np.cumsum(mass, axis=1) - mass / 2)[:, run]


def _with_ci(names, columns, groups, metrics_of, rng):
    """{name: entry} of the metrics that metrics_of() computes from sums of `columns` over rows.

    metrics_of: (..., C) sums -> one array for each name. Rows are summed by prompt first, so that a
    resample costs one product with a matrix of as many rows as there are prompts.
    """
    group = np.unique(groups, return_inverse=True)[1]
    sums_GC = np.stack([np.bincount(group, column) for column in columns], 1)
    step, resampled = max(1, CELLS // len(sums_GC)), []
    with np.errstate(invalid="ignore", divide="ignore"):
        for start in range(0, intervals.RESAMPLES, step):
            n_resamples = min(step, intervals.RESAMPLES - start)
            weights_BG = intervals.resample_weights(len(sums_GC), rng, n_resamples)
            resampled.append(np.stack(metrics_of(weights_BG @ sums_GC), 1))
        values = np.array(metrics_of(sums_GC.sum(0)))
    resampled = np.concatenate(resampled)
    return {
        name: _entry(name.split()[-1], values[i], resampled[:, i]) for i, name in enumerate(names)
    }


def _undefined(names):
    return {name: _entry(name.removeprefix("baseline "), np.nan, [np.nan]) for name in names}


def _entry(name, value, resampled):
    """{name: value, name_ci95: [low, high]} as JSON holds it."""
    resampled = np.asarray(resampled)[np.isfinite(resampled)]
    low, high = np.nan, np.nan
    if len(resampled) and np.isfinite(value):
        low, high = np.percentile(resampled, [2.5, 97.5])
    return {name: null_if_nan(value), f"{name}_ci95": [null_if_nan(low), null_if_nan(high)]}
