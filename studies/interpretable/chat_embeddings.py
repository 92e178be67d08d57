"""Embeddings of a prompt and of its responses, from one pass through each conversation.

In a causal model the state of a token depends on no later token, so one pass gives both: the
embedding of the prompt at the last token of the template's opening of the assistant's turn, and
that of prompt and response at the last token of the conversation (ArmoRM, arXiv 2406.12845,
section 3).
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.llm import encoding, loading
from studies.interpretable import attribute_data, tensor_files
from studies.interpretable.attribute_data import Rated
from studies.interpretable.chat_data import Chats

PROMPT_POSITION = (
    "last token of the prompt with the opening of the assistant's turn, by the chat template"
)


# ---------------------------------------------------------------------------------------- positions


def encode(
    tokenizer, prompt: list[dict], responses: list[dict], where: str
) -> tuple[list[int], list[list[int]]]:
    """(token ids of the opened prompt, token ids of the conversation with each response).

    The opened prompt is the prompt with the opening of the assistant's turn. prompt: messages;
    responses: one message each. InputError that names `where` when the template refuses the
    messages, or writes the prompt differently once a response follows: no token of the conversation
    then stands for the prompt.
    """
    opened = render(tokenizer, prompt, where, add_generation_prompt=True)
    conversations = [render(tokenizer, [*prompt, response], where) for response in responses]
    if all(position(opened, ids) is not None for ids in conversations):
        return opened, conversations
    start = render(tokenizer, prompt, where, tokenize=False)
    for response in responses:
        text = render(tokenizer, [*prompt, response], where, tokenize=False)
        if not text.startswith(start):
            raise InputError(
                f"{where}: expected the chat template to write a prompt in one way, found "
                f"{start[-60:]!r} without and {text[: len(start)][-60:]!r} before a response; "
                "use a template whose text of a prompt does not depend on later messages"
            )
    return opened, conversations


def load_tokenizer(name: str, chat_template: Path | None, trust_remote_code: bool):
    """The tokenizer of model `name`, with the chat template of a Jinja file where one is given."""
    tokenizer = loading.load_tokenizer(name, trust_remote_code)
    if chat_template:
        if not chat_template.is_file():
            raise InputError(f"--chat_template: no Jinja file at {chat_template}")
        tokenizer.chat_template = chat_template.read_text()
    if not tokenizer.chat_template:
        raise InputError(f"{name}: the tokenizer has no chat template; give --chat_template")
    return tokenizer


def render(
    tokenizer,
    messages: list[dict],
    where: str,
    tokenize: bool = True,
    add_generation_prompt: bool = False,
) -> list[int] | str:
    """Token ids (or, without `tokenize`, the text) of messages by the chat template."""
    form = {"return_dict": False} if tokenize else {}
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt, **form
        )
    except Exception as error:  # a template may raise any exception
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"{where}: expected messages that the chat template takes, found {roles}: {error}"
        ) from error


def position(opened: list[int], conversation: list[int]) -> int | None:
    """Index of the last token of the opened prompt in the conversation.

    None where the conversation does not begin with the tokens of the opened prompt: the tokenizer
    may join the last characters of the opening and the first of the response in one token, and the
    opening may hold text that the template leaves out of a finished turn, such as the start of a
    thought.
    """
    return len(opened) - 1 if conversation[: len(opened)] == opened else None


# --------------------------------------------------------------------------------------- embeddings


def states_at(
    model,
    sequences: list[list[int]],
    positions: list[int],
    pad_id: int,
    batch_tokens: int,
    side: str = "right",
    desc: str | None = None,
) -> np.ndarray:
    """Hidden states (n, 2, D) float32 of n sequences of token ids.

    The first is the state of the token at positions[i], the second the state of the last token.
    side: where batches are padded, "right" or "left"; desc: title of the progress bar (None: no
    bar).
    """
    lengths, positions = [len(ids) for ids in sequences], np.asarray(positions)
    states = np.empty((len(sequences), 2, model.config.get_text_config().hidden_size), np.float32)
    bar = tqdm(
        total=sum(lengths), desc=desc, unit="token", unit_scale=True, disable=None if desc else True
    )
    with bar:
        for rows in encoding.batches(lengths, batch_tokens):
            batch = encoding.pad([sequences[i] for i in rows], pad_id, side)
            ids, mask = (tensor.to(model.device) for tensor in batch)
            with torch.inference_mode():
                hidden = encoding.hidden_states(model, ids, mask)
                # The first token of a row stands behind the padding where the left is padded.
                columns = mask.argmax(1) + torch.as_tensor(positions[rows], device=mask.device)
                early = hidden[torch.arange(len(rows), device=mask.device), columns]
                both = torch.stack([early, encoding.pool(hidden, mask)], 1)
                states[rows] = both.float().cpu().numpy()
            bar.update(sum(lengths[i] for i in rows))
    return states


@dataclass
class _Passes:
    """Token sequences that a model has to read for a set of conversations.

    sequences: lists of token ids; positions: index of the prompt's last token in each (0 where no
    prompt is read from it); prompts: sequence from which the prompt of each row is read; responses:
    sequences of the responses of each row; rows: row numbers; left_out: ids of too long rows.
    """

    sequences: list = field(default_factory=list)
    positions: list = field(default_factory=list)
    prompts: list = field(default_factory=list)
    responses: list = field(default_factory=list)
    rows: list = field(default_factory=list)
    left_out: list = field(default_factory=list)

    def add(self, row, opened, conversations):
        """Add the conversations of a row, and its opened prompt where no conversation holds it."""
        first = len(self.sequences)
        self.rows.append(row)
        self.responses.append([first + side for side in range(len(conversations))])
        positions = [position(opened, ids) for ids in conversations]
        if all(index is None for index in positions):
            conversations, positions = [*conversations, opened], [*positions, len(opened) - 1]
        holder = next(side for side, index in enumerate(positions) if index is not None)
        self.prompts.append(first + holder)
        self.sequences += conversations
        self.positions += [index or 0 for index in positions]


def _plan_passes(tokenizer, chats, longest):
    """The _Passes of `chats`; rows with a sequence of more than `longest` tokens are left out."""
    passes = _Passes()
    for i, name in enumerate(chats.ids):
        opened, conversations = encode(tokenizer, *chats.conversation(i), f"row {name!r}")
        if max(map(len, (opened, *conversations))) > longest:
            passes.left_out.append(name)
        else:
            passes.add(i, opened, conversations)
    return passes


def embed(
    model,
    tokenizer,
    pad_id: int,
    chats: Chats,
    *,
    max_length: int,
    batch_tokens: int,
    storage_dtype: str,
    desc: str | None = None,
) -> tuple[Rated, int]:
    """(embedded conversations, number of prompts that took a pass of their own).

    Rows with a conversation of more than max_length tokens, or of more than the model has
    positions, are left out with their labels. A prompt that has no `position` in any of its
    conversations is embedded in a pass of its own. InputError where an embedding is not finite.
    """
    longest = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    passes = _plan_passes(tokenizer, chats, longest)
    states = states_at(model, passes.sequences, passes.positions, pad_id, batch_tokens, desc=desc)
    with np.errstate(over="ignore"):
        states = states.astype(storage_dtype)
    if not np.isfinite(states).all():
        raise InputError(
            f"{desc}: expected finite embeddings, found NaN or inf; use float32 for both dtypes"
        )
    n_rows, n_sides = len(passes.rows), 2 if chats.kind == "pairs" else 1
    responses = states[np.array(passes.responses, int).reshape(n_rows, n_sides), 1]
    chats = chats.take(np.array(passes.rows, int))
    rated = Rated(
        embeddings=[responses if n_sides == 2 else responses[:, 0]],
        prompt_embeddings=[states[np.array(passes.prompts, int), 0]],
        groups=chats.groups,
        ids=chats.ids,
        labels=chats.labels,
        attributes=chats.attributes,
        subsets=chats.subsets,
        left_out=passes.left_out,
    )
    return rated, len(passes.sequences) - n_sides * n_rows


# ------------------------------------------------------------------------------------------- shards


def shard_rows(n: int, idx: int, n_shards: int) -> np.ndarray:
    """Row numbers of shard `idx`: consecutive parts of nearly equal size."""
    return np.arange(n * idx // n_shards, n * (idx + 1) // n_shards)


@contextmanager
def shard_lock(path: Path) -> Iterator[None]:
    """Hold the lock of one shard; other processes can make other shards in the same folder."""
    with open(_lock_file(path), "a") as file:
        artifacts.take_lock(file, path)
        yield


def _lock_file(path):
    return path.with_name(f".{path.name}.lock")


def is_shard(path: Path, source: dict) -> bool:
    """Whether `path` is a finished shard of the data and settings `source`; never with FORCE=1."""
    if not path.exists() or artifacts.is_forced():
        return False
    return json.loads(tensor_files.map_tensors(path)[1].get("source", "null")) == source


def check_disk(folder: Path, chats: Chats, model, storage_dtype: str) -> None:
    """InputError where the disk has no room for the shards and the file that joins them."""
    n_vectors = len(chats.ids) * (3 if chats.kind == "pairs" else 2)
    n_dims = model.config.get_text_config().hidden_size
    needed = 2 * n_vectors * n_dims * np.dtype(storage_dtype).itemsize
    if needed > (free := shutil.disk_usage(folder).free):
        raise InputError(
            f"{folder}: expected {needed / 1e9:.1f} GB of free disk space, found "
            f"{free / 1e9:.1f} GB; free some space, or choose another --output or "
            "--storage_dtype float16"
        )


def join(output: Path, paths: list[Path], source: dict) -> None:
    """Write `output` from its shards, in the order of their numbers, and remove the shards.

    InputError where a shard is missing or where no row is left.
    """
    existing = [path for path in paths if path.exists()]
    if not existing:
        raise InputError(
            f"{paths[0]} is missing, and so are all other shards; make them with --shard_idx"
        )
    rated = attribute_data.merge(existing)
    if rated.source != source:
        raise InputError(
            f"{existing[0]}: expected a shard of these data and settings, found another shard; "
            "make the shard again"
        )
    if not rated.shape[0]:
        raise InputError(
            f"{output}: no rows: all {len(rated.left_out)} are longer than --max_length or than "
            "the model has positions; raise --max_length"
        )
    attribute_data.write(output, rated)
    for path in paths:
        path.unlink()
        _lock_file(path).unlink(missing_ok=True)
