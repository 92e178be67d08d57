"""Reward models by name, as `--rm_model` and `--rm_objective` give it, and the fit of an ensemble's members."""

import numpy as np

from rewardlib.errors import InputError
from rewardlib.models.classifiers import CLF_LGBM
from rewardlib.models.linear import BT_Laplace, BT_Linear, CLF_Linear, Regression_Ridge
from rewardlib.models.mlp import BT_MLP, CLF_MLP


def model_class(model, objective):
    """The class of reward model `model` (mlp or one of MODELS) with `objective`; InputError where there is none."""
    if model == "mlp":
        objectives = {"bt": BT_MLP, "clf": CLF_MLP}
    else:
        objectives = MODELS.get(model, {})
    if objective not in objectives:
        known = {"mlp": ("bt", "clf"), **MODELS}
        pairs = ", ".join(f"{name} {kind}" for name, kinds in known.items() for kind in kinds)
        raise InputError(
            f"reward model: expected one of {pairs}, found {model} {objective}; change either"
        )
    return objectives[objective]


MODELS = {
    "linear": {"bt": BT_Linear, "clf": CLF_Linear},
    "lgbm": {"clf": CLF_LGBM},
    "laplace": {"bt": BT_Laplace},
    "ridge": {"regression": Regression_Ridge},
}


def fit_members(kind, rows, index, labels, folds, members, ratings=None):
    """Fit models of the class `kind` on parts of the same annotated pairs, as networks.train_ensemble trains MLPs.

    rows: (R, D) float32; index: (M, 2) row numbers; labels: (M,); folds: (M,) fold of each pair's
    prompts; members: a list of (train, validation, seed); ratings: (R,) golden rewards of the rows
    for Regression_Ridge, which learns from those of the train pairs. Yields (model, log of one
    entry) for each member.
    """
    for fit, held, seed in members:
        model = kind(random_state=seed % 2**32)
        if ratings is None:
            # A pair says the same with its sides turned. Turned to alternate, few labels are not
            # all alike by chance.
            alternating = np.arange(len(fit)) % 2
            sides = np.where((labels[fit] == alternating)[:, None], index[fit], index[fit][:, ::-1])
            model.fit(sides, alternating, embeddings=rows, groups=folds[fit])
        else:
            model.fit(
                rows[index[fit].ravel()],
                ratings[index[fit].ravel()],
                groups=np.repeat(folds[fit], 2),
            )
        entry = {"epoch": 1, "best": True}
        if len(held):
            scores = model.predict(rows[index[held].ravel()]).reshape(-1, 2)
            gap = np.where(labels[held] == 1, 1, -1) * (scores[:, 0] - scores[:, 1])
            entry |= {
                "validation_loss": float(np.logaddexp(0, -gap).mean()),
                "validation_accuracy": float(0.5 + 0.5 * np.sign(gap).mean()),
            }
        yield model, [entry]
