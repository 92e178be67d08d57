"""Torch modules and their training: the reward MLP, Bradley-Terry and classification losses, one training loop.

Everything here works on tensors and arrays; files are rewardlib's business. References: Bradley-Terry and
classification reward models on embeddings, arXiv 2411.04991 (sections 3 and 4).
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.adamw import adamw

HIDDEN = (1024, 512)
SCORE_ROWS = 1024
WARMUP = 0.1
FIRST_LOOK = 512  # prompts that tell the student's first slope
UPDATE_SIZE = 1 << 18  # weights updated at a time, so that they and their state stay in the cache


class _Linear(nn.Linear):
    """torch.nn.Linear whose weights are not drawn from torch's global stream, but by its owner, or loaded."""

    def reset_parameters(self):
        pass


class MLP(nn.Module):
    """input_dim -> hidden[0] -> hidden[1] -> 1 with ReLU, on raw embeddings; a plain state_dict fc1 ... fc3.

    `generator` seeds the weights, drawn as torch.nn.Linear draws them; without one they are left to be loaded.
    dtype: of the hidden layers' weights, and so the type they compute in; the last layer is float32.
    """

    def __init__(self, input_dim, hidden=HIDDEN, generator=None, dtype=torch.float32):
        super().__init__()
        self.fc1 = _Linear(input_dim, hidden[0], dtype=dtype)
        self.fc2 = _Linear(hidden[0], hidden[1], dtype=dtype)
        self.fc3 = _Linear(hidden[1], 1)
        if generator is not None:
            for layer in (self.fc1, self.fc2, self.fc3):
                bound = 1 / math.sqrt(layer.in_features)
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def forward(self, x):
        """(..., input_dim), of the type of the hidden layers -> (...) float32 scores."""
        x = F.relu(self.fc1(x), inplace=True)
        x = F.relu(self.fc2(x), inplace=True)
        return self.fc3(x.float()).squeeze(-1)


def in_type(model, dtype):
    """An MLP whose hidden layers compute in `dtype`: `model` itself where they do, else a copy."""
    if model.fc1.weight.dtype == dtype:
        return model
    made = MLP(model.fc1.in_features, (model.fc1.out_features, model.fc2.out_features), dtype=dtype)
    made.load_state_dict(model.state_dict())
    return made.train(model.training)


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


TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_precision(name):
    """ "fp32" or "bf16" as asked for; for "auto" bf16 where this CPU has instructions for it (AMX, AVX-512 BF16)."""
    if name != "auto":
        return name
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("amx_bf16") or able.get("avx512_bf16") else "fp32"


def gather(parts, n, dim, dtype):
    """(n, dim) tensor of type `dtype` filled from parts (positions, rows as an array), no second copy of the whole."""
    rows = torch.empty(n, dim, dtype=dtype)
    for at, part in parts:
        rows[torch.from_numpy(at)] = torch.from_numpy(part).to(dtype)
    return rows


def train(model, n, loss, validate, settings, generator, working=None):
    """Minimise loss(index tensor) over shuffled passes through range(n); keep the best validated state.

    working: the copy of `model` that loss and validate compute with, where it is of another type: gradients are taken
    there, and each update of model's float32 weights is rounded into it (mixed precision, arXiv 1710.03740).

    AdamW, learning rate warmed up over the first tenth of the steps, then lowered to zero along a cosine. `validate()`
    returns the measures of an epoch; "quality" among them decides: the state with the highest one is restored at the
    end, and `patience` epochs without a higher one end the training. Where it gives none, the last state stays.
    Returns the log, one dict per epoch: epoch, learning_rate, train_loss, what else validate() gave, best.
    """
    total = settings.epochs * math.ceil(n / settings.batch_size)
    warmup = max(1, round(WARMUP * total))

    def rate_at(step):
        if step < warmup:
            return settings.learning_rate * (step + 1) / warmup
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

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
            entry = {"epoch": epoch, "learning_rate": rate, "train_loss": total_loss.item() / n, **validate()}
        if not (math.isfinite(entry["train_loss"]) and math.isfinite(entry.get("validation_loss", 0.0))):
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

    torch.optim.AdamW does the same, but its first instance loads the compiler: a second of CPU time and 70 MB.
    """
    constants = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": weight_decay}
    state = []
    for weight, copied in zip(weights, working, strict=True):
        columns = weight.detach(), torch.zeros_like(weight), torch.zeros_like(weight), copied.detach()
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


def train_ensemble(rows, pairs, labels, members, objective, settings, hidden=HIDDEN):
    """Train reward models one after another on parts of the same annotated pairs.

    rows: (R, D) embeddings, an array or tensor whose type is the one to compute in; pairs: (M, 2) row numbers; labels:
    (M,) 1.0 where side 0 was preferred; members: a list of (train, validation, seed) with index arrays into the pairs;
    objective: "bt" or "clf". Yields (MLP, log) for each member: the state of the epoch that orders the validation pairs
    best (the loss overfits long before the order does). They should share no prompt with the training pairs, and may be
    empty.
    """
    rows = torch.as_tensor(rows)
    pairs, labels = torch.from_numpy(np.asarray(pairs, np.int64)), torch.from_numpy(np.asarray(labels, np.float32))
    for fit, held, seed in members:
        generator = torch.Generator().manual_seed(seed)
        model = MLP(rows.shape[1], hidden, generator)
        parts = (pairs[fit], labels[fit]), (pairs[held], labels[held])
        yield model, _train_member(model, rows, *parts, objective, settings, generator)


def _train_member(model, rows, fit, held, objective, settings, generator):
    """Train on annotated pairs `fit` and validate on `held`, each (pairs (m, 2), labels (m,)). Returns the log."""
    objective_loss = LOSSES[objective]
    (pairs, labels), (held_pairs, held_labels) = fit, held
    held_rows, held_index = torch.unique(held_pairs, return_inverse=True)
    working = in_type(model, rows.dtype)

    def loss(batch):
        scores = working(rows.index_select(0, pairs[batch].flatten())).view(-1, 2)
        return objective_loss(scores, labels[batch])

    def validate():
        if not len(held_labels):
            return {}
        scores = _score(working, rows, held_rows)[held_index]
        right = torch.where(held_labels == 1, 1, -1) * torch.sign(scores[:, 0] - scores[:, 1])
        accuracy = 0.5 + 0.5 * right.mean().item()
        return {
            "validation_loss": objective_loss(scores, held_labels).item(),
            "validation_accuracy": accuracy,
            "quality": accuracy,
        }

    return train(model, len(labels), loss, validate, settings, generator, working)


def train_student(start, rows, targets, preferences, parts, student_loss, ranking_lambda, settings, seed):
    """Distil a teacher into one MLP. Returns (MLP, log); the MLP scores raw embeddings in the unit of the targets.

    start: the MLP whose layers the student starts from; rows: (n, K, D) K responses to each of n prompts, an array or
    tensor whose type is the one to compute in; targets: (n, K) calibrated teacher scores; preferences: (n, K) the
    teacher's own scores, sd about 1; parts: (train, validation) prompt index arrays; student_loss: "mse", or "hybrid",
    which adds ranking_lambda times a Bradley-Terry loss within prompts with the teacher's probabilities
    sigmoid(difference of preferences) as soft labels: it keeps the order where the calibration is nearly flat. Inside,
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
        scores = _score(in_type(model, rows.dtype), rows, some)
    slope = torch.corrcoef(torch.stack([scores.flatten(), wanted[some].flatten()]))[0, 1] / scores.std()
    slope = slope if torch.isfinite(slope) else torch.ones(())
    _rescale(model, slope, -slope * scores.mean())
    working = in_type(model, rows.dtype)

    def loss(batch):
        scores = working(rows.index_select(0, fit[batch]))
        value = F.mse_loss(scores, wanted[fit[batch]])
        if student_loss == "hybrid":
            shift = int(torch.randint(1, n_responses, (), generator=generator))
            gap, preferred = (x - x.roll(shift, 1) for x in (scores, preferences[fit[batch]]))
            value = value + ranking_lambda * F.binary_cross_entropy_with_logits(gap, preferred.sigmoid())
        return value

    def validate():
        error = F.mse_loss(_score(working, rows, held), wanted[held]).item()
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


def _score(model, rows, at):
    """Scores of rows[at], in parts that fit the cache; `at` indexes the first axis of rows (R, ..., D)."""
    step = max(1, SCORE_ROWS // math.prod(rows.shape[1:-1]))
    return torch.cat([model(rows.index_select(0, part)) for part in at.split(step)])


def predict(model, rows, dtype=torch.float32):
    """Scores of `rows` (m, input_dim), an array or a tensor, as a float32 array (m,), computed in `dtype`."""
    rows = rows if torch.is_tensor(rows) else torch.from_numpy(np.ascontiguousarray(rows, np.float32))
    with torch.inference_mode():
        model = in_type(model, dtype)
        return torch.cat([model(part) for part in rows.to(dtype).split(SCORE_ROWS)]).numpy()


def __getattr__(name):
    """BT_MLP and CLF_MLP of rewardlib/mlp_models.py: scikit-learn is loaded by those who ask for them."""
    if name in ("BT_MLP", "CLF_MLP"):
        from rewardlib import mlp_models

        return getattr(mlp_models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


GATE_HIDDEN = (1024, 1024, 1024)
SCALES = torch.logspace(0, 2, 41)


class Gate(nn.Module):
    """Prompt embedding -> weights of A attributes that sum to 1: the gating network of ArmoRM, arXiv 2406.12845.

    ReLU layers `hidden`, each with dropout; a softmax over the attributes (the last axis) of logits divided by
    `temperature`; a learnable positive scale from reward difference to logit, kept as its logarithm. frozen: (A,) the
    weight of an attribute that is given, NaN where it is learned; learned ones share what is left of 1.
    `generator` as in MLP.
    """

    def __init__(self, input_dim, frozen, hidden=GATE_HIDDEN, dropout=0.0, temperature=1.0, scale=1.0, generator=None):
        super().__init__()
        sizes = (input_dim, *hidden, len(frozen))
        self.layers = nn.ModuleList(_Linear(sizes[i], sizes[i + 1]) for i in range(len(sizes) - 1))
        self.dropout, self.temperature = dropout, temperature
        self.register_buffer("frozen", torch.as_tensor(frozen, dtype=torch.float32))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        if generator is not None:
            for layer in self.layers:
                bound = 1 / math.sqrt(layer.in_features)
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def forward(self, prompts):
        """(..., input_dim) -> (..., A) weights."""
        x = prompts
        for layer in self.layers[:-1]:
            x = F.dropout(F.relu(layer(x)), self.dropout, self.training)
        logits = self.layers[-1](x) / self.temperature
        learned = F.softmax(logits.masked_fill(~self.frozen.isnan(), -math.inf), dim=-1)
        return learned * (1 - self.frozen.nansum()) + self.frozen.nan_to_num()


def gated_rewards(gate, prompts, rewards):
    """(n, K) rewards of K responses to each of n prompts, all K under the one gate of their prompt.

    prompts: (n, input_dim); rewards: (n, K, A), one for each attribute.
    """
    return torch.einsum("na,nka->nk", gate(prompts), rewards)


def train_gate(prompts, rewards, parts, frozen, settings, seed, **shape):
    """Train a Gate on preference pairs with the Bradley-Terry loss. Returns (Gate, log); the best validated epoch.

    prompts: (n, D') float32; rewards: (n, 2, A) float32 debiased rewards, preferred response first, standardised;
    parts: (train, validation) index arrays that share no prompt; frozen and `shape` (hidden, dropout, temperature) as
    in Gate. The scale starts where uniform weights fit the training pairs best, at 1 at least: ArmoRM's start of 100 is
    for rewards in [0, 1], of which a pair's differ by hundredths; on standardised ones it would be certain and wrong.
    """
    prompts, rewards = torch.from_numpy(prompts), torch.from_numpy(rewards)
    fit, held = (torch.from_numpy(part) for part in parts)
    uniform = rewards[fit].mean(-1)
    losses = torch.stack([bt_loss(scale * uniform, torch.ones(len(fit))) for scale in SCALES])
    scale = SCALES[losses.argmin()].item()
    gate = Gate(prompts.shape[1], frozen, scale=scale, generator=torch.Generator().manual_seed(seed), **shape)

    def scores_of(part):
        return gate.log_scale.exp() * gated_rewards(gate, prompts[part], rewards[part])

    def loss(batch):
        gate.train()
        return bt_loss(scores_of(fit[batch]), torch.ones(len(batch)))

    def validate():
        gate.eval()
        scores = torch.cat([scores_of(part) for part in held.split(SCORE_ROWS)])
        accuracy = 0.5 + 0.5 * torch.sign(scores[:, 0] - scores[:, 1]).mean()
        error = bt_loss(scores, torch.ones(len(held))).item()
        return {"validation_loss": error, "validation_accuracy": accuracy.item(), "quality": -error}

    with torch.random.fork_rng(devices=[]):  # dropout draws from the global stream
        torch.manual_seed(seed)
        log = train(gate, len(fit), loss, validate, settings, torch.Generator().manual_seed(seed))
    return gate.eval(), log


def predict_gate(gate, prompts):
    """Weights (n, A) float32 of prompt embeddings (n, input_dim) as an array."""
    rows = torch.from_numpy(np.ascontiguousarray(prompts, np.float32))
    with torch.inference_mode():
        return torch.cat([gate(part) for part in rows.split(SCORE_ROWS)]).numpy()
