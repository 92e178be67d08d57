"""Responses and models that the tests of scores and run records share."""

import numpy as np
import torch

from rewardlib.data import embeddings
from rewardlib.nets import mlp

N, K, D = 6, 3, 2


SHAPES = {
    "fc1.weight": (5, D),
    "fc1.bias": (5,),
    "fc2.weight": (4, 5),
    "fc2.bias": (4,),
    "fc3.weight": (1, 4),
    "fc3.bias": (1,),
}


def rng(seed=0):
    return np.random.default_rng(seed)


def responses(n=N, k=K, d=D, seed=0, digests=None):
    """Random embeddings in memory; the rewards are NaN because no score may depend on them."""
    arrays = list(rng(seed).standard_normal((k, n, d)).astype(np.float32))
    return embeddings.Responses(arrays, np.full((n, k), np.nan), None, np.arange(n), digests or {})


def model(seed=0, d=D, hidden=(5, 4)):
    return mlp.MLP(d, hidden, torch.Generator().manual_seed(seed))


def state(**changed):
    """A state_dict that fits; a changed shape of None leaves the entry out."""
    shapes = {**SHAPES, **{name.replace("_", "."): shape for name, shape in changed.items()}}
    return {name: torch.zeros(shape) for name, shape in shapes.items() if shape is not None}
