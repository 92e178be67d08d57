"""Students that learn a teacher's scores, in the unit of the targets."""

import copy

import numpy as np
import pytest
import torch
from training_data import (
    D,
    K,
    generator,
    predict,
    rng,
    same,
    student_case,
    students,
)

from rewardlib.nets import mlp
from rewardlib.nets.student import train_student
from rewardlib.nets.training import (
    Training,
)


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
