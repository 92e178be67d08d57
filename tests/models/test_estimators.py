"""BT_MLP and CLF_MLP, fitted to pair arrays or to row numbers, as scikit-learn estimators."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from rewardlib.models.mlp import BT_MLP, CLF_MLP


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, 6)).astype(np.float32)
    reward = rows @ np.array([2, -1, 0.5, 0, 0, 0])
    index = rng.integers(400, size=(600, 2))
    index = index[index[:, 0] != index[:, 1]]
    return rows, reward, index, (reward[index[:, 0]] > reward[index[:, 1]]).astype(int)


@pytest.mark.parametrize("estimator", [BT_MLP, CLF_MLP])
def test_learns_the_order_and_keeps_the_axes(problem, estimator):
    rows, _, index, labels = problem
    model = estimator(epochs=4).fit(rows[index], labels)
    fresh = np.random.default_rng(1).standard_normal((30, 5, 6))
    scores = model.predict(fresh)
    assert scores.shape == (30, 5, 1)
    truth = fresh @ np.array([2, -1, 0.5, 0, 0, 0])
    assert np.corrcoef(scores.ravel(), truth.ravel())[0, 1] > 0.9
    np.testing.assert_allclose(scores[3, :, 0], model.predict(fresh[3])[:, 0], rtol=1e-5, atol=1e-5)


def test_row_numbers_and_pair_arrays_are_the_same_data(problem):
    rows, _, index, labels = problem
    a = BT_MLP().fit(rows[index], labels).predict(rows)
    b = BT_MLP().fit(index, labels, embeddings=rows).predict(rows)
    assert np.array_equal(a, b)


def test_random_state_decides_everything(problem):
    rows, _, index, labels = problem
    model = CLF_MLP(random_state=3)
    first = model.fit(rows[index], labels).predict(rows)
    assert np.array_equal(first, clone(model).fit(rows[index], labels).predict(rows))
    assert not np.array_equal(first, CLF_MLP(random_state=4).fit(rows[index], labels).predict(rows))
    assert model.get_params()["random_state"] == 3


def test_validation_holds_out_whole_groups(problem):
    rows, _, index, labels = problem
    few = BT_MLP(validation_share=0.5).fit(
        rows[index], labels, groups=np.repeat([0, 1], [100, len(labels) - 100])
    )
    assert few.log_[0]["validation_accuracy"] > 0.5
    assert "validation_loss" not in BT_MLP(validation_share=0).fit(rows[index], labels).log_[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, y: (p[:, 0], y), r"should be \(M, 2, D\).*got \(\d+, 6\)"),
        (lambda p, y: (p, y[:-1]), "labels should be"),
        (lambda p, y: (p, y * 2), "labels should be"),
        (lambda p, y: (p, np.ones_like(y)), "labels should hold both 0 and 1; got 1 only"),
        (lambda p, y: (np.where(p == p[0, 0, 0], np.nan, p), y), "got NaN or inf"),
    ],
)
def test_refusals(problem, change, message):
    rows, _, index, labels = problem
    with pytest.raises(ValueError, match=message):
        BT_MLP().fit(*change(rows[index], labels))


def test_refuses_other_dimensions_and_predicting_before_fit(problem):
    rows, _, index, labels = problem
    with pytest.raises(NotFittedError):
        BT_MLP().predict(rows)
    with pytest.raises(ValueError, match=r"should have 6 dimensions; got \(4, 5\)"):
        BT_MLP().fit(rows[index], labels).predict(np.zeros((4, 5)))


@pytest.mark.parametrize("estimator", [BT_MLP, CLF_MLP])
def test_features_are_the_last_hidden_layer(problem, estimator):
    rows, _, index, labels = problem
    model = estimator(hidden=(12, 5), precision="fp32").fit(
        index, labels, embeddings=rows.reshape(40, 10, 6)
    )
    features = model.features(rows.reshape(40, 10, 6))
    assert features.shape == (40, 10, 5) and (features >= 0).all()
    scores = features @ model.output_weights() + float(model.model_.fc3.bias.detach())
    np.testing.assert_allclose(scores[..., None], model.predict(rows.reshape(40, 10, 6)), atol=1e-5)


def test_read_only_embeddings_are_taken(problem):
    rows, _, index, labels = problem
    locked = rows[index]
    locked.setflags(write=False)
    model = BT_MLP(hidden=(12, 5)).fit(locked, labels)
    free = BT_MLP(hidden=(12, 5)).fit(rows[index], labels)
    np.testing.assert_array_equal(model.predict(locked), free.predict(rows[index]))
    np.testing.assert_array_equal(model.features(locked), free.features(rows[index]))
