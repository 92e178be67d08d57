"""The one training loop, and reward models trained with it: Bradley-Terry and classification losses on pairs.

Bradley-Terry and classification reward models on embeddings: arXiv 2411.04991, sections 3 and 4.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.adamw import adamw

from rewardlib.nets import mlp

WARMUP = 0.1
UPDATE_SIZE = 1 << 18  # weights updated at a time, so that they and their state stay in the cache


def bt_loss(scores, labels):
    """Bradley-Terry: mean of -log P(label), P(side 0 preferred) = sigmoid(s_0 - s_1). scores (M, 2), labels (M,)."""
    return F.binary_cross_entropy_with_logits(scores[:, 0] - scores[:, 1], labels)


def clf_loss(scores, labels):
    """Classification: each response on its own, preferred = 1, other = 0, the logit is the score. scores (M, 2)."""
    return F.binary_cross_entropy_with_logits(scores, torch.stack([labels, 1 - labels], 1))


LOSSES = {"bt": bt_loss, "clf": clf_loss}


@dataclass(frozen=True)
class Training:
    """Settings of the training loop. patience: epochs without a better validation value before it stops."""

    epochs: int
    learning_rate: float
    batch_size: int
    patience: int = 5
    weight_decay: float = 0.0


def default_batch_size(n):
    """A sixteenth of the n training pairs, between 16 and 1024: 32 steps in two passes for n of 256 to 16,384."""
    return int(np.clip(n // 16, 16, 1024))


def train(model, n, loss, validate, settings, generator, working=None):
    """Minimise loss(index tensor) over shuffled passes through range(n); keep the best validated state.

    working: the copy of `model` that loss and validate compute with, where it is of another type:
    gradients are taken there, and each update of model's float32 weights is rounded into it (mixed
    precision, arXiv 1710.03740).

    AdamW, learning rate warmed up over the first tenth of the steps, then lowered to zero along a
    cosine. `validate()` returns the measures of an epoch; "quality" among them decides: the state
    with the highest one is restored at the end, and `patience` epochs without a higher one end the
    training. Where it gives none, the last state stays. Returns the log, one dict per epoch: epoch,
    learning_rate, train_loss, what else validate() gave, best.
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
    """A copy of a state_dict, in the tensors of an earlier copy where there is one."""
    if into is None:
        return {name: value.clone() for name, value in state.items()}
    for name, value in state.items():
        into[name].copy_(value)
    return into


def _adamw(weights, working, weight_decay):
    """update(gradients, learning rate) of fused AdamW with torch's defaults, and of the `working` copies of weights.

    torch.optim.AdamW does the same, but its first instance loads the compiler: a second of CPU time
    and 70 MB.
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


def train_ensemble(rows, pairs, labels, members, objective, settings, hidden=mlp.HIDDEN):
    """Train reward models one after another on parts of the same annotated pairs.

    rows: (R, D) embeddings, an array or tensor whose type is the one to compute in; pairs: (M, 2)
    row numbers; labels: (M,) 1.0 where side 0 was preferred; members: a list of (train, validation,
    seed) with index arrays into the pairs; objective: "bt" or "clf". Yields (MLP, log) for each
    member: the state of the epoch that orders the validation pairs best (the loss overfits long
    before the order does). They should share no prompt with the training pairs, and may be empty.
    """
    rows = torch.as_tensor(rows)
    pairs, labels = (
        torch.from_numpy(np.asarray(pairs, np.int64)),
        torch.from_numpy(np.asarray(labels, np.float32)),
    )
    for fit, held, seed in members:
        generator = torch.Generator().manual_seed(seed)
        model = mlp.MLP(rows.shape[1], hidden, generator)
        parts = (pairs[fit], labels[fit]), (pairs[held], labels[held])
        yield model, _train_member(model, rows, *parts, objective, settings, generator)


def _train_member(model, rows, fit, held, objective, settings, generator):
    """Train on annotated pairs `fit` and validate on `held`, each (pairs (m, 2), labels (m,)). Returns the log."""
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
        right = torch.where(held_labels == 1, 1, -1) * torch.sign(scores[:, 0] - scores[:, 1])
        accuracy = 0.5 + 0.5 * right.mean().item()
        return {
            "validation_loss": objective_loss(scores, held_labels).item(),
            "validation_accuracy": accuracy,
            "quality": accuracy,
        }

    return train(model, len(labels), loss, validate, settings, generator, working)
