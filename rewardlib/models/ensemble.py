"""Several copies of one reward model, their scores on one scale and aggregated."""

import numpy as np
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted

from rewardlib.data.pairs import bootstrap
from rewardlib.models import checks
from rewardlib.models.aggregation import LCB_C, UWO_LAMBDA, aggregate
from rewardlib.models.base import RewardModel
from rewardlib.models.linear import Regression_Ridge

SCALE_ROWS = 4096
REDRAWS = 100


class Ensemble(RewardModel):
    """n copies of any reward model, each from its own seed, their scores on one scale and then aggregated.

    estimator: a reward model; bootstrap: True: each member on the pairs (ratings) of groups drawn
    with replacement; aggregation: mean, min (worst case), uwo (uncertainty-weighted) or lcb (lower
    confidence bound), see aggregation.aggregate; one scale: each member has mean 0 and standard
    deviation 1 over (at most 4096 of) the responses it was fitted to. Models without randomness of
    their own need bootstrap=True: ValueError where the first two members are the same.
    """

    def __init__(
        self,
        estimator,
        n=10,
        bootstrap=False,
        aggregation="mean",
        random_state=0,
        uwo_lambda=UWO_LAMBDA,
        lcb_c=LCB_C,
    ):
        self.estimator = estimator
        self.n = n
        self.bootstrap = bootstrap
        self.aggregation = aggregation
        self.random_state = random_state
        self.uwo_lambda = uwo_lambda
        self.lcb_c = lcb_c

    def fit(self, pairs, labels, embeddings=None, groups=None):
        """Fit all members; arguments as those of the estimator's own fit (ratings for labels in Regression_Ridge)."""
        if self.aggregation not in ("mean", "min", "uwo", "lcb", "first") or self.n < 1:
            raise ValueError(
                "expected n of at least 1 and aggregation mean, min, uwo, lcb or first; "
                f"got n {self.n} and {self.aggregation!r}"
            )
        matrix, sides = {}, None
        if isinstance(self.estimator, Regression_Ridge):
            pairs, labels, groups = checks.check_ratings(pairs, labels, groups)
        else:
            rows, pairs, labels, groups = checks.check_pairs(pairs, labels, embeddings, groups)
            matrix, sides = {"embeddings": rows}, pairs.ravel()
        sample = self._sample(matrix.get("embeddings", pairs), sides)
        members, raw = [], []
        for i in range(self.n):
            rng = checks.random_generator(self.random_state, "member", i)
            member = _reseed(clone(self.estimator), rng)
            at = self._draw(labels, groups, rng) if self.bootstrap else slice(None)
            members.append(member.fit(pairs[at], labels[at], groups=groups[at], **matrix))
            raw.append(member.predict(sample).astype(float))
            if i == 1 and not self.bootstrap and np.array_equal(raw[0], raw[1]):
                name = type(self.estimator).__name__
                raise ValueError(
                    f"members should differ; {name} draws nothing at random: set bootstrap=True"
                )
        spread = np.std(raw, axis=(1, 2))
        self.estimators_, self.center_ = members, np.mean(raw, axis=(1, 2))
        self.spread_ = np.where(spread > 0, spread, 1.0)
        self.n_features_in_ = members[0].n_features_in_
        return self

    def _sample(self, embeddings, flat):
        """(m, D) embeddings of some of the responses numbered `flat` (None: of all there are)."""
        flat = np.arange(np.prod(embeddings.shape[:-1])) if flat is None else flat
        return checks.take_rows(
            embeddings,
            checks.random_generator(self.random_state, "ensemble scale").permutation(flat)[
                :SCALE_ROWS
            ],
        )

    def _draw(self, labels, groups, rng):
        """Positions of a bootstrap of whole groups that does not hold one label alone."""
        for _ in range(REDRAWS):
            at = bootstrap(groups, rng)
            if labels[at].min() < labels[at].max():
                break
        return at

    def predict_members(self, embeddings):
        """Scores of every member on one scale, (n, N, K, 1) or (n, M, 1)."""
        check_is_fitted(self)
        each = zip(self.estimators_, self.center_, self.spread_, strict=True)
        return np.stack(
            [(member.predict(embeddings) - center) / spread for member, center, spread in each]
        )

    def predict(self, embeddings):
        """Aggregated scores (N, K, 1) or (M, 1)."""
        return aggregate(self.predict_members(embeddings), self.uwo_lambda, self.lcb_c)[
            self.aggregation
        ]


def _reseed(estimator, rng):
    """Give every random_state of an estimator, nested ones too, a number of its own."""
    names = [
        name for name in sorted(estimator.get_params()) if name.split("__")[-1] == "random_state"
    ]
    return estimator.set_params(**{name: int(rng.integers(2**31)) for name in names})
