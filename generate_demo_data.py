"""Seeded synthetic data whose true reward is known, to see what the method does and how far it is from the best.

Embedding of response k to prompt n: prompt component + response component, e_nk = p_n + r_nk, each
with most of its variance in `latent_dim` directions. Golden reward: f(latent projection of e_nk) +
prompt offset + noise, f a fixed two-layer tanh function of standard deviation 2. Offset and noise
cannot be seen in the embedding: the noise bounds the ranking that any model can reach, both bound
its MSE. The manifest records the truth and these bounds.

Reads   nothing
Writes  OUTPUT_DIR/EMBD-{TRAIN,TEST}-split_{k}.npy, rewards_{,test_}split_{k}.json, manifest.json
Example python generate_demo_data.py --n_prompts 200 --n_splits 10 --output_dir data
"""

import json
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
LATENT_SD, REST_SD = 3.0, 0.3


def parse_args(argv=None):
    parser = console.parser(__doc__)
    parser.add_argument(
        "--n_splits", type=kinds.count, default=10, help="train responses per prompt, K"
    )
    parser.add_argument("--n_prompts", type=kinds.count, default=200, help="train prompts, N")
    parser.add_argument(
        "--n_test_splits", type=kinds.count, default=50, help="test responses per prompt"
    )
    parser.add_argument("--n_test_prompts", type=kinds.count, default=100, help="test prompts")
    parser.add_argument("--emb_dim", type=kinds.count, default=2048, help="embedding dimensions, D")
    parser.add_argument(
        "--seed", type=kinds.seed, default=42, help="of the function and of every draw"
    )
    parser.add_argument("--output_dir", default="data", help="DATA_DIR of the other steps")
    args = parser.parse_args(argv)
    if args.emb_dim < LATENT_DIM:
        raise InputError(
            f"emb_dim: expected at least {LATENT_DIM}, the latent dimensions, found {args.emb_dim}"
        )
    return args


def make_room(folder):
    """Remove data that can be made again, after marking the folder unfinished; InputError where there is other data."""
    found = sorted(
        path
        for name in ("EMBD-*-split_*.npy", "rewards_*split_*.json")
        for path in folder.glob(name)
    )
    manifest = artifacts.read_manifest(folder)
    unfinished = folder / embeddings.UNFINISHED
    if (
        (found or manifest)
        and manifest.get("producer") not in embeddings.PRODUCERS
        and not unfinished.exists()
    ):
        raise InputError(
            f"{folder}: expected an empty folder or data that can be made again, found "
            f"{found[0].name if found else artifacts.MANIFEST} put there by hand or by step 4; "
            "choose another --output_dir"
        )
    unfinished.write_text(Path(__file__).name)
    (folder / artifacts.MANIFEST).unlink(missing_ok=True)
    for path in found:
        path.unlink()


def make_truth(seed, emb_dim):
    """(projection (D, L) with orthonormal columns, reward function of (m, L) latents with mean 0 and sd 2)."""
    rng = seeds.rng(seed, "demo truth")
    projection = np.linalg.qr(rng.standard_normal((emb_dim, LATENT_DIM)))[0].astype(np.float32)
    inner = rng.standard_normal((LATENT_DIM, HIDDEN)) / (LATENT_SD * np.sqrt(2 * LATENT_DIM))
    bias, outer = rng.standard_normal(HIDDEN), rng.standard_normal(HIDDEN)

    def raw(latent):
        return np.tanh(latent @ inner + bias) @ outer

    reference = raw(rng.standard_normal((100_000, LATENT_DIM)) * LATENT_SD * np.sqrt(2))
    centre, spread = reference.mean(), reference.std()
    return projection, lambda latent: SIGNAL_SD * (raw(latent) - centre) / spread


def component(rng, n, projection):
    """(n, D) float32: sd LATENT_SD along each latent direction, REST_SD in every dimension besides."""
    latent = rng.standard_normal((n, projection.shape[1]), np.float32) * np.float32(LATENT_SD)
    rest = rng.standard_normal((n, projection.shape[0]), np.float32) * np.float32(REST_SD)
    return latent @ projection.T + rest


def write_split(args, split, n, n_responses, projection, function):
    """Write one split. Returns ({file: {"bytes", "sha256"}}, signal (n, K), golden (n, K))."""
    output_dir = Path(args.output_dir)
    prompts = component(seeds.rng(args.seed, "demo", split, "prompts"), n, projection)
    offset = OFFSET_SD * seeds.rng(args.seed, "demo", split, "offset").standard_normal(n)
    signal, golden, files = np.empty((n, n_responses)), np.empty((n, n_responses)), []
    for k in tqdm(range(n_responses), desc=f"{split} data", leave=False, disable=None):
        rng = seeds.rng(args.seed, "demo", split, "responses", k)
        embedding = prompts + component(rng, n, projection)
        signal[:, k] = function((embedding @ projection).astype(float)) + offset
        golden[:, k] = signal[:, k] + NOISE_SD * rng.standard_normal(n)
        embedding_file, reward_file = embeddings.file_names(split, k)
        artifacts.write_npy(output_dir / embedding_file, embedding)
        lines = (
            json.dumps({"reward": g, "noise_free": s})
            for g, s in zip(golden[:, k], signal[:, k], strict=True)
        )
        with artifacts.atomic(output_dir / reward_file) as file:
            file.write(("\n".join(lines) + "\n").encode())
        files += [output_dir / embedding_file, output_dir / reward_file]
    return {path.name: artifacts.describe_file(path) for path in files}, signal, golden


def best_reachable(signal, golden):
    """What a scorer that knows the noise-free reward reaches on this data."""
    if golden.shape[1] < 2:
        return None
    return {
        "spearman": float(np.nanmean(ranking.spearman(signal, golden))),
        "pair_accuracy": float(np.nanmean(ranking.pair_accuracy(signal, golden))),
        "mse_knowing_function_not_offset": OFFSET_SD**2 + NOISE_SD**2,
        "reward_variance": float(golden.var()),
    }


def main(argv=None):
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
            written, signal, golden = write_split(args, split, n, k, projection, function)
            files |= written
            best[split] = best_reachable(signal, golden)
            shapes[split] = {"K": k, "N": n, "D": args.emb_dim, "dtype": "float32"}
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
            "arguments": {k: v for k, v in vars(args).items() if k != "debug"},
            **shapes,
            "truth": truth,
            "files": files,
        }
        artifacts.write_json(output_dir / artifacts.MANIFEST, manifest)
        (output_dir / embeddings.UNFINISHED).unlink()
    for split, shape in shapes.items():
        print(
            f"{split}: {shape['N']} prompts x {shape['K']} responses x {shape['D']} dimensions in {output_dir}"
        )
        if best[split]:
            print(
                f"  best reachable: Spearman {best[split]['spearman']:.3f}, pairwise accuracy "
                f"{best[split]['pair_accuracy']:.3f}; reward variance {best[split]['reward_variance']:.2f}"
            )


if __name__ == "__main__":
    console.run(main, Path(__file__).stem)
