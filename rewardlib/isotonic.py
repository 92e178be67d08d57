"""Centred isotonic regression as a scikit-learn estimator; `from rewardlib.calibration import` finds it as well."""

from sklearn.base import BaseEstimator, RegressorMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from rewardlib.calibration import CenteredIsotonicMap


class CenteredIsotonicRegression(CenteredIsotonicMap, RegressorMixin, TransformerMixin, BaseEstimator):
    __doc__ = CenteredIsotonicMap.__doc__

    def predict(self, X):
        """Calibrated values of the scores, in the shape of X without a last axis of 1 when X is a column."""
        check_is_fitted(self)
        return super().predict(X)
