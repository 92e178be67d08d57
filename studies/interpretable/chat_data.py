"""Data sets of conversations: rated responses, or pairs of responses to one prompt.

A row is {"messages"} with columns of numbers (rated), or {"chosen", "rejected"} (pairs). Messages
are lists of {"role", "content"} that end with a message of the assistant. Where "messages",
"chosen" or "rejected" is a text, or the last message alone, {"prompt"} holds what precedes it: a
text or a list of messages. {"prompt", "response"} is another form of {"messages"}. "id" and
"subset" are optional. Rows come from a .jsonl file, a folder that datasets' save_to_disk wrote, or
a data set on the hub.
"""

import hashlib
import json
import math
from collections.abc import Sequence
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
    """n conversations, or n pairs of conversations with the same prompt.

    rows: all rows of the source, read on demand; row_numbers: (n,) selected rows; kind:
    "rated" or "pairs"; ids: n strings; groups: (n,) int64 prompt numbers; labels: (n, A) float32
    with NaN where missing, or None; attributes: A names; subsets: n names, or None; digest: sha256
    of all that was read.
    """

    rows: Sequence[dict]
    row_numbers: np.ndarray
    kind: str
    ids: list[str]
    groups: np.ndarray
    labels: np.ndarray | None
    attributes: list[str]
    subsets: list[str] | None
    digest: str

    def conversation(self, i: int) -> tuple[list[dict], list[dict]]:
        """(messages of the prompt, last message of each response) of the i-th selected row.

        There is one response to rated rows, and two, chosen and rejected, to pairs.
        """
        return split_row(self.rows[int(self.row_numbers[i])], self.kind, self.ids[i])

    def take(self, positions: np.ndarray) -> "Chats":
        """The selected rows at these positions alone."""
        return replace(
            self,
            row_numbers=self.row_numbers[positions],
            ids=[self.ids[i] for i in positions],
            groups=self.groups[positions],
            labels=None if self.labels is None else self.labels[positions],
            subsets=None if self.subsets is None else [self.subsets[i] for i in positions],
        )


def read(
    name: str, split: str = "train", kind: str = "auto", attributes: list[str] | None = None
) -> Chats:
    """Check every row of the data set `name` and return it as Chats.

    kind: "rated", "pairs", or "auto": told by the columns. attributes: names of the label columns;
    None: every column of numbers of rated rows, no column of pairs (labels of pairs are P(chosen is
    preferred)). InputError names the row.
    """
    rows = open_rows(name, split)
    if not len(rows):
        raise InputError(f"{name}: no rows")
    kind = find_kind(rows[0], name) if kind == "auto" else kind
    digest, prompts, entries, columns, other_columns = hashlib.sha256(), [], [], {}, set()
    for i in range(len(rows)):
        row = rows[i]
        prompt, responses = split_row(row, kind, f"{name} row {i}")
        prompts.append(json.dumps(prompt))
        # Of each row only ids, subsets and numbers are kept: texts are read again when embedded.
        entries.append({k: v for k, v in row.items() if k in ("id", "subset") or is_number(v)})
        columns |= dict.fromkeys(key for key in row if key not in NO_LABELS)
        other_columns |= {k for k, v in row.items() if v is not None and not is_number(v)}
        digest.update(json.dumps([prompt, responses]).encode())
    if attributes is None:
        attributes = [key for key in columns if key not in other_columns] if kind == "rated" else []
    check_columns(name, rows, attributes, columns, other_columns)
    ids, subsets = read_ids(entries), read_subsets(entries, name)
    labels = np.array([[row.get(key, np.nan) for key in attributes] for row in entries], np.float32)
    digest.update(json.dumps([ids, subsets, attributes]).encode() + labels.tobytes())
    return Chats(
        rows=rows,
        row_numbers=np.arange(len(rows)),
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
    """Rows of a .jsonl file, parsed on demand: memory holds the text of the file and no more."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise InputError(f"{path} not found; expected a .jsonl file of conversations")
        self.path = path
        try:
            text = path.read_text(encoding="utf-8-sig").removesuffix("\n")
        except UnicodeDecodeError:
            raise InputError(f"{path}: expected text in UTF-8, found other bytes") from None
        self.lines = text.split("\n") if text else []

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> dict:
        try:
            row = json.loads(self.lines[i])
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(
                f"{self.path} line {i + 1}: expected one JSON object, found {self.lines[i][:60]!r}"
            )
        return row


def open_rows(name: str, split: str) -> Sequence[dict]:
    """Rows of a .jsonl file, of a folder that save_to_disk wrote, or of a data set on the hub."""
    path = Path(name)
    if path.suffix == ".jsonl":
        return JsonLines(path)
    import datasets

    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        with loading.fetching(name, "a data set saved with save_to_disk"):
            dataset = datasets.load_from_disk(name)
        if not isinstance(dataset, datasets.DatasetDict):
            return dataset
        if split not in dataset:
            raise InputError(
                f"{name}: expected a split named {split}, found {', '.join(dataset)}; "
                "give --dataset_split"
            )
        return dataset[split]
    with loading.fetching(name, "a .jsonl file, a folder of save_to_disk or a data set on the hub"):
        return datasets.load_dataset(name, split=split)


def find_kind(row: dict, name: str) -> str:
    """ "rated" or "pairs", told by the columns of a row."""
    has_columns = {
        "pairs": "chosen" in row and "rejected" in row,
        "rated": "messages" in row or "response" in row,
    }
    if sum(has_columns.values()) != 1:
        hint = "; choose with --kind" if all(has_columns.values()) else ""
        raise InputError(
            f"{name}: expected the column messages (or prompt and response), or the columns chosen "
            f"and rejected, found {', '.join(row)}{hint}"
        )
    return max(has_columns, key=has_columns.get)


# ------------------------------------------------------------------------------------ text of a row


def split_row(row: dict, kind: str, where: str) -> tuple[list[dict], list[dict]]:
    """(messages of the prompt, last message of each response) of a row; InputError names `where`.

    There is one response to rated rows, and two, chosen and rejected, to pairs.
    """
    conversations = [conversation(row, name, where) for name in CONVERSATIONS[kind]]
    prompt = conversations[0][:-1]
    if any(turns[:-1] != prompt for turns in conversations):
        raise InputError(
            f"{where}: expected chosen and rejected to differ in the last message alone, "
            "found different prompts"
        )
    return prompt, [turns[-1] for turns in conversations]


def conversation(row: dict, name: str, where: str) -> list[dict]:
    """All messages of column `name`, preceded by "prompt" where the column holds only the last."""
    if name == "messages" and row.get(name) is None:
        name = "response"
    content = row.get(name)
    if isinstance(content, str):
        content = [{"role": "assistant", "content": content}]
    turns = messages(content, name, where)
    if len(turns) == 1 and turns[0]["role"] == "assistant":
        prompt = row.get("prompt")
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = messages(prompt, "prompt", where) + turns
    if turns[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: expected the assistant's message last in {name}, "
            f"found a message of {turns[-1]['role']}"
        )
    return turns


def messages(content: object, name: str, where: str) -> list[dict]:
    """Roles and contents of a list of messages; InputError where `content` is no such list."""
    try:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in content]
    except (TypeError, KeyError):
        turns = []
    if not turns or not all(isinstance(text, str) for turn in turns for text in turn.values()):
        raise InputError(
            f'{where}: expected {name} as text or as a list of {{"role", "content"}} texts, '
            f"found {str(content)[:60]!r}"
        )
    return turns


# ------------------------------------------------------------------------------------------ columns


def is_number(value: object) -> bool:
    """Whether `value` can be a label: a number or NaN, but not infinite."""
    return isinstance(value, (int, float)) and not math.isinf(value)


def check_columns(
    name: str, rows: Sequence[dict], attributes: list[str], columns: dict, other_columns: set[str]
) -> None:
    """InputError unless each of the `attributes` is a column of numbers and nulls."""
    if absent := [key for key in attributes if key not in columns]:
        raise InputError(
            f"{name}: no columns for the attributes {', '.join(absent)}; the columns are "
            f"{', '.join(columns) or 'none'}"
        )
    for key in other_columns.intersection(attributes):
        values = (rows[i].get(key) for i in range(len(rows)))
        i, value = next(
            (i, value)
            for i, value in enumerate(values)
            if value is not None and not is_number(value)
        )
        raise InputError(
            f"{name} row {i}: {key}: expected a number or null, found {str(value)[:60]!r}"
        )


def read_ids(entries: list[dict]) -> list[str]:
    """n different strings: the ids of the rows, with row numbers where ids are absent or repeat."""
    ids = [f"row {i}" if row.get("id") is None else str(row["id"]) for i, row in enumerate(entries)]
    if len(set(ids)) == len(ids):
        return ids
    return [f"{name} (row {i})" for i, name in enumerate(ids)]


def read_subsets(entries: list[dict], name: str) -> list[str] | None:
    """n subset names, or None where no row has one."""
    subsets = [row.get("subset") for row in entries]
    if all(subset is None for subset in subsets):
        return None
    for i, subset in enumerate(subsets):
        if not isinstance(subset, str):
            raise InputError(
                f"{name} row {i}: expected the name of a subset, as in other rows, found {subset!r}"
            )
    return subsets
