"""Steps 5 to 8 in the plain style of released pipelines: the reference of cpu_pipeline.

The code spends time as such pipelines do, without all of their faults: pairs are mirrored and
materialised, everything is float32, each epoch is one full-size batch drawn by randperm, responses
are scored one at a time, metrics loop over prompts in Python, best-of-n draws 100 random subsets,
and one member of the ensemble is distilled. Nothing here is used elsewhere.

Reads   DATA_DIR
Writes  OUTPUT_DIR/member_{i}.ckpt            step 5
        OUTPUT_DIR/eval.json                  step 6
        OUTPUT_DIR/student.ckpt, map.joblib   step 7
        OUTPUT_DIR/validation.json            step 8
Example python -m benchmarks.reference step5 --data_dir case --output_dir reference_out
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import joblib
import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.isotonic import IsotonicRegression
from torch import nn

BATCH = 10_240
PATIENCE = 3
BEST_OF_N = (2, 5, 10)
N_RESAMPLES = 100
CALIBRATION_ROWS = 10_000
STUDENT_EPOCHS, STUDENT_BATCH = 10, 256


def make_model(dim: int) -> nn.Sequential:
    """The published network, dim -> 1024 -> 512 -> 1, with random weights."""
    return nn.Sequential(
        nn.Linear(dim, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 1)
    )


def load_data(data_dir: str | Path, split: str = "TRAIN") -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, K, D), float32, and rewards (N, K), all in memory. split: TRAIN or TEST."""
    infix = "" if split == "TRAIN" else "test_"
    n_splits = len(list(Path(data_dir).glob(f"EMBD-{split}-split_*.npy")))
    emb_KND = [
        np.load(f"{data_dir}/EMBD-{split}-split_{k}.npy").astype(np.float32)
        for k in range(n_splits)
    ]
    rewards_KN = []
    for k in range(n_splits):
        with open(f"{data_dir}/rewards_{infix}split_{k}.json") as file:
            rewards_KN.append([json.loads(line)["reward"] for line in file])
    return np.stack(emb_KND, 1), np.array(rewards_KN).T


def load_model(path: Path, dim: int) -> nn.Sequential:
    """The network of a checkpoint, in evaluation mode."""
    model = make_model(dim)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def draw_pairs(rewards_NK: np.ndarray, n_pairs: int, rng: np.random.Generator) -> Iterator[tuple]:
    """Yield cross-prompt pairs (prompt, response, other prompt, other response, label).

    The label is 1.0 where the first response is preferred, with probability
    sigmoid(10 x reward difference / standard deviation of the rewards).
    """
    for i in range(n_pairs):
        n, m = i % len(rewards_NK), rng.integers(len(rewards_NK))
        k, j = rng.integers(rewards_NK.shape[1], size=2)
        gap = 10 * (rewards_NK[n, k] - rewards_NK[m, j]) / rewards_NK.std()
        yield n, k, m, j, float(rng.random() < 1 / (1 + np.exp(-np.clip(gap, -500, 500))))


def mirrored_pairs(args, emb_NKD, rewards_NK):
    """Embeddings of the first and the second side, (2 M, D) each, and labels (2 M,)."""
    rng = np.random.default_rng(args.seed)
    pairs = np.load(args.pairs) if args.pairs else draw_pairs(rewards_NK, args.n_pairs, rng)
    first, second, labels = [], [], []
    for n, k, m, j, label in pairs:
        first += [emb_NKD[n, k], emb_NKD[m, j]]
        second += [emb_NKD[m, j], emb_NKD[n, k]]
        labels += [label, 1 - label]
    return [torch.tensor(np.array(x), dtype=torch.float32) for x in (first, second, labels)]


def train_member(dim, fit, held, epochs):
    """A Bradley-Terry network trained on `fit` until the loss on `held` stops falling.

    fit, held: (first sides, second sides, labels).
    """
    first, second, labels = fit
    held_first, held_second, held_labels = held
    model = make_model(dim)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss_of = nn.BCEWithLogitsLoss()
    best, waited = np.inf, 0
    for _ in range(epochs):
        batch = torch.randperm(len(labels))[:BATCH]
        optimiser.zero_grad()
        gap = model(first[batch]) - model(second[batch])
        loss_of(gap[:, 0], labels[batch]).backward()
        optimiser.step()
        with torch.no_grad():
            gap = model(held_first) - model(held_second)
            held_loss = loss_of(gap[:, 0], held_labels).item()
        waited = 0 if held_loss < best else waited + 1
        best = min(best, held_loss)
        if waited >= PATIENCE:
            break
    return model


def step5(args):
    """Train the ensemble."""
    emb_NKD, rewards_NK = load_data(args.data_dir)
    torch.manual_seed(args.seed)
    pairs = mirrored_pairs(args, emb_NKD, rewards_NK)
    n_rows = len(pairs[-1])
    for member in range(args.members):
        order = torch.randperm(n_rows)
        fit, held = order[: int(0.8 * n_rows)], order[int(0.8 * n_rows) :]
        fit_pairs, held_pairs = ([column[rows] for column in pairs] for rows in (fit, held))
        model = train_member(emb_NKD.shape[2], fit_pairs, held_pairs, args.epochs)
        torch.save(model.state_dict(), args.output_dir / f"member_{member}.ckpt")


def prompt_metrics(scores: np.ndarray, golden: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Spearman, pair accuracy and best-of-n (from random subsets) of one prompt's K responses."""
    right, pairs = 0, 0
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            right += (scores[i] > scores[j]) == (golden[i] > golden[j])
            pairs += 1
    best = []
    for n in BEST_OF_N:
        picks = []
        for _ in range(N_RESAMPLES):
            subset = rng.choice(len(scores), min(n, len(scores)), replace=False)
            picks.append(golden[subset[np.argmax(scores[subset])]])
        best.append(np.mean(picks))
    return [spearmanr(scores, golden).statistic, right / pairs, *best]


def evaluate(scores_NK: np.ndarray, golden_NK: np.ndarray, seed: int) -> list[float]:
    """Means over prompts of `prompt_metrics`."""
    rng = np.random.default_rng(seed)
    prompts = zip(scores_NK, golden_NK, strict=True)
    return np.mean([prompt_metrics(scores, golden, rng) for scores, golden in prompts], 0).tolist()


def step6(args):
    """Evaluate the mean and the minimum of the members, and each member, on the train prompts."""
    emb_NKD, rewards_NK = load_data(args.data_dir)
    results, scores_ENK = {}, []
    for member in range(args.members):
        model = load_model(args.output_dir / f"member_{member}.ckpt", emb_NKD.shape[2])
        scores_NK = np.zeros(rewards_NK.shape)
        with torch.no_grad():
            for n in range(len(emb_NKD)):
                for k in range(emb_NKD.shape[1]):
                    scores_NK[n, k] = model(torch.from_numpy(emb_NKD[n, k]).unsqueeze(0)).item()
        scores_ENK.append(scores_NK)
    aggregates = {"mean": np.mean(scores_ENK, 0), "min": np.min(scores_ENK, 0)}
    for name, scores_NK in {**aggregates, **dict(enumerate(scores_ENK))}.items():
        results[name] = evaluate(scores_NK, rewards_NK, args.seed)
    (args.output_dir / "eval.json").write_text(json.dumps(results))


def score_rows(model: nn.Module, emb_RD: np.ndarray, batch: int = 512) -> np.ndarray:
    """Scores (R,) of embeddings (R, D)."""
    parts = [emb_RD[i : i + batch] for i in range(0, len(emb_RD), batch)]
    with torch.no_grad():
        return np.concatenate([model(torch.from_numpy(part))[:, 0].numpy() for part in parts])


def step7(args):
    """Distil the first member, calibrated by isotonic regression in five folds of rows."""
    emb_NKD, rewards_NK = load_data(args.data_dir)
    torch.manual_seed(args.seed)
    teacher = load_model(args.output_dir / "member_0.ckpt", emb_NKD.shape[2])
    emb_RD, golden_R = emb_NKD.reshape(-1, emb_NKD.shape[2]), rewards_NK.reshape(-1)
    emb_RD, golden_R = emb_RD[:CALIBRATION_ROWS], golden_R[:CALIBRATION_ROWS]
    scores_R = score_rows(teacher, emb_RD)
    fold_R = np.random.default_rng(args.seed).integers(5, size=len(emb_RD))
    calibrated_R = np.zeros(len(emb_RD))
    for fold in range(5):
        fit, held = fold_R != fold, fold_R == fold
        isotonic = IsotonicRegression(out_of_bounds="clip").fit(scores_R[fit], golden_R[fit])
        calibrated_R[held] = isotonic.predict(scores_R[held])
    isotonic = IsotonicRegression(out_of_bounds="clip").fit(scores_R, golden_R)
    joblib.dump(isotonic, args.output_dir / "map.joblib")
    rows, targets = torch.from_numpy(emb_RD), torch.tensor(calibrated_R, dtype=torch.float32)
    student = make_model(rows.shape[1])
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)
    for _ in range(STUDENT_EPOCHS):
        for batch in torch.randperm(len(rows)).split(STUDENT_BATCH):
            optimiser.zero_grad()
            nn.functional.mse_loss(student(rows[batch])[:, 0], targets[batch]).backward()
            optimiser.step()
    torch.save(student.state_dict(), args.output_dir / "student.ckpt")


def step8(args):
    """Evaluate the first member and the student, raw and calibrated, on the last prompts."""
    emb_NKD, rewards_NK = load_data(args.data_dir)
    start = int(0.8 * len(emb_NKD))
    emb_RD, golden_NK = emb_NKD[start:].reshape(-1, emb_NKD.shape[2]), rewards_NK[start:]
    isotonic = joblib.load(args.output_dir / "map.joblib")
    results = {}
    for name in ("member_0", "student"):
        model = load_model(args.output_dir / f"{name}.ckpt", emb_NKD.shape[2])
        raw_R = score_rows(model, emb_RD)
        for kind, scores_R in (("raw", raw_R), ("isotonic", isotonic.predict(raw_R))):
            mse = float(np.mean((scores_R - golden_NK.ravel()) ** 2))
            metrics = evaluate(scores_R.reshape(golden_NK.shape), golden_NK, args.seed)
            results[f"{name} {kind}"] = [*metrics, mse]
    (args.output_dir / "validation.json").write_text(json.dumps(results))


STEPS = {"step5": step5, "step6": step6, "step7": step7, "step8": step8}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=list(STEPS), help="step to run")
    parser.add_argument("--data_dir", required=True, help="folder of the train data")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results")
    parser.add_argument("--members", type=int, default=10, help="number of ensemble members")
    parser.add_argument(
        "--n_pairs", type=int, default=5000, help="number of pairs to draw, without --pairs"
    )
    parser.add_argument(
        "--pairs", type=Path, help="pairs_....npy of our step 5; None: --n_pairs pairs are drawn"
    )
    parser.add_argument("--epochs", type=int, default=30, help="maximum number of epochs")
    parser.add_argument("--seed", type=int, default=6, help="random seed")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    STEPS[args.step](args)


if __name__ == "__main__":
    main()
