"""Means and ratios over prompts with 95 % intervals from resampling prompts, and paired differences."""

import numpy as np

from rewardlib.artifacts import null_if_nan

RESAMPLES = 2000
CELLS = 1 << 21  # resamples x prompts that are held in float64 at once


def resample_weights(n, rng, resamples=RESAMPLES):
    """(resamples, N) uint8: how often each prompt is drawn when N prompts are drawn with replacement."""
    weights = np.empty((resamples, n), np.uint8)
    for row in weights:
        row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
    return weights


def resampled_sums(columns, weights):
    """(B, C) sums of columns (N, C) in every resample; `weights` (B, N) become float64 in blocks of bounded size."""
    blocks = np.split(
        weights, range(_rows_at_once(len(columns)), len(weights), _rows_at_once(len(columns)))
    )
    return np.concatenate([block.astype(float) @ columns for block in blocks])


def _rows_at_once(n):
    return max(1, CELLS // n)


def mean_with_ci(values, weights):
    """Mean over the prompts where `values` (N,) is defined, and its 95 % percentile interval, (nan, ...) if none is."""
    return ratio_with_ci(np.nan_to_num(values), np.isfinite(values).astype(float), weights)


def ratio_with_ci(numerator, denominator, weights):
    """sum(numerator) / sum(denominator) over prompts, and its 95 % percentile interval under `weights`."""
    return ratios_with_ci([numerator], [denominator], weights)[0]


def ratios_with_ci(numerators, denominators, weights):
    """`ratio_with_ci` of several (N,) numerators and denominators: the resamples are gone through once for all."""
    above, below = (np.asarray(parts, float).T for parts in (numerators, denominators))
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn, ratio = (
            resampled_sums(above, weights) / resampled_sums(below, weights),
            above.sum(0) / below.sum(0),
        )
    defined, bounds = below.any(0), np.full((2, below.shape[1]), np.nan)
    if defined.any():
        bounds[:, defined] = np.nanpercentile(drawn[:, defined], [2.5, 97.5], axis=0)
    return [
        (float(r), (float(low), float(high)))
        for r, low, high in zip(np.where(defined, ratio, np.nan), *bounds, strict=True)
    ]


def paired_difference(a, b, weights, rng):
    """Mean of a - b over the prompts where both are defined, its 95 % interval and a two-sided sign-flip p-value.

    All None where no prompt has both.
    """
    difference = np.asarray(a) - np.asarray(b)
    mean, ci = mean_with_ci(difference, weights)
    d = difference[np.isfinite(difference)]
    if not len(d):
        return {"difference": None, "ci95": None, "p_value": None}
    as_large, step = 0, _rows_at_once(len(d))
    for start in range(0, RESAMPLES, step):
        flips = rng.choice([-1.0, 1.0], size=(min(step, RESAMPLES - start), len(d)))
        as_large += int((np.abs(flips @ d / len(d)) >= abs(mean) * (1 - 1e-6)).sum())
    return {"difference": mean, "ci95": ci, "p_value": (1 + as_large) / (1 + RESAMPLES)}


def entry(name, value, ci):
    return {name: null_if_nan(value), f"{name}_ci95": [null_if_nan(v) for v in ci]}
