"""Reward models from classifiers of single responses into preferred and not preferred: LightGBM, scikit-learn's."""

import numpy as np
from joblib import effective_n_jobs
from scipy.special import logit
from sklearn.base import clone

from rewardlib.models import checks, solvers
from rewardlib.models.base import RewardModel

CLIP = 1e-6


class CLF_LGBM(RewardModel):
    """Gradient-boosted trees on single responses, LightGBM's default settings as in arXiv 2411.04991; logit = score.

    Needs the optional package lightgbm. n_jobs: threads; the trees do not depend on their number.
    """

    def __init__(
        self,
        n_estimators=100,
        learning_rate=0.1,
        num_leaves=31,
        min_child_samples=20,
        n_jobs=1,
        random_state=0,
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

        class Sides(lightgbm.Sequence):  # LightGBM bins the responses of the pairs block by block
            batch_size = solvers.BLOCK_ROWS

            def __len__(self):
                return len(flat)

            def __getitem__(self, at):
                return rows[flat[at]].astype(float)

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
        return self.booster_.predict(
            rows, raw_score=True, num_threads=effective_n_jobs(self.n_jobs)
        )


def has_lightgbm():
    """Whether CLF_LGBM can be fitted here; the preflight of a script asks."""
    try:
        import_lightgbm()
    except ImportError:
        return False
    return True


def import_lightgbm():
    try:
        import lightgbm
    except ImportError:
        raise ImportError(
            'CLF_LGBM: expected the package lightgbm, found none; pip install -e ".[trees]"'
        ) from None
    return lightgbm


class CLF_Any(RewardModel):
    """Any scikit-learn classifier, fitted to single responses with preferred = 1.

    The score is its decision_function, or where it has none the logit of predict_proba clipped to
    [1e-6, 1 - 1e-6]. It is given all 2 M responses as one array, because not every classifier takes
    weights.
    """

    def __init__(self, estimator):
        self.estimator = estimator

    def _fit(self, rows, index, labels, groups):
        if not any(
            hasattr(self.estimator, name) for name in ("decision_function", "predict_proba")
        ):
            raise ValueError(
                f"estimator should have decision_function or predict_proba; {type(self.estimator).__name__} has neither"
            )
        self.estimator_ = clone(self.estimator).fit(
            rows[index.ravel()], solvers.one_by_one(labels).astype(int)
        )

    def _score(self, rows):
        rows = rows.astype(float)
        if hasattr(self.estimator_, "decision_function"):
            return np.asarray(self.estimator_.decision_function(rows), float).reshape(len(rows))
        preferred = list(self.estimator_.classes_).index(1)
        chance = np.asarray(self.estimator_.predict_proba(rows), float)[:, preferred]
        return logit(np.clip(chance, CLIP, 1 - CLIP))
