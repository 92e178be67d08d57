"""The solvers behind every linear reward model: logistic and ridge regression, exact, on rows that are never copied.

An observation is a combination of rows: the difference of a pair (`differences`) or one response
(`responses`), written as a sparse (M, R) `design`. Its logit is design @ (rows @ w), so pair
differences (M, D) are never stored. Sums that decide the optimum are in float64, a block of rows at
a time, whatever the rows are stored in.
"""

import warnings

import numpy as np
from scipy import sparse
from scipy.special import expit

STRENGTHS = (
    1.0,
    0.1,
    0.01,
    1e-3,
    1e-4,
)  # ridge penalty of the mean loss, in units of the variance of the rows
EXACT, ROUGH = 1e-9, 1e-4
BLOCK_ROWS = 1024
NEWTON_STEPS = 100
CG_STEPS = 500
CG_TOLERANCE = 0.01


def differences(pairs, n):
    """Design (M, n) of the row differences x_0 - x_1 of pairs (M, 2)."""
    sign = np.tile([1.0, -1.0], len(pairs))
    return sparse.csr_array(
        (sign, pairs.ravel(), np.arange(0, 2 * len(pairs) + 1, 2)), shape=(len(pairs), n)
    )


def responses(pairs, n):
    """Design (2 M, n) of the responses of pairs (M, 2), one by one: side 0 and side 1 of the first pair, and so on."""
    return sparse.csr_array(
        (np.ones(pairs.size), pairs.ravel(), np.arange(pairs.size + 1)), shape=(pairs.size, n)
    )


def logistic_loss(logits, labels):
    """(M,) -log P(label), P(1) = sigmoid(logit)."""
    return np.logaddexp(0, logits) - labels * logits


def moments(rows, counts=None):
    """Mean (D,) of the rows, row i taken counts[i] times (None: once), and the sum of their columns' variances."""
    counts = np.ones(len(rows)) if counts is None else counts
    n = counts.sum()
    mean = sum(counts[part] @ block for part, block in _blocks(rows)) / n
    return mean, float(
        sum(counts[part] @ ((block - mean) ** 2).sum(1) for part, block in _blocks(rows)) / n
    )


def product(rows, weights):
    """rows @ weights in float64."""
    return np.concatenate([block @ weights for _, block in _blocks(rows)])


def _blocks(rows):
    for start in range(0, len(rows), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        yield part, rows[part].astype(float)


def fit_logistic(
    rows, design, labels, alpha, *, intercept=False, start=None, tolerance=EXACT, known_moments=None
):
    """Minimise sum of logistic_loss + alpha / 2 |w|^2 (scikit-learn's C = 1 / alpha). Returns (w (D,), intercept).

    rows: (R, D); design: sparse (M, R); labels: (M,) in [0, 1]; intercept: whether one is fitted,
    unpenalised; start: (w, intercept) of a similar problem; known_moments: moments(rows), where
    they are known. Newton's method with conjugate gradients: Hessian products are in the type of
    the rows, the gradient is exact to float64, unless a tolerance of ROUGH or more lets float32 do.
    It ends where the gradient of the mean loss, on rows of unit variance, is below `tolerance`;
    ConvergenceWarning if that is never reached.
    """
    mean, spread = known_moments or moments(rows)
    scale, n, d = np.sqrt(max(spread, 1e-24)), design.shape[0], rows.shape[1]
    penalty = np.append(np.full(d, alpha / n / scale**2), 0.0)
    column = np.ones(n) if intercept else np.zeros(n)

    def logits_of(v, multiply):
        return design @ ((multiply(v[:d]) - mean @ v[:d]) / scale) + column * v[d]

    def gradient_of(residual, multiply):
        pull = design.T @ residual
        return np.append((multiply(pull) - mean * pull.sum()) / scale, column @ residual) / n

    def quick(v):
        return rows @ v.astype(rows.dtype)

    def quick_transposed(pull):
        return pull.astype(rows.dtype) @ rows

    def exact(v):
        return product(rows, v)

    def exact_transposed(pull):
        return sum(pull[part] @ block for part, block in _blocks(rows))

    if tolerance >= ROUGH and rows.dtype == np.float32:
        exact, exact_transposed = quick, quick_transposed

    v = np.zeros(d + 1)
    if start is not None:
        v = np.append(start[0] * scale, start[1] + mean @ start[0])
    logits = logits_of(v, exact)
    for _ in range(NEWTON_STEPS):
        chance = expit(logits)
        gradient = gradient_of(chance - labels, exact_transposed) + penalty * v
        if np.linalg.norm(gradient) <= tolerance:
            break
        curvature = chance * (1 - chance)

        def hessian(u, curvature=curvature):
            return gradient_of(curvature * logits_of(u, quick), quick_transposed) + penalty * u

        step = _conjugate_gradients(hessian, -gradient)
        along = logits_of(step, exact)
        length = _step_length(logits, along, labels, penalty, v, step, gradient @ step)
        v, logits = v + length * step, logits + length * along
    else:
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn(
            f"no optimum within {NEWTON_STEPS} Newton steps; raise alpha",
            ConvergenceWarning,
            stacklevel=2,
        )
    weights = v[:d] / scale
    return weights, float(v[d] - mean @ weights) if intercept else 0.0


def _conjugate_gradients(hessian, target):
    """Solve hessian(step) = target roughly. Where the Hessian is flat in every direction left, stop there."""
    step, residual = np.zeros_like(target), target.copy()
    direction, size = residual.copy(), residual @ residual
    goal = CG_TOLERANCE**2 * size
    for _ in range(CG_STEPS):
        bent = hessian(direction)
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
    """The largest of 1, 1/2, 1/4, ... that lowers the loss enough (Armijo), up to rounding."""

    def value(length):
        w = v + length * step
        return logistic_loss(logits + length * along, labels).mean() + 0.5 * penalty @ w**2

    here, length = value(0.0), 1.0
    while value(length) > here + 1e-4 * length * slope + 1e-14 * abs(here) and length > 1e-8:
        length /= 2
    return length


def fit_bt(rows, pairs, labels, alpha, **options):
    """Bradley-Terry: P(side 0 preferred) = sigmoid((x_0 - x_1) w). Returns (w, 0.0); options as in fit_logistic."""
    return fit_logistic(rows, differences(pairs, len(rows)), labels, alpha, **options)


def fit_clf(rows, pairs, labels, alpha, **options):
    """Classification, response by response: P(preferred) = sigmoid(x w + b). Returns (w, b)."""
    return fit_logistic(
        rows, responses(pairs, len(rows)), one_by_one(labels), alpha, intercept=True, **options
    )


def one_by_one(labels):
    """(2 M,) labels of the responses of M pairs, preferred 1 and other 0, in the order of pairs.ravel()."""
    return np.stack([labels, 1 - labels], 1).ravel()


def held_out_logits(fit, rows, pairs, labels, folds, held_folds, penalties):
    """(S, M) score differences of pairs by models that were fitted to the other folds, NaN outside `held_folds`.

    fit: fit_bt or fit_clf; folds: (M,); penalties: S values of alpha per pair.
    """
    logits, known = np.full((len(penalties), len(pairs)), np.nan), moments(rows)
    for held in (folds == fold for fold in held_folds):
        found = None
        for i, penalty in enumerate(penalties):
            alpha = penalty * (~held).sum()
            found = fit(
                rows,
                pairs[~held],
                labels[~held],
                alpha,
                start=found,
                tolerance=ROUGH,
                known_moments=known,
            )
            scores = product(rows, found[0])
            logits[i, held] = scores[pairs[held, 0]] - scores[pairs[held, 1]]
    return logits


def rescaled_loss(logits, labels):
    """(M,) logistic loss of the logits times the one positive number that makes its sum least."""
    from scipy.optimize import (
        minimize_scalar,
    )  # loaded by those who need it, as all that is slow to load

    scale = max(np.abs(logits).mean(), 1e-300)

    def total(log_slope):
        return logistic_loss(np.exp(log_slope) * logits / scale, labels).sum()

    return logistic_loss(
        np.exp(minimize_scalar(total, bounds=(-10, 10), method="bounded").x) * logits / scale,
        labels,
    )


def within_one_error(losses, groups):
    """Number of the first row of losses (S, M) that is no more than one standard error above the best.

    The error is that of the summed paired difference over whole groups (M,): the rule of Breiman et
    al. (1984).
    """
    best = int(np.argmin(losses.sum(1)))
    for i in range(best):
        by_group = np.bincount(groups, losses[i] - losses[best])
        if by_group.sum() <= np.sqrt(len(by_group)) * by_group.std(ddof=1):
            return i
    return best


def logistic_hessian(rows, pairs, weights):
    """(D, D) sum over pairs of p (1 - p) z z', z = x_0 - x_1, p = sigmoid(z w): the exact Hessian of the loss."""
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for start in range(0, len(pairs), BLOCK_ROWS):
        first, second = pairs[start : start + BLOCK_ROWS].T
        z = rows[first].astype(float) - rows[second]
        chance = expit(z @ weights)
        total += z.T @ (z * (chance * (1 - chance))[:, None])
    return total


def second_moments(rows, targets):
    """(D + 2, D + 2) sum of v v' over rows v = (x, y, 1): all that ridge regression needs of any number of rows."""
    v = np.column_stack([rows, targets, np.ones(len(rows))]).astype(float)
    return v.T @ v


def variance(sums):
    """Sum of the variances of the columns of x, from second_moments."""
    n, d = sums[-1, -1], len(sums) - 2
    return max(float((np.diag(sums)[:d] / n - (sums[:d, -1] / n) ** 2).sum()), 1e-24)


def fit_ridge(sums, alpha):
    """(w (D,), intercept) minimising sum (y - x w - b)^2 + alpha |w|^2, scikit-learn's Ridge, from second_moments."""
    from scipy.linalg import solve

    n, d = sums[-1, -1], len(sums) - 2
    centred = sums[:-1, :-1] - np.outer(sums[:-1, -1], sums[-1, :-1]) / n
    weights = solve(centred[:d, :d] + alpha * np.eye(d), centred[:d, d], assume_a="pos")
    return weights, float(sums[d, -1] - sums[:d, -1] @ weights) / n


def squared_error(sums, weights, intercept):
    """Sum of (y - x w - b)^2 from second_moments."""
    v = np.concatenate([-weights, [1.0, -intercept]])
    return v @ sums @ v


def choose_ridge_strength(sums, strengths=STRENGTHS):
    """The strength with the lowest squared error on folds held out in turn; sums: second_moments of each fold."""
    total, losses = sum(sums), np.zeros(len(strengths))
    for held in sums if len(sums) > 1 else ():
        fit = total - held
        for i, strength in enumerate(strengths):
            losses[i] += squared_error(
                held, *fit_ridge(fit, strength * fit[-1, -1] * variance(fit))
            )
    return strengths[int(np.argmin(losses))]
