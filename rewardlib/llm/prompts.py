"""Where prompts and fine-tuning examples come from, and the dialogue text they are written as.

hh-rlhf-{helpful,harmless}        Anthropic/hh-rlhf: DATA_DIR/NAME (a save_to_disk folder) or the hub
hh-rlhf-{helpful,harmless}-gpt4   DATA_DIR/synthetic_hhrlhf_{task}_expert_gpt4.csv: query, response (fine-tuning only)
ultrafeedback, helpsteer          DATA_DIR/NAME_{train,test}.csv: prompt (prompts only)
a .jsonl or .csv file             prompt (or query), completion (or response), id; {data_class} stands for train / test
"""

import csv
import json
import re
import sys
from collections import Counter
from pathlib import Path

from rewardlib.errors import InputError
from rewardlib.llm.loading import fetching

NEXT_TURN = "\n\nHuman"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
HH = re.compile(r"hh-rlhf-(helpful|harmless)(-gpt4)?")
CSV_PROMPTS = ("ultrafeedback", "helpsteer")
SOURCES = "hh-rlhf-helpful, hh-rlhf-harmless, ultrafeedback, helpsteer or a .jsonl / .csv file"
COLUMNS = {"prompt": ("prompt", "query"), "completion": ("completion", "response")}


# --------------------------------------------------------------------------------------------- text


def dialogue(text):
    """`text` as a dialogue that waits for an answer: "\\n\\nHuman: ...\\n\\nAssistant:"."""
    text = text.rstrip() if HUMAN in text else f"{HUMAN} {text.strip()}"
    return text if text.endswith(ASSISTANT) else text + ASSISTANT


def cut(response):
    """The response up to the next turn of the human: what is scored, embedded and kept."""
    return response.split(NEXT_TURN, 1)[0]


def messages(query, response):
    """The dialogue as chat messages; the response is one message whatever it contains."""
    turns = re.split(r"\n\n(Human|Assistant):", query.removesuffix(ASSISTANT))
    roles = {"Human": "user", "Assistant": "assistant"}
    found = [
        {"role": roles[r], "content": t.strip()}
        for r, t in zip(turns[1::2], turns[2::2], strict=True)
    ]
    return [*found, {"role": "assistant", "content": response.strip()}]


# ------------------------------------------------------------------------------------------ sources


def default_prompts(dataset):
    """The prompt source that goes with a fine-tuning data set: the same one, without -gpt4."""
    found = HH.fullmatch(dataset)
    return f"hh-rlhf-{found[1]}" if found else dataset


def read_prompts(name, data_class, data_dir):
    """[{"id", "query"}] of the prompts of `data_class` ("train" or "test"), in the order of the source."""
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
        raise InputError(f"eval_dataset {name}: expected {SOURCES}, found none of them")
    rows = read_rows(path, ["prompt"])
    ids = [str(row.get("id") or f"{path.stem}-{i}") for i, row in enumerate(rows)]
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise InputError(
            f"{path}: expected a different id in every row, found {twice!r} twice; number them anew"
        )
    return [{"id": i, "query": dialogue(row["prompt"])} for i, row in zip(ids, rows, strict=True)]


def read_examples(name, data_dir):
    """[(prompt dialogue, completion text)] to fine-tune on."""
    hh = HH.fullmatch(name)
    if hh and not hh[2]:
        pairs = [split_answer(text, name) for text in hh_chosen(name, "train", data_dir)]
    elif hh:
        rows = read_rows(
            Path(data_dir) / f"synthetic_hhrlhf_{hh[1]}_expert_gpt4.csv", ["prompt", "completion"]
        )
        pairs = [(row["prompt"], row["completion"]) for row in rows]
    elif Path(name).suffix in (".jsonl", ".csv"):
        pairs = [
            (row["prompt"], row["completion"])
            for row in read_rows(Path(name), ["prompt", "completion"])
        ]
    else:
        raise InputError(
            f"dataset {name}: expected hh-rlhf-helpful, hh-rlhf-harmless (each also with -gpt4) or a .jsonl / .csv "
            "file with prompt and completion, found none of them"
        )
    return [(dialogue(prompt), completion) for prompt, completion in pairs]


def split_answer(text, name):
    """(dialogue up to and with the last "Assistant:", the answer)."""
    head, found, answer = text.rpartition(ASSISTANT)
    if not found:
        raise InputError(
            f"{name}: expected an Assistant turn in every dialogue, found {text[:60]!r}"
        )
    return head + found, answer


def hh_chosen(name, data_class, data_dir):
    """Texts of the chosen dialogues."""
    import datasets

    folder, task = Path(data_dir) / name, HH.fullmatch(name)[1]
    if folder.is_dir():
        with fetching(str(folder), "a data set saved with save_to_disk"):
            found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.DatasetDict):
            if data_class not in found:
                raise InputError(
                    f"{folder}: expected a split named {data_class}, found {', '.join(found)}"
                )
            found = found[data_class]
    else:
        with fetching(
            "Anthropic/hh-rlhf", f"the data set on the hub, or saved with save_to_disk in {folder}"
        ):
            found = datasets.load_dataset(
                "Anthropic/hh-rlhf", data_dir=f"{task}-base", split=data_class
            )
    if "chosen" not in found.column_names:
        raise InputError(
            f"{name}: expected a column named chosen, found {', '.join(found.column_names)}"
        )
    return found["chosen"]


def read_rows(path, needed):
    """Rows of a .csv or .jsonl file as dicts of the `needed` columns under their first names, and id where present."""
    if not path.is_file():
        raise InputError(
            f"{path} not found; expected a file with the columns {' and '.join(needed)}"
        )
    rows = []
    try:
        for number, row in _numbered_rows(path):
            made = {"id": row.get("id")}
            for column in needed:
                values = [row[name] for name in COLUMNS[column] if isinstance(row.get(name), str)]
                if not values:
                    raise InputError(
                        f"{path} line {number}: expected text under {' or '.join(COLUMNS[column])}, found the columns "
                        f"{', '.join(map(str, row))}"
                    )
                made[column] = values[0]
            rows.append(made)
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected text in UTF-8, found bytes that are not") from None
    if not rows:
        raise InputError(f"{path}: expected at least one row, found none")
    return rows


def _numbered_rows(path):
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
                    f"{path} line {number}: expected one JSON object a line, found {line[:60]!r}"
                )
            yield number, row
