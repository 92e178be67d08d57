"""From embeddings to rewards: debiased attribute scores under a gate, and what stands beside the gate.

Stage 2 of ArmoRM (Wang et al., arXiv 2406.12845): reward = sum over attributes of weight(prompt) *
debiased reward. All that scores goes through `standardised`, in training, validation, benchmarks
and explanations alike: raw scores, less their share of verbosity, each attribute used in units of
its standard deviation over the training responses. So weights of attributes on different scales can
be compared, and contributions are relative to an average response.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import xlogy

from rewardlib import artifacts, seeds
from rewardlib.errors import InputError
from rewardlib.measures import intervals
from rewardlib.nets.gate import Gate, predict_gate
from rewardlib.pipeline import baselines
from studies.interpretable import attribute_data, multi_objective

GATE, RECORD, SPLIT = "gate.safetensors", "gate.json", "gating_split.json"
MADE_BY = "studies/interpretable_gating.py"
HEADS_RECORD, HEADS_SPLIT = "attribute_heads.json", "regression_split.json"
HASHED = 2**32


@dataclass(frozen=True)
class GatedModel:
    """model: the attribute heads; attributes: the A names used; centre, spread: (A,) of their debiased scores; gate:
    networks.Gate; beside it, single: one of the attributes, global_weights (A,) and linear_head (D,)."""

    model: multi_objective.AttributeModel
    attributes: list
    centre: np.ndarray
    spread: np.ndarray
    gate: Gate | None = None
    single: str | None = None
    global_weights: np.ndarray | None = None
    linear_head: np.ndarray | None = None


# ------------------------------------------------------------------------------------------ rewards


def debiased(gated, raw):
    """Debiased scores (..., A) of the attributes used, from raw scores (..., all attributes of the heads)."""
    names = list(gated.model.attributes)
    return multi_objective.debias(gated.model, raw)[
        ..., [names.index(name) for name in gated.attributes]
    ]


def standardised(gated, raw):
    """Attribute rewards (..., A) float32: debiased scores, less their mean, in standard deviations."""
    return ((debiased(gated, raw) - gated.centre) / gated.spread).astype(np.float32)


def standardise(model, attributes, raw):
    """A GatedModel without a gate, its centre and spread those of raw scores (..., all attributes) to be trained on."""
    plain = GatedModel(model, list(attributes), np.zeros(len(attributes)), np.ones(len(attributes)))
    values = debiased(plain, raw).reshape(-1, len(attributes))
    spread = values.std(0)
    if not (spread > 0).all():
        name = attributes[int(np.argmin(spread))]
        raise InputError(
            f"{name}: expected scores that differ between responses, found one for all; --drop {name}"
        )
    return GatedModel(model, list(attributes), values.mean(0), spread)


def weights(gated, data, rows):
    """(m, A) gate weights of rows of a prepared file."""
    return predict_gate(gated.gate, data.take_prompts(rows))


def rewards(gated, data, rows):
    """{method: (m,) or, of pairs, (m, 2) rewards} of rows of a prepared file, higher being better.

    Methods: gate, uniform (equal weights), best_single, global_weights (one set for all prompts),
    linear_head (on the embeddings, without attributes), and "attribute NAME" for each attribute by
    itself.
    """
    shape = len(rows), *data.shape[1:-1]
    raw, linear = np.empty((*shape, len(gated.model.attributes))), np.empty(shape)
    for part, x in data.blocks(rows):
        raw[part] = multi_objective.scores(gated.model, x)
        linear[part] = x @ gated.linear_head.astype(np.float32)
    values = standardised(gated, raw)
    gates = weights(gated, data, rows)
    gates = gates[:, None] if data.is_pairs else gates
    return {
        "gate": (gates * values).sum(-1),
        "uniform": values.mean(-1),
        "best_single": values[..., gated.attributes.index(gated.single)],
        "global_weights": values @ gated.global_weights,
        "linear_head": linear,
    } | {f"attribute {name}": values[..., a] for a, name in enumerate(gated.attributes)}


# ------------------------------------------------------------------------------------------ fitting


def choose_attributes(names, drop, freeze):
    """(attributes used, (A,) frozen weights with NaN where learned) of `names` after --drop and --freeze.

    drop: names; freeze: {name: weight in [0, 1)}, which add up to less than 1.
    """
    for name in (*drop, *freeze):
        if name not in names:
            raise InputError(
                f"expected attributes among {', '.join(names)}, found {name!r}; check --drop and --freeze"
            )
    used = [name for name in names if name not in drop]
    if both := sorted(set(drop) & set(freeze)):
        raise InputError(
            f"{', '.join(both)}: expected to be dropped or frozen, found both; give one of the two"
        )
    if any(not 0 <= weight < 1 for weight in freeze.values()) or sum(freeze.values()) >= 1:
        told = ", ".join(f"{name}={weight:g}" for name, weight in freeze.items())
        raise InputError(
            f"--freeze: expected weights from 0 that add up to less than 1, found {told}; lower them"
        )
    if len(used) - len(freeze) < 2:
        raise InputError(
            f"expected at least two attributes whose weights are learned, found {len(used) - len(freeze)} "
            f"of {len(names)}; drop or freeze fewer"
        )
    return used, np.array([freeze.get(name, np.nan) for name in used], np.float32)


def split_prompts(groups, seen, held_out_share, validation_share, seed):
    """{"fit", "validation", "held_out"}: sorted row numbers, whole prompts at a time.

    groups: (n,) prompt of each row; seen: prompts that the attribute heads were fitted on (None:
    not known), which are not held out, and validated on only where the others do not suffice.
    InputError where no prompt is left to fit or validate on.
    """
    prompts, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = seeds.rng(seed, "gating split").permutation(len(prompts))
    is_seen = np.isin(prompts, [] if seen is None else seen)
    order = order[np.argsort(is_seen[order], kind="stable")]
    middle = np.cumsum(sizes[order]) - sizes[order] / 2
    held = (middle < held_out_share * len(groups)) & ~is_seen[order]
    validation = ~held & (middle < held.dot(sizes[order]) + validation_share * len(groups))
    part = np.empty(len(prompts), int)
    part[order] = np.where(held, 2, np.where(validation, 1, 0))
    split = {
        name: np.flatnonzero(part[group] == i)
        for i, name in enumerate(("fit", "validation", "held_out"))
    }
    if not len(split["fit"]) or not len(split["validation"]):
        raise InputError(
            f"expected prompts to fit and to validate on, found {len(prompts)} prompts, {held.sum()} of them held out; "
            "add pairs, or change --held_out_share and --validation_share"
        )
    return split


def prompts_of_heads(model_dir, data):
    """Prompt numbers that the attribute heads or their penalties were fitted on; None where they cannot be compared."""
    source = artifacts.read_json(Path(model_dir) / HEADS_RECORD, multi_objective.MADE_BY)["data"][
        "source"
    ]
    split = artifacts.read_json(Path(model_dir) / HEADS_SPLIT, multi_objective.MADE_BY)
    seen = np.unique(
        np.concatenate([split[role] for role in split if role != "held_out"]).astype(np.int64)
    )
    return seen if are_comparable(seen, source, data) else None


def prompts_of_gate(model_dir, data):
    """(prompt numbers that the gate, its baselines or the attribute heads were fitted on, whether these are all).

    They are not where those of the heads, or all of them, cannot be compared with those of `data`.
    """
    source = artifacts.read_json(Path(model_dir) / RECORD, MADE_BY)["pairs"]["source"]
    split = artifacts.read_json(Path(model_dir) / SPLIT, MADE_BY)
    known = split["heads"] is not None
    parts = [split["fit"], split["validation"], split["heads"] if known else []]
    seen = np.unique(np.concatenate(parts).astype(np.int64))
    return (seen, known) if are_comparable(seen, source, data) else (seen[:0], False)


def are_comparable(prompts, source, data):
    """Whether `prompts`, of a file made as `source` says, are numbered as those of `data`.

    They are where both files number prompts by a digest of the same thing (attribute_data.groups_of
    makes 53 bits, and numbers that merely count prompts are small), and where both are of one
    source.
    """
    alike = source.get("prompt_position") == data.source.get("prompt_position")
    hashed = np.median(prompts) >= HASHED and np.median(data.groups) >= HASHED
    return bool((hashed and alike) or (source and source == data.source))


def describe_seen(seen, groups, split):
    """What gate.json says of prompts of the pairs that the attribute heads were fitted on; seen as above."""
    if seen is None:
        told = "whether the attribute heads were fitted on prompts held out here cannot be told from the files"
        return {"told": told, "shared": None, "held_out": None}
    prompts = np.unique(groups)
    shared, held_out = (
        int(np.isin(each, seen).sum()) for each in (prompts, np.unique(groups[split["held_out"]]))
    )
    told = f"{shared} of {len(prompts)} prompts are among those the attribute heads were fitted on"
    return {
        "told": told + ("; none of them is held out" if shared else ""),
        "shared": shared,
        "held_out": held_out,
    }


def describe_no_held_out(seen, share):
    """Why no pairs are held out."""
    if not share:
        return "--held_out_share is 0"
    return (
        "the attribute heads were fitted on every prompt"
        if seen is not None and len(seen)
        else "too few prompts"
    )


def fit_global_weights(values, fit, validation):
    """(A,) weights for all prompts: a logistic regression on the attribute differences of pairs, any sign.

    values: (n, 2, A) attribute rewards, preferred first; the ridge strength is chosen on
    `validation`, then both parts are fitted.
    """
    rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]), np.float32)
    return _fit_logistic(rows, fit, validation)


def fit_linear_head(data, fit, validation):
    """(D,) a Bradley-Terry head on the response embeddings of the same pairs, fitted as `fit_global_weights` is."""
    used = np.concatenate([fit, validation])
    rows = data.take(used).reshape(-1, data.shape[-1])
    return _fit_logistic(rows, np.arange(len(fit)), np.arange(len(fit), len(used)))


def _fit_logistic(rows, fit, validation):
    used = np.concatenate([fit, validation])
    pairs, folds = (
        2 * used[:, None] + np.arange(2),
        np.r_[np.ones(len(fit)), np.zeros(len(validation))],
    )
    return baselines.fit_linear_probe(rows, pairs, np.ones(len(used)), folds)


def best_attribute(attributes, values):
    """The attribute that orders most of the pairs `values` (n, 2, A), preferred first, by itself."""
    return attributes[int(np.argmax(np.sign(values[:, 0] - values[:, 1]).sum(0)))]


# ----------------------------------------------------------------------------------------- measures


def prompt_accuracy(scores, groups):
    """(G,) share of a prompt's pairs in which the preferred response scores higher, ties one half. scores: (n, 2)."""
    _, group = np.unique(groups, return_inverse=True)
    right = 0.5 + 0.5 * np.sign(scores[:, 0] - scores[:, 1])
    return np.bincount(group, right) / np.bincount(group)


def compare(scores, groups, seed):
    """{"n_pairs", "n_prompts", "methods", "gate_minus"} of {method: (n, 2)}: accuracies and paired differences.

    Means over prompts, intervals from resampling prompts; None where there are no pairs.
    """
    if not len(groups):
        return None
    accuracy = {method: prompt_accuracy(each, groups) for method, each in scores.items()}
    n = len(accuracy["gate"])
    draws = intervals.resample_weights(n, seeds.rng(seed, "resample prompts"))
    result = {"n_pairs": len(groups), "n_prompts": n, "methods": {}, "gate_minus": {}}
    for method, values in accuracy.items():
        mean, ci = intervals.mean_with_ci(values, draws)
        result["methods"][method] = {"accuracy": mean, "accuracy_ci95": ci}
        if method != "gate":
            flips = seeds.rng(seed, "sign flips", method)
            result["gate_minus"][method] = intervals.paired_difference(
                accuracy["gate"], values, draws, flips
            )
    return result


def describe_weights(attributes, found):
    """Mean and standard deviation over prompts of each weight (n, A), and the entropy of a prompt's weights.

    relative_entropy: its mean over prompts as a share of log A, 1 for equal weights and 0 for a
    single attribute; entropy_of_mean: the same of the mean weights. Where the first is far below
    the second, prompts differ.
    """
    mean, most = found.mean(0, dtype=float), np.log(len(attributes))
    return {
        "n_prompts": len(found),
        "mean": dict(zip(attributes, mean.tolist(), strict=True)),
        "sd_between_prompts": dict(
            zip(attributes, found.std(0, dtype=float).tolist(), strict=True)
        ),
        "relative_entropy": float(-xlogy(found, found).sum(1, dtype=float).mean() / most),
        "entropy_of_mean": float(-xlogy(mean, mean).sum() / most),
    }


def weights_by_subset(gated, data, rows):
    """{subset: {attribute: mean gate weight}} of rows of a prepared file with subsets, each prompt counting once."""
    subsets, found = np.array(data.subsets)[rows], {}
    for name in dict.fromkeys(subsets.tolist()):
        at = rows[subsets == name]
        at = at[np.unique(data.groups[at], return_index=True)[1]]
        found[name] = dict(
            zip(
                gated.attributes,
                weights(gated, data, at).mean(0, dtype=float).tolist(),
                strict=True,
            )
        )
    return found


# -------------------------------------------------------------------------------------------- files


def save(output_dir, gated):
    """Write the gate, the standardisation and the baselines; the attribute heads are named by their digest."""
    gate = gated.gate
    state = gate.state_dict().items()
    tensors = {
        f"gate.{name}": [value.numpy().reshape(-1, *value.shape[1:])] for name, value in state
    }
    for name in ("centre", "spread", "global_weights", "linear_head"):
        tensors[name] = [np.asarray(getattr(gated, name), float)]
    told = {
        "attributes": gated.attributes,
        "single": gated.single,
        "temperature": gate.temperature,
        "dropout": gate.dropout,
        "heads": artifacts.sha256(Path(output_dir) / multi_objective.HEADS),
    }
    attribute_data.write_tensors(
        Path(output_dir) / GATE, tensors, {k: json.dumps(v) for k, v in told.items()}
    )


def load(model_dir, data=None):
    """The GatedModel in a model folder; InputError unless it fits the heads beside it and the prepared `data`."""
    model = multi_objective.load(model_dir, data)
    path = Path(model_dir) / GATE
    if not path.exists():
        raise InputError(f"{path} not found; it is written by {MADE_BY}: run that first")
    arrays, metadata = attribute_data.map_tensors(path)
    try:
        names = ("attributes", "single", "temperature", "dropout", "heads")
        told = {name: json.loads(metadata[name]) for name in names}
        state = {
            name.removeprefix("gate."): torch.tensor(value)
            for name, value in arrays.items()
            if "gate." in name
        }
        state["log_scale"] = state["log_scale"].reshape(())
        layers = [
            state[f"layers.{i}.weight"] for i in range(sum("weight" in name for name in state))
        ]
        hidden = [len(layer) for layer in layers[:-1]]
        gate = Gate(
            layers[0].shape[1], state["frozen"], hidden, told["dropout"], told["temperature"]
        )
        gate.load_state_dict(state)
        rest = {
            name: np.array(arrays[name])
            for name in ("centre", "spread", "global_weights", "linear_head")
        }
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise InputError(
            f"{path}: expected a gate of {MADE_BY}, found another file ({error}); run it again"
        ) from None
    if told["heads"] != artifacts.sha256(Path(model_dir) / multi_objective.HEADS):
        raise InputError(
            f"{path}: the attribute heads beside it are not those it was trained on; run {MADE_BY} again"
        )
    check_prompts(data, layers[0].shape[1])
    return GatedModel(model, told["attributes"], gate=gate.eval(), single=told["single"], **rest)


def check_prompts(data, input_dim=None):
    """InputError unless the prepared `data` (None: nothing to check) has prompt embeddings, of input_dim if given."""
    if data is None:
        return
    if data.prompt_embeddings is None:
        raise InputError(
            f"{data.path}: expected prompt_embeddings, which the gate reads, found none; prepare it again"
        )
    found = data.prompt_embeddings[0].shape[1]
    if input_dim is not None and found != input_dim:
        raise InputError(
            f"{data.path}: expected prompt_embeddings of {input_dim} dimensions as the gate was trained on, found "
            f"{found}; embed both with one model"
        )


# -------------------------------------------------------------------------------------- explanation


def explain(gated, data, rows):
    """What makes up the reward of rows of a prepared file, in the mean over them, as a dict of arrays.

    weights (A,); score, debiased, standardised, contribution: (K, A), K the responses of a row, 1
    or 2 (chosen, rejected); reward (K,). contribution = weight * standardised, of each row before
    the mean; reward is its sum over attributes. share_right: of the pairs, those whose chosen
    response has the higher reward, None for responses.
    """
    n_sides = 2 if data.is_pairs else 1
    raw = multi_objective.score_rows(gated.model, data, rows).reshape(len(rows), n_sides, -1)
    names = list(gated.model.attributes)
    values, gates = standardised(gated, raw).astype(float), weights(gated, data, rows).astype(float)
    contribution = gates[:, None] * values
    reward = contribution.sum(-1)
    return {
        "weights": gates.mean(0),
        "score": raw[..., [names.index(name) for name in gated.attributes]].mean(0),
        "debiased": debiased(gated, raw).mean(0),
        "standardised": values.mean(0),
        "contribution": contribution.mean(0),
        "reward": reward.mean(0),
        "share_right": float((reward[:, 0] > reward[:, 1]).mean()) if data.is_pairs else None,
    }
