"""Metrics of predictions on the golden reward scale: mean squared error, R2 and reliability."""

import numpy as np

from rewardlib.measures import intervals

BINS = 20


def scale_metrics(predicted: np.ndarray, golden: np.ndarray, weights: np.ndarray) -> dict:
    """MSE and R2 with 95 % intervals, and `reliability`, as a JSON-able dict.

    predicted, golden: (N, K) on the golden reward scale; weights: (B, N) resamples of the prompts.
    R2 compares with the mean of these golden rewards; None where all golden rewards are equal.
    """
    squared_error = ((predicted - golden) ** 2).mean(1)
    mse, mse_ci = intervals.mean_with_ci(squared_error, weights)
    r2, r2_ci = np.nan, (np.nan, np.nan)
    if np.ptp(golden) > 0:
        centred = golden - golden.mean()
        columns = np.stack([squared_error, (centred**2).mean(1), centred.mean(1)], 1) / len(golden)
        error, square, mean = intervals.resampled_sums(columns, weights).T
        with np.errstate(invalid="ignore", divide="ignore"):
            r2 = 1 - mse / golden.var()
            # square - mean**2 is the variance of the golden rewards within the resample
            r2_ci = np.nanpercentile(1 - error / (square - mean**2), [2.5, 97.5])
    return (
        intervals.entry("mse", mse, mse_ci)
        | intervals.entry("r2", r2, r2_ci)
        | {"reliability": reliability(predicted, golden)}
    )


def reliability(predicted: np.ndarray, golden: np.ndarray, bins: int = BINS) -> dict:
    """Mean prediction and mean golden reward in bins that hold equally many predictions.

    predicted, golden: (N, K). calibration_error is the mean over responses of |mean golden reward
    of the bin - mean prediction of the bin|, in units of the reward.
    """
    order = np.argsort(predicted, axis=None, kind="stable")
    members = np.array_split(order, min(bins, len(order)))
    mean_predicted = np.array([predicted.ravel()[positions].mean() for positions in members])
    mean_golden = np.array([golden.ravel()[positions].mean() for positions in members])
    count = np.array([len(positions) for positions in members])
    error = float(np.average(np.abs(mean_predicted - mean_golden), weights=count))
    return {
        "predicted": mean_predicted.tolist(),
        "golden": mean_golden.tolist(),
        "count": count.tolist(),
        "calibration_error": error,
    }
