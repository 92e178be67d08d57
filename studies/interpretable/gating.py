"""From embeddings to rewards: debiased attribute scores under a gate, and baselines of the gate.

Stage 2 of ArmoRM (Wang et al., arXiv 2406.12845): reward = sum over attributes of weight(prompt) *
debiased reward. Training, validation, benchmarks and explanations all score through `standardised`:
raw scores, debiased, less their mean, in standard deviations over the training responses. So the
weights of attributes on different scales can be compared, and a contribution is relative to an
average response.
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
from studies.interpretable import multi_objective, tensor_files
from studies.interpretable.attribute_data import Rated

GATE, RECORD, SPLIT = "gate.safetensors", "gate.json", "gating_split.json"
MADE_BY = "studies/interpretable_gating.py"
HEADS_RECORD, HEADS_SPLIT = "attribute_heads.json", "regression_split.json"
# Prompt numbers with a lower median are counters: attribute_data.groups_of makes 53-bit digests.
HASHED = 2**32


@dataclass(frozen=True)
class GatedModel:
    """Attribute heads with a gate over A of their attributes, and the baselines of the gate.

    model: the attribute heads; attributes: the A names used; centre, spread: (A,) mean and standard
    deviation of their debiased scores; gate: rewardlib.nets.gate.Gate. Baselines: single, the best
    attribute by itself; global_weights (A,), one weighting for all prompts; linear_head (D,), on
    the embeddings.
    """

    model: multi_objective.AttributeModel
    attributes: list[str]
    centre: np.ndarray
    spread: np.ndarray
    gate: Gate | None = None
    single: str | None = None
    global_weights: np.ndarray | None = None
    linear_head: np.ndarray | None = None


# ------------------------------------------------------------------------------------------ rewards


def debiased(gated: GatedModel, raw: np.ndarray) -> np.ndarray:
    """Debiased scores (..., A) of the attributes used, from raw scores of all heads (..., H)."""
    names = list(gated.model.attributes)
    columns = [names.index(name) for name in gated.attributes]
    return multi_objective.debias(gated.model, raw)[..., columns]


def standardised(gated: GatedModel, raw: np.ndarray) -> np.ndarray:
    """Attribute rewards (..., A) float32, from raw scores of all heads (..., H).

    Debiased scores, less their mean, in standard deviations of the training responses.
    """
    return ((debiased(gated, raw) - gated.centre) / gated.spread).astype(np.float32)


def standardise(
    model: multi_objective.AttributeModel, attributes: list[str], raw: np.ndarray
) -> GatedModel:
    """A GatedModel without a gate, with centre and spread of the training responses.

    attributes: the A names to use; raw: (..., H) scores of the training responses by all heads.
    InputError where an attribute scores all responses alike.
    """
    plain = GatedModel(model, list(attributes), np.zeros(len(attributes)), np.ones(len(attributes)))
    values = debiased(plain, raw).reshape(-1, len(attributes))
    spread = values.std(0)
    if not (spread > 0).all():
        name = attributes[int(np.argmin(spread))]
        raise InputError(f"{name}: all responses have the same score; give --drop {name}")
    return GatedModel(model, list(attributes), values.mean(0), spread)


def weights(gated: GatedModel, data: Rated, rows: np.ndarray) -> np.ndarray:
    """Gate weights (m, A) of m rows of a prepared file."""
    return predict_gate(gated.gate, data.take_prompts(rows))


def rewards(gated: GatedModel, data: Rated, rows: np.ndarray) -> dict[str, np.ndarray]:
    """{method: rewards (m,), or (m, 2) of pairs} of m rows of a prepared file; higher is better.

    Methods: gate, uniform (equal weights), best_single, global_weights (one weighting for all
    prompts), linear_head (on the embeddings, without attributes), and "attribute NAME" for each
    attribute by itself.
    """
    shape = len(rows), *data.shape[1:-1]
    raw, linear = np.empty((*shape, len(gated.model.attributes))), np.empty(shape)
    for block, embeddings in data.blocks(rows):
        raw[block] = multi_objective.scores(gated.model, embeddings)
        linear[block] = embeddings @ gated.linear_head.astype(np.float32)
    values = standardised(gated, raw)
    weights_MA = weights(gated, data, rows)
    # Both responses of a pair have the weights of their prompt.
    gates = weights_MA[:, None] if data.is_pairs else weights_MA
    return {
        "gate": (gates * values).sum(-1),
        "uniform": values.mean(-1),
        "best_single": values[..., gated.attributes.index(gated.single)],
        "global_weights": values @ gated.global_weights,
        "linear_head": linear,
    } | {f"attribute {name}": values[..., a] for a, name in enumerate(gated.attributes)}


# ------------------------------------------------------------------------------------------ fitting


def choose_attributes(
    names: list[str], drop: list[str], freeze: dict[str, float]
) -> tuple[list[str], np.ndarray]:
    """(the A attributes used, frozen weights (A,) float32, NaN where the weight is learned).

    names: all attributes; drop: names to leave out; freeze: {name: weight in [0, 1)}, which add up
    to less than 1. InputError for other names and weights, or where fewer than two are learned.
    """
    for name in (*drop, *freeze):
        if name not in names:
            raise InputError(
                f"expected attributes among {', '.join(names)}, found {name!r}; "
                "check --drop and --freeze"
            )
    used = [name for name in names if name not in drop]
    if both := sorted(set(drop) & set(freeze)):
        raise InputError(
            f"{', '.join(both)}: an attribute is either dropped or frozen, found both; "
            "give --drop or --freeze"
        )
    if any(not 0 <= weight < 1 for weight in freeze.values()) or sum(freeze.values()) >= 1:
        frozen = ", ".join(f"{name}={weight:g}" for name, weight in freeze.items())
        raise InputError(
            "--freeze: expected weights of at least 0 that add up to less than 1, "
            f"found {frozen}; lower them"
        )
    if len(used) - len(freeze) < 2:
        raise InputError(
            "expected at least two attributes whose weights are learned, found "
            f"{len(used) - len(freeze)} of {len(names)}; drop or freeze fewer"
        )
    return used, np.array([freeze.get(name, np.nan) for name in used], np.float32)


def split_prompts(
    groups: np.ndarray,
    seen: np.ndarray | None,
    held_out_share: float,
    validation_share: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """Random split by prompt: {"fit", "validation", "held_out": sorted row numbers}.

    groups: (n,) prompt number of each row; seen: prompts that the attribute heads were fitted on
    (None: not known). Seen prompts are never held out, and validated on only where there are not
    enough others. InputError where no prompt is left to fit or to validate on.
    """
    prompts, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = seeds.rng(seed, "gating split").permutation(len(prompts))
    is_seen = np.isin(prompts, [] if seen is None else seen)
    # Unseen prompts come first; held-out rows are taken first, then validation rows.
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
            f"expected prompts to fit and to validate on, found {len(prompts)} prompts, "
            f"{held.sum()} of them held out; add pairs, or change --held_out_share and "
            "--validation_share"
        )
    return split


def prompts_of_heads(model_dir: Path, data: Rated) -> np.ndarray | None:
    """Prompt numbers that the attribute heads or their penalties were fitted on.

    None where they cannot be compared with the prompt numbers of `data`.
    """
    record = artifacts.read_json(Path(model_dir) / HEADS_RECORD, multi_objective.MADE_BY)
    split = artifacts.read_json(Path(model_dir) / HEADS_SPLIT, multi_objective.MADE_BY)
    parts = [split[part] for part in split if part != "held_out"]
    seen = np.unique(np.concatenate(parts).astype(np.int64))
    return seen if are_comparable(seen, record["data"]["source"], data) else None


def prompts_of_gate(model_dir: Path, data: Rated) -> tuple[np.ndarray, bool]:
    """(prompt numbers that the gate, its baselines or the heads were fitted on, whether complete).

    The numbers are incomplete where the prompts of the heads are not known, and empty where they
    cannot be compared with the prompt numbers of `data`.
    """
    source = artifacts.read_json(Path(model_dir) / RECORD, MADE_BY)["pairs"]["source"]
    split = artifacts.read_json(Path(model_dir) / SPLIT, MADE_BY)
    known = split["heads"] is not None
    parts = [split["fit"], split["validation"], split["heads"] if known else []]
    seen = np.unique(np.concatenate(parts).astype(np.int64))
    return (seen, known) if are_comparable(seen, source, data) else (seen[:0], False)


def are_comparable(prompts: np.ndarray, source: dict, data: Rated) -> bool:
    """Whether equal numbers mean equal prompts in `prompts` and in `data`.

    prompts: prompt numbers of a file whose `source` is given. They are comparable where both files
    number prompts by digests of the same content, and where both have the same source.
    """
    alike = source.get("prompt_position") == data.source.get("prompt_position")
    hashed = np.median(prompts) >= HASHED and np.median(data.groups) >= HASHED
    return bool((hashed and alike) or (source and source == data.source))


def describe_seen(
    seen: np.ndarray | None, groups: np.ndarray, split: dict[str, np.ndarray]
) -> dict:
    """What gate.json says about prompts of the pairs that the attribute heads were fitted on.

    seen, groups, split: as in split_prompts.
    """
    if seen is None:
        sentence = (
            "whether the attribute heads were fitted on prompts held out here cannot be told "
            "from the files"
        )
        return {"told": sentence, "shared": None, "held_out": None}
    prompts, held_out = np.unique(groups), np.unique(groups[split["held_out"]])
    n_shared = int(np.isin(prompts, seen).sum())
    sentence = (
        f"{n_shared} of {len(prompts)} prompts are among those the attribute heads were fitted on"
    )
    return {
        "told": sentence + ("; none of them is held out" if n_shared else ""),
        "shared": n_shared,
        "held_out": int(np.isin(held_out, seen).sum()),
    }


def describe_no_held_out(seen: np.ndarray | None, share: float) -> str:
    """Why no pairs are held out. seen: as in split_prompts; share: the share that was asked for."""
    if not share:
        return "--held_out_share is 0"
    return (
        "the attribute heads were fitted on every prompt"
        if seen is not None and len(seen)
        else "too few prompts"
    )


def fit_global_weights(values: np.ndarray, fit: np.ndarray, validation: np.ndarray) -> np.ndarray:
    """One weighting (A,), of any signs, for all prompts, by a logistic regression on pairs.

    values: (n, 2, A) attribute rewards, preferred response first; fit, validation: row numbers. The
    ridge strength is chosen on `validation`, then both parts are fitted.
    """
    rows = np.ascontiguousarray(values.reshape(-1, values.shape[-1]), np.float32)
    return _fit_logistic(rows, fit, validation)


def fit_linear_head(data: Rated, fit: np.ndarray, validation: np.ndarray) -> np.ndarray:
    """A Bradley-Terry head (D,) on the response embeddings, fitted as `fit_global_weights` is."""
    used = np.concatenate([fit, validation])
    rows = data.take(used).reshape(-1, data.shape[-1])
    return _fit_logistic(rows, np.arange(len(fit)), np.arange(len(fit), len(used)))


def _fit_logistic(rows, fit, validation):
    """Logistic regression on rows (2n, F), of which 2i and 2i + 1 are the responses of pair i."""
    used = np.concatenate([fit, validation])
    pairs = 2 * used[:, None] + np.arange(2)
    # fit_linear_probe chooses the strength on the lowest fold.
    folds = np.r_[np.ones(len(fit)), np.zeros(len(validation))]
    return baselines.fit_linear_probe(rows, pairs, np.ones(len(used)), folds)


def best_attribute(attributes: list[str], values: np.ndarray) -> str:
    """The attribute that by itself orders most pairs rightly.

    values: (n, 2, A) attribute rewards, preferred response first.
    """
    return attributes[int(np.argmax(np.sign(values[:, 0] - values[:, 1]).sum(0)))]


# ----------------------------------------------------------------------------------------- measures


def prompt_accuracy(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Share (G,) of the pairs of each prompt whose preferred response scores higher.

    scores: (n, 2), preferred response first; groups: (n,) prompt numbers. A tie counts one half.
    """
    _, group = np.unique(groups, return_inverse=True)
    right = 0.5 + 0.5 * np.sign(scores[:, 0] - scores[:, 1])
    return np.bincount(group, right) / np.bincount(group)


def compare(scores: dict[str, np.ndarray], groups: np.ndarray, seed: int) -> dict | None:
    """{"n_pairs", "n_prompts", "methods", "gate_minus"}: accuracies and paired differences.

    scores: {method: (n, 2)}, preferred response first; groups: (n,) prompt numbers. Means over
    prompts, with intervals from resampling prompts. None where there are no pairs.
    """
    if not len(groups):
        return None
    accuracy = {method: prompt_accuracy(pairs, groups) for method, pairs in scores.items()}
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


def describe_weights(attributes: list[str], weights_NA: np.ndarray) -> dict:
    """Mean and standard deviation over prompts of each weight, and entropies of the weights.

    weights_NA: (N, A) weights of N prompts. relative_entropy: mean over prompts of the entropy of a
    prompt's weights, as a share of log A: 1 for equal weights, 0 for a single attribute;
    entropy_of_mean: the same of the mean weights. Where the first is far below the second, prompts
    differ in their weights.
    """
    mean, max_entropy = weights_NA.mean(0, dtype=float), np.log(len(attributes))
    spread, entropy = (
        weights_NA.std(0, dtype=float),
        -xlogy(weights_NA, weights_NA).sum(1, dtype=float),
    )
    return {
        "n_prompts": len(weights_NA),
        "mean": dict(zip(attributes, mean.tolist(), strict=True)),
        "sd_between_prompts": dict(zip(attributes, spread.tolist(), strict=True)),
        "relative_entropy": float(entropy.mean() / max_entropy),
        "entropy_of_mean": float(-xlogy(mean, mean).sum() / max_entropy),
    }


def weights_by_subset(
    gated: GatedModel, data: Rated, rows: np.ndarray
) -> dict[str, dict[str, float]]:
    """{subset: {attribute: mean gate weight over prompts}} of rows of a prepared file."""
    subsets, means = np.array(data.subsets)[rows], {}
    for name in dict.fromkeys(subsets.tolist()):
        subset_rows = rows[subsets == name]
        first_of_prompt = np.unique(data.groups[subset_rows], return_index=True)[1]
        mean = weights(gated, data, subset_rows[first_of_prompt]).mean(0, dtype=float)
        means[name] = dict(zip(gated.attributes, mean.tolist(), strict=True))
    return means


# -------------------------------------------------------------------------------------------- files


def save(output_dir: Path, gated: GatedModel) -> None:
    """Write the gate, the standardisation, the baselines and the digest of the attribute heads."""
    gate = gated.gate
    state = gate.state_dict().items()
    tensors = {
        f"gate.{name}": [value.numpy().reshape(-1, *value.shape[1:])] for name, value in state
    }
    for name in ("centre", "spread", "global_weights", "linear_head"):
        tensors[name] = [np.asarray(getattr(gated, name), float)]
    description = {
        "attributes": gated.attributes,
        "single": gated.single,
        "temperature": gate.temperature,
        "dropout": gate.dropout,
        "heads": artifacts.sha256(Path(output_dir) / multi_objective.HEADS),
    }
    metadata = {name: json.dumps(value) for name, value in description.items()}
    tensor_files.write_tensors(Path(output_dir) / GATE, tensors, metadata)


def load(model_dir: Path, data: Rated | None = None) -> GatedModel:
    """The GatedModel in a model folder.

    InputError unless the gate was trained on the heads in the same folder, and takes the embeddings
    and prompt embeddings of `data` (None: not checked).
    """
    model = multi_objective.load(model_dir, data)
    path = Path(model_dir) / GATE
    if not path.exists():
        raise InputError(f"{path} not found; it is written by {MADE_BY}: run that first")
    arrays, metadata = tensor_files.map_tensors(path)
    try:
        names = ("attributes", "single", "temperature", "dropout", "heads")
        description = {name: json.loads(metadata[name]) for name in names}
        gate = _gate_of(arrays, description["dropout"], description["temperature"])
        names = ("centre", "spread", "global_weights", "linear_head")
        fields = {name: np.array(arrays[name]) for name in names}
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise InputError(
            f"{path}: expected a gate of {MADE_BY}, found another file ({error}); "
            "run the script again"
        ) from None
    if description["heads"] != artifacts.sha256(Path(model_dir) / multi_objective.HEADS):
        raise InputError(
            f"{path}: the attribute heads in this folder are not those that the gate was trained "
            f"on; run {MADE_BY} again"
        )
    check_prompts(data, gate.layers[0].in_features)
    fields |= {"gate": gate, "single": description["single"]}
    return GatedModel(model, description["attributes"], **fields)


def _gate_of(arrays, dropout, temperature):
    """The Gate whose parameters are the arrays "gate.*", in evaluation mode."""
    state = {
        name.removeprefix("gate."): torch.tensor(value)
        for name, value in arrays.items()
        if "gate." in name
    }
    state["log_scale"] = state["log_scale"].reshape(())
    n_layers = sum("weight" in name for name in state)
    layers = [state[f"layers.{i}.weight"] for i in range(n_layers)]
    hidden = [len(layer) for layer in layers[:-1]]
    gate = Gate(layers[0].shape[1], state["frozen"], hidden, dropout, temperature)
    gate.load_state_dict(state)
    return gate.eval()


def check_prompts(data: Rated | None, input_dim: int | None = None) -> None:
    """InputError unless `data` has prompt embeddings, of `input_dim` dimensions where given.

    None as `data` passes.
    """
    if data is None:
        return
    if data.prompt_embeddings is None:
        raise InputError(
            f"{data.path}: no prompt_embeddings, which the gate reads; prepare the file again"
        )
    n_dims = data.prompt_embeddings[0].shape[1]
    if input_dim is not None and n_dims != input_dim:
        raise InputError(
            f"{data.path}: expected prompt_embeddings of {input_dim} dimensions as the gate was "
            f"trained on, found {n_dims}; embed both with one model"
        )


# -------------------------------------------------------------------------------------- explanation


def explain(
    gated: GatedModel, data: Rated, rows: np.ndarray
) -> dict[str, np.ndarray | float | None]:
    """Terms of the reward of rows of a prepared file, as means over the rows.

    weights: (A,); score, debiased, standardised, contribution: (K, A), of the K responses of a row,
    1 or 2 (chosen, rejected); reward: (K,). contribution = weight * standardised, multiplied row by
    row before the mean; the reward is its sum over attributes. share_right: share of the pairs
    whose chosen response has the higher reward, None for rated responses.
    """
    n_sides = 2 if data.is_pairs else 1
    raw = multi_objective.score_rows(gated.model, data, rows).reshape(len(rows), n_sides, -1)
    names = list(gated.model.attributes)
    columns = [names.index(name) for name in gated.attributes]
    values_NKA = standardised(gated, raw).astype(float)
    weights_NA = weights(gated, data, rows).astype(float)
    contribution_NKA = weights_NA[:, None] * values_NKA
    reward_NK = contribution_NKA.sum(-1)
    is_right = reward_NK[:, 0] > reward_NK[:, 1] if data.is_pairs else None
    return {
        "weights": weights_NA.mean(0),
        "score": raw[..., columns].mean(0),
        "debiased": debiased(gated, raw).mean(0),
        "standardised": values_NKA.mean(0),
        "contribution": contribution_NKA.mean(0),
        "reward": reward_NK.mean(0),
        "share_right": float(is_right.mean()) if data.is_pairs else None,
    }
