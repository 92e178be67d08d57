"""The gating network of ArmoRM (arXiv 2406.12845): from a prompt embedding to the weights of the attributes."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rewardlib.nets import mlp
from rewardlib.nets.training import bt_loss, train

GATE_HIDDEN = (1024, 1024, 1024)
SCALES = torch.logspace(0, 2, 41)


class Gate(nn.Module):
    """Prompt embedding -> weights of A attributes that sum to 1: the gating network of ArmoRM, arXiv 2406.12845.

    ReLU layers `hidden`, each with dropout; a softmax over the attributes (the last axis) of logits
    divided by `temperature`; a learnable positive scale from reward difference to logit, kept as
    its logarithm. frozen: (A,) the weight of an attribute that is given, NaN where it is learned;
    learned ones share what is left of 1. `generator` as in MLP.
    """

    def __init__(
        self,
        input_dim,
        frozen,
        hidden=GATE_HIDDEN,
        dropout=0.0,
        temperature=1.0,
        scale=1.0,
        generator=None,
    ):
        super().__init__()
        sizes = (input_dim, *hidden, len(frozen))
        self.layers = nn.ModuleList(
            mlp.Linear(sizes[i], sizes[i + 1]) for i in range(len(sizes) - 1)
        )
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

    prompts: (n, D') float32; rewards: (n, 2, A) float32 debiased rewards, preferred response first,
    standardised; parts: (train, validation) index arrays that share no prompt; frozen and `shape`
    (hidden, dropout, temperature) as in Gate. The scale starts where uniform weights fit the
    training pairs best, at 1 at least: ArmoRM's start of 100 is for rewards in [0, 1], of which a
    pair's differ by hundredths; on standardised ones it would be certain and wrong.
    """
    prompts, rewards = torch.from_numpy(prompts), torch.from_numpy(rewards)
    fit, held = (torch.from_numpy(part) for part in parts)
    uniform = rewards[fit].mean(-1)
    losses = torch.stack([bt_loss(scale * uniform, torch.ones(len(fit))) for scale in SCALES])
    scale = SCALES[losses.argmin()].item()
    gate = Gate(
        prompts.shape[1],
        frozen,
        scale=scale,
        generator=torch.Generator().manual_seed(seed),
        **shape,
    )

    def scores_of(part):
        return gate.log_scale.exp() * gated_rewards(gate, prompts[part], rewards[part])

    def loss(batch):
        gate.train()
        return bt_loss(scores_of(fit[batch]), torch.ones(len(batch)))

    def validate():
        gate.eval()
        scores = torch.cat([scores_of(part) for part in held.split(mlp.SCORE_ROWS)])
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
        return torch.cat([gate(part) for part in rows.split(mlp.SCORE_ROWS)]).numpy()
