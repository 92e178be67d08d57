"""Linear reward models: Bradley-Terry, its Laplace approximation, classification, ridge."""

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import brentq
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted

from rewardlib.data import splits
from rewardlib.models import base, checks, solvers


class _Linear(base.RewardModel):
    """A reward model with weights coef_ (D,), intercept_ and the penalty alpha_ of its fit.

    Subclasses define _solve, a solver such as solvers.fit_bt. alpha: ridge penalty, the factor of
    |w|^2 / 2 beside the sum of the losses; scikit-learn's 1 / C and the precision of a Gaussian
    prior. None: the strongest of solvers.STRENGTHS that orders held-out pairs within one standard
    error of the best strength, on `cv` folds of whole groups.

    Strengths are compared by the logistic loss of score differences times the one positive number
    that suits them best: a ridge penalty shrinks scores, which does not change their order.
    """

    def __init__(
        self,
        alpha: float | None = None,
        cv: int = 5,
        random_state: int | np.random.RandomState | None = 0,
    ):
        self.alpha = alpha
        self.cv = cv
        self.random_state = random_state

    def _fit(self, rows, index, labels, groups):
        if self.alpha is None:
            self.alpha_ = self._choose(rows, index, labels, groups)
        else:
            self.alpha_ = _positive(self.alpha)
        self.coef_, self.intercept_ = self._solve(rows, index, labels, self.alpha_)

    def _choose(self, rows, index, labels, groups):
        """alpha by cross-validation; the strongest where one group leaves no fold to hold out."""
        folds, best = _folds(self, groups), 0
        penalties = np.multiply(solvers.STRENGTHS, max(_moments(rows, index)[1], 1e-12))
        if folds.any():
            logits_SM = solvers.held_out_logits(
                self._solve, rows, index, labels, folds, np.unique(folds), penalties
            )
            best = self._best(logits_SM, labels, groups)
        return penalties[best] * len(labels)

    def _best(self, logits_SM, labels, groups):
        """Index of the chosen strength, from held-out score differences (S, M)."""
        losses_SM = np.stack([solvers.rescaled_loss(logits, labels) for logits in logits_SM])
        return solvers.within_one_error(losses_SM, groups)

    def _score(self, rows):
        return solvers.product(rows, self.coef_) + self.intercept_


def _moments(rows, index):
    """solvers.moments of all sides of the pairs: a response that occurs twice counts twice."""
    return solvers.moments(rows, np.bincount(index.ravel(), minlength=len(rows)).astype(float))


def _folds(model, groups):
    """(M,) numbers of at most model.cv folds of whole groups."""
    n_folds = min(model.cv, groups.max() + 1)
    rng = checks.random_generator(model.random_state, "cross-validation")
    return splits.assign_folds(groups, n_folds, rng)


def _positive(alpha):
    if not alpha > 0:
        raise ValueError(
            f"alpha should be above 0, or None to choose it by cross-validation; got {alpha!r}"
        )
    return float(alpha)


class BT_Linear(_Linear):
    """Linear Bradley-Terry model: exact logistic regression on x_0 - x_1, without intercept.

    alpha: ridge penalty, scikit-learn's 1 / C; None: chosen on `cv` folds of whole groups, see
    _Linear.
    """

    _solve = staticmethod(solvers.fit_bt)


class BT_Laplace(BT_Linear):
    """Bayesian linear Bradley-Terry model with a Gaussian posterior over the weights.

    The Laplace approximation of Bayesian logistic regression (MacKay, Neural Computation 4, 1992)
    with prior w ~ N(0, 1 / alpha): the posterior mean is the MAP estimate, the posterior precision
    alpha I + sum over pairs of p (1 - p) z z', where z = x_0 - x_1. Pairs say nothing about the
    level of the scores, so a score and its standard deviation are those of the difference to the
    mean training response (`center_`). The standard deviation of the difference of two responses
    comes from predict_difference: the standard deviations of the two scores do not determine it.

    features: None, or a BT_MLP for last-layer Laplace (arXiv 2106.14806). The BT_MLP is fitted to
    the same pairs, or used as it is when wrapped in scikit-learn's FrozenEstimator. Its last hidden
    layer takes the place of the embeddings and its output weights the place of the MAP estimate, so
    that the posterior means are the scores of the BT_MLP.

    alpha: prior precision. None: as in BT_Linear, but by the plain loss, because the posterior is
    about probabilities; with features, the precision of the highest marginal likelihood. cv,
    random_state: as in BT_Linear.
    """

    def __init__(
        self,
        alpha: float | None = None,
        features: BaseEstimator | None = None,
        cv: int = 5,
        random_state: int | np.random.RandomState | None = 0,
    ):
        super().__init__(alpha, cv, random_state)
        self.features = features

    def _fit(self, rows, index, labels, groups):
        if self.features is None:
            super()._fit(rows, index, labels, groups)
            hessian_DD = solvers.logistic_hessian(rows, index, self.coef_)
        else:
            self.features_ = clone(self.features).fit(index, labels, embeddings=rows, groups=groups)
            rows, self.coef_ = self.features_.features(rows), self.features_.output_weights()
            hessian_DD = solvers.logistic_hessian(rows, index, self.coef_)
            if self.alpha is None:
                self.alpha_ = _evidence_alpha(hessian_DD, self.coef_)
            else:
                self.alpha_ = _positive(self.alpha)
        self.center_ = _moments(rows, index)[0]
        self.intercept_ = float(-self.center_ @ self.coef_)
        precision_DD = hessian_DD + self.alpha_ * np.eye(len(hessian_DD))
        self.covariance_ = cho_solve(cho_factor(precision_DD), np.eye(len(precision_DD)))

    def _best(self, logits_SM, labels, groups):
        return int(np.argmin(solvers.logistic_loss(logits_SM, labels).sum(1)))

    def _phi(self, rows):
        """Inputs of the linear model: the rows themselves, or their features."""
        return rows if self.features is None else self.features_.features(rows)

    def _score(self, rows):
        return super()._score(self._phi(rows))

    def _std(self, directions_MD):
        """Posterior standard deviations (M,) of the scores along directions (M, D)."""
        return np.sqrt(np.einsum("md,md->m", directions_MD @ self.covariance_, directions_MD))

    def predict(
        self, embeddings: np.ndarray, return_std: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Posterior mean of the scores, (N, K, 1) or (M, 1).

        return_std: whether to return a pair, the mean and the standard deviation, of equal shapes.
        """
        if not return_std:
            return super().predict(embeddings)

        def mean_and_std(rows):
            directions = self._phi(rows) - self.center_
            return np.stack([directions @ self.coef_, self._std(directions)], 1)

        moments = self._by_rows(mean_and_std, embeddings)
        return moments[..., :1], moments[..., 1:]

    def predict_difference(
        self, pairs: np.ndarray, embeddings: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and standard deviation of s_0 - s_1, each (M,), of pairs.

        pairs: (M, 2, D), or (M, 2) row numbers into `embeddings`.
        """
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


def _evidence_alpha(hessian_DD, weights):
    """Prior precision of the highest Laplace marginal likelihood, at fixed weights.

    It solves alpha |w|^2 = sum h / (h + alpha) over the eigenvalues h of the Hessian; the right
    side is MacKay's number of well-determined weights. As alpha rises, the left side rises and the
    right side falls, so there is one solution.
    """
    h, size = np.clip(np.linalg.eigvalsh(hessian_DD), 0, None), max(weights @ weights, 1e-24)

    def excess(log_alpha):
        alpha = np.exp(log_alpha)
        return alpha * size - (h / (h + alpha)).sum()

    return float(np.exp(brentq(excess, -60, np.log(len(h) / size) + 1)))


class CLF_Linear(_Linear):
    """Logistic regression of single responses into preferred and other; the logit is the score.

    alpha: ridge penalty, scikit-learn's 1 / C; None: chosen on `cv` folds of whole groups, see
    _Linear. The intercept is not penalised.
    """

    _solve = staticmethod(solvers.fit_clf)


class Regression_Ridge(_Linear):
    """Ridge regression on absolute ratings: a reference for the models that see comparisons only.

    within: False predicts the rating itself. True regresses the deviations from the means of each
    prompt (fixed effects), which is what ranking within prompts is about, and needs embeddings
    (N, K, D). alpha: penalty of scikit-learn's Ridge; None: the best of solvers.STRENGTHS by the
    squared error on `cv` folds of whole groups.
    """

    def __init__(
        self,
        alpha: float | None = None,
        within: bool = False,
        cv: int = 5,
        random_state: int | np.random.RandomState | None = 0,
    ):
        super().__init__(alpha, cv, random_state)
        self.within = within

    def fit(
        self, embeddings: np.ndarray, ratings: np.ndarray, groups: np.ndarray | None = None
    ) -> "Regression_Ridge":
        """Fit to embeddings (N, K, D) and ratings (N, K[, 1]), or to (M, D) and (M[, 1]).

        groups: (N,) or (M,) prompt of each entry of the first axis; None: each entry is a group of
        its own. Embeddings are read in blocks: memory does not grow with N. ValueError on other
        shapes or values that are not finite.
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
            strength = solvers.choose_ridge_strength(sums)
            self.alpha_ = strength * total[-1, -1] * solvers.variance(total)
        else:
            self.alpha_ = _positive(self.alpha)
        self.coef_, self.intercept_ = solvers.fit_ridge(total, self.alpha_)
        self.n_features_in_ = shape[-1]
        return self

    def _sums(self, embeddings, ratings, chosen):
        """solvers.second_moments of the entries of axis 0 that `chosen` (N,) marks, in blocks."""
        positions, total = np.flatnonzero(chosen), 0
        step = max(1, base.BLOCK_BYTES // (8 * int(np.prod(embeddings.shape[1:]))))
        for start in range(0, len(positions), step):
            part = positions[start : start + step]
            x, y = checks.finite_rows(embeddings[part]).astype(float), ratings[part]
            if self.within:
                x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
            total = total + solvers.second_moments(x.reshape(-1, x.shape[-1]), y.ravel())
        return total
