"""The interface of reward models: arrays of preference pairs in, one score per response out.

    model.fit(pairs, labels, embeddings=None, groups=None)     pairs (M, 2, D), or (M, 2) row numbers into embeddings
    model.predict(embeddings)                                  (N, K, D) -> (N, K, 1) or (M, D) -> (M, 1)

They follow scikit-learn: get_params, set_params, clone, random_state, n_features_in_,
NotFittedError.

Scores have no unit. Best-of-n and every ranking metric use their order alone, so a reward model
need only be order consistent, (s_0 - s_1)(r_0 - r_1) > 0, and any increasing function of it is as
good (arXiv 2411.04991). A classifier of single responses into preferred and not preferred is
enough: a pair it orders wrongly has at least one response on the wrong side of the threshold, so
its order error is at most the sum of its two classification errors, and its logit is the score.
Reward units come from rewardlib/calibration.py.
"""

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from rewardlib.models import checks

BLOCK_BYTES = 1 << 25


class RewardModel(BaseEstimator):
    """What all reward models on pairs share. A model has _fit(rows, index, labels, groups) and _score(rows) -> (m,)."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.target_tags.required = True
        return tags

    def fit(self, pairs, labels, embeddings=None, groups=None):
        """Fit on pairs (M, 2, D) of embeddings, or on (M, 2) row numbers into `embeddings` (R, D) or (N, K, D).

        labels: (M,) 1 where side 0 was preferred, else 0, both of them present. groups: (M,) prompt
        of each pair (for cross-prompt pairs the fold of its prompts), kept together wherever some
        pairs are held out to choose a setting. ValueError on other shapes, other labels or values
        that are not finite; see check_pairs.
        """
        rows, index, labels, groups = checks.check_pairs(pairs, labels, embeddings, groups)
        self._fit(rows, index, labels, groups)
        self.n_features_in_ = rows.shape[1]
        return self

    def predict(self, embeddings):
        """Scores (N, K, 1) of embeddings (N, K, D), or (M, 1) of (M, D); read in blocks, so they may be mapped."""
        return self._by_rows(lambda rows: self._score(rows)[:, None], embeddings)

    def score(self, pairs, labels, embeddings=None):
        """Share of pairs whose order the scores and the labels agree on; tied scores count one half."""
        rows, index = checks.check_index(pairs, embeddings)
        scores = self.predict(rows)[index, 0]
        right = np.where(checks.check_labels(labels, len(index)) == 1, 1, -1) * np.sign(
            scores[:, 0] - scores[:, 1]
        )
        return float(0.5 + 0.5 * right.mean())

    def _check_width(self, shape):
        if shape[-1] != self.n_features_in_:
            raise ValueError(
                f"X has {shape[-1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features as "
                f"input: embeddings should have {self.n_features_in_} dimensions; got {shape}"
            )

    def _by_rows(self, function, embeddings):
        """function(rows (m, D)) -> (m, C) over embeddings (..., D), block by block: (..., C)."""
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
