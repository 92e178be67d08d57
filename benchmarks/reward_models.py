"""Every reward model on published embeddings, by pairing and annotation quality.

Each model is fitted on pairs of the train prompts and ranks all responses to the test prompts,
which no fit has seen. Settings that a model chooses for itself are chosen on folds of train
prompts. A metric is computed per test prompt, averaged over seeds (of pairs, labels and models),
then over prompts, with a 95 % interval from resampling prompts. sd is the standard deviation over
seeds of the mean Spearman. The CPU seconds are of one fit and of scoring all test responses. The
ridge models are fitted on the golden rewards of all train responses instead of pairs.

Reads   --data: EMBD_... and REWARD_... in a published format, train and test
Writes  --output, where it is given: the numbers as JSON
Example python -m benchmarks.reward_models --data embd --task harmless --gen_model gemma2b --seeds 5
"""

import time

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from tqdm import tqdm

from rewardlib import artifacts, load_embd_data, seeds
from rewardlib.cli import console, kinds, tables
from rewardlib.data import pairs, splits
from rewardlib.errors import InputError
from rewardlib.measures import intervals, ranking
from rewardlib.models.classifiers import CLF_LGBM, CLF_Any
from rewardlib.models.ensemble import Ensemble
from rewardlib.models.linear import BT_Laplace, BT_Linear, CLF_Linear, Regression_Ridge
from rewardlib.models.mlp import BT_MLP, CLF_MLP

FOLDS = 10
BEST_OF = 10
METRICS = ("spearman", "pair_accuracy", "best_of_n")


def make_models(seed: int) -> dict:
    """Unfitted reward models {name: model} with one random seed."""
    mlp = {"random_state": seed}
    return {
        "BT_MLP": BT_MLP(**mlp),
        "CLF_MLP": CLF_MLP(**mlp),
        "BT_MLP x 10": Ensemble(BT_MLP(), random_state=seed),
        "CLF_MLP x 10": Ensemble(CLF_MLP(), random_state=seed),
        "BT_Linear": BT_Linear(random_state=seed),
        "BT_Linear x 10": Ensemble(BT_Linear(), bootstrap=True, random_state=seed),
        "CLF_Linear": CLF_Linear(random_state=seed),
        "CLF_LGBM": CLF_LGBM(random_state=seed),
        "CLF_LGBM x 10": Ensemble(CLF_LGBM(), bootstrap=True, random_state=seed),
        "CLF_Any(forest)": CLF_Any(
            RandomForestClassifier(200, min_samples_leaf=5, random_state=seed)
        ),
        "BT_Laplace": BT_Laplace(random_state=seed),
        "BT_Laplace(BT_MLP)": BT_Laplace(features=BT_MLP(**mlp), random_state=seed),
        "ridge": Regression_Ridge(random_state=seed),
        "ridge within": Regression_Ridge(within=True, random_state=seed),
    }


def parse_args(argv=None):
    parser = console.parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, help="folder of the published files")
    data.add_argument(
        "--task",
        type=kinds.word,
        required=True,
        help="task in the file names (helpful, harmless), or the data set's name",
    )
    data.add_argument(
        "--gen_model", type=kinds.word, required=True, help="model that wrote the responses"
    )
    data.add_argument(
        "--embed_model",
        type=kinds.word,
        default="gemma2b",
        help="model that embedded the responses",
    )
    data.add_argument(
        "--lengths",
        help="(K, N) .npy of the lengths of the test responses, for a baseline; None: no baseline",
    )
    labels = parser.add_argument_group("preference labels")
    labels.add_argument(
        "--pairings",
        nargs="+",
        choices=["xprompt", "sameprompt"],
        default=["xprompt", "sameprompt"],
        help="pairs of responses to different prompts, to the same prompt, or both in turn",
    )
    labels.add_argument(
        "--qualities",
        nargs="+",
        type=kinds.finite,
        default=[10.0, 1.0, 0.5],
        help="annotation qualities; below 0: labels without noise",
    )
    labels.add_argument("--n_pairs", type=kinds.count, default=5, help="number of pairs per prompt")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list(make_models(0)),
        metavar="MODEL",
        help="names of the models to fit; None: all models",
    )
    parser.add_argument(
        "--seeds", type=kinds.count, default=1, help="number of random seeds: 0, 1, ..."
    )
    parser.add_argument("--output", help="JSON file for the results; None: print them only")
    return parser.parse_args(argv)


def measure(scores_NK: np.ndarray, golden_NK: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics {name: (N,)} of every prompt."""
    best_of = min(BEST_OF, golden_NK.shape[1])
    return {
        "spearman": ranking.spearman(scores_NK, golden_NK),
        "pair_accuracy": ranking.pair_accuracy(scores_NK, golden_NK),
        "best_of_n": ranking.best_of_n(scores_NK, golden_NK, [best_of])[:, 0],
    }


def fit_and_predict(model, train, test_embeddings, annotated, index):
    """(scores (N, K) of the test responses, CPU seconds of the fit, CPU seconds of the scoring).

    train: (embeddings, rewards). index: the pairs as numbers of train responses (M, 2).
    """
    embeddings, rewards = train
    started = time.process_time()
    if isinstance(model, Regression_Ridge):
        model.fit(embeddings, rewards)
    else:
        model.fit(index, annotated.labels, embeddings=embeddings, groups=annotated.folds)
    fitted = time.process_time()
    scores_NK = model.predict(test_embeddings)[..., 0].astype(float)
    return scores_NK, fitted - started, time.process_time() - fitted


def run(args, train, test):
    """Fit every model in every setting: (metrics, label errors), both by (pairing, quality).

    train, test: (embeddings, rewards). metrics[setting][model] is a list over seeds of what
    `measure` returns, with "fit_seconds" and "score_seconds". label_errors[setting] is a list over
    seeds too.
    """
    test_embeddings = test[0]
    golden_NK, train_golden_NK = _golden(test), _golden(train)
    settings = [(pairing, quality) for pairing in args.pairings for quality in args.qualities]
    names = args.models or list(make_models(0))
    metrics = {key: {name: [] for name in names} for key in settings}
    label_errors = {key: [] for key in settings}
    # the first fit pays for torch's start-up, which no model should be charged with
    BT_MLP(hidden=(2, 2)).fit(np.array([[0, 1], [1, 0]]), [0, 1], embeddings=np.eye(2))
    progress = tqdm(total=args.seeds * len(settings) * len(names), desc="fits", disable=None)
    for seed in range(args.seeds):
        prompts = np.arange(len(train_golden_NK))
        folds = splits.assign_folds(prompts, FOLDS, seeds.rng(seed, "folds"))
        for pairing, quality in settings:
            # qualities share the pairs' random stream: they label the same pairs
            annotated = pairs.build(
                train_golden_NK, folds, pairing=pairing, consider_first_n=2, n_pairs=args.n_pairs,
                quality=quality, scale=train_golden_NK.std(), rng=seeds.rng(seed, "pairs", pairing),
            )  # fmt: skip
            label_errors[pairing, quality].append(annotated.label_error)
            index = annotated.prompts * train_golden_NK.shape[1] + annotated.responses
            for name, model in make_models(seed).items():
                if name not in names:
                    continue
                scores_NK, fit_seconds, score_seconds = fit_and_predict(
                    model, train, test_embeddings, annotated, index
                )
                entry = measure(scores_NK, golden_NK)
                entry |= {"fit_seconds": fit_seconds, "score_seconds": score_seconds}
                metrics[pairing, quality][name].append(entry)
                progress.update()
    return metrics, label_errors


def _golden(data):
    """Golden rewards (N, K), float64, of (embeddings, rewards (N, K, 1))."""
    return np.asarray(data[1][..., 0], float)


def summarise(entries: list[dict], weights: np.ndarray) -> dict:
    """Means over seeds, then over prompts, with intervals, of one model's entries per seed.

    weights: of the resampled prompts, from intervals.resample_weights.
    """
    result = {}
    for name in METRICS:
        over_seeds_N = np.mean([entry[name] for entry in entries], axis=0)
        value, interval = intervals.mean_with_ci(over_seeds_N, weights)
        result |= {name: value, f"{name}_ci95": interval}
    by_seed = [np.nanmean(entry["spearman"]) for entry in entries]
    result["sd_over_seeds"] = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
    for name in ("fit_seconds", "score_seconds"):
        if name in entries[0]:
            result[name] = float(np.mean([entry[name] for entry in entries]))
    return result


def report(rows: dict[str, dict], n: int) -> None:
    """Print the table of one setting: a row for each baseline and model."""
    columns = f"{'':20}{'Spearman':>23}{'sd':>7}{'pair accuracy':>23}{f'best of {n}':>26}"
    print(f"  {columns}{'fit s':>9}{'score s':>9}")
    for name, row in rows.items():
        sd = "-" if row["sd_over_seeds"] is None else f"{row['sd_over_seeds']:.3f}"
        cells = f"{tables.with_interval(row, 'spearman'):>23}{sd:>7}"
        cells += f"{tables.with_interval(row, 'pair_accuracy'):>23}"
        cells += f"{tables.with_interval(row, 'best_of_n'):>26}"
        for part in ("fit_seconds", "score_seconds"):
            cells += f"{row[part]:9.2f}" if part in row else " " * 9
        print(f"  {name:20}{cells}")


def baselines(args, golden_NK: np.ndarray) -> dict[str, list[dict]]:
    """Metrics {name: [per seed]} of scorers that are not fitted."""
    random_scores = [
        seeds.rng(seed, "random scorer").random(golden_NK.shape) for seed in range(args.seeds)
    ]
    metrics = {"random": [measure(scores_NK, golden_NK) for scores_NK in random_scores]}
    if args.lengths:
        lengths_NK = np.load(args.lengths, allow_pickle=False).T
        if lengths_NK.shape != golden_NK.shape:
            raise InputError(
                f"{args.lengths}: expected (K, N) = {golden_NK.T.shape}, found {lengths_NK.T.shape}"
            )
        metrics["length"] = [measure(lengths_NK.astype(float), golden_NK)]
    metrics["oracle"] = [measure(golden_NK, golden_NK)]
    return metrics


def main(argv=None):
    args = parse_args(argv)
    train, test = (
        load_embd_data(args.task, args.gen_model, args.embed_model, split, root=args.data)
        for split in ("train", "test")
    )
    golden_NK = _golden(test)
    weights = intervals.resample_weights(len(golden_NK), seeds.rng(0, "resample"))
    base = {
        name: summarise(entries, weights) for name, entries in baselines(args, golden_NK).items()
    }
    metrics, label_errors = run(args, train, test)
    results = {"baselines": base, "seeds": args.seeds, "n_pairs": args.n_pairs, "settings": []}
    for (pairing, quality), by_model in metrics.items():
        rows = {name: summarise(entries, weights) for name, entries in by_model.items()}
        error = float(np.mean(label_errors[pairing, quality]))
        print(
            f"{pairing}, annotation quality {quality:g}: label error {error:.3f}, "
            f"mean of {args.seeds} seeds"
        )
        report({**base, **rows}, min(BEST_OF, golden_NK.shape[1]))
        results["settings"].append(
            {"pairing": pairing, "quality": quality, "label_error": error, "models": rows}
        )
    if args.output:
        artifacts.write_json(args.output, results)


if __name__ == "__main__":
    console.run(main, "reward_models")
