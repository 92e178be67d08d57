"""Plain code in the style of released pipelines, steps 5 to 8: what `benchmarks.cpu_pipeline` compares with.

It repeats how such code spends its time, not every fault: pairs are mirrored and materialised,
everything is float32, each epoch is one full-size batch drawn by randperm, responses are scored one
at a time, metrics loop over prompts in Python, best-of-n draws 100 random subsets, one member of
the ensemble is distilled. Nothing here is used elsewhere.

Reads   DATA_DIR
Writes  OUTPUT_DIR/member_{i}.ckpt (step 5), eval.json (6), student.ckpt and map.joblib (7), validation.json (8)
Example python -m benchmarks.reference step5 --data_dir case --output_dir reference_out
"""

import argparse
import json
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


def make_model(dim):
    return nn.Sequential(
        nn.Linear(dim, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 1)
    )


def load_data(data_dir, split="TRAIN"):
    """(N, K, D) embeddings and (N, K) rewards, all in memory."""
    infix = "" if split == "TRAIN" else "test_"
    n_splits = len(list(Path(data_dir).glob(f"EMBD-{split}-split_*.npy")))
    embeddings = [
        np.load(f"{data_dir}/EMBD-{split}-split_{k}.npy").astype(np.float32)
        for k in range(n_splits)
    ]
    rewards = []
    for k in range(n_splits):
        with open(f"{data_dir}/rewards_{infix}split_{k}.json") as file:
            rewards.append([json.loads(line)["reward"] for line in file])
    return np.stack(embeddings, 1), np.array(rewards).T


def load_model(path, dim):
    model = make_model(dim)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def draw_pairs(rewards, n_pairs, rng):
    """Prompt and response of either side, and 1.0 where the first is preferred, of n_pairs pairs across prompts."""
    for i in range(n_pairs):
        n, m = i % len(rewards), rng.integers(len(rewards))
        k, j = rng.integers(rewards.shape[1], size=2)
        gap = 10 * (rewards[n, k] - rewards[m, j]) / rewards.std()
        yield n, k, m, j, float(rng.random() < 1 / (1 + np.exp(-np.clip(gap, -500, 500))))


def step5(args):
    embeddings, rewards = load_data(args.data_dir)
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    first, second, labels = [], [], []
    for n, k, m, j, label in (
        np.load(args.pairs) if args.pairs else draw_pairs(rewards, args.n_pairs, rng)
    ):
        first += [embeddings[n, k], embeddings[m, j]]
        second += [embeddings[m, j], embeddings[n, k]]
        labels += [label, 1 - label]
    first, second, labels = (
        torch.tensor(np.array(x), dtype=torch.float32) for x in (first, second, labels)
    )
    for member in range(args.members):
        order = torch.randperm(len(labels))
        fit, held = order[: int(0.8 * len(order))], order[int(0.8 * len(order)) :]
        fit_first, fit_second, fit_labels = first[fit], second[fit], labels[fit]
        held_first, held_second, held_labels = first[held], second[held], labels[held]
        model = make_model(embeddings.shape[2])
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        loss_of = nn.BCEWithLogitsLoss()
        best, waited = np.inf, 0
        for _ in range(args.epochs):
            batch = torch.randperm(len(fit))[:BATCH]
            optimiser.zero_grad()
            gap = model(fit_first[batch]) - model(fit_second[batch])
            loss_of(gap[:, 0], fit_labels[batch]).backward()
            optimiser.step()
            with torch.no_grad():
                gap = model(held_first) - model(held_second)
                held_loss = loss_of(gap[:, 0], held_labels).item()
            waited = 0 if held_loss < best else waited + 1
            best = min(best, held_loss)
            if waited >= PATIENCE:
                break
        torch.save(model.state_dict(), args.output_dir / f"member_{member}.ckpt")


def prompt_metrics(scores, golden, rng):
    """Spearman, pair accuracy and best-of-n by 100 random subsets, of one prompt's K responses."""
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


def evaluate(scores, golden, seed):
    rng = np.random.default_rng(seed)
    return np.mean(
        [prompt_metrics(s, g, rng) for s, g in zip(scores, golden, strict=True)], 0
    ).tolist()


def step6(args):
    embeddings, rewards = load_data(args.data_dir)
    results, all_scores = {}, []
    for member in range(args.members):
        model = load_model(args.output_dir / f"member_{member}.ckpt", embeddings.shape[2])
        scores = np.zeros(rewards.shape)
        with torch.no_grad():
            for n in range(len(embeddings)):
                for k in range(embeddings.shape[1]):
                    scores[n, k] = model(torch.from_numpy(embeddings[n, k]).unsqueeze(0)).item()
        all_scores.append(scores)
    kinds = {"mean": np.mean(all_scores, 0), "min": np.min(all_scores, 0)}
    for name, scores in {**kinds, **dict(enumerate(all_scores))}.items():
        results[name] = evaluate(scores, rewards, args.seed)
    (args.output_dir / "eval.json").write_text(json.dumps(results))


def score_rows(model, rows, batch=512):
    with torch.no_grad():
        return np.concatenate(
            [model(torch.from_numpy(part))[:, 0].numpy() for part in batches(rows, batch)]
        )


def batches(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def step7(args):
    embeddings, rewards = load_data(args.data_dir)
    torch.manual_seed(args.seed)
    teacher = load_model(args.output_dir / "member_0.ckpt", embeddings.shape[2])
    rows, golden = embeddings.reshape(-1, embeddings.shape[2]), rewards.reshape(-1)
    rows, golden = rows[:CALIBRATION_ROWS], golden[:CALIBRATION_ROWS]
    scores = score_rows(teacher, rows)
    fold = np.random.default_rng(args.seed).integers(5, size=len(rows))
    calibrated = np.zeros(len(rows))
    for f in range(5):
        fitted = IsotonicRegression(out_of_bounds="clip").fit(scores[fold != f], golden[fold != f])
        calibrated[fold == f] = fitted.predict(scores[fold == f])
    fitted = IsotonicRegression(out_of_bounds="clip").fit(scores, golden)
    joblib.dump(fitted, args.output_dir / "map.joblib")
    rows, targets = torch.from_numpy(rows), torch.tensor(calibrated, dtype=torch.float32)
    student = make_model(rows.shape[1])
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-3)
    for _ in range(STUDENT_EPOCHS):
        for batch in torch.randperm(len(rows)).split(STUDENT_BATCH):
            optimiser.zero_grad()
            nn.functional.mse_loss(student(rows[batch])[:, 0], targets[batch]).backward()
            optimiser.step()
    torch.save(student.state_dict(), args.output_dir / "student.ckpt")


def step8(args):
    embeddings, rewards = load_data(args.data_dir)
    start = int(0.8 * len(embeddings))
    rows, golden = embeddings[start:].reshape(-1, embeddings.shape[2]), rewards[start:]
    fitted = joblib.load(args.output_dir / "map.joblib")
    results = {}
    for name in ("member_0", "student"):
        model = load_model(args.output_dir / f"{name}.ckpt", embeddings.shape[2])
        raw = score_rows(model, rows)
        for kind, values in (("raw", raw), ("isotonic", fitted.predict(raw))):
            mse = float(np.mean((values - golden.ravel()) ** 2))
            results[f"{name} {kind}"] = [
                *evaluate(values.reshape(golden.shape), golden, args.seed),
                mse,
            ]
    (args.output_dir / "validation.json").write_text(json.dumps(results))


STEPS = {"step5": step5, "step6": step6, "step7": step7, "step8": step8}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--n_pairs", type=int, default=5000)
    parser.add_argument(
        "--pairs", type=Path, help="pairs_....npy of step 5; None: n_pairs are drawn"
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=6)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    STEPS[args.step](args)


if __name__ == "__main__":
    main()
