"""BT_MLP and CLF_MLP as scikit-learn estimators."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from training_data import D, preferences, rng, same

from rewardlib.models import mlp as mlp_models
from rewardlib.models.mlp import BT_MLP, CLF_MLP
from rewardlib.nets import mlp
from rewardlib.nets.training import (
    Training,
    default_batch_size,
    train_ensemble,
)

SMALL = {
    "hidden": (16, 8),
    "epochs": 4,
    "learning_rate": 3e-3,
    "batch_size": 16,
    "precision": "fp32",
}


@pytest.mark.parametrize("kind", [BT_MLP, CLF_MLP])
def test_estimators_learn_from_pairs_of_embeddings(kind):
    rows, pairs, labels, _ = preferences()
    fitted = kind(**SMALL).fit(rows[pairs], labels)
    fresh, _, _, reward = preferences(n=2000, seed=9)
    scores = fitted.predict(fresh)
    assert scores.shape == (2000, 1)
    assert np.mean((scores[::2, 0] > scores[1::2, 0]) == (reward[::2] > reward[1::2])) > 0.9
    assert fitted.model_.fc1.weight.shape == (16, D) and len(fitted.log_) == 4


def test_pairs_of_row_numbers_are_the_same_pairs():
    rows, pairs, labels, _ = preferences(n=200)
    direct = BT_MLP(**SMALL).fit(rows[pairs], labels)
    numbered = BT_MLP(**SMALL).fit(pairs, labels, embeddings=rows.astype(np.float64))
    assert same(direct.model_, numbered.model_)


def test_the_two_objectives_are_those_of_the_ensembles():
    rows, pairs, labels, _ = preferences(n=200)
    for kind, objective in ((BT_MLP, "bt"), (CLF_MLP, "clf")):
        fitted = kind(**SMALL, validation_share=0.0).fit(rows[pairs], labels)
        rng_of_fit = np.random.default_rng(0)
        rng_of_fit.permutation(100)
        member = (np.arange(100), np.arange(0), int(rng_of_fit.integers(2**62)))
        settings = Training(4, 3e-3, 16)
        [(model, _)] = train_ensemble(rows, pairs, labels, [member], objective, settings, (16, 8))
        assert same(fitted.model_, model) and "validation_loss" not in fitted.log_[0]


def test_estimators_follow_scikit_learns_conventions():
    rows, pairs, labels, _ = preferences(n=100)
    fitted = CLF_MLP(**SMALL, random_state=3)
    with pytest.raises(NotFittedError, match="not fitted"):
        fitted.predict(rows)
    assert fitted.fit(rows[pairs], labels) is fitted
    again = clone(fitted)
    assert again.get_params() == fitted.get_params() and not hasattr(again, "model_")
    assert same(again.fit(rows[pairs], labels).model_, fitted.model_)
    other = clone(fitted).set_params(random_state=4).fit(rows[pairs], labels)
    assert not same(other.model_, fitted.model_)


def test_whole_groups_choose_the_epoch(monkeypatch):
    rows, pairs, labels, _ = preferences(n=200)
    groups = np.array(list("abcdefghij"))[rng().integers(10, size=100)]
    jobs = []

    def remember(rows, pairs, labels, members, *more):
        jobs.extend(members)
        return train_ensemble(rows, pairs, labels, members, *more)

    monkeypatch.setattr(mlp_models, "train_ensemble", remember)
    fitted = BT_MLP(**SMALL, validation_share=0.3).fit(rows[pairs], labels, groups=groups)
    fit, held, _ = jobs[0]
    assert sorted([*fit, *held]) == list(range(100))
    assert len(set(groups[held])) == 3 and not set(groups[held]) & set(groups[fit])
    assert "validation_loss" in fitted.log_[0]
    BT_MLP(**SMALL).fit(rows[pairs], labels)
    assert len(jobs[1][1]) == 10


def test_scores_keep_the_leading_axes():
    rows, pairs, labels, _ = preferences(n=60)
    fitted = BT_MLP(**SMALL).fit(rows[pairs], labels)
    scores = fitted.predict(rows.reshape(6, 10, D))
    assert scores.shape == (6, 10, 1)
    np.testing.assert_array_equal(scores.ravel(), mlp.predict(fitted.model_, rows))
    assert fitted.predict(rows[:1]).shape == (1, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pairs": np.zeros((4, 3, D))}, r"pairs should be \(M, 2, D\), .* got \(4, 3, 4\)"),
        ({"pairs": np.zeros((4, 2), int)}, r"row numbers with embeddings \(R, D\); got \(4, 2\)"),
        (
            {"pairs": np.zeros((4, 2)), "embeddings": np.zeros((4, D))},
            r"expected \(M, 2\) row numbers .* \(4, 2\)",
        ),
        ({"pairs": np.zeros((4, 2), int), "embeddings": np.zeros(4)}, r"got \(4, 2\) and \(4,\)"),
        ({"labels": np.ones(3)}, r"labels should be \(4,\) of 0 and 1; got \(3,\)"),
        ({"labels": np.array([1, 0, -1, 1])}, r"labels should be \(4,\) of 0 and 1"),
        ({"pairs": np.full((4, 2, D), np.nan)}, "embeddings should be finite"),
    ],
    ids=["three sides", "no embeddings", "no integers", "1-d embeddings", "count", "signs", "NaN"],
)
def test_estimators_refuse_other_input(changed, message):
    with pytest.raises(ValueError, match=message):
        BT_MLP(**SMALL).fit(**{"pairs": np.zeros((4, 2, D)), "labels": np.ones(4), **changed})


def test_estimators_refuse_embeddings_of_another_model():
    rows, pairs, labels, _ = preferences(n=60)
    with pytest.raises(ValueError, match=r"should have 4 dimensions; got \(5, 7\)"):
        BT_MLP(**SMALL).fit(rows[pairs], labels).predict(np.zeros((5, 7)))


@pytest.mark.parametrize(("n", "size"), [(10, 16), (800, 50), (40_000, 1024)])
def test_the_default_batch_is_a_sixteenth_of_the_pairs_within_bounds(n, size):
    assert default_batch_size(n) == size
