"""Metrics of predictions on the golden reward scale: mean squared error, R2 and reliability."""

import numpy as np

from rewardlib.measures import intervals

BINS = 20


def scale_metrics(predicted, golden, weights):
    """MSE, R2 (against the mean of these golden rewards) and reliability of predictions on the golden scale, (N, K)."""
    squared = ((predicted - golden) ** 2).mean(1)
    mse, mse_ci = intervals.mean_with_ci(squared, weights)
    r2, r2_ci = np.nan, (np.nan, np.nan)
    if np.ptp(golden) > 0:
        centred = golden - golden.mean()
        columns = np.stack([squared, (centred**2).mean(1), centred.mean(1)], 1) / len(golden)
        error, square, shift = intervals.resampled_sums(columns, weights).T
        with np.errstate(invalid="ignore", divide="ignore"):
            r2 = 1 - mse / golden.var()
            r2_ci = np.nanpercentile(1 - error / (square - shift**2), [2.5, 97.5])
    return (
        intervals.entry("mse", mse, mse_ci)
        | intervals.entry("r2", r2, r2_ci)
        | {"reliability": reliability(predicted, golden)}
    )


def reliability(predicted, golden, bins=BINS):
    """Mean prediction and mean golden reward in equally full bins of the prediction.

    calibration_error is the mean over responses of |bin mean golden - bin mean prediction|, in
    reward units.
    """
    order = np.argsort(predicted, axis=None, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    x = np.array([predicted.ravel()[part].mean() for part in parts])
    y = np.array([golden.ravel()[part].mean() for part in parts])
    size = np.array([len(part) for part in parts])
    error = float(np.average(np.abs(x - y), weights=size))
    return {
        "predicted": x.tolist(),
        "golden": y.tolist(),
        "count": size.tolist(),
        "calibration_error": error,
    }
