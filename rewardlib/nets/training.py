"""The training loop of every network, and reward models trained on pairs with it.

Bradley-Terry and classification reward models on embeddings: arXiv 2411.04991, sections 3 and 4.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.adamw import adamw

from rewardlib.nets import mlp

WARMUP = 0.1  # share of the steps in which the learning rate rises
UPDATE_SIZE = 1 << 18  # weights updated at a time, so that they and their state stay in the cache


def bt_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry loss: mean of -log P(label), where P(side 0 preferred) = sigmoid(s_0 - s_1).

    scores: (M, 2); labels: (M,) 1 where side 0 was preferred.
    """
    return F.binary_cross_entropy_with_logits(scores[:, 0] - scores[:, 1], labels)


def clf_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Classification loss: mean cross-entropy of the single responses, preferred = 1, other = 0.

    scores: (M, 2) logits; labels: (M,) 1 where side 0 was preferred.
    """
    return F.binary_cross_entropy_with_logits(scores, torch.stack([labels, 1 - labels], 1))


LOSSES = {"bt": bt_loss, "clf": clf_loss}


@dataclass(frozen=True)
class Training:
    """Settings of the training loop.

    learning_rate: peak learning rate; batch_size: examples per step; patience: epochs without a
    higher validation quality after which training stops.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    patience: int = 5
    weight_decay: float = 0.0


def default_batch_size(n: int) -> int:
    """A sixteenth of the n training pairs, between 16 and 1024.

    For n from 256 to 16,384, two passes are 32 steps.
    """
    return int(np.clip(n // 16, 16, 1024))


def train(
    model: torch.nn.Module,
    n: int,
    loss: Callable[[torch.Tensor], torch.Tensor],
    validate: Callable[[], dict],
    settings: Training,
    generator: torch.Generator,
    working: torch.nn.Module | None = None,
) -> list[dict]:
    """Train `model` in place on n examples and leave it in its best validated state.

    loss: loss of a batch, from a tensor of indices in range(n); generator: draws the order of the
    examples in every epoch. working: the copy of `model` with which loss and validate compute,
    where that copy is of another type. Gradients are taken in the copy, and each update of the
    float32 weights of `model` is rounded into the copy (mixed precision, arXiv 1710.03740).

    AdamW, with a learning rate that rises over the first tenth of the steps, then falls to zero
    along a cosine. validate() returns the metrics of an epoch. The epoch of the highest "quality"
    is the best one: its state is restored at the end, and `patience` epochs without a higher
    quality end the training. Without "quality", all epochs run and the last state stays.

    Returns the log, one dict per epoch: epoch, learning_rate, train_loss, the other metrics of
    validate(), best. FloatingPointError where the train or validation loss is not finite.
    """
    total = settings.epochs * math.ceil(n / settings.batch_size)
    warmup = max(1, round(WARMUP * total))

    def rate_at(step):
        if step < warmup:
            return settings.learning_rate * (step + 1) / warmup
        return (
            settings.learning_rate
            * 0.5
            * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        )

    weights = list((model if working is None else working).parameters())
    step_of = _adamw(list(model.parameters()), weights, settings.weight_decay)
    log, best_epoch, best_quality, best_state, step = [], 0, -math.inf, None, 0
    for epoch in range(1, settings.epochs + 1):
        total_loss = torch.zeros(())
        for batch in torch.randperm(n, generator=generator).split(settings.batch_size):
            value = loss(batch)
            rate = rate_at(step)
            step_of(torch.autograd.grad(value, weights, materialize_grads=True), rate)
            total_loss += value.detach() * len(batch)
            step += 1
        with torch.inference_mode():
            entry = {
                "epoch": epoch,
                "learning_rate": rate,
                "train_loss": total_loss.item() / n,
                **validate(),
            }
        if not (
            math.isfinite(entry["train_loss"]) and math.isfinite(entry.get("validation_loss", 0.0))
        ):
            raise FloatingPointError(
                f"diverged: validation loss {entry.get('validation_loss', math.nan):g} "
                f"(train loss {entry['train_loss']:g}); "
                f"lower the learning rate from {settings.learning_rate:g}"
            )
        quality = entry.pop("quality", epoch)
        entry["best"] = quality > best_quality
        log.append(entry)
        if entry["best"]:
            best_epoch, best_quality = epoch, quality
            if epoch < settings.epochs:
                best_state = _copied(model.state_dict(), best_state)
        elif epoch - best_epoch >= settings.patience:
            break
    if best_epoch < epoch:
        model.load_state_dict(best_state)
    return log


def _copied(state, into):
    """A copy of a state_dict, written into the tensors of an earlier copy where there is one."""
    if into is None:
        return {name: value.clone() for name, value in state.items()}
    for name, value in state.items():
        into[name].copy_(value)
    return into


def _adamw(weights, working, weight_decay):
    """Function update(gradients, learning rate): a step of AdamW on weights and `working` copies.

    Fused AdamW with torch's defaults. torch.optim.AdamW does the same, but its first instance loads
    the compiler: a second of CPU time and 70 MB.
    """
    constants = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": weight_decay}
    state = []
    for weight, copied in zip(weights, working, strict=True):
        columns = (
            weight.detach(),
            torch.zeros_like(weight),
            torch.zeros_like(weight),
            copied.detach(),
        )
        parts = zip(*(tensor.view(-1).split(UPDATE_SIZE) for tensor in columns), strict=True)
        state.append([(*part, torch.zeros(())) for part in parts])

    def update(gradients, rate):
        for parts, gradient in zip(state, gradients, strict=True):
            slopes = gradient.reshape(-1).split(UPDATE_SIZE)
            for (weight, first, second, copied, step), slope in zip(parts, slopes, strict=True):
                adamw(
                    [weight], [slope.float()], [first], [second], [], [step],
                    fused=True, amsgrad=False, maximize=False, lr=rate, **constants,
                )  # fmt: skip
                if copied.data_ptr() != weight.data_ptr():
                    copied.copy_(weight)

    return update


def train_ensemble(
    rows: np.ndarray | torch.Tensor,
    pairs: np.ndarray,
    labels: np.ndarray,
    members: Sequence[tuple[np.ndarray, np.ndarray, int]],
    objective: str,
    settings: Training,
    hidden: Sequence[int] = mlp.HIDDEN,
) -> Iterator[tuple[mlp.MLP, list[dict]]]:
    """Train reward models one after another on parts of the same annotated pairs.

    rows: (R, D) embeddings, in the type to compute in; pairs: (M, 2) row numbers; labels: (M,) 1.0
    where side 0 was preferred; members: (train, validation, seed) of each member, with index arrays
    into the pairs; objective: "bt" or "clf". Validation pairs should share no prompt with training
    pairs, and there may be none.

    Yields the MLP and the training log of each member. The MLP is that of the epoch that orders the
    validation pairs best, because the loss overfits long before the order does.
    """
    rows = torch.as_tensor(rows)
    pairs = torch.from_numpy(np.asarray(pairs, np.int64))
    labels = torch.from_numpy(np.asarray(labels, np.float32))
    for fit, held, seed in members:
        generator = torch.Generator().manual_seed(seed)
        model = mlp.MLP(rows.shape[1], hidden, generator)
        parts = (pairs[fit], labels[fit]), (pairs[held], labels[held])
        yield model, _train_member(model, rows, *parts, objective, settings, generator)


def _train_member(model, rows, fit, held, objective, settings, generator):
    """Training log of `model`, trained on annotated pairs `fit` and validated on `held`.

    fit, held: (pairs (m, 2), labels (m,)).
    """
    objective_loss = LOSSES[objective]
    (pairs, labels), (held_pairs, held_labels) = fit, held
    held_rows, held_index = torch.unique(held_pairs, return_inverse=True)
    working = mlp.in_type(model, rows.dtype)

    def loss(batch):
        scores = working(rows.index_select(0, pairs[batch].flatten())).view(-1, 2)
        return objective_loss(scores, labels[batch])

    def validate():
        if not len(held_labels):
            return {}
        scores = mlp.score_selected(working, rows, held_rows)[held_index]
        gap = scores[:, 0] - scores[:, 1]
        agreement = torch.where(held_labels == 1, 1, -1) * torch.sign(gap)
        accuracy = 0.5 + 0.5 * agreement.mean().item()
        return {
            "validation_loss": objective_loss(scores, held_labels).item(),
            "validation_accuracy": accuracy,
            "quality": accuracy,
        }

    return train(model, len(labels), loss, validate, settings, generator, working)
