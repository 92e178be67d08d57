"""Reward models from recorded preference pairs: split, training pairs, evaluation.

Pairs are split 60 / 20 / 20 into train, calibration and held-out, groups of linked pairs on one
side (pair_files.link). Ties teach no order and have no right answer: they are left out of fits and
metrics, and counted. How often a model scores the two responses of a tie alike is not measured.

A difference is score(preferred) - score(other), in logits: the ensemble's scores are brought to one
scale for aggregation, then multiplied by the members' mean spread. preference_maps.py makes
probabilities of it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rewardlib import artifacts, seeds
from rewardlib.data import splits
from rewardlib.errors import InputError
from rewardlib.measures import intervals, preferences
from rewardlib.models import aggregation, scoring
from rewardlib.nets import mlp
from rewardlib.pipeline import baselines, preference_maps, run_record

SPLIT_FILE = "pair_split.json"
ROLES = ("train", "calibration", "held_out")
ANNOTATION = (
    "pairing",
    "consider_first_n",
    "n_sample",
    "n_pairs",
    "annotation_quality",
    "reward_scale",
)


def split(data, seed):
    """Deal the pairs 60 / 20 / 20, whole groups at a time. Returns {role: sorted (m,) row numbers} for ROLES."""
    # split_prompts deals in these shares too, under the names of a pipeline that trains on few
    # prompts
    return dict(zip(ROLES, splits.split_prompts(data.responses.groups, seed).values(), strict=True))


def save_split(output_dir, roles, seed):
    artifacts.write_json(Path(output_dir) / SPLIT_FILE, {"seed": seed, **roles})


def load_split(output_dir, data):
    """The split that step 5 made; InputError unless it covers exactly these pairs and keeps groups on one side."""
    path = Path(output_dir) / SPLIT_FILE
    content = artifacts.read_json(path, "step 5")
    parts = {role: np.array(content[role], int) for role in ROLES}
    if not np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(data))):
        raise InputError(
            f"{path}: expected each of {len(data)} pairs once, found other pairs; run step 5 again"
        )
    groups = np.concatenate([np.unique(data.responses.groups[rows]) for rows in parts.values()])
    if n_shared := len(groups) - len(np.unique(groups)):
        raise InputError(
            f"leakage: {path} has {n_shared} groups of linked pairs on two sides; it was changed after step 5: "
            "run step 5 again"
        )
    return parts


def run_settings(settings, data):
    """`settings` (a dict) of a run on recorded pairs: nothing in them is about drawing and annotating pairs."""
    return {**settings, **dict.fromkeys(ANNOTATION), "pairing": "human", "n_sample": len(data)}


def open_run(output_dir, settings, data):
    """The split and the record that step 5 left; InputError where it ran with other settings or pairs, or never."""
    record = run_record.read(output_dir, settings)
    if artifacts.read_manifest(output_dir)["step5"]["inputs"] != data.responses.digests:
        raise InputError(
            f"{output_dir}: expected the pairs its reward models were trained on, found other ones in "
            f"{next(iter(data.responses.digests))}; run step 5 again, or use another output folder"
        )
    return load_split(output_dir, data), record


@dataclass(frozen=True)
class TrainingPairs:
    """M pairs to train on, sides in random order.

    rows: (2M, D) embeddings, a float32 array or the tensor that `draw` was asked for; index: (M, 2)
    row numbers of side 0 and side 1; labels: (M,) 1.0 where side 0 was preferred, else 0.0;
    prompts: (M, 2) group of either side, the same; folds: (M,) validation fold, by group.
    """

    rows: np.ndarray | torch.Tensor
    index: np.ndarray
    labels: np.ndarray
    prompts: np.ndarray
    folds: np.ndarray
    n_folds: int


def draw(data, at, seed, dtype=None):
    """TrainingPairs of the pairs `at` (row numbers) that are no ties. InputError where none or one prompt is left.

    dtype: None, or the torch type of the tensor that an MLP is to train on.
    """
    at = at[~data.ties[at]]
    groups = data.responses.groups[at]
    n_groups = len(np.unique(groups))
    if n_groups < 2:
        raise InputError(
            f"pairs: expected at least 2 prompts with a preference to train on, found {n_groups}; add pairs"
        )
    m, rng = len(at), seeds.rng(seed, "pair positions")
    index = np.arange(2 * m).reshape(-1, 2)  # the preferred response first
    turned = rng.random(m) < 0.5
    index[turned] = index[turned, ::-1]
    n_folds = max(2, min(run_record.FOLDS, n_groups // 4))
    folds = splits.assign_folds(groups, n_folds, seeds.rng(seed, "folds"))
    places = np.repeat(at, 2), np.tile([0, 1], m)
    if dtype is None:
        rows = data.responses.take(*places)
    else:
        rows = mlp.gather(data.responses.read(*places), 2 * m, data.responses.shape[2], dtype)
    return TrainingPairs(
        rows, index, (~turned).astype(float), np.stack([groups, groups], 1), folds, n_folds
    )


@dataclass(frozen=True)
class Part:
    """The m pairs of a role that are no ties.

    at: (m,) row numbers; prompts: (m,) groups, numbered 0 ... G - 1; subset: (m,) names or None;
    weights: (B, G) resamples of the groups; n_ties: pairs left out.
    """

    at: np.ndarray
    prompts: np.ndarray
    subset: np.ndarray | None
    weights: np.ndarray
    n_ties: int


def part(data, at, rng):
    """The Part of the pairs `at` (row numbers). InputError where fewer than 2 prompts have a preference."""
    kept = at[~data.ties[at]]
    prompts = np.unique(data.responses.groups[kept], return_inverse=True)[1]
    n_prompts = len(np.unique(prompts))
    if n_prompts < 2:
        raise InputError(
            f"pairs: expected at least 2 prompts with a preference to evaluate on, found {n_prompts}; add pairs"
        )
    subset = None if data.subset is None else data.subset[kept]
    return Part(
        kept, prompts, subset, intervals.resample_weights(n_prompts, rng), len(at) - len(kept)
    )


def model_differences(predict, data, at):
    """(m,) score(preferred) - score(other) of the pairs `at` (row numbers); predict: (r, D) -> (r,) or (r, 1)."""
    scores = np.empty(2 * len(at))
    for places, rows in data.responses.read(np.repeat(at, 2), np.tile([0, 1], len(at))):
        scores[places] = np.ravel(predict(rows.astype(np.float32)))
    return scores[::2] - scores[1::2]


def differences(ensemble, probe, data, at, seed):
    """Score differences, preferred minus other, of the pairs `at` (m row numbers), by what they are.

    Returns {"aggregations": {name: (m,)}, "members": (E, m), "baselines": {name: (m,)}}, all but
    the baselines random, longer and shorter in logits. probe: (D,) weights of the linear probe.
    """
    raw = scoring.score_raw([*ensemble.models, probe], data.responses, at, ensemble.dtype)
    scores, linear = scoring.on_scale(ensemble, raw[:-1]), raw[-1].astype(float)
    unit = ensemble.spread.mean()
    simple = {
        name: s[:, 0] - s[:, 1]
        for name, s in baselines.scores(data.responses, at, linear, 0.0, seed).items()
    }
    del simple["mean_reward"]  # a constant
    if "length" in simple:
        longer = simple.pop("length")
        simple |= {"longer": longer, "shorter": -longer}
    return {
        "aggregations": {
            name: unit * (s[:, 0] - s[:, 1]) for name, s in aggregation.aggregate(scores).items()
        },
        "members": ensemble.spread[:, None] * (scores[..., 0] - scores[..., 1]),
        "baselines": simple,
    }


def evaluate(ensemble, pairs, data, roles, seed):
    """How well an ensemble predicts held-out choices, beside baselines, as one JSON-able dict.

    ensemble: ensembles.Ensemble trained on `pairs`, the TrainingPairs of role train; roles: the split of data.
    Temperatures and maps are fitted on the calibration pairs; their metrics on these are out of fold. Baselines: a
    random scorer, the longer and the shorter response (where lengths are known), a linear Bradley-Terry probe.
    Result: "calibration" and "held_out", each {"n_pairs", "n_prompts", "n_ties", "aggregations": {name: table},
    "baselines": {name: table}}, held_out also "members": [table], with tables as of `table`; "maps": {name:
    {"temperature", "isotonic"}}, the temperature null where it is infinite.
    """
    probe = baselines.fit_linear_probe(pairs.rows, pairs.index, pairs.labels, pairs.folds)
    fitted, held = (
        part(data, roles[role], seeds.rng(seed, "resample", role)) for role in ROLES[1:]
    )
    n_folds = min(run_record.FOLDS, fitted.weights.shape[1])
    folds = splits.assign_folds(fitted.prompts, n_folds, seeds.rng(seed, "calibration folds"))
    on_fitted, on_held = (differences(ensemble, probe, data, p.at, seed) for p in (fitted, held))
    inside, outside = ({**_counts(p), "aggregations": {}, "baselines": {}} for p in (fitted, held))
    maps = {}
    for kind, name in [
        *(("aggregations", name) for name in on_held["aggregations"]),
        ("baselines", "linear_probe"),
    ]:
        difference, unseen = on_fitted[kind][name], on_held[kind][name]
        temperature, numbers = (
            preference_maps.fit_temperature(difference),
            preference_maps.fit_map(difference),
        )
        inside[kind][name] = table(
            difference, preference_maps.out_of_fold(difference, folds), fitted
        )
        outside[kind][name] = table(
            unseen, preference_maps.calibrated(unseen, temperature, numbers), held
        )
        maps[name] = {"temperature": artifacts.null_if_nan(temperature), "isotonic": numbers}
    for name, difference in on_held["baselines"].items():
        outside["baselines"].setdefault(name, table(difference, {}, held))
    outside["members"] = [
        table(difference, {"uncalibrated": difference}, held) for difference in on_held["members"]
    ]
    return {"calibration": inside, "held_out": outside, "maps": maps}


def _counts(chosen):
    return {
        "n_pairs": len(chosen.at),
        "n_prompts": chosen.weights.shape[1],
        "n_ties": chosen.n_ties,
    }


def table(difference, log_odds, chosen):
    """Accuracy of differences (m,) on the Part `chosen` and, by variant, the metrics of log_odds {variant: (m,)}."""
    return preferences.preference_accuracy(
        difference, chosen.prompts, chosen.weights, chosen.subset
    ) | {
        name: preferences.preference_metrics(values, chosen.prompts, chosen.weights)
        for name, values in log_odds.items()
    }


def summary(results):
    """Lines for people about what `evaluate` found on held-out pairs."""
    held = results["held_out"]
    lines = [
        f"held out: {held['n_pairs']} pairs in {held['n_prompts']} groups, {held['n_ties']} ties left out",
        f"  {'':14}accuracy [95 % interval]  NLL and ECE: uncalibrated > temperature > isotonic (ECE if calibrated)",
    ]
    members = {f"member {i}": row for i, row in enumerate(held["members"])}
    for name, row in {**members, **held["aggregations"], **held["baselines"]}.items():
        low, high = row["accuracy_ci95"]
        variants = [row[v] for v in ("uncalibrated", "temperature_scaled", "isotonic") if v in row]
        nll = " > ".join(f"{v['nll']:.3f}" for v in variants)
        ece = " > ".join(f"{v['ece']:.3f} ({v['ece_if_calibrated']:.3f})" for v in variants)
        lines.append(
            f"  {name:14}{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]      {nll:23}  {ece}".rstrip()
        )
    for name, row in held["aggregations"]["mean"].get("by_subset", {}).items():
        low, high = row["accuracy_ci95"]
        lines.append(
            f"  mean on {name} ({row['n_pairs']} pairs): {row['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        )
    return lines
