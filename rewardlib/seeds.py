"""Independent random streams from one seed, each with a name.

A draw that is added to one stream changes no other stream.
"""

import zlib

import numpy as np


def rng(seed: int, *names: str | int) -> np.random.Generator:
    """The NumPy Generator of the stream `names` (strings, non-negative integers) under `seed`."""
    return np.random.default_rng(_entropy(seed, names))


def torch_seed(seed: int, *names: str | int) -> int:
    """Random seed for a torch.Generator, of the stream `names` under `seed`, below 2 ** 63."""
    return int(np.random.SeedSequence(_entropy(seed, names)).generate_state(1, np.uint64)[0] >> 1)


def _entropy(seed, names):
    """Integers for a NumPy SeedSequence; a name counts as its CRC-32, which no run changes."""
    return [
        seed,
        *(zlib.crc32(name.encode()) if isinstance(name, str) else int(name) for name in names),
    ]
