"""Distillation of a teacher's calibrated scores into one MLP."""

import copy

import torch
import torch.nn.functional as F

from rewardlib.nets import mlp
from rewardlib.nets.training import train

FIRST_LOOK = 512  # prompts that tell the student's first slope


def train_student(
    start, rows, targets, preferences, parts, student_loss, ranking_lambda, settings, seed
):
    """Distil a teacher into one MLP. Returns (MLP, log); the MLP scores raw embeddings in the unit of the targets.

    start: the MLP whose layers the student starts from; rows: (n, K, D) K responses to each of n
    prompts, an array or tensor whose type is the one to compute in; targets: (n, K) calibrated
    teacher scores; preferences: (n, K) the teacher's own scores, sd about 1; parts: (train,
    validation) prompt index arrays; student_loss: "mse", or "hybrid", which adds ranking_lambda
    times a Bradley-Terry loss within prompts with the teacher's probabilities sigmoid(difference of
    preferences) as soft labels: it keeps the order where the calibration is nearly flat. Inside,
    targets are standardised; the last layer is rescaled at either end.
    """
    rows, targets = torch.as_tensor(rows), torch.as_tensor(targets, dtype=torch.float64)
    preferences = torch.as_tensor(preferences, dtype=torch.float32)
    fit, held = (torch.from_numpy(part) for part in parts)
    centre, spread = targets[fit].mean(), targets[fit].std().clamp(min=1e-12)
    wanted = ((targets - centre) / spread).float()
    n_responses = rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(start).float()
    del start  # which may be large, and is no longer needed where the caller has no use for it

    some = fit[:: 1 + len(fit) // FIRST_LOOK]
    with torch.inference_mode():
        scores = mlp.score_selected(mlp.in_type(model, rows.dtype), rows, some)
    slope = (
        torch.corrcoef(torch.stack([scores.flatten(), wanted[some].flatten()]))[0, 1] / scores.std()
    )
    slope = slope if torch.isfinite(slope) else torch.ones(())
    _rescale(model, slope, -slope * scores.mean())
    working = mlp.in_type(model, rows.dtype)

    def loss(batch):
        scores = working(rows.index_select(0, fit[batch]))
        value = F.mse_loss(scores, wanted[fit[batch]])
        if student_loss == "hybrid":
            shift = int(torch.randint(1, n_responses, (), generator=generator))
            gap, preferred = (x - x.roll(shift, 1) for x in (scores, preferences[fit[batch]]))
            value = value + ranking_lambda * F.binary_cross_entropy_with_logits(
                gap, preferred.sigmoid()
            )
        return value

    def validate():
        error = F.mse_loss(mlp.score_selected(working, rows, held), wanted[held]).item()
        variance = wanted[held].var(correction=0).item()
        share = 1 - error / variance if variance else None
        return {"validation_loss": error, "validation_r2": share, "quality": -error}

    log = train(model, len(fit), loss, validate, settings, generator, working)
    _rescale(model, spread.float(), centre.float())
    return model, log


def _rescale(model, slope, offset):
    """Change the scores of `model` to slope * score + offset."""
    with torch.no_grad():
        model.fc3.weight.mul_(slope)
        model.fc3.bias.mul_(slope).add_(offset)
