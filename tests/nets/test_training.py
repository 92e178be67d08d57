"""Losses by hand, one training loop, seeds to the last bit, ensembles that learn."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from training_data import (
    D,
    generator,
    members,
    preferences,
    rng,
    same,
    students,
)

from rewardlib.nets import mlp, training
from rewardlib.nets.training import (
    LOSSES,
    Training,
    _adamw,
    bt_loss,
    clf_loss,
    train,
    train_ensemble,
)

# --------------------------------------------------------------------------------------- the losses


def test_bradley_terry_is_the_softplus_of_the_wrong_way():
    scores = torch.tensor([[1.0, -2], [0.5, 0.5], [0, 4]], dtype=torch.float64)
    expected = [math.log1p(math.exp(-3)), math.log(2), math.log1p(math.exp(4))]
    assert bt_loss(scores, torch.ones(3, dtype=torch.float64)).item() == pytest.approx(
        sum(expected) / 3
    )


def test_classification_scores_each_response_on_its_own():
    scores = torch.tensor([[1.0, -2]], dtype=torch.float64)
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2
    assert clf_loss(scores, torch.ones(1, dtype=torch.float64)).item() == pytest.approx(expected)
    both = clf_loss(scores + 5, torch.ones(1, dtype=torch.float64))
    assert both.item() != pytest.approx(expected, rel=0.1), (
        "a shift of both scores is no matter for Bradley-Terry only"
    )
    shifted = bt_loss(scores + 5, torch.ones(1, dtype=torch.float64))
    assert shifted.item() == pytest.approx(math.log1p(math.exp(-3)))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_swapping_the_sides_and_the_label_changes_nothing(loss):
    scores, labels = (
        torch.randn(50, 2, generator=generator()),
        torch.randint(2, (50,), generator=generator(1)).float(),
    )
    assert loss(scores.flip(1), 1 - labels).item() == pytest.approx(
        loss(scores, labels).item(), rel=1e-6
    )


@pytest.mark.parametrize(("loss", "worst"), [(bt_loss, 2e4), (clf_loss, 1e4)], ids=["bt", "clf"])
def test_losses_are_finite_and_teach_where_the_model_is_confidently_wrong(loss, worst):
    """BCE on sigmoid outputs is flat there: the sigmoid of 1e4 is 1 and its derivative 0."""
    scores = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    value = loss(scores, torch.ones(1))
    value.backward()
    assert value.item() == pytest.approx(worst)
    assert scores.grad[0, 0] <= -0.5 and scores.grad[0, 1] >= 0.5
    assert loss(scores.detach().flip(1), torch.ones(1)).item() == 0


# ----------------------------------------------------------------------------------------- training


class Probe:
    """A one-weight model that remembers its training batches and its weight at each validation."""

    def __init__(self, quality=(), losses=None):
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.model.weight)
        self.batches, self.weights, self.quality = [], [], list(quality)
        self.losses = losses or range(1, 1 + len(self.quality))

    def loss(self, batch):
        self.batches.append(batch.tolist())
        return (self.model.weight**2).sum()

    def validate(self):
        self.weights.append(self.model.weight.item())
        epoch = len(self.weights) - 1
        return (
            {"validation_loss": self.losses[epoch], "quality": self.quality[epoch]}
            if self.quality
            else {}
        )

    def train(self, n=10, seed=0, **settings):
        settings = Training(**{"epochs": 4, "learning_rate": 0.1, "batch_size": 4, **settings})
        return train(self.model, n, self.loss, self.validate, settings, generator(seed))


def test_every_epoch_visits_every_index_once_in_a_new_order():
    probe = Probe()
    probe.train(epochs=3)
    assert [len(batch) for batch in probe.batches] == [4, 4, 2] * 3
    passes = [list(itertools.chain(*probe.batches[i : i + 3])) for i in (0, 3, 6)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len(set(map(tuple, passes))) == 3


def test_the_order_comes_from_the_generator():
    probes = [Probe() for _ in range(3)]
    for probe, seed in zip(probes, (0, 0, 1), strict=True):
        probe.train(seed=seed)
    assert probes[0].batches == probes[1].batches != probes[2].batches


def test_the_best_state_is_restored_not_the_last():
    """The best state has the highest quality, although its validation loss is not the lowest."""
    probe = Probe(quality=[1.0, 3.0, 2.0, 2.5])
    log = probe.train()
    assert [entry["best"] for entry in log] == [True, True, False, False]
    assert [entry["validation_loss"] for entry in log] == [1, 2, 3, 4]
    assert all("quality" not in entry for entry in log)
    assert len(set(probe.weights)) == 4
    assert probe.model.weight.item() == probe.weights[1]


def test_the_last_state_stays_where_it_is_the_best():
    probe = Probe(quality=[1.0, 3.0, 2.0, 4.0])
    assert [entry["best"] for entry in probe.train()] == [True, True, False, True]
    assert probe.model.weight.item() == probe.weights[3]


def test_of_equal_epochs_the_first_is_the_best():
    probe = Probe(quality=[2.0, 2.0, 2.0, 2.0])
    probe.train()
    assert probe.model.weight.item() == probe.weights[0]


def test_patience_ends_the_training():
    quality = [-5.0, -4.0, -4.0, -6.0, -1.0, -1.0]
    probe = Probe(quality)
    assert len(probe.train(epochs=6, patience=2)) == 4
    assert probe.model.weight.item() == probe.weights[1]
    assert len(Probe(quality).train(epochs=6, patience=3)) == 6


def test_without_validation_all_epochs_run_and_the_last_state_stays():
    probe = Probe()
    log = probe.train(epochs=8, patience=1)
    assert len(log) == 8 and log[-1]["best"]
    assert probe.model.weight.item() == probe.weights[-1] != probe.weights[0]


def test_the_rate_warms_up_over_a_tenth_and_falls_along_a_cosine():
    """20 steps, of which 2 warm up; the epochs end with the 5th, 10th, 15th and 20th step."""
    rates = [entry["learning_rate"] for entry in Probe().train(epochs=4, batch_size=2)]
    expected = [0.05 * (1 + math.cos(math.pi * (step - 2) / 18)) for step in (4, 9, 14, 19)]
    assert rates == pytest.approx(expected)
    assert [
        entry["learning_rate"] for entry in Probe().train(epochs=2, batch_size=10)
    ] == pytest.approx([0.1, 0.1])


def test_the_first_step_of_a_long_training_is_small():
    """Adam's first step is as long as the learning rate, here 0.1 / 10."""
    probe = Probe()
    before = probe.model.weight.item()
    moved = []

    def loss(batch):
        moved.append(before - probe.model.weight.item())
        return probe.loss(batch)

    train(probe.model, 10, loss, dict, Training(10, 0.1, 1), generator())
    assert moved[1] == pytest.approx(0.01, rel=1e-3)


def test_the_log_holds_the_mean_loss_over_the_examples():
    losses = []

    def loss(batch):
        losses.append((len(batch), probe.model.weight.detach().item() ** 2))
        return (probe.model.weight**2).sum()

    probe = Probe()
    log = train(probe.model, 10, loss, dict, Training(2, 0.1, 4), generator())
    means = [sum(n * value for n, value in part) / 10 for part in (losses[:3], losses[3:])]
    assert [entry["train_loss"] for entry in log] == pytest.approx(means, rel=1e-6)
    assert [entry["epoch"] for entry in log] == [1, 2]


def test_one_step_of_training_is_enough():
    probe = Probe()
    log = probe.train(epochs=1, batch_size=100)
    assert len(log) == 1 and log[0]["learning_rate"] == 0.1
    assert probe.model.weight.item() == pytest.approx(0.9, rel=1e-3)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_training_that_diverges_is_an_error(loss):
    with pytest.raises(
        FloatingPointError, match=f"diverged: validation loss {loss:g} .*learning rate"
    ):
        Probe(quality=[-loss] * 4, losses=[loss] * 4).train()


# ---------------------------------------------------------------------------------------- ensembles


SETTINGS = Training(4, 1e-3, 32)


def accuracy(model, rows, reward):
    scores = mlp.predict(model, rows)
    return np.mean((scores[::2] > scores[1::2]) == (reward[::2] > reward[1::2]))


@pytest.mark.parametrize("objective", ["bt", "clf"])
def test_both_objectives_learn_a_linear_reward(objective):
    rows, pairs, labels, _ = preferences()
    [(model, log)] = train_ensemble(rows, pairs, labels, members(350, 1), objective, SETTINGS)
    fresh, _, _, reward = preferences(n=2000, seed=9)
    assert accuracy(model, fresh, reward) > 0.93
    losses = [entry["train_loss"] for entry in log]
    assert losses == sorted(losses, reverse=True)


def test_the_log_validates_on_the_held_pairs_with_ties_as_one_half():
    rows, pairs, labels, _ = preferences(n=100)
    pairs[0] = pairs[0, 0]
    [(model, log)] = train_ensemble(
        rows, pairs, labels, members(50, 1), "bt", Training(1, 1e-3, 16)
    )
    held = np.arange(10)
    gap = mlp.predict(model, rows[pairs[held, 0]]) - mlp.predict(model, rows[pairs[held, 1]])
    right = np.where(gap == 0, 0.5, (gap > 0) == (labels[held] == 1))
    assert right[0] == 0.5
    assert log[0]["validation_accuracy"] == pytest.approx(right.mean())
    signed = np.where(labels[held] == 1, gap, -gap).astype(float)
    assert log[0]["validation_loss"] == pytest.approx(np.logaddexp(0, -signed).mean(), rel=1e-5)


def test_a_member_is_the_epoch_that_orders_the_validation_pairs_best():
    """With noisy labels, later epochs get better on the training pairs alone."""
    rows, pairs, labels, _ = preferences(n=400, d=16)
    noisy = np.where(rng(3).random(200) < 0.4, 1 - labels, labels)
    settings = Training(12, 3e-3, 16, patience=12)
    [(model, log)] = train_ensemble(rows, pairs, noisy, members(200, 1), "bt", settings)
    accuracies, losses = (
        [entry[f"validation_{name}"] for entry in log] for name in ("accuracy", "loss")
    )
    best = int(np.argmax(accuracies))
    assert (
        [epoch for epoch, entry in enumerate(log) if entry["best"]][-1]
        == best
        != int(np.argmin(losses))
    )
    gap = mlp.predict(model, rows[pairs[:40, 0]]) - mlp.predict(model, rows[pairs[:40, 1]])
    assert np.mean((gap > 0) == noisy[:40]) == pytest.approx(accuracies[best])


@pytest.mark.parametrize("dtype", mlp.TYPES.values(), ids=mlp.TYPES)
def test_a_member_depends_on_its_seed_and_data_alone(dtype):
    """Bit for bit, alone or after other members: a resumed ensemble is the same ensemble."""
    rows, pairs, labels, _ = preferences(n=60)
    rows = torch.from_numpy(rows).to(dtype)
    settings = Training(2, 1e-3, 16)
    three = [
        m for m, _ in train_ensemble(rows, pairs, labels, members(30, 1, 2, 1), "bt", settings)
    ]
    [(alone, _)] = train_ensemble(rows, pairs, labels, members(30, 2), "bt", settings)
    assert same(three[0], three[2]) and same(three[1], alone)
    assert not same(three[0], three[1])


def test_a_member_never_sees_its_validation_pairs_but_by_choosing_the_epoch():
    rows, pairs, labels, _ = preferences(n=60)
    settings = Training(1, 1e-3, 8)
    turned = labels.copy()
    turned[:6] = 1 - turned[:6]
    trained = [
        train_ensemble(rows, pairs, y, members(30, 1), "bt", settings) for y in (labels, turned)
    ]
    (a, log_a), (b, log_b) = (next(iter(one)) for one in trained)
    assert same(a, b)
    assert log_a[0]["validation_accuracy"] == pytest.approx(1 - log_b[0]["validation_accuracy"])


def test_validation_pairs_may_be_none():
    rows, pairs, labels, _ = preferences(n=60)
    job = [(np.arange(30), np.arange(0), 1)]
    [(model, log)] = train_ensemble(rows, pairs, labels, job, "bt", Training(2, 1e-3, 16))
    assert "validation_loss" not in log[0] and np.isfinite(mlp.predict(model, rows)).all()


def test_torchs_own_random_numbers_are_left_alone():
    rows, pairs, labels, _ = preferences(n=60)
    before = torch.get_rng_state()
    start = mlp.MLP(D, (8, 8), generator())
    list(train_ensemble(rows, pairs, labels, members(30, 1), "clf", Training(1, 1e-3, 16)))
    students(start, loss="hybrid")
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        [(a, _)] = train_ensemble(rows, pairs, labels, members(30, 1), "bt", Training(1, 1e-3, 16))
        torch.manual_seed(7)
        [(b, _)] = train_ensemble(rows, pairs, labels, members(30, 1), "bt", Training(1, 1e-3, 16))
    assert same(a, b)


@pytest.mark.parametrize("objective", ["bt", "clf"])
def test_constant_dimensions_and_equal_rows_do_no_harm(objective):
    rows, pairs, labels, _ = preferences(n=60)
    rows[:, 1], rows[:, 2] = 0, 1e3
    for data in (rows, np.zeros_like(rows)):
        [(model, log)] = train_ensemble(data, pairs, labels, members(30, 1), objective, SETTINGS)
        assert np.isfinite(mlp.predict(model, data)).all()
        assert all(np.isfinite(list(entry.values())).all() for entry in log)


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({}, "fp32"),
        ({"avx2": True, "avx512_f": True, "amx_bf16": False}, "fp32"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
    ],
)
def test_auto_is_bf16_where_the_cpu_has_instructions_for_it(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert mlp.choose_precision("auto") == expected
    assert mlp.choose_precision("fp32") == "fp32"
    assert mlp.choose_precision("bf16") == "bf16"


def test_this_cpu_can_be_asked():
    assert mlp.choose_precision("auto") in mlp.TYPES


def hidden_types(model, rows):
    found = []
    for layer in (model.fc1, model.fc2):
        layer.register_forward_hook(lambda _, __, output: found.append(output.dtype))
    with torch.inference_mode():
        assert model(rows).dtype == torch.float32
    return found


@pytest.mark.parametrize("dtype", mlp.TYPES.values(), ids=mlp.TYPES)
def test_hidden_layers_compute_in_their_type_and_scores_are_float32(dtype):
    model, rows = mlp.MLP(D, generator=generator()), torch.randn(9, D, generator=generator())
    working = mlp.in_type(model, dtype)
    assert hidden_types(working, rows.to(dtype)) == [dtype] * 2
    assert (working is model) == (dtype == torch.float32) and mlp.in_type(working, dtype) is working
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    for name, value in working.state_dict().items():
        assert value.dtype == (torch.float32 if name.startswith("fc3") else dtype)
        assert torch.equal(value, model.state_dict()[name].to(value.dtype))


@pytest.mark.parametrize("dtype", mlp.TYPES.values(), ids=mlp.TYPES)
def test_an_update_is_that_of_torch_and_is_rounded_into_the_copies(monkeypatch, dtype):
    """Parts of up to 5 numbers: of a matrix of 12 numbers, a vector of 3 and a scalar."""
    monkeypatch.setattr(training, "UPDATE_SIZE", 5)
    weights = [torch.randn(size, generator=generator()) for size in [(3, 4), (3,), ()]]
    theirs = [weight.clone().requires_grad_() for weight in weights]
    copies = [weight.to(dtype) for weight in weights] if dtype != torch.float32 else weights
    update = _adamw(weights, copies, 0.1)
    optimiser = torch.optim.AdamW(theirs, weight_decay=0.1)
    for step in range(1, 6):
        slopes = [
            torch.randn(weight.shape, generator=generator(step)).to(dtype) for weight in weights
        ]
        slopes[0] = slopes[0].t().contiguous().t()
        for group in optimiser.param_groups:
            group["lr"] = 0.1 / step
        for weight, slope in zip(theirs, slopes, strict=True):
            weight.grad = slope.float()
        optimiser.step()
        update(slopes, 0.1 / step)
        for weight, other, copied in zip(weights, theirs, copies, strict=True):
            torch.testing.assert_close(weight, other.detach())
            assert torch.equal(copied, weight.to(dtype))


def test_training_changes_a_model_and_its_working_copy_alike():
    model = mlp.MLP(D, (8, 4), generator())
    working, before = mlp.in_type(model, torch.bfloat16), copy.deepcopy(model)
    rows = torch.randn(20, D, generator=generator()).bfloat16()

    def loss(batch):
        return working(rows[batch]).square().mean()

    train(model, 20, loss, dict, Training(3, 0.01, 5), generator(), working)
    assert not same(model, before) and same(mlp.in_type(model, torch.bfloat16), working)


def test_bf16_scores_are_those_of_fp32_to_its_8_bits():
    model = mlp.MLP(256, generator=generator())
    rows = rng().standard_normal((500, 256)).astype(np.float32)
    exact, rounded = mlp.predict(model, rows), mlp.predict(model, rows, torch.bfloat16)
    assert rounded.dtype == np.float32 and (exact != rounded).any()
    np.testing.assert_allclose(rounded, exact, atol=0.02 * exact.std())
    stored = torch.from_numpy(rows).bfloat16()
    np.testing.assert_array_equal(mlp.predict(model, stored, torch.bfloat16), rounded)


@pytest.mark.parametrize("objective", ["bt", "clf"])
def test_bf16_training_ranks_as_fp32_training_does(objective):
    rows, pairs, labels, _ = preferences(n=1400, d=16)
    fresh, _, _, reward = preferences(n=2000, d=16, seed=9)
    found = {}
    for name, dtype in mlp.TYPES.items():
        data = torch.from_numpy(rows).to(dtype)
        [(model, _)] = train_ensemble(data, pairs, labels, members(700, 1), objective, SETTINGS)
        assert all(value.dtype == torch.float32 for value in model.state_dict().values())
        found[name] = spearmanr(mlp.predict(model, fresh, dtype), reward).statistic
    assert min(found.values()) > 0.9
    assert found["bf16"] == pytest.approx(found["fp32"], abs=0.01)
