"""Last-token hidden states and reward scores of texts, in batches of similar length."""

import inspect

import numpy as np
from tqdm import tqdm

from rewardlib.errors import InputError

CHUNK = 32


def batches(lengths, batch_tokens):
    """Index arrays, longest texts first, each of at most `batch_tokens` tokens with its padding."""
    order, start = np.argsort(-np.asarray(lengths), kind="stable"), 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def pad(rows, pad_id, side="right"):
    """(input ids, mask) of lists of token ids, as (batch, longest) tensors."""
    import torch

    ids = torch.full((len(rows), max(map(len, rows))), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(ids.shape[1] - len(row), None)
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return ids, mask


def hidden_states(model, ids, mask):
    """Last hidden states (batch, length, D) of a base model, right under either padding side."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    known = inspect.signature(model.forward).parameters
    if "position_ids" in known:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in known or "kwargs" in known:
        inputs["use_cache"] = False
    return model(**inputs).last_hidden_state


def pool(hidden, mask, pooling="last"):
    """(batch, D): the state of the last token that is not padding, or the mean over those that are not."""
    import torch

    if pooling == "mean":
        weights = mask.unsqueeze(-1).float()
        return (hidden.float() * weights).sum(1) / weights.sum(1)
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
    return hidden[torch.arange(len(mask), device=mask.device), last]


def embed(model, rows, pad_id, batch_tokens, pooling="last", side="right", desc=None):
    """(n, D) float32 embeddings of lists of token ids, in their order."""
    return _by_batches(
        rows,
        lambda ids, mask: pool(hidden_states(model, ids, mask), mask, pooling),
        (pad_id, side),
        batch_tokens,
        model.device,
        desc,
    )


def score(model, rows, pad_id, batch_tokens, side="right", desc=None):
    """(n,) float32 rewards of lists of token ids, in their order."""

    def call(ids, mask):
        # decoder models find the last token by the pad id, which may be the end token of the text:
        # the mask cannot err
        if hasattr(model, "score"):
            return model.score(
                pool(hidden_states(model.base_model, ids, mask), mask).to(model.dtype)
            )
        return model(input_ids=ids, attention_mask=mask).logits

    return _by_batches(rows, call, (pad_id, side), batch_tokens, model.device, desc)[:, 0]


def _by_batches(rows, call, padding, batch_tokens, device, desc):
    import torch

    lengths = [len(row) for row in rows]
    out = None
    with tqdm(
        total=sum(lengths), desc=desc, unit="token", unit_scale=True, disable=None if desc else True
    ) as bar:
        for at in batches(lengths, batch_tokens):
            ids, mask = pad([rows[i] for i in at], *padding)
            with torch.inference_mode():
                made = call(ids.to(device), mask.to(device)).float().cpu().numpy()
            if out is None:
                out = np.empty((len(rows), made.shape[1]), np.float32)
            out[at] = made
            bar.update(sum(lengths[i] for i in at))
    return out


def refuse_long(rows, max_length, model, what):
    """InputError when a text does not fit: a text cut short would not be the one that is scored and embedded."""
    limit = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    too_long = [len(row) for row in rows if len(row) > limit]
    if too_long:
        raise InputError(
            f"{what}: expected at most {limit} tokens a text, found {len(too_long)} longer, up to {max(too_long)}; "
            "raise --max_length if the model takes more, or generate with a lower --max_prompt_tokens or --max_len"
        )
