"""Exact solvers of linear reward models: logistic and ridge regression that never copy the rows.

An observation combines rows: a pair is the difference of two rows (`differences`), a single
response is one row (`responses`). Both are a sparse `design` (M, R), and the logits are
design @ (rows @ w), so the differences of the pairs, (M, D), are never stored. Sums that decide
where the optimum lies are in float64, a block of rows at a time, whatever type the rows have.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.linalg import solve
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning

# Ridge penalties of the mean loss, in units of the variance of the rows.
STRENGTHS = (1.0, 0.1, 0.01, 1e-3, 1e-4)
# Tolerances: EXACT for models that are kept, ROUGH for models that only choose a penalty.
EXACT, ROUGH = 1e-9, 1e-4
BLOCK_ROWS = 1024
NEWTON_STEPS = 100
CG_STEPS = 500
CG_TOLERANCE = 0.01  # of the norm of the gradient: each Newton step is solved to this share


def differences(pairs: np.ndarray, n: int) -> sparse.csr_array:
    """Design (M, n) of the differences x_0 - x_1 of pairs (M, 2), which hold numbers of n rows."""
    signs = np.tile([1.0, -1.0], len(pairs))
    ends = np.arange(0, 2 * len(pairs) + 1, 2)
    return sparse.csr_array((signs, pairs.ravel(), ends), shape=(len(pairs), n))


def responses(pairs: np.ndarray, n: int) -> sparse.csr_array:
    """Design (2 M, n) of the single responses of pairs (M, 2), in the order of pairs.ravel()."""
    ends = np.arange(pairs.size + 1)
    return sparse.csr_array((np.ones(pairs.size), pairs.ravel(), ends), shape=(pairs.size, n))


def logistic_loss(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log P(label) of each observation, (M,), where P(1) = sigmoid(logit)."""
    return np.logaddexp(0, logits) - labels * logits


def moments(rows: np.ndarray, counts: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """Mean (D,) of the rows (R, D) and the sum of the variances of their columns.

    counts: (R,) how often each row counts, as floats; None: once.
    """
    counts = np.ones(len(rows)) if counts is None else counts
    n = counts.sum()
    mean = sum(counts[part] @ block for part, block in _blocks(rows)) / n
    squares = sum(counts[part] @ ((block - mean) ** 2).sum(1) for part, block in _blocks(rows))
    return mean, float(squares / n)


def product(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """rows @ weights in float64."""
    return np.concatenate([block @ weights for _, block in _blocks(rows)])


def _blocks(rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows in float64, each with its slice."""
    for start in range(0, len(rows), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        yield part, rows[part].astype(float)


# ------------------------------------------------------------------------------ logistic regression


def fit_logistic(
    rows: np.ndarray,
    design: sparse.csr_array,
    labels: np.ndarray,
    alpha: float,
    *,
    intercept: bool = False,
    start: tuple[np.ndarray, float] | None = None,
    tolerance: float = EXACT,
    known_moments: tuple[np.ndarray, float] | None = None,
) -> tuple[np.ndarray, float]:
    """Weights (D,) and intercept that minimise sum of logistic_loss + alpha / 2 |w|^2.

    rows: (R, D); design: sparse (M, R); labels: (M,) in [0, 1]; alpha: scikit-learn's 1 / C;
    intercept: whether to fit an intercept, which is not penalised; start: weights and intercept of
    a similar problem; known_moments: moments(rows), where the caller has them.

    Newton's method, its linear systems solved by conjugate gradients. Products with the Hessian are
    computed in the type of the rows. The gradient is computed in float64, except for float32 rows
    and a tolerance of ROUGH or more. The method stops where the norm of the gradient of the mean
    loss, on rows scaled to unit variance, is at most `tolerance`, and issues a ConvergenceWarning
    where NEWTON_STEPS steps do not get there.
    """
    mean, spread = known_moments or moments(rows)
    scale, n, d = np.sqrt(max(spread, 1e-24)), design.shape[0], rows.shape[1]
    problem = _Problem(
        design,
        mean,
        scale,
        constant=np.ones(n) if intercept else np.zeros(n),
        penalty=np.append(np.full(d, alpha / n / scale**2), 0.0),
    )
    if start is None:
        v = np.zeros(d + 1)
    else:
        v = np.append(start[0] * scale, start[1] + mean @ start[0])
    v = _minimise(problem, labels, v, rows, tolerance)
    weights = v[:d] / scale
    return weights, float(v[d] - mean @ weights) if intercept else 0.0


@dataclass(frozen=True)
class _Problem:
    """Penalised mean logistic loss on standardised rows, as a function of v (D + 1,).

    v holds the weights of the standardised rows (x - mean) / scale, then the intercept.
    Standardised rows are never stored: centring and scaling are applied to products with the rows.
    design: sparse (M, R); mean: (D,); constant: (M,) column of the intercept, 0 where none is
    fitted; penalty: (D + 1,).
    """

    design: sparse.csr_array
    mean: np.ndarray
    scale: float
    constant: np.ndarray
    penalty: np.ndarray

    def logits(self, v, products):
        """(M,) logits at v."""
        weights = v[:-1]
        scores = (products.times(weights) - self.mean @ weights) / self.scale
        return self.design @ scores + self.constant * v[-1]

    def gradient(self, residual, products):
        """(D + 1,) gradient of the loss without its penalty; residual: (M,) p - label."""
        pull = self.design.T @ residual
        of_weights = (products.transposed_times(pull) - self.mean * pull.sum()) / self.scale
        return np.append(of_weights, self.constant @ residual) / len(self.constant)

    def hessian_times(self, u, curvature, products):
        """(D + 1,) Hessian of the penalised loss times u; curvature: (M,) p (1 - p)."""
        weighted = curvature * self.logits(u, products)
        return self.gradient(weighted, products) + self.penalty * u


class _ExactProducts:
    """Products with the rows in float64."""

    def __init__(self, rows):
        self.rows = rows

    def times(self, weights):
        return product(self.rows, weights)

    def transposed_times(self, pull):
        return sum(pull[part] @ block for part, block in _blocks(self.rows))


class _QuickProducts:
    """Products with the rows in the type that the rows are stored in."""

    def __init__(self, rows):
        self.rows = rows

    def times(self, weights):
        return self.rows @ weights.astype(self.rows.dtype)

    def transposed_times(self, pull):
        return pull.astype(self.rows.dtype) @ self.rows


def _minimise(problem, labels, v, rows, tolerance):
    """The v at which the penalised loss of `problem` is lowest, by Newton's method from `v`."""
    quick = _QuickProducts(rows)
    # Float32 gradients are accurate enough for a rough tolerance; float16 gradients are not.
    exact = quick if tolerance >= ROUGH and rows.dtype == np.float32 else _ExactProducts(rows)
    logits = problem.logits(v, exact)
    for _ in range(NEWTON_STEPS):
        chance = expit(logits)
        gradient = problem.gradient(chance - labels, exact) + problem.penalty * v
        if np.linalg.norm(gradient) <= tolerance:
            return v
        step = _newton_step(problem, chance, gradient, quick)
        along = problem.logits(step, exact)
        length = _step_length(logits, along, labels, problem.penalty, v, step, gradient @ step)
        # Logits are linear in v: the new ones need no product with the rows.
        v, logits = v + length * step, logits + length * along
    message = f"no optimum within {NEWTON_STEPS} Newton steps; raise alpha"
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return v


def _newton_step(problem, chance, gradient, products):
    """(D + 1,) approximate solution of Hessian @ step = -gradient; chance: (M,) sigmoid(logits)."""
    curvature = chance * (1 - chance)

    def hessian_times(u):
        return problem.hessian_times(u, curvature, products)

    return _conjugate_gradients(hessian_times, -gradient)


def _conjugate_gradients(hessian_times, target):
    """Step with hessian_times(step) close to `target`; shorter where the Hessian is flat."""
    step, residual = np.zeros_like(target), target.copy()
    direction, size = residual.copy(), residual @ residual
    goal = CG_TOLERANCE**2 * size
    for _ in range(CG_STEPS):
        bent = hessian_times(direction)
        curvature = direction @ bent
        if curvature <= 0:
            return step if step.any() else target
        step += size / curvature * direction
        residual -= size / curvature * bent
        size, before = residual @ residual, size
        if size <= goal:
            break
        direction = residual + size / before * direction
    return step


def _step_length(logits, along, labels, penalty, v, step, slope):
    """Largest of 1, 1/2, 1/4, ... that lowers the loss enough (Armijo), up to rounding errors.

    along: (M,) change of the logits for a step of length 1; slope: gradient @ step.
    """

    def value(length):
        w = v + length * step
        return logistic_loss(logits + length * along, labels).mean() + 0.5 * penalty @ w**2

    before, length = value(0.0), 1.0
    while value(length) > before + 1e-4 * length * slope + 1e-14 * abs(before) and length > 1e-8:
        length /= 2
    return length


def fit_bt(
    rows: np.ndarray, pairs: np.ndarray, labels: np.ndarray, alpha: float, **options
) -> tuple[np.ndarray, float]:
    """Weights (D,) and 0.0 of the Bradley-Terry model P(side 0 preferred) = sigmoid((x_0 - x_1) w).

    pairs: (M, 2) row numbers; labels: (M,) 1 where side 0 was preferred; options: start, tolerance
    and known_moments of fit_logistic.
    """
    return fit_logistic(rows, differences(pairs, len(rows)), labels, alpha, **options)


def fit_clf(
    rows: np.ndarray, pairs: np.ndarray, labels: np.ndarray, alpha: float, **options
) -> tuple[np.ndarray, float]:
    """Weights (D,) and intercept b of the classifier P(preferred) = sigmoid(x w + b).

    It classifies single responses. Arguments as in fit_bt.
    """
    design = responses(pairs, len(rows))
    return fit_logistic(rows, design, one_by_one(labels), alpha, intercept=True, **options)


def one_by_one(labels: np.ndarray) -> np.ndarray:
    """Labels (2 M,) of the responses of M pairs, 1 for preferred, in the order of pairs.ravel()."""
    return np.stack([labels, 1 - labels], 1).ravel()


def logistic_hessian(rows: np.ndarray, pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Exact Hessian (D, D) of the Bradley-Terry loss, without a penalty.

    Sum over pairs of p (1 - p) z z', where z = x_0 - x_1 and p = sigmoid(z w).
    """
    hessian_DD = np.zeros((rows.shape[1], rows.shape[1]))
    for start in range(0, len(pairs), BLOCK_ROWS):
        first, second = pairs[start : start + BLOCK_ROWS].T
        z = rows[first].astype(float) - rows[second]
        chance = expit(z @ weights)
        hessian_DD += z.T @ (z * (chance * (1 - chance))[:, None])
    return hessian_DD


# ---------------------------------------------------------------------------- choice of the penalty


def held_out_logits(
    fit: Callable,
    rows: np.ndarray,
    pairs: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    held_folds: Sequence[int],
    penalties: np.ndarray,
) -> np.ndarray:
    """Score differences (S, M) of pairs by models fitted to the other folds.

    fit: fit_bt or fit_clf; folds: (M,) fold of each pair; held_folds: the folds to hold out in
    turn; penalties: (S,) values of alpha per training pair. NaN for pairs of all other folds.
    """
    logits_SM = np.full((len(penalties), len(pairs)), np.nan)
    known = moments(rows)
    for held in (folds == fold for fold in held_folds):
        solution = None
        for i, penalty in enumerate(penalties):
            # The solution at one penalty is a good start for the next, weaker one.
            solution = fit(
                rows,
                pairs[~held],
                labels[~held],
                penalty * (~held).sum(),
                start=solution,
                tolerance=ROUGH,
                known_moments=known,
            )
            scores = product(rows, solution[0])
            logits_SM[i, held] = scores[pairs[held, 0]] - scores[pairs[held, 1]]
    return logits_SM


def rescaled_loss(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logistic loss (M,) of the logits times the positive factor that makes its sum lowest."""
    scale = max(np.abs(logits).mean(), 1e-300)

    def total(log_factor):
        return logistic_loss(np.exp(log_factor) * logits / scale, labels).sum()

    log_factor = minimize_scalar(total, bounds=(-10, 10), method="bounded").x
    return logistic_loss(np.exp(log_factor) * logits / scale, labels)


def within_one_error(losses: np.ndarray, groups: np.ndarray) -> int:
    """Index of the first row of losses (S, M) that is within one standard error of the best row.

    The one-standard-error rule of Breiman et al. (1984). The standard error is that of the summed
    paired difference from the best row, over whole groups (M,).
    """
    best = int(np.argmin(losses.sum(1)))
    for i in range(best):
        by_group = np.bincount(groups, losses[i] - losses[best])
        if by_group.sum() <= np.sqrt(len(by_group)) * by_group.std(ddof=1):
            return i
    return best


# --------------------------------------------------------------------------------- ridge regression


def second_moments(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Sum (D + 2, D + 2) of v v' over all v = (x, y, 1), x a row (D,) and y its target.

    These sums are all that ridge regression needs, whatever the number of rows.
    """
    v = np.column_stack([rows, targets, np.ones(len(rows))]).astype(float)
    return v.T @ v


def variance(sums: np.ndarray) -> float:
    """Sum of the variances of the columns of x, from second_moments."""
    n, d = sums[-1, -1], len(sums) - 2
    return max(float((np.diag(sums)[:d] / n - (sums[:d, -1] / n) ** 2).sum()), 1e-24)


def fit_ridge(sums: np.ndarray, alpha: float) -> tuple[np.ndarray, float]:
    """Weights (D,) and intercept that minimise sum (y - x w - b)^2 + alpha |w|^2.

    sums: second_moments of the data; alpha: that of scikit-learn's Ridge.
    """
    n, d = sums[-1, -1], len(sums) - 2
    centred = sums[:-1, :-1] - np.outer(sums[:-1, -1], sums[-1, :-1]) / n
    weights = solve(centred[:d, :d] + alpha * np.eye(d), centred[:d, d], assume_a="pos")
    return weights, float(sums[d, -1] - sums[:d, -1] @ weights) / n


def squared_error(sums: np.ndarray, weights: np.ndarray, intercept: float) -> float:
    """Sum of (y - x w - b)^2, from second_moments."""
    v = np.concatenate([-weights, [1.0, -intercept]])
    return v @ sums @ v


def choose_ridge_strength(
    sums: Sequence[np.ndarray], strengths: Sequence[float] = STRENGTHS
) -> float:
    """The strength with the lowest squared error on folds that are held out in turn.

    sums: second_moments of each fold. With one fold nothing can be held out: the first strength.
    """
    total, losses = sum(sums), np.zeros(len(strengths))
    for held in sums if len(sums) > 1 else ():
        fit = total - held
        for i, strength in enumerate(strengths):
            solution = fit_ridge(fit, strength * fit[-1, -1] * variance(fit))
            losses[i] += squared_error(held, *solution)
    return strengths[int(np.argmin(losses))]
