"""Independent random streams from one seed, told apart by name, so that adding a draw here changes nothing there."""

import zlib

import numpy as np


def rng(seed, *names):
    """A numpy Generator for the purpose `names` (strings or non-negative integers) under `seed`."""
    return np.random.default_rng(_entropy(seed, names))


def torch_seed(seed, *names):
    """An integer seed for a torch.Generator, from the same family of streams."""
    return int(np.random.SeedSequence(_entropy(seed, names)).generate_state(1, np.uint64)[0] >> 1)


def _entropy(seed, names):
    return [
        seed,
        *(zlib.crc32(name.encode()) if isinstance(name, str) else int(name) for name in names),
    ]
