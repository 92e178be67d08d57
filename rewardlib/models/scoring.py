"""Scores of many reward models in one pass over the embeddings, on one scale; out-of-bag means."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from rewardlib import seeds
from rewardlib.errors import InputError
from rewardlib.models import model_files
from rewardlib.nets import mlp

SCALE_ROWS = 512


@dataclass(frozen=True)
class ScaledEnsemble:
    """E reward models on one scale: member score = (raw - centre) / spread.

    models: a list, or Stored; centre, spread: (E,); dtype: the torch type that hidden layers
    compute in.
    """

    models: Sequence
    centre: np.ndarray
    spread: np.ndarray
    dtype: torch.dtype = torch.float32


def scale(models, train, prompts, dtype=torch.float32):
    """Mean and sd (E,) of each model's scores over a fixed sample of the responses of `prompts`; no labels."""
    n_responses = train.shape[1]
    prompts = np.sort(prompts)
    sample = seeds.rng(0, "ensemble scale").permutation(len(prompts) * n_responses)[:SCALE_ROWS]
    raw = score_at(
        models, train, prompts[sample // n_responses], sample % n_responses, dtype
    ).astype(float)
    spread = raw.std(1)
    return raw.mean(1), np.where(spread > 0, spread, 1.0)


def scale_of(paths, train, prompts, dtype=torch.float32):
    """`scale` of the models at `paths`, one in memory at a time; InputError for one whose scores are not finite."""
    found = [
        scale([model], train, prompts, dtype) for model in model_files.Stored(paths, train.shape[2])
    ]
    return _finite(paths, *(np.concatenate(part) for part in zip(*found, strict=True)))


def _finite(paths, centre, spread):
    finite = np.isfinite(centre) & np.isfinite(spread)
    if not finite.all():
        raise InputError(
            f"{paths[int(np.argmin(finite))]}: expected finite scores, found NaN or inf"
        )
    return centre, spread


def load(paths, train, prompts, dtype=torch.float32):
    """The models at `paths` on one scale: mean 0, sd 1 over a fixed sample of the responses of `prompts`."""
    models = _loaded(paths, train.shape[2], dtype)
    return ScaledEnsemble(models, *_finite(paths, *scale(models, train, prompts, dtype)), dtype)


def _loaded(paths, dim, dtype):
    """The models at `paths`, MLPs in the type they compute in: in bfloat16 they take half the memory."""
    return [
        mlp.in_type(m, dtype) if isinstance(m, mlp.MLP) else m
        for m in model_files.Stored(paths, dim)
    ]


def load_members(output_dir, record, dim, dtype=torch.float32):
    """The ensemble of step 5's `record`, on the scale that step 5 measured."""
    paths = [Path(output_dir) / member["file"] for member in record["members"]]
    return ScaledEnsemble(_loaded(paths, dim, dtype), *recorded_scale(record), dtype)


def recorded_scale(record):
    """Centre and spread (E,) of the members, as step 5 measured them."""
    return np.array(record["scale"]["centre"]), np.array(record["scale"]["spread"])


def on_scale(ensemble, raw):
    """Raw scores (E, ...) of the members on their one scale, float64."""
    shape = (-1,) + (1,) * (raw.ndim - 1)
    return (raw.astype(float) - ensemble.centre.reshape(shape)) / ensemble.spread.reshape(shape)


def score(ensemble, responses, prompts):
    """Scores of every member on one scale, (E, n, K) float64, for n prompts in one pass over the embeddings."""
    return on_scale(ensemble, score_raw(ensemble.models, responses, prompts, ensemble.dtype))


def score_rows(ensemble, rows):
    """Scores of every member on one scale, (E, m) float64, for embeddings (m, D)."""
    return on_scale(
        ensemble, np.stack([_predict(model, rows, ensemble.dtype) for model in ensemble.models])
    )


def _predict(model, rows, dtype):
    """(m,) float32 scores of rows (m, D), a tensor, by a model of any kind or by weights (D,)."""
    if isinstance(model, mlp.MLP):
        return mlp.predict(model, rows, dtype)
    rows = rows.float().numpy()
    if isinstance(model, np.ndarray):
        return rows @ model.astype(np.float32)
    return model.predict(rows)[:, 0].astype(np.float32)


def closest_member(scores):
    """Number of the member whose scores (E, n, K) agree best with the mean of all."""
    with np.errstate(invalid="ignore"):
        agreement = [np.corrcoef(member.ravel(), scores.mean(0).ravel())[0, 1] for member in scores]
    return int(np.argmax(np.nan_to_num(agreement, nan=-np.inf)))


def student_start(ensemble, scores, hidden, seed):
    """The MLP that a student starts from: the member closest to the ensemble's mean, a random one if it is no MLP."""
    closest = ensemble.models[closest_member(scores)]
    if isinstance(closest, mlp.MLP):
        return closest
    return mlp.MLP(closest.n_features_in_, tuple(hidden), torch.Generator().manual_seed(seed))


def score_raw(models, responses, prompts, dtype=torch.float32):
    """Raw scores (E, n, K) float32 of several models in one pass over all K responses of n prompts."""
    n, n_responses = len(prompts), responses.shape[1]
    every = np.tile(prompts, n_responses), np.repeat(np.arange(n_responses), n)
    return score_at(models, responses, *every, dtype).reshape(-1, n_responses, n).transpose(0, 2, 1)


def score_at(models, responses, prompts, numbers, dtype=torch.float32):
    """Raw scores (E, m) float32 of several models for m responses, named by prompt and response number.

    A model may also be the weights (D,) of a linear scorer. One pass over the embeddings, in
    bounded memory.
    """
    scores = np.empty((len(models), len(prompts)), np.float32)
    with tqdm(
        total=len(prompts), desc="scoring", unit="response", leave=False, disable=None
    ) as bar:
        for at, rows in responses.read(prompts, numbers):
            whole = torch.from_numpy(rows)
            rounded = whole.to(dtype)
            for i, model in enumerate(models):
                scores[i, at] = _predict(
                    model, rounded if isinstance(model, mlp.MLP) else whole, dtype
                )
            bar.update(len(rows))
    return scores


def unseen_mean(scores, seen):
    """Ensemble mean over the members that never trained on a prompt, on the scale of the mean over all members.

    scores: (E, n, K) on one scale; seen: (E, n) True where the member trained on the prompt. A mean
    of m members with correlation rho has variance rho + (1 - rho) / m, so it is shrunk to the
    variance of a mean of all E. rho is measured where two members are both unseen (or, if there is
    no such place, where one of them is). Returns (n, K), NaN for prompts that every member trained
    on. Where no member trained on a prompt this is the plain mean.
    """
    unseen = ~seen
    n_members, count = len(scores), unseen.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.einsum("en,enk->nk", unseen, scores) / count[:, None]
        if not seen.any():
            return mean
        rho = _correlation(scores, unseen)
        shrink = np.sqrt((rho + (1 - rho) / n_members) / (rho + (1 - rho) / count))
    return mean * shrink[:, None]


def _correlation(scores, unseen):
    """Mean correlation between two members' scores on prompts unseen by both, else by either; 1.0 for one member."""
    for both in (np.logical_and, np.logical_or):
        found = []
        for i in range(len(scores)):
            for j in range(i):
                at = both(unseen[i], unseen[j])
                if at.sum() >= 2:
                    found.append(np.corrcoef(scores[i][at].ravel(), scores[j][at].ravel())[0, 1])
        if np.isfinite(found).any():
            return float(np.clip(np.nanmean(found), 0.0, 1.0))
    return 1.0
