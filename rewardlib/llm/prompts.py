"""Sources of prompts and fine-tuning examples, and the dialogue format in which they are written.

hh-rlhf-{helpful,harmless}        Anthropic/hh-rlhf: DATA_DIR/NAME (from save_to_disk) or the hub
hh-rlhf-{helpful,harmless}-gpt4   DATA_DIR/synthetic_hhrlhf_{task}_expert_gpt4.csv with columns
                                  query and response; for fine-tuning only
ultrafeedback, helpsteer          DATA_DIR/NAME_{train,test}.csv with a column prompt; prompts only
a .jsonl or .csv file             columns prompt (or query), completion (or response) and id;
                                  {data_class} in the file's name stands for train or test
"""

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rewardlib.errors import InputError
from rewardlib.llm.loading import fetching

NEXT_TURN = "\n\nHuman"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
# the groups: the task, and whether GPT-4 wrote the responses
HH = re.compile(r"hh-rlhf-(helpful|harmless)(-gpt4)?")
CSV_PROMPTS = ("ultrafeedback", "helpsteer")
SOURCES = "hh-rlhf-helpful, hh-rlhf-harmless, ultrafeedback, helpsteer or a .jsonl / .csv file"
COLUMNS = {"prompt": ("prompt", "query"), "completion": ("completion", "response")}


# --------------------------------------------------------------------------------------------- text


def dialogue(text: str) -> str:
    """`text` as a dialogue that ends at the answer: "\\n\\nHuman: ...\\n\\nAssistant:"."""
    text = text.rstrip() if HUMAN in text else f"{HUMAN} {text.strip()}"
    return text if text.endswith(ASSISTANT) else text + ASSISTANT


def cut(response: str) -> str:
    """The response up to the human's next turn: the part that is scored, embedded and kept."""
    return response.split(NEXT_TURN, 1)[0]


def messages(query: str, response: str) -> list[dict[str, str]]:
    """The dialogue as chat messages {"role", "content"}; the response is always one message."""
    turns = re.split(r"\n\n(Human|Assistant):", query.removesuffix(ASSISTANT))
    roles = {"Human": "user", "Assistant": "assistant"}
    # re.split yields the text before the first turn, then speaker, text, speaker, text, ...
    history = [
        {"role": roles[speaker], "content": text.strip()}
        for speaker, text in zip(turns[1::2], turns[2::2], strict=True)
    ]
    return [*history, {"role": "assistant", "content": response.strip()}]


# ------------------------------------------------------------------------------------------ sources


def default_prompts(dataset: str) -> str:
    """The prompt source that belongs to a fine-tuning data set: its own name, without -gpt4."""
    hh = HH.fullmatch(dataset)
    return f"hh-rlhf-{hh[1]}" if hh else dataset


def read_prompts(name: str, data_class: str, data_dir: str | Path) -> list[dict[str, str]]:
    """Prompts [{"id", "query"}] of `data_class` ("train" or "test"), in the source's order.

    Raises InputError when the source is unknown, unreadable or empty, or repeats an id.
    """
    hh = HH.fullmatch(name)
    if hh and not hh[2]:
        texts = [split_answer(text, name)[0] for text in hh_chosen(name, data_class, data_dir)]
        return [
            {"id": f"{name}-{data_class}-{i}", "query": dialogue(text)}
            for i, text in enumerate(texts)
        ]
    if name in CSV_PROMPTS:
        path = Path(data_dir) / f"{name}_{data_class}.csv"
    elif Path(name).suffix in (".jsonl", ".csv"):
        path = Path(name.replace("{data_class}", data_class))
    else:
        raise InputError(f"eval_dataset {name}: unknown source; expected {SOURCES}")
    rows = read_rows(path, ["prompt"])
    ids = [str(row.get("id") or f"{path.stem}-{i}") for i, row in enumerate(rows)]
    if len(set(ids)) < len(ids):
        repeated = Counter(ids).most_common(1)[0][0]
        raise InputError(
            f"{path}: expected a different id in every row, found {repeated!r} more than once; "
            "give every row an id of its own"
        )
    return [{"id": i, "query": dialogue(row["prompt"])} for i, row in zip(ids, rows, strict=True)]


def read_examples(name: str, data_dir: str | Path) -> list[tuple[str, str]]:
    """Fine-tuning examples [(prompt dialogue, completion)].

    Raises InputError when the source is unknown, unreadable or empty.
    """
    hh = HH.fullmatch(name)
    if hh and not hh[2]:
        pairs = [split_answer(text, name) for text in hh_chosen(name, "train", data_dir)]
    elif hh:
        path = Path(data_dir) / f"synthetic_hhrlhf_{hh[1]}_expert_gpt4.csv"
        pairs = _read_pairs(path)
    elif Path(name).suffix in (".jsonl", ".csv"):
        pairs = _read_pairs(Path(name))
    else:
        raise InputError(
            f"dataset {name}: expected hh-rlhf-helpful, hh-rlhf-harmless (each also with -gpt4) "
            "or a .jsonl / .csv file with prompt and completion"
        )
    return [(dialogue(prompt), completion) for prompt, completion in pairs]


def _read_pairs(path):
    rows = read_rows(path, ["prompt", "completion"])
    return [(row["prompt"], row["completion"]) for row in rows]


def split_answer(text: str, name: str) -> tuple[str, str]:
    """The dialogue up to and including the last "Assistant:", and the answer after it.

    `name` names the source in the InputError that a dialogue without an Assistant turn raises.
    """
    head, turn, answer = text.rpartition(ASSISTANT)
    if not turn:
        raise InputError(
            f"{name}: expected an Assistant turn in every dialogue, found {text[:60]!r}"
        )
    return head + turn, answer


def hh_chosen(name: str, data_class: str, data_dir: str | Path) -> Sequence[str]:
    """Texts of the chosen dialogues of hh-rlhf, from a folder in `data_dir` or from the hub."""
    import datasets

    folder, task = Path(data_dir) / name, HH.fullmatch(name)[1]
    if folder.is_dir():
        with fetching(str(folder), "a data set saved with save_to_disk"):
            table = datasets.load_from_disk(str(folder))
        if isinstance(table, datasets.DatasetDict):
            if data_class not in table:
                raise InputError(
                    f"{folder}: expected a split named {data_class}, found {', '.join(table)}"
                )
            table = table[data_class]
    else:
        with fetching(
            "Anthropic/hh-rlhf", f"the data set on the hub, or saved with save_to_disk in {folder}"
        ):
            table = datasets.load_dataset(
                "Anthropic/hh-rlhf", data_dir=f"{task}-base", split=data_class
            )
    if "chosen" not in table.column_names:
        raise InputError(
            f"{name}: expected a column named chosen, found {', '.join(table.column_names)}"
        )
    return table["chosen"]


def read_rows(path: Path, needed: list[str]) -> list[dict]:
    """Rows of a .csv or .jsonl file, each {"id", *needed}.

    A `needed` column may have any of its names in COLUMNS, and is returned under the first. "id"
    is None where the file has no such column. Raises InputError, naming file and line, when the
    file is absent or empty, is not UTF-8, or lacks the text of a needed column.
    """
    if not path.is_file():
        raise InputError(
            f"{path} not found; expected a file with the columns {' and '.join(needed)}"
        )
    rows = []
    try:
        for number, row in _numbered_rows(path):
            texts = {"id": row.get("id")}
            for column in needed:
                values = [row[name] for name in COLUMNS[column] if isinstance(row.get(name), str)]
                if not values:
                    raise InputError(
                        f"{path} line {number}: expected text under "
                        f"{' or '.join(COLUMNS[column])}, found the columns "
                        f"{', '.join(map(str, row))}"
                    )
                texts[column] = values[0]
            rows.append(texts)
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected text in UTF-8, found other bytes") from None
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def _numbered_rows(path):
    """Yield (line number, row as a dict); a row of a .csv file counts as one line."""
    with open(path, encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
        if path.suffix == ".csv":
            csv.field_size_limit(sys.maxsize)
            yield from enumerate(csv.DictReader(file), 2)
            return
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise InputError(
                    f"{path} line {number}: expected one JSON object per line, found {line[:60]!r}"
                )
            yield number, row
