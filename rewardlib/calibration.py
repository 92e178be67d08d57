"""Monotone maps from scores to the golden reward scale: centred isotonic regression, plain isotonic, out of fold."""

from pathlib import Path

import joblib
import numpy as np
from scipy.optimize import isotonic_regression
from sklearn.isotonic import IsotonicRegression

from rewardlib import artifacts

# Segments flatter than this share of the mean slope are pooled: float64 could no longer tell
# float32 scores apart.
FLAT = 1e-6


class CenteredIsotonicMap:
    """Centred isotonic regression (Oron and Flournoy, Statistics in Biopharmaceutical Research 9, 2017).

    Each flat block of the isotonic fit becomes one point at the weighted mean of its x, with
    straight lines between the points, so the map is strictly increasing. Outside the outermost
    points it goes on with the slope of the outermost segment, or the mean slope where that is
    smaller: always positive, never steeper than the data as a whole.

    Learned: x_points_, y_points_ (strictly increasing), slope_below_, slope_above_; increasing_ is
    False when the data show no increase at all (one block): the map then is the mean with a
    negligible positive slope.
    """

    def fit(self, X, y, sample_weight=None):
        """X: (m,) or (m, 1) scores, y: (m,) targets, sample_weight: (m,) positive or None. ValueError on bad input."""
        x, y = _column(X), np.asarray(y, float).ravel()
        weight = (
            np.ones(len(x)) if sample_weight is None else np.asarray(sample_weight, float).ravel()
        )
        if not len(x) == len(y) == len(weight) or len(x) == 0:
            raise ValueError(
                f"X, y and sample_weight should have one length; got {len(x)}, {len(y)} and {len(weight)}"
            )
        if not (np.isfinite(x).all() and np.isfinite(y).all() and (weight > 0).all()):
            raise ValueError("X and y must be finite and weights positive")
        x, inverse = np.unique(x, return_inverse=True)
        y, weight = np.bincount(inverse, weight * y), np.bincount(inverse, weight)
        fit = isotonic_regression(y / weight, weights=weight)
        starts = fit.blocks[:-1]
        points = np.add.reduceat(weight * x, starts), np.add.reduceat(y, starts), fit.weights
        self.x_points_, self.y_points_ = _pool_flat(*points)
        self.increasing_ = len(self.x_points_) > 1
        if self.increasing_:
            slopes = np.diff(self.y_points_) / np.diff(self.x_points_)
            mean_slope = np.ptp(self.y_points_) / np.ptp(self.x_points_)
            self.slope_below_, self.slope_above_ = (
                float(min(s, mean_slope)) for s in (slopes[0], slopes[-1])
            )
        else:
            spread_x, spread_y = (
                np.std(v) if np.ptp(v) > 1e-9 * np.abs(v).max() else 1.0 for v in (x, y / weight)
            )
            self.slope_below_ = self.slope_above_ = float(FLAT * spread_y / spread_x)
        self.n_features_in_ = 1
        return self

    def predict(self, X):
        """Calibrated values of the scores, in the shape of X without a last axis of 1 when X is a column."""
        x = np.asarray(X, float)
        x = x[:, 0] if x.ndim == 2 and x.shape[1] == 1 else x
        low, high = self.x_points_[0], self.x_points_[-1]
        inside = np.interp(x, self.x_points_, self.y_points_)
        return (
            inside
            + self.slope_below_ * np.minimum(x - low, 0)
            + self.slope_above_ * np.maximum(x - high, 0)
        )

    def transform(self, X):
        """As `predict`."""
        return self.predict(X)


def _column(X):
    x = np.asarray(X, float)
    if x.ndim == 2 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim != 1:
        raise ValueError(f"X should be (m,) or (m, 1) scores; got {x.shape}")
    return x


def _pool_flat(sum_x, sum_y, weight):
    """Merge neighbouring points whose segment is flatter than FLAT times the mean slope. Sums are weighted sums."""
    while len(weight) > 1:
        x, y = sum_x / weight, sum_y / weight
        flat = np.diff(y) <= FLAT * (y[-1] - y[0]) / (x[-1] - x[0]) * np.diff(x)
        if not flat.any():
            break
        starts = np.flatnonzero(np.concatenate([[True], ~flat]))
        sum_x, sum_y, weight = (np.add.reduceat(part, starts) for part in (sum_x, sum_y, weight))
    return sum_x / weight, sum_y / weight


def make(kind):
    """An unfitted map: kind "centred" (strictly increasing) or "plain" (scikit-learn's, flat where the fit is)."""
    if kind == "centred":
        return CenteredIsotonicMap()
    return IsotonicRegression(out_of_bounds="clip")


def out_of_fold(kind, scores, targets, fold_sets, at=None):
    """Calibrated values (n, K) of each prompt by maps that were fitted without it, averaged over several partitions.

    One partition leaves a jump between folds that a student cannot follow; the mean over partitions
    is smooth. scores, targets: (n, K); fold_sets: list of (n,) fold numbers; at: (n, K) scores to
    map (default: `scores`).
    """
    at = scores if at is None else at
    total = np.zeros(at.shape)
    for folds in fold_sets:
        for fold in np.unique(folds):
            inside = folds == fold
            fitted = make(kind).fit(scores[~inside].ravel(), targets[~inside].ravel())
            total[inside] += fitted.predict(at[inside].ravel()).reshape(-1, at.shape[1])
    return total / len(fold_sets)


def to_numbers(fitted):
    """A fitted map as plain numbers: points, straight lines between them, slopes outside. Inverse of `from_numbers`."""
    if not isinstance(fitted, CenteredIsotonicMap):
        x, y = fitted.X_thresholds_, fitted.y_thresholds_
        return {
            "kind": "plain",
            "x": x.tolist(),
            "y": y.tolist(),
            "slope_below": 0.0,
            "slope_above": 0.0,
        }
    x, y = fitted.x_points_.tolist(), fitted.y_points_.tolist()
    slopes = {"slope_below": fitted.slope_below_, "slope_above": fitted.slope_above_}
    return {"kind": "centred", "x": x, "y": y, **slopes, "increasing": fitted.increasing_}


def from_numbers(numbers):
    """The map of `to_numbers` as a function of scores: np.interp inside, straight lines outside."""
    fitted = CenteredIsotonicMap()
    fitted.x_points_, fitted.y_points_ = np.array(numbers["x"]), np.array(numbers["y"])
    fitted.slope_below_, fitted.slope_above_ = numbers["slope_below"], numbers["slope_above"]
    return fitted.predict


def save(folder, name, fitted, aliases=()):
    """Write name.joblib (for other programs) and name.json (the same map as numbers, what the steps read).

    Returns the file names written, aliases included.
    """
    names = []
    for stem in (name, *aliases):
        with artifacts.atomic(Path(folder) / f"{stem}.joblib") as file:
            joblib.dump(fitted, file)
        artifacts.write_json(Path(folder) / f"{stem}.json", to_numbers(fitted))
        names += [f"{stem}.joblib", f"{stem}.json"]
    return names


def load(folder, name):
    """The map `name` as a function of scores, read from its .json."""
    return from_numbers(artifacts.read_json(Path(folder) / f"{name}.json", "step 7"))
