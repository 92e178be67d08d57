"""Reward models from classifiers of single responses: LightGBM, and any classifier of scikit-learn.

The classes are preferred and not preferred; base.py says why such a classifier is a reward model.
"""

import numpy as np
from joblib import effective_n_jobs
from scipy.special import logit
from sklearn.base import BaseEstimator, clone

from rewardlib.models import checks, solvers
from rewardlib.models.base import RewardModel

CLIP = 1e-6


class CLF_LGBM(RewardModel):
    """Gradient-boosted trees on single responses; the score is the logit.

    The default settings are LightGBM's own, as in arXiv 2411.04991. Needs the optional package
    lightgbm. n_jobs: number of threads; the trees do not depend on it.
    """

    def __init__(
        self,
        n_estimators: int = 100,
        learning_rate: float = 0.1,
        num_leaves: int = 31,
        min_child_samples: int = 20,
        n_jobs: int = 1,
        random_state: int | np.random.RandomState | None = 0,
    ):
        self.n_estimators = n_estimators
        self.learning_rate = learning_rate
        self.num_leaves = num_leaves
        self.min_child_samples = min_child_samples
        self.n_jobs = n_jobs
        self.random_state = random_state

    def _fit(self, rows, index, labels, groups):
        lightgbm = import_lightgbm()
        flat = index.ravel()

        # LightGBM bins the responses of the pairs block by block: no array of 2 M rows is made.
        class Sides(lightgbm.Sequence):
            batch_size = solvers.BLOCK_ROWS

            def __len__(self):
                return len(flat)

            def __getitem__(self, positions):
                return rows[flat[positions]].astype(float)

        settings = {
            "objective": "binary",
            "learning_rate": self.learning_rate,
            "num_leaves": self.num_leaves,
            "min_child_samples": self.min_child_samples,
            "num_threads": effective_n_jobs(self.n_jobs),
            "seed": int(checks.random_generator(self.random_state, "lightgbm").integers(2**31)),
            "deterministic": True,
            "force_col_wise": True,
            "verbosity": -1,
        }
        data = lightgbm.Dataset(Sides(), solvers.one_by_one(labels), params=settings)
        self.booster_ = lightgbm.train(settings, data, self.n_estimators)

    def _score(self, rows):
        n_threads = effective_n_jobs(self.n_jobs)
        return self.booster_.predict(rows, raw_score=True, num_threads=n_threads)


def import_lightgbm():
    """The module lightgbm; ImportError with the command that installs it."""
    try:
        import lightgbm
    except ImportError:
        raise ImportError(
            'CLF_LGBM needs the package lightgbm; pip install -e ".[trees]"'
        ) from None
    return lightgbm


class CLF_Any(RewardModel):
    """Any scikit-learn classifier, fitted to single responses with preferred = 1.

    The score is the decision_function of the classifier or, where the classifier has none, the
    logit of its predict_proba clipped to [1e-6, 1 - 1e-6]. The classifier gets all 2 M responses as
    one array, because not every classifier takes sample weights.
    """

    def __init__(self, estimator: BaseEstimator):
        self.estimator = estimator

    def _fit(self, rows, index, labels, groups):
        methods = ("decision_function", "predict_proba")
        if not any(hasattr(self.estimator, name) for name in methods):
            raise ValueError(
                "estimator should have decision_function or predict_proba; "
                f"{type(self.estimator).__name__} has neither"
            )
        targets = solvers.one_by_one(labels).astype(int)
        self.estimator_ = clone(self.estimator).fit(rows[index.ravel()], targets)

    def _score(self, rows):
        rows = rows.astype(float)
        if hasattr(self.estimator_, "decision_function"):
            return np.asarray(self.estimator_.decision_function(rows), float).reshape(len(rows))
        preferred = list(self.estimator_.classes_).index(1)
        chance = np.asarray(self.estimator_.predict_proba(rows), float)[:, preferred]
        return logit(np.clip(chance, CLIP, 1 - CLIP))
