"""Distillation of the calibrated scores of a teacher into one MLP."""

import copy

import numpy as np
import torch
import torch.nn.functional as F

from rewardlib.nets import mlp
from rewardlib.nets.training import Training, train

FIRST_LOOK = 512  # prompts from which the first slope of the student is estimated


def train_student(
    start: mlp.MLP,
    rows: np.ndarray | torch.Tensor,
    targets: np.ndarray,
    preferences: np.ndarray,
    parts: tuple[np.ndarray, np.ndarray],
    student_loss: str,
    ranking_lambda: float,
    settings: Training,
    seed: int,
) -> tuple[mlp.MLP, list[dict]]:
    """An MLP distilled from a teacher, and its training log.

    The MLP scores raw embeddings in the unit of the targets. start: the MLP whose layers the
    student starts from; rows: (n, K, D) embeddings of K responses to each of n prompts, in the type
    to compute in; targets: (n, K) calibrated teacher scores; preferences: (n, K) the teacher's own
    scores, of standard deviation about 1; parts: (train, validation) index arrays of prompts.

    student_loss: "mse", or "hybrid", which adds ranking_lambda times a Bradley-Terry loss within
    prompts, with the teacher's probabilities sigmoid(difference of preferences) as soft labels:
    that keeps the order where the calibration is nearly flat.
    """
    rows, targets = torch.as_tensor(rows), torch.as_tensor(targets, dtype=torch.float64)
    preferences = torch.as_tensor(preferences, dtype=torch.float32)
    fit, held = (torch.from_numpy(part) for part in parts)
    # Training sees standardised targets; the last layer takes their unit back at the end.
    centre, spread = targets[fit].mean(), targets[fit].std().clamp(min=1e-12)
    standardised = ((targets - centre) / spread).float()
    n_responses = rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(start).float()
    del start  # it may be large, and is freed here where the caller does not keep it
    _fit_last_layer(model, rows, standardised, fit[:: 1 + len(fit) // FIRST_LOOK])
    working = mlp.in_type(model, rows.dtype)

    def loss(batch):
        scores = working(rows.index_select(0, fit[batch]))
        value = F.mse_loss(scores, standardised[fit[batch]])
        if student_loss == "hybrid":
            # One random shift per batch pairs every response with another one to its prompt.
            shift = int(torch.randint(1, n_responses, (), generator=generator))
            gap, preferred = (x - x.roll(shift, 1) for x in (scores, preferences[fit[batch]]))
            ranking = F.binary_cross_entropy_with_logits(gap, preferred.sigmoid())
            value = value + ranking_lambda * ranking
        return value

    def validate():
        scores = mlp.score_selected(working, rows, held)
        error = F.mse_loss(scores, standardised[held]).item()
        variance = standardised[held].var(correction=0).item()
        r2 = 1 - error / variance if variance else None
        return {"validation_loss": error, "validation_r2": r2, "quality": -error}

    log = train(model, len(fit), loss, validate, settings, generator, working)
    _rescale(model, spread.float(), centre.float())
    return model, log


def _fit_last_layer(model, rows, targets, prompts):
    """Rescale the scores of `model` by the regression of the targets on them, over `prompts`.

    targets: (n, K) standardised, so their mean counts as 0 and their standard deviation as 1. The
    slope is negative for a model that orders responses the wrong way, and 1 where the scores or the
    targets are constant.
    """
    with torch.inference_mode():
        scores = mlp.score_selected(mlp.in_type(model, rows.dtype), rows, prompts)
    correlation = torch.corrcoef(torch.stack([scores.flatten(), targets[prompts].flatten()]))[0, 1]
    slope = correlation / scores.std()
    slope = slope if torch.isfinite(slope) else torch.ones(())
    _rescale(model, slope, -slope * scores.mean())


def _rescale(model, slope, offset):
    """Change the scores of `model` to slope * score + offset."""
    with torch.no_grad():
        model.fc3.weight.mul_(slope)
        model.fc3.bias.mul_(slope).add_(offset)
