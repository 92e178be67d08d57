"""The two embeddings of a conversation: where the assistant's last turn begins, and where it ends.

In a causal model the state of a token depends on nothing behind it, so one pass through the
conversation gives both: the embedding of the prompt at the last token of the template's opening of
the assistant's turn, and that of prompt and response at the last token of all (ArmoRM, arXiv
2406.12845, section 3).
"""

import json
import os
import shutil
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.llm import encoding, loading
from studies.interpretable import attribute_data
from studies.interpretable.attribute_data import Rated

PROMPT_POSITION = (
    "last token of the prompt with the opening of the assistant's turn, by the chat template"
)


# ---------------------------------------------------------------------------------------- positions


def encode(tokenizer, prompt, responses, where):
    """(token ids of the prompt with the opening of the assistant's turn, [ids of the conversation of each response]).

    prompt: messages; responses: one message each. InputError naming `where` when the template
    refuses the messages, or writes the prompt differently once a response follows: no token of the
    conversation then stands for the prompt.
    """
    opened = render(tokenizer, prompt, where, add_generation_prompt=True)
    whole = [render(tokenizer, [*prompt, response], where) for response in responses]
    if all(position(opened, ids) is not None for ids in whole):
        return opened, whole
    start = render(tokenizer, prompt, where, tokenize=False)
    for response in responses:
        text = render(tokenizer, [*prompt, response], where, tokenize=False)
        if not text.startswith(start):
            raise InputError(
                f"{where}: expected the chat template to write a prompt in one way, found {start[-60:]!r} without and "
                f"{text[: len(start)][-60:]!r} before a response; use a template that writes what was said so far first"
            )
    return opened, whole


def load_tokenizer(name, chat_template, trust_remote_code):
    """The tokenizer of model `name`, with the chat template of the file `chat_template` where one is given."""
    tokenizer = loading.load_tokenizer(name, trust_remote_code)
    if chat_template:
        if not chat_template.is_file():
            raise InputError(
                f"--chat_template: expected a Jinja file, found none at {chat_template}"
            )
        tokenizer.chat_template = chat_template.read_text()
    if not tokenizer.chat_template:
        raise InputError(
            f"{name}: expected a tokenizer with a chat template, found none; give --chat_template"
        )
    return tokenizer


def render(tokenizer, messages, where, tokenize=True, add_generation_prompt=False):
    form = {"return_dict": False} if tokenize else {}
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt, **form
        )
    except Exception as error:  # a template raises what it likes
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"{where}: expected messages that the chat template takes, found {roles}: {error}"
        ) from error


def position(opened, whole):
    """The number of the last token of `opened` in `whole`, None where `whole` does not begin with it.

    It does not where the first characters of a response and the last of the opening make one token,
    or where the opening holds what the template leaves out of a finished turn, as that of a
    thought.
    """
    return len(opened) - 1 if whole[: len(opened)] == opened else None


# --------------------------------------------------------------------------------------- embeddings


def states_at(model, rows, at, pad_id, batch_tokens, side="right", desc=None):
    """(n, 2, D) float32 hidden states of lists of token ids, at token at[i] and at the last one."""
    import torch

    lengths, at = [len(row) for row in rows], np.asarray(at)
    out = np.empty((len(rows), 2, model.config.get_text_config().hidden_size), np.float32)
    with tqdm(
        total=sum(lengths), desc=desc, unit="token", unit_scale=True, disable=None if desc else True
    ) as bar:
        for part in encoding.batches(lengths, batch_tokens):
            ids, mask = (
                x.to(model.device) for x in encoding.pad([rows[i] for i in part], pad_id, side)
            )
            with torch.inference_mode():
                hidden = encoding.hidden_states(model, ids, mask)
                column = mask.argmax(1) + torch.as_tensor(at[part], device=mask.device)
                early = hidden[torch.arange(len(part), device=mask.device), column]
                out[part] = (
                    torch.stack([early, encoding.pool(hidden, mask)], 1).float().cpu().numpy()
                )
            bar.update(sum(lengths[i] for i in part))
    return out


def embed(model, tokenizer, pad_id, chats, *, max_length, batch_tokens, storage_dtype, desc=None):
    """(Rated of the conversations `chats`, how many of their prompts took a pass of their own).

    Rows with a conversation of more than max_length tokens, or than the model has positions, are
    left out with their labels. A prompt that has no `position` in a conversation is embedded by
    itself.
    """
    longest = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    kept, left_out, rows, at, from_prompt, from_responses = [], [], [], [], [], []
    for i, name in enumerate(chats.ids):
        opened, whole = encode(tokenizer, *chats.conversation(i), f"row {name!r}")
        if max(map(len, (opened, *whole))) > longest:
            left_out.append(name)
            continue
        kept.append(i)
        from_responses.append([len(rows) + side for side in range(len(whole))])
        found = [position(opened, ids) for ids in whole]
        if all(one is None for one in found):
            whole, found = [*whole, opened], [*found, len(opened) - 1]
        from_prompt.append(
            len(rows) + next(side for side, one in enumerate(found) if one is not None)
        )
        rows += whole
        at += [one or 0 for one in found]
    states = states_at(model, rows, at, pad_id, batch_tokens, desc=desc)
    with np.errstate(over="ignore"):
        states = states.astype(storage_dtype)
    if not np.isfinite(states).all():
        raise InputError(
            f"{desc}: expected finite embeddings, found NaN or inf; use float32 for both dtypes"
        )
    n_sides = 2 if chats.kind == "pairs" else 1
    responses = states[np.array(from_responses, int).reshape(len(kept), n_sides), 1]
    chats = chats.take(np.array(kept, int))
    rated = Rated(
        embeddings=[responses if n_sides == 2 else responses[:, 0]],
        prompt_embeddings=[states[np.array(from_prompt, int), 0]],
        groups=chats.groups,
        ids=chats.ids,
        labels=chats.labels,
        attributes=chats.attributes,
        subsets=chats.subsets,
        left_out=left_out,
    )
    return rated, len(rows) - n_sides * len(kept)


# ------------------------------------------------------------------------------------------- shards


def shard_rows(n, idx, n_shards):
    """The numbers of the rows of shard `idx`: consecutive parts of nearly equal size."""
    return np.arange(n * idx // n_shards, n * (idx + 1) // n_shards)


@contextmanager
def shard_lock(path):
    """Hold one shard; processes for other shards of the folder go on."""
    with open(_lock_file(path), "a") as file:
        artifacts.take_lock(file, path)
        yield


def _lock_file(path):
    return path.with_name(f".{path.name}.lock")


def is_shard(path, source):
    """Whether `path` is a finished shard of the same data and settings, `source`."""
    if not path.exists() or artifacts.is_forced():
        return False
    return json.loads(attribute_data.map_tensors(path)[1].get("source", "null")) == source


def check_disk(folder, chats, model, storage_dtype):
    """InputError where the shards, and the file that is made of them, would not fit."""
    vectors = len(chats.ids) * (3 if chats.kind == "pairs" else 2)
    needed = (
        2 * vectors * model.config.get_text_config().hidden_size * np.dtype(storage_dtype).itemsize
    )
    if needed > (free := shutil.disk_usage(folder).free):
        raise InputError(
            f"{folder}: expected {needed / 1e9:.1f} GB of free disk space, found {free / 1e9:.1f} GB; free some, or "
            "choose another --output or --storage_dtype float16"
        )


def join(output, paths, source):
    """Write `output` from its shards, in the order of their numbers, and remove them; InputError if one is missing."""
    there = [path for path in paths if path.exists()]
    if not there:
        raise InputError(
            f"{paths[0]} is missing, and so are all other shards; make them with --shard_idx"
        )
    rated = attribute_data.merge(there)
    if rated.source != source:
        raise InputError(
            f"{there[0]}: expected a shard of these data and settings, found another; make it again"
        )
    if not rated.shape[0]:
        raise InputError(
            f"{output}: expected rows that are not longer than --max_length and the model's positions, found none "
            f"among {len(rated.left_out)}; raise --max_length"
        )
    attribute_data.write(output, rated)
    for path in paths:
        path.unlink()
        _lock_file(path).unlink(missing_ok=True)
