"""The MLP: shapes, weights by seed, scores by hand, rows gathered in their type."""

import math

import numpy as np
import pytest
import torch
from training_data import D, generator, rng, same

from rewardlib.nets import mlp

# --------------------------------------------------------------------------------------- the module


def test_the_mlp_has_the_published_layers_and_names():
    shapes = {
        name: tuple(value.shape)
        for name, value in mlp.MLP(D, generator=generator()).named_parameters()
    }
    assert shapes == {
        "fc1.weight": (1024, D), "fc1.bias": (1024,), "fc2.weight": (512, 1024), "fc2.bias": (512,),
        "fc3.weight": (1, 512), "fc3.bias": (1,),
    }  # fmt: skip


def test_the_mlp_by_hand():
    """a, b = relu(x - 1), relu(1 - x); the score is 3 relu(a + b) + relu(a - b) - 1."""
    model = mlp.MLP(1, (2, 2))
    values = [[[1.0], [-1]], [-1.0, 1], [[1.0, 1], [1, -1]], [0.0, 0], [[3.0, 1]], [-1.0]]
    model.load_state_dict(dict(zip(model.state_dict(), map(torch.tensor, values), strict=True)))
    assert model(torch.tensor([[3.0], [1.0], [-1.0]])).tolist() == [3 * 2 + 2 - 1, -1, 3 * 2 - 1]
    assert model(torch.zeros(5, 7, 1)).shape == (5, 7)


def test_weights_are_drawn_as_torch_draws_them():
    model = mlp.MLP(100, generator=generator())
    for layer in (model.fc1, model.fc2, model.fc3):
        bound = 1 / math.sqrt(layer.in_features)
        for values in (layer.weight, layer.bias):
            assert values.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert same(model, mlp.MLP(100, generator=generator()))
    assert not same(model, mlp.MLP(100, generator=generator(1)))


# ------------------------------------------------------------------------------------------- gather


@pytest.mark.parametrize("dtype", mlp.TYPES.values(), ids=mlp.TYPES)
@pytest.mark.parametrize("stored", [np.float16, np.float32, np.float64])
def test_parts_are_put_in_their_places(stored, dtype):
    values = np.arange(12).reshape(6, 2).astype(stored)
    parts = [(np.array(places), values[places]) for places in ([4, 0], [5], [1, 3, 2])]
    rows = mlp.gather(iter(parts), 6, 2, dtype)
    assert rows.dtype == dtype and rows.is_contiguous()
    assert rows.tolist() == values.tolist()


# ------------------------------------------------------------------------------------------ predict


def test_scores_do_not_depend_on_how_many_rows_are_scored_at_once(monkeypatch):
    model = mlp.MLP(D, (16, 8), generator())
    rows = rng().standard_normal((1000, D)).astype(np.float32)
    expected = mlp.predict(model, rows)
    assert expected.shape == (1000,) and expected.dtype == np.float32
    np.testing.assert_allclose(
        np.concatenate([mlp.predict(model, rows[i : i + 1]) for i in range(1000)]),
        expected,
        rtol=1e-4,
        atol=1e-6,
    )
    monkeypatch.setattr(mlp, "SCORE_ROWS", 7)
    np.testing.assert_allclose(mlp.predict(model, rows), expected, rtol=1e-4, atol=1e-6)


def test_any_array_of_rows_is_scored():
    model = mlp.MLP(D, (16, 8), generator())
    rows = rng().standard_normal((20, D)).astype(np.float16)
    expected = mlp.predict(model, rows.astype(np.float32))
    np.testing.assert_array_equal(mlp.predict(model, rows), expected)
    np.testing.assert_array_equal(mlp.predict(model, np.asfortranarray(rows)), expected)
    np.testing.assert_array_equal(mlp.predict(model, torch.from_numpy(rows)), expected)
    np.testing.assert_array_equal(mlp.predict(model, rows.astype(">f8")), expected)
    np.testing.assert_allclose(mlp.predict(model, rows[::-2]), expected[::-2], rtol=1e-4, atol=1e-6)
    assert mlp.predict(model, rows[:0]).shape == (0,)
