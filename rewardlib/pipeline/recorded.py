"""Reward models from recorded preference pairs: split, training pairs, evaluation.

Pairs are split 60 / 20 / 20 into train, calibration and held-out pairs, with every group of linked
pairs on one side (pair_files.link). Ties show no preference: they are left out of fits and metrics,
and counted. Whether a model gives the two responses of a tie similar scores is not measured.

A difference is score(preferred) - score(other), in logits: the scores of an ensemble are brought to
one scale for aggregation, then multiplied by the mean spread of the members. preference_maps.py
turns differences into probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rewardlib import artifacts, seeds
from rewardlib.data import splits
from rewardlib.data.pair_files import HumanPairs
from rewardlib.errors import InputError
from rewardlib.measures import intervals, preferences
from rewardlib.models import aggregation, scoring
from rewardlib.nets import mlp
from rewardlib.pipeline import baselines, preference_maps, run_record

SPLIT_FILE = "pair_split.json"
ROLES = ("train", "calibration", "held_out")
# Settings of drawing and annotating pairs, which recorded pairs do not need.
ANNOTATION = (
    "pairing",
    "consider_first_n",
    "n_sample",
    "n_pairs",
    "annotation_quality",
    "reward_scale",
)


# ------------------------------------------------------------------------------- split and settings


def split(data: HumanPairs, seed: int) -> dict[str, np.ndarray]:
    """Sorted positions (m,) of the pairs of each role, 60 / 20 / 20, every group on one side.

    Returns {role: positions} for ROLES. InputError where there are too few pairs or groups.
    """
    # split_prompts has the same shares, under the names of a pipeline that trains on few prompts.
    shares = splits.split_prompts(data.responses.groups, seed)
    return dict(zip(ROLES, shares.values(), strict=True))


def save_split(output_dir: str | Path, roles: dict[str, np.ndarray], seed: int) -> None:
    """Write the split to SPLIT_FILE in output_dir."""
    artifacts.write_json(Path(output_dir) / SPLIT_FILE, {"seed": seed, **roles})


def load_split(output_dir: str | Path, data: HumanPairs) -> dict[str, np.ndarray]:
    """The split that step 5 made.

    InputError unless the split covers exactly these pairs and keeps every group on one side.
    """
    path = Path(output_dir) / SPLIT_FILE
    content = artifacts.read_json(path, "step 5")
    roles = {role: np.array(content[role], int) for role in ROLES}
    if not np.array_equal(np.sort(np.concatenate(list(roles.values()))), np.arange(len(data))):
        raise InputError(
            f"{path}: expected each of {len(data)} pairs once, found other pairs; run step 5 again"
        )
    groups = [np.unique(data.responses.groups[positions]) for positions in roles.values()]
    groups = np.concatenate(groups)
    if n_shared := len(groups) - len(np.unique(groups)):
        raise InputError(
            f"leakage: {path} has {n_shared} groups of linked pairs on two sides; the file was "
            "changed after step 5: run step 5 again"
        )
    return roles


def run_settings(settings: dict, data: HumanPairs) -> dict:
    """`settings` of a run on recorded pairs: those of drawing and annotating pairs become None.

    But pairing is "human", and n_sample the number of pairs.
    """
    return {**settings, **dict.fromkeys(ANNOTATION), "pairing": "human", "n_sample": len(data)}


def open_run(
    output_dir: str | Path, settings: dict, data: HumanPairs
) -> tuple[dict[str, np.ndarray], dict]:
    """The split and the record that step 5 left.

    InputError where step 5 ran with other settings or other pairs, or did not finish.
    """
    record = run_record.read(output_dir, settings)
    if artifacts.read_manifest(output_dir)["step5"]["inputs"] != data.responses.digests:
        raise InputError(
            f"{output_dir}: expected the pairs that its reward models were trained on, found other "
            f"pairs in {next(iter(data.responses.digests))}; run step 5 again, or use another "
            "output folder"
        )
    return load_split(output_dir, data), record


# ---------------------------------------------------------------------------------- pairs of a role


@dataclass(frozen=True)
class TrainingPairs:
    """M pairs to train on, their sides in random order.

    rows: (2M, D) embeddings, a float32 array or a tensor of the type that `draw` was asked for;
    index: (M, 2) row numbers of side 0 and side 1; labels: (M,) 1.0 where side 0 was preferred,
    else 0.0; prompts: (M, 2) group of each side, the same for both; folds: (M,) validation fold,
    the same for all pairs of a group.
    """

    rows: np.ndarray | torch.Tensor
    index: np.ndarray
    labels: np.ndarray
    prompts: np.ndarray
    folds: np.ndarray
    n_folds: int


def draw(
    data: HumanPairs, positions: np.ndarray, seed: int, dtype: torch.dtype | None = None
) -> TrainingPairs:
    """TrainingPairs from the pairs at `positions` (m,) of the data, without ties.

    dtype: torch type of the rows, for an MLP; None: rows as a float32 array. InputError where fewer
    than 2 prompts have a preference.
    """
    positions = positions[~data.ties[positions]]
    groups = data.responses.groups[positions]
    n_groups = len(np.unique(groups))
    if n_groups < 2:
        raise InputError(
            "pairs: expected at least 2 prompts with a preference to train on, "
            f"found {n_groups}; add pairs"
        )
    m, rng = len(positions), seeds.rng(seed, "pair positions")
    index = np.arange(2 * m).reshape(-1, 2)  # the preferred response first
    swapped = rng.random(m) < 0.5
    index[swapped] = index[swapped, ::-1]
    n_folds = max(2, min(run_record.FOLDS, n_groups // 4))
    folds = splits.assign_folds(groups, n_folds, seeds.rng(seed, "folds"))
    numbers = _both_sides(positions)
    if dtype is None:
        rows = data.responses.take(*numbers)
    else:
        rows = mlp.gather(data.responses.read(*numbers), 2 * m, data.responses.shape[2], dtype)
    labels, prompts = (~swapped).astype(float), np.stack([groups, groups], 1)
    return TrainingPairs(rows, index, labels, prompts, folds, n_folds)


def _both_sides(positions):
    """Prompt and response numbers (2m,) of pairs (m,): preferred, other, preferred, other, ..."""
    return np.repeat(positions, 2), np.tile([0, 1], len(positions))


@dataclass(frozen=True)
class Part:
    """The m pairs of a role that are no ties.

    positions: (m,) positions of the pairs in the data; prompts: (m,) groups, numbered 0 ... G - 1;
    subset: (m,) names or None; weights: (B, G) resamples of the groups; n_ties: number of ties that
    were left out.
    """

    positions: np.ndarray
    prompts: np.ndarray
    subset: np.ndarray | None
    weights: np.ndarray
    n_ties: int


def part(data: HumanPairs, positions: np.ndarray, rng: np.random.Generator) -> Part:
    """The Part of the pairs at `positions` of the data.

    InputError where fewer than 2 prompts have a preference.
    """
    preferred = positions[~data.ties[positions]]
    prompts = np.unique(data.responses.groups[preferred], return_inverse=True)[1]
    n_prompts = len(np.unique(prompts))
    if n_prompts < 2:
        raise InputError(
            "pairs: expected at least 2 prompts with a preference to evaluate on, "
            f"found {n_prompts}; add pairs"
        )
    subset = None if data.subset is None else data.subset[preferred]
    weights = intervals.resample_weights(n_prompts, rng)
    return Part(preferred, prompts, subset, weights, len(positions) - len(preferred))


# --------------------------------------------------------------------------------------- evaluation


def model_differences(
    predict: Callable[[np.ndarray], np.ndarray], data: HumanPairs, positions: np.ndarray
) -> np.ndarray:
    """score(preferred) - score(other) of the pairs at `positions` (m,) of the data.

    predict: embeddings (r, D) -> scores (r,) or (r, 1).
    """
    scores = np.empty(2 * len(positions))
    for sides, rows in data.responses.read(*_both_sides(positions)):
        scores[sides] = np.ravel(predict(rows.astype(np.float32)))
    return scores[::2] - scores[1::2]


def differences(
    ensemble: scoring.ScaledEnsemble,
    probe: np.ndarray,
    data: HumanPairs,
    positions: np.ndarray,
    seed: int,
) -> dict:
    """Score differences, preferred minus other, of the pairs at `positions` (m,) of the data.

    probe: (D,) weights of the linear probe. Returns {"aggregations": {name: (m,)}, "members":
    (E, m), "baselines": {name: (m,)}}. Differences of aggregations, members and the linear probe
    are in logits; those of random, longer and shorter have no unit.
    """
    models = [*ensemble.models, probe]
    raw = scoring.score_raw(models, data.responses, positions, ensemble.dtype)
    scores_EMK, probe_MK = scoring.on_scale(ensemble, raw[:-1]), raw[-1].astype(float)
    unit = ensemble.spread.mean()
    by_baseline = {
        name: scores[:, 0] - scores[:, 1]
        for name, scores in baselines.scores(data.responses, positions, probe_MK, 0.0, seed).items()
    }
    del by_baseline["mean_reward"]  # a constant orders no pair
    if "length" in by_baseline:
        longer = by_baseline.pop("length")
        by_baseline |= {"longer": longer, "shorter": -longer}
    return {
        "aggregations": {
            name: unit * (scores[:, 0] - scores[:, 1])
            for name, scores in aggregation.aggregate(scores_EMK).items()
        },
        "members": ensemble.spread[:, None] * (scores_EMK[..., 0] - scores_EMK[..., 1]),
        "baselines": by_baseline,
    }


def evaluate(
    ensemble: scoring.ScaledEnsemble,
    pairs: TrainingPairs,
    data: HumanPairs,
    roles: dict[str, np.ndarray],
    seed: int,
) -> dict:
    """How well an ensemble predicts held-out choices, beside baselines, as one dict for JSON.

    ensemble: trained on `pairs`, the TrainingPairs of role train; roles: the split of the data.
    Temperatures and maps are fitted on the calibration pairs, whose own metrics are out of fold.
    Baselines: a random scorer, the longer and the shorter response (where lengths are known), a
    linear Bradley-Terry probe.

    Returns "calibration" and "held_out", each {"n_pairs", "n_prompts", "n_ties", "aggregations":
    {name: table}, "baselines": {name: table}}, "held_out" also with "members": [table], where
    `table` makes the tables; and "maps": {name: {"temperature", "isotonic"}}, with temperature null
    where it is infinite.
    """
    probe = baselines.fit_linear_probe(pairs.rows, pairs.index, pairs.labels, pairs.folds)
    fitted, held = (
        part(data, roles[role], seeds.rng(seed, "resample", role)) for role in ROLES[1:]
    )
    n_folds = min(run_record.FOLDS, fitted.weights.shape[1])
    folds = splits.assign_folds(fitted.prompts, n_folds, seeds.rng(seed, "calibration folds"))
    on_fitted, on_held = (
        differences(ensemble, probe, data, pairs_of_role.positions, seed)
        for pairs_of_role in (fitted, held)
    )
    inside, outside = (
        {**_counts(pairs_of_role), "aggregations": {}, "baselines": {}}
        for pairs_of_role in (fitted, held)
    )
    maps = {}
    names = [("aggregations", name) for name in on_held["aggregations"]]
    for kind, name in [*names, ("baselines", "linear_probe")]:
        difference, unseen = on_fitted[kind][name], on_held[kind][name]
        temperature = preference_maps.fit_temperature(difference)
        numbers = preference_maps.fit_map(difference)
        log_odds = preference_maps.out_of_fold(difference, folds)
        inside[kind][name] = table(difference, log_odds, fitted)
        log_odds = preference_maps.calibrated(unseen, temperature, numbers)
        outside[kind][name] = table(unseen, log_odds, held)
        maps[name] = {"temperature": artifacts.null_if_nan(temperature), "isotonic": numbers}
    for name, difference in on_held["baselines"].items():
        outside["baselines"].setdefault(name, table(difference, {}, held))
    outside["members"] = [
        table(difference, {"uncalibrated": difference}, held) for difference in on_held["members"]
    ]
    return {"calibration": inside, "held_out": outside, "maps": maps}


def _counts(pairs):
    """Numbers of pairs, prompts and ties of a Part."""
    return {
        "n_pairs": len(pairs.positions),
        "n_prompts": pairs.weights.shape[1],
        "n_ties": pairs.n_ties,
    }


def table(difference: np.ndarray, log_odds: dict[str, np.ndarray], pairs: Part) -> dict:
    """Accuracy of differences (m,) on the Part `pairs`, and metrics of each variant of log-odds.

    log_odds: {variant: (m,)}. The result has the keys of preferences.preference_accuracy and, under
    the name of each variant, those of preferences.preference_metrics.
    """
    accuracy = preferences.preference_accuracy(
        difference, pairs.prompts, pairs.weights, pairs.subset
    )
    return accuracy | {
        name: preferences.preference_metrics(values, pairs.prompts, pairs.weights)
        for name, values in log_odds.items()
    }


def summary(results: dict) -> list[str]:
    """Lines to print about the results of `evaluate` on held-out pairs."""
    held = results["held_out"]
    lines = [
        f"held out: {held['n_pairs']} pairs in {held['n_prompts']} groups, "
        f"{held['n_ties']} ties left out",
        f"  {'':14}accuracy [95 % interval]  "
        "NLL and ECE: uncalibrated > temperature > isotonic (ECE if calibrated)",
    ]
    members = {f"member {i}": row for i, row in enumerate(held["members"])}
    for name, row in {**members, **held["aggregations"], **held["baselines"]}.items():
        low, high = row["accuracy_ci95"]
        variants = [row[v] for v in ("uncalibrated", "temperature_scaled", "isotonic") if v in row]
        nll = " > ".join(f"{v['nll']:.3f}" for v in variants)
        ece = " > ".join(f"{v['ece']:.3f} ({v['ece_if_calibrated']:.3f})" for v in variants)
        accuracy = f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"  {name:14}{accuracy}      {nll:23}  {ece}".rstrip())
    for name, row in held["aggregations"]["mean"].get("by_subset", {}).items():
        low, high = row["accuracy_ci95"]
        accuracy = f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"  mean on {name} ({row['n_pairs']} pairs): {accuracy}")
    return lines
