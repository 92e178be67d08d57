"""The interface of reward models: arrays of preference pairs in, one score per response out.

    model.fit(pairs, labels, embeddings=None, groups=None)
        pairs (M, 2, D), or (M, 2) row numbers into embeddings
    model.predict(embeddings)
        (N, K, D) -> (N, K, 1), or (M, D) -> (M, 1)

Reward models follow scikit-learn: get_params, set_params, clone, random_state, n_features_in_,
NotFittedError.

Scores have no unit. Best-of-n and every ranking metric use only the order of scores, so a reward
model need only be order consistent, (s_0 - s_1)(r_0 - r_1) > 0, and any increasing function of the
model is as good (arXiv 2411.04991). A classifier of single responses into preferred and not
preferred is enough: a pair that it orders wrongly has at least one response on the wrong side of
the threshold, so its order error is at most the sum of its two classification errors. The logit of
the classifier is the score. Reward units come from rewardlib/calibration.py.
"""

from collections.abc import Callable

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from rewardlib.models import checks

BLOCK_BYTES = 1 << 25


class RewardModel(BaseEstimator):
    """Base of all reward models on pairs.

    A subclass defines _fit(rows, index, labels, groups), with arguments as check_pairs returns
    them, and _score(rows (m, D)) -> (m,).
    """

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.target_tags.required = True
        return tags

    def fit(
        self,
        pairs: np.ndarray,
        labels: np.ndarray,
        embeddings: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> "RewardModel":
        """Fit to pairs of embeddings (M, 2, D), or to row numbers (M, 2) with `embeddings`.

        embeddings: (R, D) or (N, K, D). labels: (M,) 1 where side 0 was preferred, else 0; both
        must occur. groups: (M,) prompt of each pair (for cross-prompt pairs, the fold of its
        prompts); pairs of one group stay together wherever pairs are held out to choose a setting.
        ValueError on other shapes, other labels or values that are not finite; see check_pairs.
        """
        rows, index, labels, groups = checks.check_pairs(pairs, labels, embeddings, groups)
        self._fit(rows, index, labels, groups)
        self.n_features_in_ = rows.shape[1]
        return self

    def predict(self, embeddings: np.ndarray) -> np.ndarray:
        """Scores (N, K, 1) of embeddings (N, K, D), or (M, 1) of (M, D).

        Embeddings are read in blocks and may be memory-mapped.
        """
        return self._by_rows(lambda rows: self._score(rows)[:, None], embeddings)

    def score(
        self, pairs: np.ndarray, labels: np.ndarray, embeddings: np.ndarray | None = None
    ) -> float:
        """Share of pairs that the scores order as the labels do; tied scores count one half."""
        rows, index = checks.check_index(pairs, embeddings)
        scores_M2 = self.predict(rows)[index, 0]
        labels = checks.check_labels(labels, len(index))
        gap = scores_M2[:, 0] - scores_M2[:, 1]
        agreement = np.where(labels == 1, 1, -1) * np.sign(gap)
        return float(0.5 + 0.5 * agreement.mean())

    def _check_width(self, shape):
        if shape[-1] != self.n_features_in_:
            # scikit-learn's own checks look for the first half of this message.
            raise ValueError(
                f"X has {shape[-1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input: embeddings should have "
                f"{self.n_features_in_} dimensions; got {shape}"
            )

    def _by_rows(self, function: Callable, embeddings: np.ndarray) -> np.ndarray:
        """(..., C) of function(rows (m, D)) -> (m, C), called on embeddings (..., D) in blocks."""
        check_is_fitted(self)
        embeddings = checks.as_dense(embeddings)
        shape = tuple(embeddings.shape)
        if len(shape) not in (2, 3):
            raise ValueError(
                f"Reshape your data: embeddings should be (M, D) or (N, K, D); got {shape}"
            )
        self._check_width(shape)
        if not np.prod(shape):
            raise ValueError(f"embeddings should hold at least one response; got {shape}")
        step = max(1, BLOCK_BYTES // (4 * int(np.prod(shape[1:]))))
        blocks = (
            checks.finite_rows(embeddings[start : start + step])
            for start in range(0, shape[0], step)
        )
        values = np.concatenate([function(block.reshape(-1, shape[-1])) for block in blocks])
        return values.reshape(*shape[:-1], -1)
