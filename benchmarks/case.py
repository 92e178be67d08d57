"""The benchmark data: synthetic embeddings whose golden reward is a known function of them.

The embedding of a response is a prompt vector plus a response vector, both isotropic with variance
1/2 per dimension. The golden reward is a random function of a 32-dimensional projection of the
embedding (random Fourier features, about a third of whose variance is linear) with standard
deviation 2, plus noise with standard deviation 0.25. Test prompts are not among the train prompts.
"""

from pathlib import Path

import numpy as np

from rewardlib import artifacts, seeds
from rewardlib.data import embeddings

LATENT_DIM = 32
HIDDEN, FREQUENCY = 256, 1.0
SIGNAL_SD, NOISE_SD = 2.0, 0.25
TEST_PROMPTS = 1000


def make(
    folder: str | Path,
    n: int = 5000,
    k: int = 10,
    d: int = 2048,
    n_test: int = TEST_PROMPTS,
    k_test: int | None = None,
    seed: int = 0,
    dtype: type[np.floating] = np.float32,
) -> Path:
    """Write the case as a DATA_DIR (local format, with its manifest), unless the folder holds it.

    n prompts with k responses each for training, n_test with k_test (None: k) for testing, d
    dimensions. n or n_test may be 0; the files of the other split are the same bytes as ever.
    """
    arguments = {
        "case": "cross-prompt",
        "n": n,
        "k": k,
        "d": d,
        "n_test": n_test,
        "k_test": k_test or k,
        "seed": seed,
        "dtype": np.dtype(dtype).name,
    }
    folder = artifacts.writable_dir(folder)
    if artifacts.read_manifest(folder).get("arguments") == arguments:
        return folder
    reward_of = _truth(seed, d)
    files = {}
    for split, n_prompts, responses in (("train", n, k), ("test", n_test, k_test or k)):
        prompts_ND = _isotropic(seeds.rng(seed, "case", split, "prompts"), n_prompts, d)
        for response in range(responses if n_prompts else 0):
            rng = seeds.rng(seed, "case", split, "responses", response)
            emb_ND = prompts_ND + _isotropic(rng, n_prompts, d)
            rewards = reward_of(emb_ND) + NOISE_SD * rng.standard_normal(n_prompts)
            names = embeddings.file_names(split, response)
            artifacts.write_npy(folder / names[0], emb_ND.astype(dtype))
            lines = ({"reward": reward} for reward in rewards.tolist())
            artifacts.write_jsonl(folder / names[1], lines)
            files |= {name: artifacts.describe_file(folder / name) for name in names}
    manifest = {"producer": "benchmarks", "arguments": arguments, "files": files}
    artifacts.write_json(folder / artifacts.MANIFEST, manifest)
    return folder


def _isotropic(rng, n, d):
    """(n, d) float32 vectors of variance 1/2 per dimension."""
    return rng.standard_normal((n, d), np.float32) * np.float32(np.sqrt(0.5))


def _truth(seed, d):
    """The function that maps embeddings (m, d) to their rewards (m,) without noise."""
    rng = seeds.rng(seed, "case truth")
    projection = np.linalg.qr(rng.standard_normal((d, LATENT_DIM)))[0].astype(np.float32)
    inner = rng.standard_normal((LATENT_DIM, HIDDEN)) * FREQUENCY / np.sqrt(LATENT_DIM)
    phase, outer = rng.uniform(0, 2 * np.pi, HIDDEN), rng.standard_normal(HIDDEN)

    def raw(latent):
        return np.sin(latent @ inner + phase) @ outer

    # mean and scale of the reward are estimated on a sample of its own, not on the data
    reference = raw(rng.standard_normal((100_000, LATENT_DIM)))
    mean, sd = reference.mean(), reference.std()
    return lambda emb_ND: SIGNAL_SD * (raw(emb_ND @ projection) - mean) / sd
