"""Every reward model on published embeddings: cross-prompt and same-prompt pairs, several annotation qualities.

Each model is fitted on the pairs of the train split's prompts and ranks all responses to the test
split's prompts. No fit has seen these. Settings that a model chooses are chosen on folds of train
prompts. A metric is computed per test prompt, averaged over the seeds (of pairs, labels and
models), then over prompts, with a 95 % interval from resampling prompts; sd is that of the mean
Spearman over seeds. CPU seconds are those of one fit and of scoring all test responses. The ridge
models see the golden rewards of all train responses instead of pairs.

Reads   --data: EMBD_... and REWARD_... in a published format, train and test
Writes  --output, where it is given: the numbers as JSON
Example python -m benchmarks.reward_models --data embd/RM-Embeddings --task harmless --gen_model gemma2b --seeds 5
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


def make_models(seed):
    """{name: reward model} under one seed."""
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
    data.add_argument("--data", required=True, help="folder of published files")
    data.add_argument(
        "--task",
        type=kinds.word,
        required=True,
        help="what the reward rates, or the data set's name",
    )
    data.add_argument(
        "--gen_model", type=kinds.word, required=True, help="model that wrote the responses"
    )
    data.add_argument(
        "--embed_model", type=kinds.word, default="gemma2b", help="model that embedded them"
    )
    data.add_argument(
        "--lengths", help="(K, N) .npy of the test responses' lengths, a baseline; None: left out"
    )
    labels = parser.add_argument_group("preference labels")
    labels.add_argument(
        "--pairings",
        nargs="+",
        choices=["xprompt", "sameprompt"],
        default=["xprompt", "sameprompt"],
    )
    labels.add_argument(
        "--qualities",
        nargs="+",
        type=kinds.finite,
        default=[10.0, 1.0, 0.5],
        help="below 0: no noise",
    )
    labels.add_argument("--n_pairs", type=kinds.count, default=5, help="pairs per prompt")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=list(make_models(0)),
        metavar="MODEL",
        help="None: all of them",
    )
    parser.add_argument("--seeds", type=kinds.count, default=1, help="how many; 0, 1, ...")
    parser.add_argument("--output", help="JSON file; None: print only")
    return parser.parse_args(argv)


def measure(predicted, golden):
    """{metric: (N,)} of predictions (N, K) for every prompt."""
    return {
        "spearman": ranking.spearman(predicted, golden),
        "pair_accuracy": ranking.pair_accuracy(predicted, golden),
        "best_of_n": ranking.best_of_n(predicted, golden, [min(BEST_OF, golden.shape[1])])[:, 0],
    }


def fit_and_predict(model, train, test, drawn, index, labels):
    """Predictions (N, K) of the test responses, CPU seconds of the fit, CPU seconds of the scoring."""
    embeddings, rewards = train
    started = time.process_time()
    if isinstance(model, Regression_Ridge):
        model.fit(embeddings, rewards)
    else:
        model.fit(index, labels, embeddings=embeddings, groups=drawn.folds)
    fitted = time.process_time()
    predicted = model.predict(test)[..., 0].astype(float)
    return predicted, fitted - started, time.process_time() - fitted


def run(args, train, test):
    """{(pairing, quality): {model: [per-seed dict]}} and the label errors {(pairing, quality): [per seed]}."""
    (_, rewards), (test_embeddings, test_rewards) = train, test
    golden, train_golden = (
        np.asarray(test_rewards[..., 0], float),
        np.asarray(rewards[..., 0], float),
    )
    settings = [(pairing, quality) for pairing in args.pairings for quality in args.qualities]
    names = args.models or list(make_models(0))
    found, errors = (
        {key: {name: [] for name in names} for key in settings},
        {key: [] for key in settings},
    )
    BT_MLP(hidden=(2, 2)).fit(
        np.array([[0, 1], [1, 0]]), [0, 1], embeddings=np.eye(2)
    )  # torch's start is not timed
    progress = tqdm(total=args.seeds * len(settings) * len(names), desc="fits", disable=None)
    for seed in range(args.seeds):
        folds = splits.assign_folds(np.arange(len(train_golden)), FOLDS, seeds.rng(seed, "folds"))
        for pairing, quality in settings:
            drawn = pairs.build(
                train_golden, folds, pairing=pairing, consider_first_n=2, n_pairs=args.n_pairs,
                quality=quality, scale=train_golden.std(), rng=seeds.rng(seed, "pairs", pairing),
            )  # fmt: skip
            errors[pairing, quality].append(drawn.label_error)
            index = drawn.prompts * train_golden.shape[1] + drawn.responses
            for name, model in make_models(seed).items():
                if name in names:
                    predicted, fit, score = fit_and_predict(
                        model, train, test_embeddings, drawn, index, drawn.labels
                    )
                    entry = {
                        **measure(predicted, golden),
                        "fit_seconds": fit,
                        "score_seconds": score,
                    }
                    found[pairing, quality][name].append(entry)
                    progress.update()
    return found, errors


def summarise(entries, weights):
    """Means over seeds, then prompts, with intervals, of what `run` found for one model."""
    result = {}
    for name in METRICS:
        value, interval = intervals.mean_with_ci(
            np.mean([entry[name] for entry in entries], axis=0), weights
        )
        result |= {name: value, f"{name}_ci95": interval}
    by_seed = [np.nanmean(entry["spearman"]) for entry in entries]
    result["sd_over_seeds"] = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
    for name in ("fit_seconds", "score_seconds"):
        if name in entries[0]:
            result[name] = float(np.mean([entry[name] for entry in entries]))
    return result


def report(rows, n):
    print(
        f"  {'':20}{'Spearman':>23}{'sd':>7}{'pair accuracy':>23}{f'best of {n}':>26}{'fit s':>9}{'score s':>9}"
    )
    for name, row in rows.items():
        spread = "-" if row["sd_over_seeds"] is None else f"{row['sd_over_seeds']:.3f}"
        cells = f"{tables.with_interval(row, 'spearman'):>23}{spread:>7}"
        cells += f"{tables.with_interval(row, 'pair_accuracy'):>23}{tables.with_interval(row, 'best_of_n'):>26}"
        seconds = "".join(
            f"{row[part]:9.2f}" if part in row else " " * 9
            for part in ("fit_seconds", "score_seconds")
        )
        print(f"  {name:20}{cells}{seconds}")


def baselines(args, golden):
    """{name: [per-seed dict]} of scorers that are not fitted."""
    drawn = [seeds.rng(seed, "random scorer").random(golden.shape) for seed in range(args.seeds)]
    found = {"random": [measure(scores, golden) for scores in drawn]}
    if args.lengths:
        lengths = np.load(args.lengths, allow_pickle=False).T
        if lengths.shape != golden.shape:
            raise InputError(
                f"{args.lengths}: expected (K, N) = {golden.T.shape}, found {lengths.T.shape}"
            )
        found["length"] = [measure(lengths.astype(float), golden)]
    found["oracle"] = [measure(golden, golden)]
    return found


def main(argv=None):
    args = parse_args(argv)
    train, test = (
        load_embd_data(args.task, args.gen_model, args.embed_model, split, root=args.data)
        for split in ("train", "test")
    )
    golden = np.asarray(test[1][..., 0], float)
    weights = intervals.resample_weights(len(golden), seeds.rng(0, "resample"))
    base = {name: summarise(entries, weights) for name, entries in baselines(args, golden).items()}
    found, errors = run(args, train, test)
    results = {"baselines": base, "seeds": args.seeds, "n_pairs": args.n_pairs, "settings": []}
    for (pairing, quality), models in found.items():
        rows = {name: summarise(entries, weights) for name, entries in models.items()}
        error = float(np.mean(errors[pairing, quality]))
        print(
            f"{pairing}, annotation quality {quality:g}: label error {error:.3f}, mean of {args.seeds} seeds"
        )
        report({**base, **rows}, min(BEST_OF, golden.shape[1]))
        results["settings"].append(
            {"pairing": pairing, "quality": quality, "label_error": error, "models": rows}
        )
    if args.output:
        artifacts.write_json(args.output, results)


if __name__ == "__main__":
    console.run(main, "reward_models")
