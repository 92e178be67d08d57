"""Linear reward models: Bradley-Terry, its Laplace approximation, classification, ridge regression on ratings."""

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import brentq
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from rewardlib.data import splits
from rewardlib.models import checks, solvers
from rewardlib.models.base import BLOCK_BYTES, RewardModel


class _Linear(RewardModel):
    """A reward model with weights coef_ (D,), intercept_ and the penalty alpha_ it was fitted with, by `_solve`.

    alpha: ridge penalty, alpha / 2 |w|^2 beside the sum of the losses: scikit-learn's 1 / C and the
    precision of a Gaussian prior. None: the strongest of linear.STRENGTHS that orders held-out
    pairs within one standard error of the best. It is judged on `cv` folds of whole groups, by the
    logistic loss of score differences times the one positive number that suits them best: a ridge
    penalty shrinks scores, which does not change their order.
    """

    def __init__(self, alpha=None, cv=5, random_state=0):
        self.alpha = alpha
        self.cv = cv
        self.random_state = random_state

    def _fit(self, rows, index, labels, groups):
        self.alpha_ = (
            _positive(self.alpha)
            if self.alpha is not None
            else self._choose(rows, index, labels, groups)
        )
        self.coef_, self.intercept_ = self._solve(rows, index, labels, self.alpha_)

    def _choose(self, rows, index, labels, groups):
        folds, best = _folds(self, groups), 0
        penalties = np.multiply(solvers.STRENGTHS, max(_moments(rows, index)[1], 1e-12))
        if folds.any():
            logits = solvers.held_out_logits(
                self._solve, rows, index, labels, folds, np.unique(folds), penalties
            )
            best = self._best(logits, labels, groups)
        return penalties[best] * len(labels)

    def _best(self, logits, labels, groups):
        """Number of the best row of held-out score differences (S, M)."""
        return solvers.within_one_error(
            np.stack([solvers.rescaled_loss(row, labels) for row in logits]), groups
        )

    def _score(self, rows):
        return solvers.product(rows, self.coef_) + self.intercept_


def _moments(rows, index):
    """linear.moments of all sides of the pairs: the same whether a response that comes twice is one row or two."""
    return solvers.moments(rows, np.bincount(index.ravel(), minlength=len(rows)).astype(float))


def _folds(model, groups):
    """(M,) numbers of at most model.cv folds of whole groups."""
    return splits.assign_folds(
        groups,
        min(model.cv, groups.max() + 1),
        checks.random_generator(model.random_state, "cross-validation"),
    )


def _positive(alpha):
    if not alpha > 0:
        raise ValueError(
            f"alpha should be above 0, or None to choose it by cross-validation; got {alpha!r}"
        )
    return float(alpha)


class BT_Linear(_Linear):
    """Linear Bradley-Terry model: logistic regression on x_0 - x_1 without intercept, its exact optimum.

    alpha: ridge penalty (scikit-learn's 1 / C), None: chosen on `cv` folds of whole groups; see
    _Linear.
    """

    _solve = staticmethod(solvers.fit_bt)


class BT_Laplace(BT_Linear):
    """Bayesian linear Bradley-Terry model: Gaussian posterior at the MAP weights, covariance the inverse exact Hessian.

    The Laplace approximation of Bayesian logistic regression (MacKay, Neural Computation 4, 1992)
    with prior w ~ N(0, 1 / alpha): precision alpha I + sum over pairs of p (1 - p) z z', z = x_0 -
    x_1. Pairs tell differences of scores only; a score is given as the difference to the mean
    training response (`center_`), and so is its standard deviation. That of the difference of two
    given responses comes from predict_difference, not from the two alone.

    features: None, or a BT_MLP: last-layer Laplace (arXiv 2106.14806). It is fitted to the same
    pairs, or used as it is when wrapped in scikit-learn's FrozenEstimator; its last hidden layer
    takes the place of the embeddings and its output weights that of the MAP, so that the means are
    its own scores.

    alpha: prior precision. None: as in BT_Linear, but by the plain loss, because the posterior is
    about probabilities; with features, that of the highest marginal likelihood. cv, random_state as
    in BT_Linear.
    """

    def __init__(self, alpha=None, features=None, cv=5, random_state=0):
        super().__init__(alpha, cv, random_state)
        self.features = features

    def _fit(self, rows, index, labels, groups):
        if self.features is None:
            super()._fit(rows, index, labels, groups)
            hessian = solvers.logistic_hessian(rows, index, self.coef_)
        else:
            self.features_ = clone(self.features).fit(index, labels, embeddings=rows, groups=groups)
            rows, self.coef_ = self.features_.features(rows), self.features_.output_weights()
            hessian = solvers.logistic_hessian(rows, index, self.coef_)
            self.alpha_ = (
                _evidence_alpha(hessian, self.coef_)
                if self.alpha is None
                else _positive(self.alpha)
            )
        self.center_ = _moments(rows, index)[0]
        self.intercept_ = float(-self.center_ @ self.coef_)
        precision = hessian + self.alpha_ * np.eye(len(hessian))
        self.covariance_ = cho_solve(cho_factor(precision), np.eye(len(precision)))

    def _best(self, logits, labels, groups):
        return int(np.argmin(solvers.logistic_loss(logits, labels).sum(1)))

    def _phi(self, rows):
        return rows if self.features is None else self.features_.features(rows)

    def _score(self, rows):
        return super()._score(self._phi(rows))

    def _std(self, directions):
        return np.sqrt(np.einsum("md,md->m", directions @ self.covariance_, directions))

    def predict(self, embeddings, return_std=False):
        """Posterior mean of the scores, (N, K, 1) or (M, 1); with return_std=True also their standard deviation."""
        if not return_std:
            return super().predict(embeddings)

        def mean_and_std(rows):
            rows = self._phi(rows) - self.center_
            return np.stack([rows @ self.coef_, self._std(rows)], 1)

        found = self._by_rows(mean_and_std, embeddings)
        return found[..., :1], found[..., 1:]

    def predict_difference(self, pairs, embeddings=None):
        """Posterior mean and standard deviation of s_0 - s_1, each (M,), of pairs (M, 2, D) or (M, 2) row numbers."""
        check_is_fitted(self)
        rows, index = checks.check_index(pairs, embeddings)
        self._check_width(rows.shape)
        rows = self._phi(rows)
        parts = (
            index[start : start + solvers.BLOCK_ROWS].T
            for start in range(0, len(index), solvers.BLOCK_ROWS)
        )
        differences = (rows[first].astype(float) - rows[second] for first, second in parts)
        mean, std = zip(*((z @ self.coef_, self._std(z)) for z in differences), strict=True)
        return np.concatenate(mean), np.concatenate(std)


def _evidence_alpha(hessian, weights):
    """Prior precision of the highest Laplace marginal likelihood at fixed weights: alpha |w|^2 = sum h / (h + alpha).

    h: eigenvalues of the Hessian; the right side is MacKay's number of well-determined weights. It
    falls as alpha rises and the left side rises, so there is one solution.
    """
    h, size = np.clip(np.linalg.eigvalsh(hessian), 0, None), max(weights @ weights, 1e-24)

    def excess(log_alpha):
        alpha = np.exp(log_alpha)
        return alpha * size - (h / (h + alpha)).sum()

    return float(np.exp(brentq(excess, -60, np.log(len(h) / size) + 1)))


class CLF_Linear(_Linear):
    """Logistic regression of single responses into preferred and other, with intercept; the logit is the score.

    alpha: ridge penalty (scikit-learn's 1 / C), None: chosen on `cv` folds of whole groups; see
    _Linear.
    """

    _solve = staticmethod(solvers.fit_clf)


class Regression_Ridge(_Linear):
    """Ridge regression on absolute ratings: what the embeddings give linearly where no comparison is needed.

    A reference for models of pairs: it sees golden rewards. within=False predicts the rating
    itself; True regresses the deviations from each prompt's means (fixed effects), which is what
    ranking within prompts is about, and needs (N, K, D). alpha: penalty of scikit-learn's Ridge;
    None: the best of linear.STRENGTHS by the squared error on `cv` folds of whole groups.
    """

    def __init__(self, alpha=None, within=False, cv=5, random_state=0):
        super().__init__(alpha, cv, random_state)
        self.within = within

    def fit(self, embeddings, ratings, groups=None):
        """Fit on embeddings (N, K, D) and ratings (N, K, 1) or (N, K), or on (M, D) and (M, 1) or (M,).

        groups: (N,) or (M,) prompt of each entry of the first axis; None: each its own. Read in
        blocks: memory does not grow with N. ValueError on other shapes or values that are not
        finite.
        """
        embeddings, ratings, groups = checks.check_ratings(embeddings, ratings, groups)
        shape = tuple(embeddings.shape)
        if self.within and len(shape) == 2:
            raise ValueError(
                f"embeddings should be (N, K, D), K responses to each prompt; got {shape}"
            )
        folds = _folds(self, groups)
        sums = [self._sums(embeddings, ratings, folds == fold) for fold in np.unique(folds)]
        total = sum(sums)
        if self.alpha is None:
            self.alpha_ = (
                solvers.choose_ridge_strength(sums) * total[-1, -1] * solvers.variance(total)
            )
        else:
            self.alpha_ = _positive(self.alpha)
        self.coef_, self.intercept_ = solvers.fit_ridge(total, self.alpha_)
        self.n_features_in_ = shape[-1]
        return self

    def _sums(self, embeddings, ratings, chosen):
        """linear.second_moments of the chosen (N,) entries of the first axis, block by block."""
        at, d, total = np.flatnonzero(chosen), embeddings.shape[-1], 0
        step = max(1, BLOCK_BYTES // (8 * int(np.prod(embeddings.shape[1:]))))
        for part in (at[start : start + step] for start in range(0, len(at), step)):
            x, y = checks.finite_rows(embeddings[part]).astype(float), ratings[part]
            if self.within:
                x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
            total = total + solvers.second_moments(x.reshape(-1, d), y.ravel())
        return total
