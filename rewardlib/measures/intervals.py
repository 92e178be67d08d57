"""Means and ratios over prompts, with 95 % intervals from resampled prompts; paired differences."""

import numpy as np

from rewardlib.artifacts import null_if_nan

RESAMPLES = 2000
CELLS = 1 << 21  # resamples x prompts held in float64 at once


def resample_weights(n: int, rng: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """Bootstrap weights (resamples, N) uint8: how often each resample of N prompts draws a prompt.

    Prompts are drawn with replacement.
    """
    weights_BN = np.empty((resamples, n), np.uint8)
    for row in weights_BN:
        row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
    return weights_BN


def resampled_sums(columns: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums (B, C) of the columns (N, C) over the prompts of each resample.

    weights: (B, N), see `resample_weights`; converted to float64 in blocks of bounded size.
    """
    rows = _rows_per_block(len(columns))
    blocks = np.split(weights, range(rows, len(weights), rows))
    return np.concatenate([block.astype(float) @ columns for block in blocks])


def _rows_per_block(n):
    """Number of resamples of n prompts that fit into CELLS float64 numbers."""
    return max(1, CELLS // n)


def mean_with_ci(values: np.ndarray, weights: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Mean over the prompts where `values` (N,) is finite, and its 95 % percentile interval.

    weights: (B, N) resamples of the prompts. (nan, (nan, nan)) where no value is finite.
    """
    return ratio_with_ci(np.nan_to_num(values), np.isfinite(values).astype(float), weights)


def ratio_with_ci(
    numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray
) -> tuple[float, tuple[float, float]]:
    """sum(numerator) / sum(denominator) over prompts, and its 95 % percentile interval.

    numerator, denominator: (N,); weights: (B, N) resamples of the prompts. (nan, (nan, nan)) where
    the denominator is 0 everywhere.
    """
    return ratios_with_ci([numerator], [denominator], weights)[0]


def ratios_with_ci(
    numerators: list[np.ndarray], denominators: list[np.ndarray], weights: np.ndarray
) -> list[tuple[float, tuple[float, float]]]:
    """`ratio_with_ci` of C numerators and denominators (N,), in one pass over the resamples."""
    numerators_NC = np.asarray(numerators, float).T
    denominators_NC = np.asarray(denominators, float).T
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios_C = numerators_NC.sum(0) / denominators_NC.sum(0)
        ratios_BC = resampled_sums(numerators_NC, weights) / resampled_sums(
            denominators_NC, weights
        )
    defined_C = denominators_NC.any(0)
    bounds_2C = np.full((2, len(defined_C)), np.nan)
    if defined_C.any():
        # a resample may hold only prompts whose denominator is 0: such resamples are left out
        bounds_2C[:, defined_C] = np.nanpercentile(ratios_BC[:, defined_C], [2.5, 97.5], axis=0)
    return [
        (float(ratio), (float(low), float(high)))
        for ratio, low, high in zip(np.where(defined_C, ratios_C, np.nan), *bounds_2C, strict=True)
    ]


def paired_difference(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray, rng: np.random.Generator
) -> dict:
    """{"difference", "ci95", "p_value"}: mean of a - b over the prompts where both are finite.

    a, b: (N,) metrics of two models on the same prompts; weights: (B, N) resamples of the prompts.
    The p-value is two-sided, of a sign-flip permutation test with RESAMPLES random flips. All three
    values are None where no prompt has both metrics.
    """
    difference = np.asarray(a) - np.asarray(b)
    mean, ci = mean_with_ci(difference, weights)
    finite = difference[np.isfinite(difference)]
    n = len(finite)
    if not n:
        return {"difference": None, "ci95": None, "p_value": None}
    n_as_large, step = 0, _rows_per_block(n)
    for start in range(0, RESAMPLES, step):
        flips = rng.choice([-1.0, 1.0], size=(min(step, RESAMPLES - start), n))
        # the tolerance keeps flips whose mean equals the observed one up to rounding
        n_as_large += int((np.abs(flips @ finite / n) >= abs(mean) * (1 - 1e-6)).sum())
    # the observed signs are one of the possible flips, so the p-value is never 0
    return {"difference": mean, "ci95": ci, "p_value": (1 + n_as_large) / (1 + RESAMPLES)}


def entry(name: str, value: float, ci: tuple[float, float]) -> dict:
    """{name: value, name_ci95: [low, high]} for JSON, with None in place of NaN."""
    return {name: null_if_nan(value), f"{name}_ci95": [null_if_nan(bound) for bound in ci]}
