"""Metrics of attribute scores: rows with missing labels, any number of them per prompt, intervals over prompts.

metrics.py has those of (N, K) arrays, K responses to each prompt. Here a row belongs to a prompt by
its group number, and a 95 % interval comes from drawing prompts with replacement, all rows of a
prompt together. As in metrics.py an undefined number is null.
"""

import numpy as np

from rewardlib.artifacts import null_if_nan
from rewardlib.measures import intervals, ranking

RANK_RESAMPLES = 500  # each ranks all rows again
CELLS = 1 << 22  # resampled weights that are held at once


def of_ratings(predicted, labels, groups, constant, rng):
    """Errors and rank correlation of predicted ratings (m,) against labels (m,), NaN where missing.

    constant: the rating that the baseline predicts throughout, the mean of the training labels. r2
    is against the mean of these labels. Returns {"n", "mse", "r2", "spearman", their "_ci95",
    "baseline": {"mse", "r2", ...}}.
    """
    known = ~np.isnan(labels)
    predicted, labels, groups = predicted[known], labels[known].astype(float), groups[known]
    names = ("mse", "r2", "baseline mse", "baseline r2")
    if len(labels) < 2:
        found = {name: _entry(name.removeprefix("baseline "), np.nan, [np.nan]) for name in names}
    else:
        centred = labels - labels.mean()
        columns = [
            np.ones(len(labels)),
            (predicted - labels) ** 2,
            (constant - labels) ** 2,
            centred,
            centred**2,
        ]

        def table(sums):
            n, squared, constant_squared, total, squares = sums.T
            spread = squares - total**2 / n
            return [
                squared / n,
                1 - squared / spread,
                constant_squared / n,
                1 - constant_squared / spread,
            ]

        found = _with_ci(names, columns, groups, table, rng)
    rho = spearman(predicted, labels, groups, rng)
    baseline = found["baseline mse"] | found["baseline r2"]
    return {"n": len(labels)} | found["mse"] | found["r2"] | rho | {"baseline": baseline}


def of_preferences(logits, labels, groups, constant, rng):
    """Log loss and accuracy of logits (m,) that side 0 is preferred against labels (m,) in [0, 1], NaN where missing.

    constant: the logit that the baseline gives throughout. Labels of 1/2 are left out of the
    accuracy, logits of 0 count one half. Returns {"n", "log_loss", "accuracy", their "_ci95",
    "baseline": {"log_loss", "accuracy", ...}}.
    """
    known = ~np.isnan(labels)
    logits, labels, groups = logits[known], labels[known].astype(float), groups[known]
    names = ("log_loss", "accuracy", "baseline log_loss", "baseline accuracy")
    if not len(labels):
        found = {name: _entry(name.removeprefix("baseline "), np.nan, [np.nan]) for name in names}
    else:
        side = np.sign(labels - 0.5)
        columns = [np.ones(len(labels)), side**2]
        for z in (logits, np.full(len(labels), constant)):
            columns += [np.logaddexp(0, z) - labels * z, side**2 * (0.5 + 0.5 * side * np.sign(z))]

        def table(sums):
            n, decided, loss, right, constant_loss, constant_right = sums.T
            return [loss / n, right / decided, constant_loss / n, constant_right / decided]

        found = _with_ci(names, columns, groups, table, rng)
    baseline = found["baseline log_loss"] | found["baseline accuracy"]
    return {"n": len(labels)} | found["log_loss"] | found["accuracy"] | {"baseline": baseline}


def spearman(a, b, groups, rng):
    """{"spearman", "spearman_ci95"} of a and b (m,), ties on average ranks; drawn prompts are ranked again."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return _entry("spearman", np.nan, [np.nan])
    group = np.unique(groups, return_inverse=True)[1]
    n_groups, step = group.max() + 1, max(1, CELLS // len(a))
    blocks = [_tie_blocks(x) for x in (a, b)]
    drawn = []
    for start in range(0, RANK_RESAMPLES, step):
        weights = intervals.resample_weights(n_groups, rng, min(step, RANK_RESAMPLES - start))[
            :, group
        ]
        x, y = (_weighted_ranks(weights, *block) for block in blocks)
        n = weights.sum(1, keepdims=True)
        x, y = (ranks - (weights * ranks).sum(1, keepdims=True) / n for ranks in (x, y))
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.sqrt((weights * x * x).sum(1) * (weights * y * y).sum(1))
            drawn.append((weights * x * y).sum(1) / spread)
    return _entry(
        "spearman",
        ranking.global_spearman(np.asarray(a, float), np.asarray(b, float)),
        np.concatenate(drawn),
    )


def _tie_blocks(x):
    """(order, first position of each block of equal values in that order, block of each row)."""
    order = np.argsort(x, kind="stable")
    new = np.r_[True, np.diff(x[order]) != 0]
    block = np.empty(len(x), int)
    block[order] = np.cumsum(new) - 1
    return order, np.flatnonzero(new), block


def _weighted_ranks(weights, order, starts, block):
    """(B, m) average ranks, less a constant, where row i counts weights[:, i] times."""
    mass = np.add.reduceat(weights[:, order].astype(float), starts, axis=1)
    return (np.cumsum(mass, axis=1) - mass / 2)[:, block]


def _with_ci(names, columns, groups, table, rng):
    """{name: entry} of the statistics that table() makes of the sums of `columns` over drawn prompts."""
    group = np.unique(groups, return_inverse=True)[1]
    sums = np.stack([np.bincount(group, column) for column in columns], 1)
    step, drawn = max(1, CELLS // len(sums)), []
    with np.errstate(invalid="ignore", divide="ignore"):
        for start in range(0, intervals.RESAMPLES, step):
            weights = intervals.resample_weights(
                len(sums), rng, min(step, intervals.RESAMPLES - start)
            )
            drawn.append(np.stack(table(weights @ sums), 1))
        whole = np.array(table(sums.sum(0)))
    drawn = np.concatenate(drawn)
    return {name: _entry(name.split()[-1], whole[i], drawn[:, i]) for i, name in enumerate(names)}


def _entry(name, value, drawn):
    """{name: value, name_ci95: [low, high]} as JSON holds it."""
    drawn = np.asarray(drawn)[np.isfinite(drawn)]
    low, high = (
        np.percentile(drawn, [2.5, 97.5]) if len(drawn) and np.isfinite(value) else (np.nan, np.nan)
    )
    return {name: null_if_nan(value), f"{name}_ci95": [null_if_nan(low), null_if_nan(high)]}
