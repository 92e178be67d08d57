"""Losses by hand, the training loop, seeds to the last bit, ensembles and students that learn."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn

from rewardlib.models import mlp as mlp_models
from rewardlib.models.mlp import BT_MLP, CLF_MLP
from rewardlib.nets import mlp, training
from rewardlib.nets.student import train_student
from rewardlib.nets.training import (
    LOSSES,
    Training,
    _adamw,
    bt_loss,
    clf_loss,
    default_batch_size,
    train,
    train_ensemble,
)

D = 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rng(seed=0):
    return np.random.default_rng(seed)


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


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


def preferences(n=700, d=D, seed=0):
    """Embeddings, pairs of neighbouring rows and labels by a linear reward."""
    rows = rng(seed).standard_normal((n, d)).astype(np.float32)
    reward = rows[:, :4] @ np.array([1.0, -2, 0.5, 0], np.float32)
    pairs = rng(seed + 1).permutation(n).reshape(-1, 2)
    return rows, pairs, (reward[pairs[:, 0]] > reward[pairs[:, 1]]).astype(float), reward


SETTINGS = Training(4, 1e-3, 32)


def members(m, *seeds):
    part = np.arange(m)
    return [(part[m // 5 :], part[: m // 5], seed) for seed in seeds]


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


# --------------------------------------------------------------------------------------- estimators

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


# ------------------------------------------------------------------------------------------ student

K = 5


def student_case(start, n=60):
    """Rows (n, K, D), targets 98 + 3 * scores of start, and those scores standardised."""
    rows = rng().standard_normal((n, K, D)).astype(np.float32)
    scores = mlp.predict(start, rows.reshape(-1, D)).reshape(n, K).astype(float)
    return rows, 98 + 3 * scores, (scores - scores.mean()) / (scores.std() or 1)


def students(start, loss="mse", seed=0, targets=None, settings=None):
    """Rows, targets, student and log of a student trained on 50 prompts and validated on 10."""
    rows, affine, liking = student_case(start)
    targets = affine if targets is None else targets
    settings = settings or Training(3, 1e-4, 8)
    parts = np.arange(50), np.arange(50, 60)
    student, log = train_student(start, rows, targets, liking, parts, loss, 1.0, settings, seed)
    return rows, targets, student, log


def predict(model, rows):
    return mlp.predict(model, rows.reshape(-1, D)).reshape(rows.shape[:2])


@pytest.fixture
def start():
    return mlp.MLP(D, (32, 16), generator(5))


def test_targets_that_the_start_can_say_are_reproduced_in_their_own_unit(start):
    before = copy.deepcopy(start)
    rows, targets, student, log = students(start)
    error = np.mean((predict(student, rows) - targets) ** 2) / targets.var()
    assert error < 1e-4
    assert log[-1]["validation_r2"] > 0.999
    assert same(start, before), "the teacher's member was changed"


def test_a_start_that_ranks_the_wrong_way_is_turned_round(start):
    rows, targets, student, _ = students(start, targets=-student_case(start)[1])
    assert np.mean((predict(student, rows) - targets) ** 2) / targets.var() < 1e-4


def test_a_start_that_says_nothing_still_learns():
    flat = mlp.MLP(D, (32, 16), generator(5))
    with torch.no_grad():
        flat.fc3.weight.zero_()
    targets = 10 + student_case(mlp.MLP(D, (32, 16), generator(6)))[1]
    rows, targets, student, log = students(flat, targets=targets, settings=Training(20, 3e-3, 8))
    assert log[-1]["validation_r2"] > 0.8
    assert np.corrcoef(predict(student, rows).ravel(), targets.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e4])
def test_the_unit_of_the_targets_changes_the_scores_by_that_unit_alone(start, unit):
    base = student_case(start)[1] + np.sin(np.arange(60 * K)).reshape(60, K)
    rows, _, plain, plain_log = students(start, targets=base)
    _, _, scaled, log = students(start, targets=unit * base - 7 * unit)
    np.testing.assert_allclose(
        predict(scaled, rows) / unit, predict(plain, rows) - 7, rtol=1e-3, atol=1e-2
    )
    assert log[-1]["validation_r2"] == pytest.approx(plain_log[-1]["validation_r2"], abs=1e-3)


def test_the_hybrid_loss_keeps_an_order_that_the_targets_lost(start):
    """Calibration can make targets constant on the upper half of the teacher's scores."""
    liking = student_case(start)[2]
    flat = np.minimum(liking, 0)
    settings = Training(30, 3e-3, 8)
    upper = liking > 0.1
    agree = {}
    for loss in ("mse", "hybrid"):
        rows, _, student, log = students(start, loss, targets=flat, settings=settings)
        agree[loss] = np.corrcoef(predict(student, rows)[upper], liking[upper])[0, 1]
        assert log[-1]["validation_r2"] > 0.9
    assert agree["hybrid"] > agree["mse"] + 0.2


@pytest.mark.parametrize("loss", ["mse", "hybrid"])
def test_one_seed_one_student(start, loss):
    first, again, other = (students(start, loss, seed)[2] for seed in (0, 0, 1))
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("loss", ["mse", "hybrid"])
def test_targets_of_one_value_make_a_student_of_that_value(start, loss):
    """The plain isotonic map of a teacher without skill is a constant."""
    rows, _, student, log = students(start, loss, targets=np.full((60, K), 2.5))
    np.testing.assert_allclose(predict(student, rows), 2.5, atol=1e-5)
    assert all(
        entry["validation_r2"] is None or np.isfinite(entry["validation_r2"]) for entry in log
    )


@pytest.mark.parametrize("unit", [1, -1])
def test_the_student_is_the_epoch_of_the_lowest_validation_error(start, unit):
    targets = student_case(start)[1] + 30 * rng(3).standard_normal((60, K))
    rows, _, student, log = students(start, targets=unit * targets, settings=Training(10, 3e-3, 8))
    losses = [entry["validation_loss"] for entry in log]
    best = int(np.argmin(losses))
    assert [epoch for epoch, entry in enumerate(log) if entry["best"]][-1] == best < len(log) - 1
    error = np.mean((predict(student, rows) - unit * targets)[50:] ** 2) / targets[:50].var(ddof=1)
    assert error == pytest.approx(losses[best], rel=1e-3)


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


@pytest.mark.parametrize("loss", ["mse", "hybrid"])
def test_a_bf16_student_is_reproducible_and_close_to_the_fp32_one(start, loss):
    rows, targets, liking = student_case(start)
    parts, settings = (np.arange(50), np.arange(50, 60)), Training(3, 1e-4, 8)
    trained = []
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float32):
        data = torch.from_numpy(rows).to(dtype)
        trained.append(
            train_student(start, data, targets, liking, parts, loss, 1.0, settings, 0)[0]
        )
    assert same(trained[0], trained[1]) and not same(trained[0], trained[2])
    gap = predict(trained[0], rows) - predict(trained[2], rows)
    assert np.abs(gap).max() < 0.05 * targets.std()


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
