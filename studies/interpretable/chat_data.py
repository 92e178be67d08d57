"""Data sets of chat conversations: rated responses, or pairs of responses to one prompt.

A row is {"messages"} beside columns of numbers (rated), or {"chosen", "rejected"} (pairs); messages are lists of
{"role", "content"} that end with the assistant's. A text, or the assistant's message alone, continues {"prompt"}, which
is a text or a list of messages; {"prompt", "response"} stands for {"messages"}. "id" and "subset" are optional.
Rows come from a .jsonl file, a folder of datasets' save_to_disk, or a data set on the hub.
"""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rewardlib.errors import InputError
from rewardlib.llm import loading
from studies.interpretable import attribute_data

CONVERSATIONS = {"rated": ("messages",), "pairs": ("chosen", "rejected")}
NO_LABELS = ("messages", "prompt", "response", "chosen", "rejected", "id", "subset")


@dataclass(frozen=True)
class Chats:
    """n conversations, or n pairs of conversations that share their prompt.

    rows: all rows of the source, read when asked for; at: (n,) numbers of those that are meant;
    kind: "rated" or "pairs"; ids: n strings; groups: (n,) int64 by prompt; labels: (n, A) float32
    with NaN where missing, or None; attributes: A names; subsets: n names or None; digest: sha256
    of all that was read.
    """

    rows: object
    at: np.ndarray
    kind: str
    ids: list
    groups: np.ndarray
    labels: np.ndarray | None
    attributes: list
    subsets: list | None
    digest: str

    def conversation(self, i):
        """(prompt messages, [the response], of pairs [chosen, rejected]) of row i, each response one message."""
        return split_row(self.rows[int(self.at[i])], self.kind, self.ids[i])

    def take(self, at):
        """The rows `at` (an index array) alone."""
        return replace(
            self,
            at=self.at[at],
            ids=[self.ids[i] for i in at],
            groups=self.groups[at],
            labels=None if self.labels is None else self.labels[at],
            subsets=None if self.subsets is None else [self.subsets[i] for i in at],
        )


def read(name, split="train", kind="auto", attributes=None):
    """Check every row of the data set `name` and return Chats.

    kind: "rated", "pairs" or "auto", by the columns. attributes: names of the label columns; None:
    of rated rows every column of numbers, of pairs none (labels of pairs are P(chosen is
    preferred)). InputError names the row.
    """
    rows = open_rows(name, split)
    if not len(rows):
        raise InputError(f"{name}: expected at least one row, found none")
    kind = find_kind(rows[0], name) if kind == "auto" else kind
    digest, prompts, told, columns, other = hashlib.sha256(), [], [], {}, set()
    for i in range(len(rows)):
        row = rows[i]
        prompt, responses = split_row(row, kind, f"{name} row {i}")
        prompts.append(json.dumps(prompt))
        told.append(
            {
                key: value
                for key, value in row.items()
                if key in ("id", "subset") or is_number(value)
            }
        )
        columns |= dict.fromkeys(key for key in row if key not in NO_LABELS)
        other |= {key for key, value in row.items() if value is not None and not is_number(value)}
        digest.update(json.dumps([prompt, responses]).encode())
    if attributes is None:
        attributes = [key for key in columns if key not in other] if kind == "rated" else []
    check_columns(name, rows, attributes, columns, other)
    ids, subsets = read_ids(told), read_subsets(told, name)
    labels = np.array([[row.get(key, np.nan) for key in attributes] for row in told], np.float32)
    digest.update(json.dumps([ids, subsets, attributes]).encode() + labels.tobytes())
    return Chats(
        rows=rows,
        at=np.arange(len(rows)),
        kind=kind,
        ids=ids,
        groups=attribute_data.groups_of(prompts),
        labels=labels if attributes else None,
        attributes=list(attributes),
        subsets=subsets,
        digest=digest.hexdigest(),
    )


# --------------------------------------------------------------------------------------------- rows


class JsonLines:
    """Rows of a .jsonl file, parsed when asked for: memory holds the text of the file and no more."""

    def __init__(self, path):
        if not path.is_file():
            raise InputError(f"{path} not found; expected a .jsonl file of conversations")
        self.path = path
        try:
            text = path.read_text(encoding="utf-8-sig").removesuffix("\n")
        except UnicodeDecodeError:
            raise InputError(f"{path}: expected text in UTF-8, found bytes that are not") from None
        self.lines = text.split("\n") if text else []

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, i):
        try:
            row = json.loads(self.lines[i])
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(
                f"{self.path} line {i + 1}: expected one JSON object, found {self.lines[i][:60]!r}"
            )
        return row


def open_rows(name, split):
    """The rows of a .jsonl file, of a folder that datasets' save_to_disk wrote, or of a data set on the hub."""
    path = Path(name)
    if path.suffix == ".jsonl":
        return JsonLines(path)
    import datasets

    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        with loading.fetching(name, "a data set saved with save_to_disk"):
            found = datasets.load_from_disk(name)
        if not isinstance(found, datasets.DatasetDict):
            return found
        if split not in found:
            raise InputError(
                f"{name}: expected a split named {split}, found {', '.join(found)}; give --dataset_split"
            )
        return found[split]
    with loading.fetching(name, "a .jsonl file, a folder of save_to_disk or a data set on the hub"):
        return datasets.load_dataset(name, split=split)


def find_kind(row, name):
    """ "rated" or "pairs", by the columns of a row."""
    holds = {
        "pairs": "chosen" in row and "rejected" in row,
        "rated": "messages" in row or "response" in row,
    }
    if sum(holds.values()) != 1:
        raise InputError(
            f"{name}: expected the column messages (or prompt and response), or chosen and rejected, found "
            f"{', '.join(row)}" + ("; choose with --kind" if all(holds.values()) else "")
        )
    return max(holds, key=holds.get)


# ----------------------------------------------------------------------------------- one row's text


def split_row(row, kind, where):
    """(prompt messages, [the response], of pairs [chosen, rejected]) of a row; InputError naming `where`."""
    whole = [conversation(row, name, where) for name in CONVERSATIONS[kind]]
    prompt = whole[0][:-1]
    if any(one[:-1] != prompt for one in whole):
        raise InputError(
            f"{where}: expected chosen and rejected to differ in the last message alone, found another"
        )
    return prompt, [one[-1] for one in whole]


def conversation(row, name, where):
    """The messages under `name`, after those of "prompt" where `name` holds the assistant's last one alone."""
    if name == "messages" and row.get(name) is None:
        name = "response"
    found = row.get(name)
    found = messages(
        [{"role": "assistant", "content": found}] if isinstance(found, str) else found, name, where
    )
    if len(found) == 1 and found[0]["role"] == "assistant":
        prompt = row.get("prompt")
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        found = messages(prompt, "prompt", where) + found
    if found[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: expected the assistant's message last in {name}, found one of {found[-1]['role']}"
        )
    return found


def messages(found, name, where):
    """The roles and contents of a list of messages."""
    try:
        made = [{"role": one["role"], "content": one["content"]} for one in found]
    except (TypeError, KeyError):
        made = []
    if not made or not all(isinstance(text, str) for one in made for text in one.values()):
        raise InputError(
            f'{where}: expected {name} as text or as a list of {{"role", "content"}} texts, found {str(found)[:60]!r}'
        )
    return made


# ------------------------------------------------------------------------------------------ columns


def is_number(value):
    return isinstance(value, (int, float)) and not math.isinf(value)


def check_columns(name, rows, attributes, columns, other):
    """InputError unless each of the `attributes` is a column of numbers and nulls."""
    if absent := [key for key in attributes if key not in columns]:
        raise InputError(
            f"{name}: expected a column for each attribute, found none for {', '.join(absent)}; the columns are "
            f"{', '.join(columns) or 'none'}"
        )
    for key in other.intersection(attributes):
        i = next(
            i
            for i in range(len(rows))
            if rows[i].get(key) is not None and not is_number(rows[i][key])
        )
        raise InputError(
            f"{name} row {i}: {key}: expected a number or null, found {str(rows[i][key])[:60]!r}"
        )


def read_ids(told):
    """n different strings: the ids of the rows, followed by the row's number where there are none or they repeat."""
    ids = [f"row {i}" if row.get("id") is None else str(row["id"]) for i, row in enumerate(told)]
    return ids if len(set(ids)) == len(ids) else [f"{one} (row {i})" for i, one in enumerate(ids)]


def read_subsets(told, name):
    """n subset names, or None where no row has one."""
    subsets = [row.get("subset") for row in told]
    if all(subset is None for subset in subsets):
        return None
    for i, subset in enumerate(subsets):
        if not isinstance(subset, str):
            raise InputError(
                f"{name} row {i}: expected the name of a subset, as in other rows, found {subset!r}"
            )
    return subsets
