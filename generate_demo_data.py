"""Generate seeded synthetic data whose true reward is known.

The data show what the method does, and how far its results are from the best that is possible.

Embedding of response k to prompt n: prompt component + response component, e_nk = p_n + r_nk, each
with most of its variance in `latent_dim` directions. Golden reward: f(latent projection of e_nk) +
prompt offset + noise, where f is a fixed two-layer tanh function with standard deviation 2. Offset
and noise do not show in the embedding: the noise bounds the ranking that any model can reach, and
both bound the MSE. The manifest records the true parameters and these bounds.

Reads   nothing
Writes  OUTPUT_DIR/EMBD-{TRAIN,TEST}-split_{k}.npy, rewards_{,test_}split_{k}.json, manifest.json
Example python generate_demo_data.py --n_prompts 200 --n_splits 10 --output_dir data
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rewardlib import artifacts, seeds
from rewardlib.cli import console, kinds
from rewardlib.data import embeddings
from rewardlib.errors import InputError
from rewardlib.measures import ranking

LATENT_DIM = 16
HIDDEN = 32
SIGNAL_SD, OFFSET_SD, NOISE_SD = 2.0, 1.0, 0.5
LATENT_SD, REST_SD = 3.0, 0.3  # of each component, per latent direction and per dimension


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = console.parser(__doc__)
    parser.add_argument(
        "--n_splits", type=kinds.count, default=10, help="number of responses per train prompt, K"
    )
    parser.add_argument(
        "--n_prompts", type=kinds.count, default=200, help="number of train prompts, N"
    )
    parser.add_argument(
        "--n_test_splits", type=kinds.count, default=50, help="number of responses per test prompt"
    )
    parser.add_argument(
        "--n_test_prompts", type=kinds.count, default=100, help="number of test prompts"
    )
    parser.add_argument(
        "--emb_dim", type=kinds.count, default=2048, help="number of embedding dimensions, D"
    )
    parser.add_argument(
        "--seed", type=kinds.seed, default=42, help="random seed of the true reward and of the data"
    )
    parser.add_argument("--output_dir", default="data", help="DATA_DIR of the other steps")
    args = parser.parse_args(argv)
    if args.emb_dim < LATENT_DIM:
        raise InputError(
            f"emb_dim: expected at least {LATENT_DIM}, the number of latent dimensions, "
            f"found {args.emb_dim}"
        )
    return args


def make_room(folder: Path) -> None:
    """Remove earlier data that can be made again, after marking the folder as unfinished.

    Raises InputError where the folder holds other data.
    """
    patterns = ("EMBD-*-split_*.npy", "rewards_*split_*.json")
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern))
    manifest = artifacts.read_manifest(folder)
    unfinished = folder / embeddings.UNFINISHED
    is_ours = manifest.get("producer") in embeddings.PRODUCERS or unfinished.exists()
    if (paths or manifest) and not is_ours:
        raise InputError(
            f"{folder}: expected an empty folder or data that can be made again, found "
            f"{paths[0].name if paths else artifacts.MANIFEST} put there by hand or by step 4; "
            "choose another --output_dir"
        )
    unfinished.write_text(Path(__file__).name)
    (folder / artifacts.MANIFEST).unlink(missing_ok=True)
    for path in paths:
        path.unlink()


def make_truth(seed: int, emb_dim: int) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """The true reward: latent projection (D, L), with orthonormal columns, and reward function.

    The function maps latents (m, L) to rewards (m,) with mean 0 and standard deviation SIGNAL_SD.
    """
    rng = seeds.rng(seed, "demo truth")
    projection = np.linalg.qr(rng.standard_normal((emb_dim, LATENT_DIM)))[0].astype(np.float32)
    inner = rng.standard_normal((LATENT_DIM, HIDDEN)) / (LATENT_SD * np.sqrt(2 * LATENT_DIM))
    bias, outer = rng.standard_normal(HIDDEN), rng.standard_normal(HIDDEN)

    def raw(latent):
        return np.tanh(latent @ inner + bias) @ outer

    # mean and spread over latents like those of the data: prompt and response components add up
    reference = raw(rng.standard_normal((100_000, LATENT_DIM)) * LATENT_SD * np.sqrt(2))
    centre, spread = reference.mean(), reference.std()
    return projection, lambda latent: SIGNAL_SD * (raw(latent) - centre) / spread


def component(rng: np.random.Generator, n: int, projection: np.ndarray) -> np.ndarray:
    """Random prompt or response components of embeddings, (n, D) float32.

    Standard deviations: LATENT_SD along each latent direction, and independently REST_SD in every
    dimension.
    """
    latent = rng.standard_normal((n, projection.shape[1]), np.float32) * np.float32(LATENT_SD)
    rest = rng.standard_normal((n, projection.shape[0]), np.float32) * np.float32(REST_SD)
    return latent @ projection.T + rest


def write_split(
    args: argparse.Namespace,
    split: str,
    n: int,
    n_responses: int,
    projection: np.ndarray,
    function: Callable[[np.ndarray], np.ndarray],
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Write the files of one split.

    Returns ({file: {"bytes", "sha256"}}, noise-free rewards (n, K), golden rewards (n, K)).
    """
    output_dir = Path(args.output_dir)
    prompts = component(seeds.rng(args.seed, "demo", split, "prompts"), n, projection)
    offset = OFFSET_SD * seeds.rng(args.seed, "demo", split, "offset").standard_normal(n)
    signal, golden, paths = np.empty((n, n_responses)), np.empty((n, n_responses)), []
    for k in tqdm(range(n_responses), desc=f"{split} data", leave=False, disable=None):
        rng = seeds.rng(args.seed, "demo", split, "responses", k)
        embedding = prompts + component(rng, n, projection)
        signal[:, k] = function((embedding @ projection).astype(float)) + offset
        golden[:, k] = signal[:, k] + NOISE_SD * rng.standard_normal(n)
        embedding_file, reward_file = embeddings.file_names(split, k)
        artifacts.write_npy(output_dir / embedding_file, embedding)
        lines = (
            json.dumps({"reward": reward, "noise_free": noise_free})
            for reward, noise_free in zip(golden[:, k], signal[:, k], strict=True)
        )
        with artifacts.atomic(output_dir / reward_file) as file:
            file.write(("\n".join(lines) + "\n").encode())
        paths += [output_dir / embedding_file, output_dir / reward_file]
    return {path.name: artifacts.describe_file(path) for path in paths}, signal, golden


def best_reachable(signal: np.ndarray, golden: np.ndarray) -> dict | None:
    """Metrics of a scorer that knows the noise-free reward; None for one response per prompt.

    signal: noise-free rewards (n, K); golden: golden rewards (n, K).
    """
    if golden.shape[1] < 2:
        return None
    return {
        "spearman": float(np.nanmean(ranking.spearman(signal, golden))),
        "pair_accuracy": float(np.nanmean(ranking.pair_accuracy(signal, golden))),
        "mse_knowing_function_not_offset": OFFSET_SD**2 + NOISE_SD**2,
        "reward_variance": float(golden.var()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    output_dir = artifacts.writable_dir(args.output_dir)
    with artifacts.lock(output_dir):
        make_room(output_dir)
        projection, function = make_truth(args.seed, args.emb_dim)
        files, best, shapes = {}, {}, {}
        for split, n, k in (
            ("train", args.n_prompts, args.n_splits),
            ("test", args.n_test_prompts, args.n_test_splits),
        ):
            split_files, signal, golden = write_split(args, split, n, k, projection, function)
            files |= split_files
            best[split] = best_reachable(signal, golden)
            shapes[split] = {"K": k, "N": n, "D": args.emb_dim, "dtype": "float32"}
        write_manifest(output_dir, args, shapes, best, files)
        (output_dir / embeddings.UNFINISHED).unlink()
    report(output_dir, shapes, best)


def write_manifest(
    output_dir: Path, args: argparse.Namespace, shapes: dict, best: dict, files: dict
) -> None:
    """Record arguments, shapes, the true parameters with their bounds, and the digests of files."""
    truth = {
        "reward": "two-layer tanh function of the latent projection + prompt offset + noise",
        "latent_dim": LATENT_DIM,
        "signal_sd": SIGNAL_SD,
        "prompt_offset_sd": OFFSET_SD,
        "noise_sd": NOISE_SD,
        "best_reachable": best,
    }
    manifest = {
        "producer": Path(__file__).name,
        "arguments": {name: value for name, value in vars(args).items() if name != "debug"},
        **shapes,
        "truth": truth,
        "files": files,
    }
    artifacts.write_json(output_dir / artifacts.MANIFEST, manifest)


def report(output_dir: Path, shapes: dict, best: dict) -> None:
    """Print the shape of each split and the best metrics that a model can reach on it."""
    for split, shape in shapes.items():
        print(
            f"{split}: {shape['N']} prompts x {shape['K']} responses x {shape['D']} dimensions in "
            f"{output_dir}"
        )
        if bounds := best[split]:
            print(
                f"  best reachable: Spearman {bounds['spearman']:.3f}, pairwise accuracy "
                f"{bounds['pair_accuracy']:.3f}; reward variance {bounds['reward_variance']:.2f}"
            )


if __name__ == "__main__":
    console.run(main, Path(__file__).stem)
