"""The reward MLP: its weights, the type it computes in, its scores.

Reward models on embeddings: arXiv 2411.04991, sections 3 and 4.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HIDDEN = (1024, 512)
SCORE_ROWS = 1024  # rows scored at a time, so that their activations stay in the cache


class Linear(nn.Linear):
    """torch.nn.Linear whose weights are left for its owner to draw or load.

    torch would draw them from its global random stream.
    """

    def reset_parameters(self):
        pass


class MLP(nn.Module):
    """input_dim -> hidden[0] -> hidden[1] -> 1 with ReLU, on raw embeddings; layers fc1, fc2, fc3.

    generator: draws the initial weights, from the same distribution as torch.nn.Linear; None leaves
    them to be loaded. dtype: type of the weights of the hidden layers, in which these layers
    compute; the last layer is float32.
    """

    def __init__(
        self,
        input_dim: int,
        hidden: Sequence[int] = HIDDEN,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.fc1 = Linear(input_dim, hidden[0], dtype=dtype)
        self.fc2 = Linear(hidden[0], hidden[1], dtype=dtype)
        self.fc3 = Linear(hidden[1], 1)
        if generator is not None:
            draw_weights((self.fc1, self.fc2, self.fc3), generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores (...), float32, of x (..., input_dim), which has the type of the hidden layers."""
        x = F.relu(self.fc1(x), inplace=True)
        x = F.relu(self.fc2(x), inplace=True)
        return self.fc3(x.float()).squeeze(-1)


def draw_weights(layers: Iterable[nn.Linear], generator: torch.Generator) -> None:
    """Draw weights and biases as torch.nn.Linear does, uniform within 1 / sqrt(inputs)."""
    for layer in layers:
        bound = 1 / math.sqrt(layer.in_features)
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def in_type(model: MLP, dtype: torch.dtype) -> MLP:
    """An MLP whose hidden layers compute in `dtype`: `model` itself where they do, else a copy."""
    if model.fc1.weight.dtype == dtype:
        return model
    hidden = model.fc1.out_features, model.fc2.out_features
    converted = MLP(model.fc1.in_features, hidden, dtype=dtype)
    converted.load_state_dict(model.state_dict())
    return converted.train(model.training)


TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_precision(name: str) -> str:
    """ "fp32" or "bf16" as given; for "auto", "bf16" where this CPU has instructions for bfloat16.

    Those instructions are AMX and AVX-512 BF16.
    """
    if name != "auto":
        return name
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return "bf16" if has_bf16 else "fp32"


def gather(
    parts: Iterable[tuple[np.ndarray, np.ndarray]], n: int, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """Tensor (n, dim) of type `dtype`, filled part by part without a second copy of all rows.

    parts: (positions (m,), rows (m, dim)), which together cover positions 0 ... n - 1.
    """
    rows = torch.empty(n, dim, dtype=dtype)
    for positions, part in parts:
        rows[torch.from_numpy(positions)] = torch.from_numpy(part).to(dtype)
    return rows


def score_selected(model: MLP, rows: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Scores of rows[selected], in parts that fit the cache.

    rows: (R, ..., D); selected: (m,) indices into the first axis.
    """
    step = max(1, SCORE_ROWS // math.prod(rows.shape[1:-1]))
    return torch.cat([model(rows.index_select(0, part)) for part in selected.split(step)])


def predict(
    model: MLP, rows: np.ndarray | torch.Tensor, dtype: torch.dtype = torch.float32
) -> np.ndarray:
    """Scores (m,), float32, of `rows` (m, input_dim), computed in `dtype`."""
    if not torch.is_tensor(rows):
        rows = torch.from_numpy(np.ascontiguousarray(rows, np.float32))
    with torch.inference_mode():
        model = in_type(model, dtype)
        return torch.cat([model(part) for part in rows.to(dtype).split(SCORE_ROWS)]).numpy()
