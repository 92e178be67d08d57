"""Rows, pairs and models that the tests of networks share."""

import numpy as np
import torch

from rewardlib.nets import mlp
from rewardlib.nets.student import train_student
from rewardlib.nets.training import (
    Training,
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


def preferences(n=700, d=D, seed=0):
    """Embeddings, pairs of neighbouring rows and labels by a linear reward."""
    rows = rng(seed).standard_normal((n, d)).astype(np.float32)
    reward = rows[:, :4] @ np.array([1.0, -2, 0.5, 0], np.float32)
    pairs = rng(seed + 1).permutation(n).reshape(-1, 2)
    return rows, pairs, (reward[pairs[:, 0]] > reward[pairs[:, 1]]).astype(float), reward


def members(m, *seeds):
    part = np.arange(m)
    return [(part[m // 5 :], part[: m // 5], seed) for seed in seeds]


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
