"""The ensemble estimator: copies of one reward model, their scores on one scale and aggregated."""

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
    """n copies of a reward model, each with its own seed; their scores on one scale, aggregated.

    estimator: a reward model. bootstrap: True fits each member to the pairs (ratings) of groups
    drawn with replacement. aggregation: mean, min (worst case), uwo (uncertainty-weighted), lcb
    (lower confidence bound) or first; see aggregation.aggregate, also for uwo_lambda and lcb_c.

    On the common scale each member has mean 0 and standard deviation 1 over at most 4096 of the
    responses that the ensemble was fitted to. A model that draws nothing at random needs
    bootstrap=True: ValueError where the first two members are the same.
    """

    def __init__(
        self,
        estimator: RewardModel,
        n: int = 10,
        bootstrap: bool = False,
        aggregation: str = "mean",
        random_state: int | np.random.RandomState | None = 0,
        uwo_lambda: float = UWO_LAMBDA,
        lcb_c: float = LCB_C,
    ):
        self.estimator = estimator
        self.n = n
        self.bootstrap = bootstrap
        self.aggregation = aggregation
        self.random_state = random_state
        self.uwo_lambda = uwo_lambda
        self.lcb_c = lcb_c

    def fit(
        self,
        pairs: np.ndarray,
        labels: np.ndarray,
        embeddings: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> "Ensemble":
        """Fit all members; arguments as in the estimator's own fit.

        For Regression_Ridge, pairs are embeddings and labels are ratings.
        """
        if self.aggregation not in ("mean", "min", "uwo", "lcb", "first") or self.n < 1:
            raise ValueError(
                "expected n of at least 1 and aggregation mean, min, uwo, lcb or first; "
                f"got n {self.n} and {self.aggregation!r}"
            )
        if isinstance(self.estimator, Regression_Ridge):
            pairs, labels, groups = checks.check_ratings(pairs, labels, groups)
            sample, options = self._sample(pairs, None), {}
        else:
            rows, pairs, labels, groups = checks.check_pairs(pairs, labels, embeddings, groups)
            sample, options = self._sample(rows, pairs.ravel()), {"embeddings": rows}
        members, raw = [], []
        for i in range(self.n):
            rng = checks.random_generator(self.random_state, "member", i)
            member = _reseed(clone(self.estimator), rng)
            positions = self._draw(labels, groups, rng) if self.bootstrap else slice(None)
            member.fit(pairs[positions], labels[positions], groups=groups[positions], **options)
            members.append(member)
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
        """Embeddings (m, D) of up to SCALE_ROWS of the responses numbered `flat`; None: of all."""
        flat = np.arange(np.prod(embeddings.shape[:-1])) if flat is None else flat
        rng = checks.random_generator(self.random_state, "ensemble scale")
        return checks.take_rows(embeddings, rng.permutation(flat)[:SCALE_ROWS])

    def _draw(self, labels, groups, rng):
        """Positions of a bootstrap of whole groups, drawn again while only one label occurs."""
        for _ in range(REDRAWS):
            positions = bootstrap(groups, rng)
            if labels[positions].min() < labels[positions].max():
                break
        return positions

    def predict_members(self, embeddings: np.ndarray) -> np.ndarray:
        """Scores of every member on one scale, (n, N, K, 1) or (n, M, 1)."""
        check_is_fitted(self)
        members = zip(self.estimators_, self.center_, self.spread_, strict=True)
        return np.stack(
            [(member.predict(embeddings) - center) / spread for member, center, spread in members]
        )

    def predict(self, embeddings: np.ndarray) -> np.ndarray:
        """Aggregated scores (N, K, 1) or (M, 1)."""
        scores = aggregate(self.predict_members(embeddings), self.uwo_lambda, self.lcb_c)
        return scores[self.aggregation]


def _reseed(estimator, rng):
    """The estimator with a new number for each of its random_state parameters, nested ones too."""
    names = [
        name for name in sorted(estimator.get_params()) if name.split("__")[-1] == "random_state"
    ]
    return estimator.set_params(**{name: int(rng.integers(2**31)) for name in names})
