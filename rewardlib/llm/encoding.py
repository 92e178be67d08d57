"""Hidden states and reward scores of texts, computed in batches of texts of similar length."""

import inspect
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from tqdm import tqdm

from rewardlib.errors import InputError

Rows = Sequence[Sequence[int]]  # the token ids of each text


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[np.ndarray]:
    """Index arrays of batches of at most `batch_tokens` tokens, padding included; longest first.

    A text of more than `batch_tokens` tokens is a batch of its own. The longest texts come first,
    so that a batch that does not fit into memory fails at once and not after hours.
    """
    order, start = np.argsort(-np.asarray(lengths), kind="stable"), 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def pad(rows: Rows, pad_id: int, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and attention mask of lists of token ids, each (batch, longest)."""
    ids = torch.full((len(rows), max(map(len, rows))), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        positions = slice(0, len(row)) if side == "right" else slice(ids.shape[1] - len(row), None)
        ids[i, positions], mask[i, positions] = torch.tensor(row), 1
    return ids, mask


def hidden_states(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states (batch, length, D) of a base model, correct for either padding side."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    parameters = inspect.signature(model.forward).parameters
    # Without explicit positions, models with absolute positions count the padding on the left.
    if "position_ids" in parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in parameters or "kwargs" in parameters:
        inputs["use_cache"] = False
    return model(**inputs).last_hidden_state


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str = "last") -> torch.Tensor:
    """Embeddings (batch, D) of hidden states (batch, length, D).

    pooling "last" takes the state of the last token that is not padding; "mean" averages, in
    float32, over all tokens that are not padding.
    """
    if pooling == "mean":
        weights = mask.unsqueeze(-1).float()
        return (hidden.float() * weights).sum(1) / weights.sum(1)
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
    return hidden[torch.arange(len(mask), device=mask.device), last]


def embed(
    model,
    rows: Rows,
    pad_id: int,
    batch_tokens: int,
    pooling: str = "last",
    side: str = "right",
    desc: str | None = None,
) -> np.ndarray:
    """Embeddings (n, D), float32, of n lists of token ids, in the order of the lists."""
    return _by_batches(
        rows,
        lambda ids, mask: pool(hidden_states(model, ids, mask), mask, pooling),
        (pad_id, side),
        batch_tokens,
        model.device,
        desc,
    )


def score(
    model,
    rows: Rows,
    pad_id: int,
    batch_tokens: int,
    side: str = "right",
    desc: str | None = None,
) -> np.ndarray:
    """Rewards (n,), float32, of n lists of token ids, in the order of the lists."""

    def call(ids, mask):
        # Decoder models find the last token by the padding id. That id may also be the end token,
        # which belongs to the text, so the score head is applied at the position the mask gives.
        if hasattr(model, "score"):
            hidden = hidden_states(model.base_model, ids, mask)
            return model.score(pool(hidden, mask).to(model.dtype))
        return model(input_ids=ids, attention_mask=mask).logits

    return _by_batches(rows, call, (pad_id, side), batch_tokens, model.device, desc)[:, 0]


def _by_batches(
    rows: Rows,
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    padding: tuple[int, str],
    batch_tokens: int,
    device: torch.device,
    desc: str | None,
) -> np.ndarray:
    """call(ids, mask) (batch, D) of every batch, as one float32 array (n, D) in the rows' order."""
    lengths = [len(row) for row in rows]
    outputs_ND = None
    with tqdm(
        total=sum(lengths), desc=desc, unit="token", unit_scale=True, disable=None if desc else True
    ) as bar:
        for batch in batches(lengths, batch_tokens):
            ids, mask = pad([rows[i] for i in batch], *padding)
            with torch.inference_mode():
                outputs_BD = call(ids.to(device), mask.to(device)).float().cpu().numpy()
            if outputs_ND is None:
                outputs_ND = np.empty((len(rows), outputs_BD.shape[1]), np.float32)
            outputs_ND[batch] = outputs_BD
            bar.update(sum(lengths[i] for i in batch))
    return outputs_ND


def refuse_long(rows: Rows, max_length: int, model, source: object) -> None:
    """Raise InputError when a text has more than `max_length` tokens or positions of the model.

    A truncated text would be another text than the one that was generated and scored. `source`
    names the texts in the message.
    """
    limit = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    too_long = [len(row) for row in rows if len(row) > limit]
    if too_long:
        raise InputError(
            f"{source}: expected at most {limit} tokens per text, found {len(too_long)} longer "
            f"texts, of up to {max(too_long)} tokens; raise max_length if the model takes more, "
            "or generate with a lower max_prompt_tokens or max_len"
        )
