"""The reward MLP: weights, computing type, scores.

Reward models on embeddings: arXiv 2411.04991, sections 3 and 4.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HIDDEN = (1024, 512)
SCORE_ROWS = 1024


class Linear(nn.Linear):
    """torch.nn.Linear whose weights are not drawn from torch's global stream, but by its owner, or loaded."""

    def reset_parameters(self):
        pass


class MLP(nn.Module):
    """input_dim -> hidden[0] -> hidden[1] -> 1 with ReLU, on raw embeddings; a plain state_dict fc1 ... fc3.

    `generator` seeds the weights, drawn as torch.nn.Linear draws them; without one they are left to
    be loaded. dtype: of the hidden layers' weights, and so the type they compute in; the last layer
    is float32.
    """

    def __init__(self, input_dim, hidden=HIDDEN, generator=None, dtype=torch.float32):
        super().__init__()
        self.fc1 = Linear(input_dim, hidden[0], dtype=dtype)
        self.fc2 = Linear(hidden[0], hidden[1], dtype=dtype)
        self.fc3 = Linear(hidden[1], 1)
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


def score_selected(model, rows, at):
    """Scores of rows[at], in parts that fit the cache; `at` indexes the first axis of rows (R, ..., D)."""
    step = max(1, SCORE_ROWS // math.prod(rows.shape[1:-1]))
    return torch.cat([model(rows.index_select(0, part)) for part in at.split(step)])


def predict(model, rows, dtype=torch.float32):
    """Scores of `rows` (m, input_dim), an array or a tensor, as a float32 array (m,), computed in `dtype`."""
    rows = (
        rows if torch.is_tensor(rows) else torch.from_numpy(np.ascontiguousarray(rows, np.float32))
    )
    with torch.inference_mode():
        model = in_type(model, dtype)
        return torch.cat([model(part) for part in rows.to(dtype).split(SCORE_ROWS)]).numpy()
