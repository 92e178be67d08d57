"""The table of reward models by name and objective, and the fit of the members of an ensemble."""

from collections.abc import Iterator, Sequence

import numpy as np

from rewardlib.models.base import RewardModel
from rewardlib.models.classifiers import CLF_LGBM
from rewardlib.models.linear import BT_Laplace, BT_Linear, CLF_Linear, Regression_Ridge
from rewardlib.models.mlp import BT_MLP, CLF_MLP
from rewardlib.models.names import check_names

MODELS = {
    "mlp": {"bt": BT_MLP, "clf": CLF_MLP},
    "linear": {"bt": BT_Linear, "clf": CLF_Linear},
    "lgbm": {"clf": CLF_LGBM},
    "laplace": {"bt": BT_Laplace},
    "ridge": {"regression": Regression_Ridge},
}


def model_class(model: str, objective: str) -> type[RewardModel]:
    """The class of MODELS with this name and objective; InputError if there is none."""
    check_names(model, objective)
    return MODELS[model][objective]


def fit_members(
    kind: type[RewardModel],
    rows: np.ndarray,
    index: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    members: Sequence[tuple[np.ndarray, np.ndarray, int]],
    ratings: np.ndarray | None = None,
) -> Iterator[tuple[RewardModel, list[dict]]]:
    """Fit models of the class `kind` to parts of the same annotated pairs, one after another.

    The counterpart of nets.training.train_ensemble, which trains MLPs. rows: (R, D) float32; index:
    (M, 2) row numbers; labels: (M,) 1 where side 0 was preferred; folds: (M,) fold of the prompts
    of each pair; members: (train, validation, seed) of each member, with index arrays into the
    pairs; ratings: (R,) golden rewards of the rows for Regression_Ridge, which learns from the
    ratings of the train pairs instead of their labels. Yields each model with its log of one entry.
    """
    for fit, held, seed in members:
        model = kind(random_state=seed % 2**32)
        if ratings is None:
            _fit_to_labels(model, rows, index[fit], labels[fit], folds[fit])
        else:
            flat = index[fit].ravel()
            model.fit(rows[flat], ratings[flat], groups=np.repeat(folds[fit], 2))
        entry = {"epoch": 1, "best": True}
        if len(held):
            entry |= _validation(model, rows, index[held], labels[held])
        yield model, [entry]


def _fit_to_labels(model, rows, index, labels, folds):
    """Fit to pairs whose sides are swapped so that the labels alternate.

    A pair says the same with its sides swapped. Drawn at random, the labels of a few pairs could by
    chance be all alike, which the models refuse.
    """
    alternating = np.arange(len(index)) % 2
    sides = np.where((labels == alternating)[:, None], index, index[:, ::-1])
    model.fit(sides, alternating, embeddings=rows, groups=folds)


def _validation(model, rows, index, labels):
    """Loss and accuracy of a fitted model on held-out pairs, as an MLP's log has them."""
    scores = model.predict(rows[index.ravel()]).reshape(-1, 2)
    gap = np.where(labels == 1, 1, -1) * (scores[:, 0] - scores[:, 1])
    return {
        "validation_loss": float(np.logaddexp(0, -gap).mean()),
        "validation_accuracy": float(0.5 + 0.5 * np.sign(gap).mean()),
    }
