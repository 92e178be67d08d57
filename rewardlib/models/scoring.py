"""Scores of several reward models: one pass over the embeddings, one scale, out-of-bag means."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from rewardlib import seeds
from rewardlib.data.embeddings import Responses
from rewardlib.errors import InputError
from rewardlib.models import model_files
from rewardlib.nets import mlp

SCALE_ROWS = 512


# ---------------------------------------------------------------------------------------- one scale


@dataclass(frozen=True)
class ScaledEnsemble:
    """E reward models and their common scale: scaled score = (raw score - centre) / spread.

    models: a list, or model_files.Stored; centre, spread: (E,); dtype: the torch type in which the
    hidden layers compute.
    """

    models: Sequence
    centre: np.ndarray
    spread: np.ndarray
    dtype: torch.dtype = torch.float32


def scale(
    models: Sequence, train: Responses, prompts: np.ndarray, dtype: torch.dtype = torch.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (E,) of the raw scores of each model, without golden rewards.

    They are taken over the same random SCALE_ROWS responses to `prompts` for every model and in
    every call. A standard deviation of 0 is replaced by 1.
    """
    n_responses = train.shape[1]
    prompts = np.sort(prompts)
    sample = seeds.rng(0, "ensemble scale").permutation(len(prompts) * n_responses)[:SCALE_ROWS]
    numbers = prompts[sample // n_responses], sample % n_responses
    raw_EM = score_at(models, train, *numbers, dtype).astype(float)
    spread = raw_EM.std(1)
    return raw_EM.mean(1), np.where(spread > 0, spread, 1.0)


def scale_of(
    paths: Sequence[Path],
    train: Responses,
    prompts: np.ndarray,
    dtype: torch.dtype = torch.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """`scale` of the models at `paths`, with one model in memory at a time.

    InputError for a model whose scores are not finite.
    """
    stored = model_files.Stored(paths, train.shape[2])
    scales = [scale([model], train, prompts, dtype) for model in stored]
    return _finite(paths, *(np.concatenate(values) for values in zip(*scales, strict=True)))


def _finite(paths, centre, spread):
    """centre and spread (E,), where all are finite; InputError with the first path otherwise."""
    finite = np.isfinite(centre) & np.isfinite(spread)
    if not finite.all():
        path = paths[int(np.argmin(finite))]
        raise InputError(f"{path}: expected finite scores, found NaN or inf")
    return centre, spread


def load(
    paths: Sequence[Path],
    train: Responses,
    prompts: np.ndarray,
    dtype: torch.dtype = torch.float32,
) -> ScaledEnsemble:
    """The models at `paths`, with mean 0 and standard deviation 1 over responses to `prompts`.

    The scale is that of `scale`. InputError for a model whose scores are not finite.
    """
    models = _load_models(paths, train.shape[2], dtype)
    return ScaledEnsemble(models, *_finite(paths, *scale(models, train, prompts, dtype)), dtype)


def _load_models(paths, dim, dtype):
    """The models at `paths`, MLPs in their computing type: bfloat16 halves their memory."""
    return [
        mlp.in_type(model, dtype) if isinstance(model, mlp.MLP) else model
        for model in model_files.Stored(paths, dim)
    ]


def load_members(
    output_dir: str | Path, record: dict, dim: int, dtype: torch.dtype = torch.float32
) -> ScaledEnsemble:
    """The ensemble of step 5's `record`, on the scale that step 5 measured."""
    paths = [Path(output_dir) / member["file"] for member in record["members"]]
    return ScaledEnsemble(_load_models(paths, dim, dtype), *recorded_scale(record), dtype)


def recorded_scale(record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Centre and spread (E,) of the members, as step 5 measured them."""
    return np.array(record["scale"]["centre"]), np.array(record["scale"]["spread"])


def on_scale(ensemble: ScaledEnsemble, raw: np.ndarray) -> np.ndarray:
    """Scaled scores, float64, of raw member scores (E, ...)."""
    shape = (-1,) + (1,) * (raw.ndim - 1)
    return (raw.astype(float) - ensemble.centre.reshape(shape)) / ensemble.spread.reshape(shape)


# ------------------------------------------------------------------------------------------- scores


def score(ensemble: ScaledEnsemble, responses: Responses, prompts: np.ndarray) -> np.ndarray:
    """Scaled scores (E, n, K), float64, of all K responses to n prompts, in one pass."""
    return on_scale(ensemble, score_raw(ensemble.models, responses, prompts, ensemble.dtype))


def score_rows(ensemble: ScaledEnsemble, rows: np.ndarray | torch.Tensor) -> np.ndarray:
    """Scaled scores (E, m), float64, of embeddings (m, D)."""
    raw_EM = np.stack([_predict(model, rows, ensemble.dtype) for model in ensemble.models])
    return on_scale(ensemble, raw_EM)


def score_raw(
    models: Sequence, responses: Responses, prompts: np.ndarray, dtype: torch.dtype = torch.float32
) -> np.ndarray:
    """Raw scores (E, n, K), float32, of all K responses to n prompts, in one pass."""
    n, n_responses = len(prompts), responses.shape[1]
    numbers = np.tile(prompts, n_responses), np.repeat(np.arange(n_responses), n)
    raw_EM = score_at(models, responses, *numbers, dtype)
    return raw_EM.reshape(-1, n_responses, n).transpose(0, 2, 1)


def score_at(
    models: Sequence,
    responses: Responses,
    prompts: np.ndarray,
    numbers: np.ndarray,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Raw scores (E, m), float32, of m responses, each named by its prompt and response number.

    models: reward models of any kind, or weights (D,) of linear scorers. One pass over the
    embeddings, in bounded memory.
    """
    raw_EM = np.empty((len(models), len(prompts)), np.float32)
    with tqdm(
        total=len(prompts), desc="scoring", unit="response", leave=False, disable=None
    ) as bar:
        for positions, block in responses.read(prompts, numbers):
            stored = torch.from_numpy(block)
            # Rounded once for all MLPs; other models score the embeddings as they are stored.
            rounded = stored.to(dtype)
            for i, model in enumerate(models):
                rows = rounded if isinstance(model, mlp.MLP) else stored
                raw_EM[i, positions] = _predict(model, rows, dtype)
            bar.update(len(block))
    return raw_EM


def _predict(model, rows, dtype):
    """(m,) float32 scores of rows (m, D), a tensor, by a model of any kind or by weights (D,)."""
    if isinstance(model, mlp.MLP):
        return mlp.predict(model, rows, dtype)
    rows = rows.float().numpy()
    if isinstance(model, np.ndarray):
        return rows @ model.astype(np.float32)
    return model.predict(rows)[:, 0].astype(np.float32)


# ------------------------------------------------------------------------- from teacher to student


def closest_member(scores: np.ndarray) -> int:
    """Number of the member whose scores (E, n, K) correlate best with the mean of all members."""
    with np.errstate(invalid="ignore"):
        agreement = [np.corrcoef(member.ravel(), scores.mean(0).ravel())[0, 1] for member in scores]
    # A constant member has no correlation, NaN, and is never the closest.
    return int(np.argmax(np.nan_to_num(agreement, nan=-np.inf)))


def student_start(
    ensemble: ScaledEnsemble, scores: np.ndarray, hidden: Sequence[int], seed: int
) -> mlp.MLP:
    """The MLP that a student starts from: the member closest to the mean of the ensemble.

    scores: (E, n, K). Where that member is no MLP, the start is an MLP of random weights with the
    two hidden sizes `hidden`.
    """
    closest = ensemble.models[closest_member(scores)]
    if isinstance(closest, mlp.MLP):
        return closest
    return mlp.MLP(closest.n_features_in_, tuple(hidden), torch.Generator().manual_seed(seed))


def unseen_mean(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Out-of-bag ensemble mean (n, K): over the members that were not trained on a prompt.

    scores: (E, n, K) on one scale; seen: (E, n) True where the member was trained on the prompt.
    NaN for prompts that every member was trained on.

    The mean of m members of variance 1 and correlation rho has variance rho + (1 - rho) / m. So
    that all prompts have one scale, each mean is shrunk to the variance of a mean of all E members,
    with rho from _correlation. Where no member was trained on any prompt, this is the plain mean.
    """
    unseen = ~seen
    n_members, count = len(scores), unseen.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_NK = np.einsum("en,enk->nk", unseen, scores) / count[:, None]
        if not seen.any():
            return mean_NK
        rho = _correlation(scores, unseen)
        shrink_N = np.sqrt((rho + (1 - rho) / n_members) / (rho + (1 - rho) / count))
    return mean_NK * shrink_N[:, None]


def _correlation(scores, unseen):
    """Mean correlation of the scores (E, n, K) of two members, clipped to [0, 1].

    Over prompts that neither of the two was trained on or, where no two members share such prompts,
    over prompts that one of them was not trained on. 1.0 where neither can be measured.
    """
    for combine in (np.logical_and, np.logical_or):
        correlations = []
        for i in range(len(scores)):
            for j in range(i):
                prompts = combine(unseen[i], unseen[j])
                if prompts.sum() >= 2:
                    pair = scores[i][prompts].ravel(), scores[j][prompts].ravel()
                    correlations.append(np.corrcoef(*pair)[0, 1])
        if np.isfinite(correlations).any():
            return float(np.clip(np.nanmean(correlations), 0.0, 1.0))
    return 1.0
