"""The gating network of ArmoRM (arXiv 2406.12845): attribute weights from a prompt embedding."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rewardlib.nets import mlp
from rewardlib.nets.training import Training, bt_loss, train

GATE_HIDDEN = (1024, 1024, 1024)
SCALES = torch.logspace(0, 2, 41)  # candidates for the first scale: 1 to 100


class Gate(nn.Module):
    """Weights of A attributes, which sum to 1, from a prompt embedding: arXiv 2406.12845.

    ReLU layers of sizes `hidden`, each with dropout, then a softmax over the attributes (the last
    axis) of logits divided by `temperature`. frozen: (A,) fixed weight of an attribute, NaN where
    the weight is learned; learned weights share what the fixed ones leave of 1. scale: initial
    value of the learnable positive factor from reward difference to logit, kept as its logarithm.
    generator: as in MLP.
    """

    def __init__(
        self,
        input_dim: int,
        frozen: np.ndarray,
        hidden: tuple[int, ...] = GATE_HIDDEN,
        dropout: float = 0.0,
        temperature: float = 1.0,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
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
            mlp.draw_weights(self.layers, generator)

    def forward(self, prompts: torch.Tensor) -> torch.Tensor:
        """Weights (..., A) of prompt embeddings (..., input_dim)."""
        x = prompts
        for layer in self.layers[:-1]:
            x = F.dropout(F.relu(layer(x)), self.dropout, self.training)
        logits = self.layers[-1](x) / self.temperature
        learned = F.softmax(logits.masked_fill(~self.frozen.isnan(), -math.inf), dim=-1)
        return learned * (1 - self.frozen.nansum()) + self.frozen.nan_to_num()


def gated_rewards(gate: Gate, prompts: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Rewards (n, K) of K responses to each of n prompts, all K under the gate of their prompt.

    prompts: (n, input_dim); rewards: (n, K, A), one for each attribute.
    """
    return torch.einsum("na,nka->nk", gate(prompts), rewards)


def train_gate(
    prompts: np.ndarray,
    rewards: np.ndarray,
    parts: tuple[np.ndarray, np.ndarray],
    frozen: np.ndarray,
    settings: Training,
    seed: int,
    **shape,
) -> tuple[Gate, list[dict]]:
    """A Gate trained on preference pairs with the Bradley-Terry loss, and its training log.

    prompts: (n, D') float32; rewards: (n, 2, A) float32 debiased and standardised rewards,
    preferred response first; parts: (train, validation) index arrays that share no prompt; frozen
    and `shape` (hidden, dropout, temperature): as in Gate. The gate is that of the epoch with the
    lowest validation loss.
    """
    prompts, rewards = torch.from_numpy(prompts), torch.from_numpy(rewards)
    fit, held = (torch.from_numpy(part) for part in parts)
    scale = _first_scale(rewards[fit])
    generator = torch.Generator().manual_seed(seed)
    gate = Gate(prompts.shape[1], frozen, scale=scale, generator=generator, **shape)

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

    with torch.random.fork_rng(devices=[]):  # dropout draws from the global random stream
        torch.manual_seed(seed)
        log = train(gate, len(fit), loss, validate, settings, torch.Generator().manual_seed(seed))
    return gate.eval(), log


def _first_scale(rewards):
    """The one of SCALES with which uniform weights fit rewards (n, 2, A) of training pairs best.

    ArmoRM starts at 100, for rewards in [0, 1] that differ by hundredths within a pair. With
    standardised rewards, the gate would start out certain and wrong.
    """
    uniform = rewards.mean(-1)
    losses = torch.stack([bt_loss(scale * uniform, torch.ones(len(uniform))) for scale in SCALES])
    return SCALES[losses.argmin()].item()


def predict_gate(gate: Gate, prompts: np.ndarray) -> np.ndarray:
    """Weights (n, A), float32, of prompt embeddings (n, input_dim)."""
    rows = torch.from_numpy(np.ascontiguousarray(prompts, np.float32))
    with torch.inference_mode():
        return torch.cat([gate(part) for part in rows.split(mlp.SCORE_ROWS)]).numpy()
