"""Monotone maps from scores to the golden reward scale, by isotonic regression.

Centred isotonic regression (strictly increasing), plain isotonic regression, calibration out of
fold, and the files of fitted maps.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import joblib
import numpy as np
from scipy.optimize import isotonic_regression
from sklearn.isotonic import IsotonicRegression

from rewardlib import artifacts

# Segments flatter than this share of the mean slope are pooled: on them, the calibrated values of
# neighbouring float32 scores could be equal in float64.
FLAT = 1e-6


class CenteredIsotonicMap:
    """Centred isotonic regression, a strictly increasing map from scores to targets.

    Oron and Flournoy, Statistics in Biopharmaceutical Research 9, 2017. Each flat block of the
    isotonic fit becomes one point, at the weighted mean of its x, with straight lines between the
    points. Outside the outermost points the map continues with the slope of the outermost segment,
    or with the mean slope if that is smaller: always positive, never steeper than the data as a
    whole.

    Learned: x_points_, y_points_ (both strictly increasing), slope_below_, slope_above_.
    increasing_ is False if the data show no increase at all (one block): the map is then the mean
    of the targets with a negligible positive slope.
    """

    def fit(
        self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None
    ) -> "CenteredIsotonicMap":
        """Fit the map from scores X, (m,) or (m, 1), to targets y (m,).

        sample_weight: (m,) positive weights, or None for equal weights. Raises ValueError for
        other shapes, for values that are not finite and for weights that are not positive.
        """
        x, y = _column(X), np.asarray(y, float).ravel()
        weight = (
            np.ones(len(x)) if sample_weight is None else np.asarray(sample_weight, float).ravel()
        )
        if not len(x) == len(y) == len(weight) or len(x) == 0:
            raise ValueError(
                "X, y and sample_weight should have the same length; "
                f"got {len(x)}, {len(y)} and {len(weight)}"
            )
        if not (np.isfinite(x).all() and np.isfinite(y).all() and (weight > 0).all()):
            raise ValueError("X and y must be finite and weights positive")
        x, inverse = np.unique(x, return_inverse=True)
        y, weight = np.bincount(inverse, weight * y), np.bincount(inverse, weight)
        fit = isotonic_regression(y / weight, weights=weight)
        starts = fit.blocks[:-1]
        sum_x, sum_y = np.add.reduceat(weight * x, starts), np.add.reduceat(y, starts)
        self.x_points_, self.y_points_ = _pool_flat(sum_x, sum_y, fit.weights)
        self.increasing_ = len(self.x_points_) > 1
        if self.increasing_:
            slopes = np.diff(self.y_points_) / np.diff(self.x_points_)
            mean_slope = np.ptp(self.y_points_) / np.ptp(self.x_points_)
            self.slope_below_ = float(min(slopes[0], mean_slope))
            self.slope_above_ = float(min(slopes[-1], mean_slope))
        else:
            # a spread that is only rounding error counts as 1, so that the slope stays sensible
            spread_x, spread_y = (
                np.std(v) if np.ptp(v) > 1e-9 * np.abs(v).max() else 1.0 for v in (x, y / weight)
            )
            self.slope_below_ = self.slope_above_ = float(FLAT * spread_y / spread_x)
        self.n_features_in_ = 1
        return self

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Calibrated values of the scores X, in the shape of X; a column (m, 1) becomes (m,)."""
        x = np.asarray(X, float)
        x = x[:, 0] if x.ndim == 2 and x.shape[1] == 1 else x
        low, high = self.x_points_[0], self.x_points_[-1]
        inside = np.interp(x, self.x_points_, self.y_points_)
        return (
            inside
            + self.slope_below_ * np.minimum(x - low, 0)
            + self.slope_above_ * np.maximum(x - high, 0)
        )

    def transform(self, X: np.ndarray) -> np.ndarray:
        """The same as `predict`."""
        return self.predict(X)


def _column(X):
    """Scores (m,) or (m, 1) as (m,) float64; ValueError for other shapes."""
    x = np.asarray(X, float)
    if x.ndim == 2 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim != 1:
        raise ValueError(f"X should be (m,) or (m, 1) scores; got {x.shape}")
    return x


def _pool_flat(sum_x, sum_y, weight):
    """(x, y) of the points after merging neighbours joined by a segment that is too flat.

    Too flat is a slope of at most FLAT times the mean slope. A point is given by the sums of its
    weighted x and weighted y and by its weight. Merging moves points, which can make further
    segments too flat; hence the loop.
    """
    while len(weight) > 1:
        x, y = sum_x / weight, sum_y / weight
        flat = np.diff(y) <= FLAT * (y[-1] - y[0]) / (x[-1] - x[0]) * np.diff(x)
        if not flat.any():
            break
        starts = np.flatnonzero(np.concatenate([[True], ~flat]))
        sum_x, sum_y, weight = (np.add.reduceat(part, starts) for part in (sum_x, sum_y, weight))
    return sum_x / weight, sum_y / weight


def make(kind: str) -> CenteredIsotonicMap | IsotonicRegression:
    """An unfitted map. kind: "centred" or "plain".

    The centred map is strictly increasing. The plain map is scikit-learn's: it has flat steps, and
    is constant outside the scores that it was fitted on.
    """
    if kind == "centred":
        return CenteredIsotonicMap()
    return IsotonicRegression(out_of_bounds="clip")


def out_of_fold(
    kind: str,
    scores: np.ndarray,
    targets: np.ndarray,
    fold_sets: list[np.ndarray],
    scores_to_map: np.ndarray | None = None,
) -> np.ndarray:
    """Calibrated values (n, K): each prompt is mapped by maps that were fitted without this prompt.

    kind: see `make`; scores, targets: (n, K) to fit on; fold_sets: several partitions of the
    prompts, each (n,) fold numbers; scores_to_map: (n, K), None for `scores`. The result is the
    mean over the partitions.
    """
    # A single partition leaves jumps between its folds that a student cannot follow. The mean over
    # several partitions is smooth.
    scores_to_map = scores if scores_to_map is None else scores_to_map
    total = np.zeros(scores_to_map.shape)
    for folds in fold_sets:
        for fold in np.unique(folds):
            in_fold = folds == fold
            fitted = make(kind).fit(scores[~in_fold].ravel(), targets[~in_fold].ravel())
            held_out = scores_to_map[in_fold]
            total[in_fold] += fitted.predict(held_out.ravel()).reshape(held_out.shape)
    return total / len(fold_sets)


def to_numbers(fitted: CenteredIsotonicMap | IsotonicRegression) -> dict:
    """A fitted map as plain numbers: points, and the slopes outside. Inverse of `from_numbers`."""
    if not isinstance(fitted, CenteredIsotonicMap):
        x, y = fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist()
        return {"kind": "plain", "x": x, "y": y, "slope_below": 0.0, "slope_above": 0.0}
    x, y = fitted.x_points_.tolist(), fitted.y_points_.tolist()
    slopes = {"slope_below": fitted.slope_below_, "slope_above": fitted.slope_above_}
    return {"kind": "centred", "x": x, "y": y, **slopes, "increasing": fitted.increasing_}


def from_numbers(numbers: dict) -> Callable[[np.ndarray], np.ndarray]:
    """The map that `to_numbers` wrote, as a function of scores: straight lines between points."""
    fitted = CenteredIsotonicMap()
    fitted.x_points_, fitted.y_points_ = np.array(numbers["x"]), np.array(numbers["y"])
    fitted.slope_below_, fitted.slope_above_ = numbers["slope_below"], numbers["slope_above"]
    return fitted.predict


def save(
    folder: Path | str,
    name: str,
    fitted: CenteredIsotonicMap | IsotonicRegression,
    aliases: Iterable[str] = (),
) -> list[str]:
    """Write a fitted map to `folder`, and return the names of the files.

    name.joblib is for other programs; name.json holds the same map as numbers, and is the file that
    the steps read. Each alias gets both files as well.
    """
    names = []
    for stem in (name, *aliases):
        with artifacts.atomic(Path(folder) / f"{stem}.joblib") as file:
            joblib.dump(fitted, file)
        artifacts.write_json(Path(folder) / f"{stem}.json", to_numbers(fitted))
        names += [f"{stem}.joblib", f"{stem}.json"]
    return names


def load(folder: Path | str, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The map `name` of `folder` as a function of scores, read from name.json."""
    return from_numbers(artifacts.read_json(Path(folder) / f"{name}.json", "step 7"))
