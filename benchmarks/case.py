"""The case that speed and memory are measured on: cross-prompt preferences on embeddings of known reward.

Embedding of a response = prompt vector + response vector, both isotropic with variance 1/2 per
dimension. Golden reward = a random two-layer function of a 32-dimensional projection (random
Fourier features: about a third of its variance is linear) of standard deviation 2, plus noise of
standard deviation 0.25. Test prompts are fresh.
"""

import numpy as np

from rewardlib import artifacts, seeds
from rewardlib.data import embeddings

LATENT_DIM = 32
HIDDEN, FREQUENCY = 256, 1.0
SIGNAL_SD, NOISE_SD = 2.0, 0.25
TEST_PROMPTS = 1000


def make(folder, n=5000, k=10, d=2048, n_test=TEST_PROMPTS, k_test=None, seed=0, dtype=np.float32):
    """Write the case as a DATA_DIR (local format, with its manifest) unless it is there already.

    With n or n_test 0 it has no train or no test files; those it has are the same.
    """
    told = {
        "case": "cross-prompt",
        "n": n,
        "k": k,
        "d": d,
        "n_test": n_test,
        "k_test": k_test or k,
        "seed": seed,
    }
    told["dtype"] = np.dtype(dtype).name
    folder = artifacts.writable_dir(folder)
    if artifacts.read_manifest(folder).get("arguments") == told:
        return folder
    function = _truth(seed, d)
    files = {}
    for split, n_prompts, responses in (("train", n, k), ("test", n_test, k_test or k)):
        prompts = _isotropic(seeds.rng(seed, "case", split, "prompts"), n_prompts, d)
        for response in range(responses if n_prompts else 0):
            rng = seeds.rng(seed, "case", split, "responses", response)
            rows = prompts + _isotropic(rng, n_prompts, d)
            rewards = function(rows) + NOISE_SD * rng.standard_normal(n_prompts)
            names = embeddings.file_names(split, response)
            artifacts.write_npy(folder / names[0], rows.astype(dtype))
            artifacts.write_jsonl(
                folder / names[1], ({"reward": reward} for reward in rewards.tolist())
            )
            files |= {name: artifacts.describe_file(folder / name) for name in names}
    artifacts.write_json(
        folder / artifacts.MANIFEST, {"producer": "benchmarks", "arguments": told, "files": files}
    )
    return folder


def _isotropic(rng, n, d):
    return rng.standard_normal((n, d), np.float32) * np.float32(np.sqrt(0.5))


def _truth(seed, d):
    """The noise-free reward of embeddings (m, d)."""
    rng = seeds.rng(seed, "case truth")
    projection = np.linalg.qr(rng.standard_normal((d, LATENT_DIM)))[0].astype(np.float32)
    inner = rng.standard_normal((LATENT_DIM, HIDDEN)) * FREQUENCY / np.sqrt(LATENT_DIM)
    phase, outer = rng.uniform(0, 2 * np.pi, HIDDEN), rng.standard_normal(HIDDEN)

    def raw(latent):
        return np.sin(latent @ inner + phase) @ outer

    reference = raw(rng.standard_normal((100_000, LATENT_DIM)))
    return lambda rows: SIGNAL_SD * (raw(rows @ projection) - reference.mean()) / reference.std()
