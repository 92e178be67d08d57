"""The files between the steps that generate (2), score (3), join (3.5) and embed (4) responses.

GEN_DIR/{prompts}_{generator}_{adapter}/
    {train,test}-part_{p}/responses.jsonl     a fifth of the prompts, responses in generation order:
                                              {"id", "query", "responses" [K]}
    {train,test}-part_{p}/prompts.json        how many prompts were read, which were dropped
    {train,test}-part_{p}/rewards_{rm}.jsonl  {"id", "rewards" [K], "texts" [K]}
    records_{rm}_{train,test}.jsonl           one line per response, sorted by prompt, then by k:
                                              {"id", "k", "query", "response", "reward", "rank",
                                              "text"}
    manifest.json, also in each part          what is finished, and from which inputs

k is the number of a response in generation order, from 0. rank is its place by reward among the
responses to its prompt; 1 is the highest reward, and equal rewards rank in generation order.
"text" (in "texts", one per response) is the digest of query + response as the text was scored.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.llm.names import label
from rewardlib.llm.prompts import cut

PARTS = 5


def adapter_folder(sft_dir: str | Path, model: str, dataset: str) -> Path:
    """Folder in which step 1 puts the adapter of `model` fine-tuned on `dataset`."""
    return Path(sft_dir) / f"{label(model)}_{label(dataset)}"


def run_folder(
    gen_dir: str | Path, eval_dataset: str, model: str, adapter_name: str, dataset: str
) -> Path:
    """Folder in which steps 2, 3 and 3.5 put one generator's responses to one set of prompts."""
    tuned = f"sft-{label(dataset)}" if adapter_name == "sft" else label(adapter_name)
    return Path(gen_dir) / f"{label(eval_dataset)}_{label(model)}_{tuned}"


def part_folder(folder: str | Path, data_class: str, part: int) -> Path:
    """Folder of part `part` (0 to 4) of the train or test prompts."""
    return Path(folder) / f"{data_class}-part_{part}"


def part_of(rows: list, part: int) -> list:
    """The rows of one part; the parts are consecutive fifths."""
    return rows[len(rows) * part // PARTS : len(rows) * (part + 1) // PARTS]


def parts_named(text: str) -> range | list[int]:
    """Part numbers that `text` names: "all", or the number of one part."""
    return range(PARTS) if text == "all" else [int(text)]


def text_digest(query: str, response: str) -> str:
    """Digest, 16 hexadecimal digits, of a prompt with its response."""
    return hashlib.sha256((query + response).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ reading


def finished(folder: str | Path, entry: str, files: list[str], producer: str) -> dict:
    """The manifest entry of finished work, after a check that its `files` are unchanged.

    Raises InputError, naming the step `producer` that writes the files, when the work is not
    finished or a file has changed.
    """
    recorded = artifacts.read_manifest(folder).get(entry)
    if recorded is None:
        raise InputError(
            f"{folder}: the finished files of {producer} are missing; run {producer} first"
        )
    for name in files:
        path = Path(folder) / name
        if not path.is_file() or artifacts.describe_file(path) != recorded["outputs"][name]:
            state = "a changed file" if path.is_file() else "no file"
            raise InputError(
                f"{path}: expected the file as {producer} wrote it, found {state}; "
                f"run {producer} again"
            )
    return recorded


def read_jsonl(path: Path, keys: tuple[str, ...]) -> Iterator[dict]:
    """Yield the objects of a JSONL file; InputError at the first that lacks one of the `keys`."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            yield _parse_object(path, number, line, keys)


def _parse_object(path, number, line, keys):
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not all(key in row for key in keys):
        raise InputError(
            f"{path} line {number}: expected a JSON object with {', '.join(keys)}, "
            f"found {line[:60]!r}"
        )
    return row


def read_responses(folder: Path) -> tuple[list[dict], int, str]:
    """(rows, K, digest of the file) of a part's responses, each cut at the human's next turn.

    A row is {"id", "query", "responses" [K]}.
    """
    recorded = finished(folder, "step2", ["responses.jsonl"], "step2_gen_sample.py")
    path, k = folder / "responses.jsonl", recorded["arguments"]["n_samples"]
    rows = []
    for row in read_jsonl(path, ("id", "query", "responses")):
        if len(row["responses"]) != k:
            raise InputError(
                f"{path}: expected {k} responses to {row['id']}, found {len(row['responses'])}"
            )
        rows.append({**row, "responses": [cut(text) for text in row["responses"]]})
    return rows, k, recorded["outputs"]["responses.jsonl"]["sha256"]


def join(folder: Path, reward_model: str) -> Iterator[dict]:
    """Yield the records of a part: every response with its own reward and rank, in order.

    Raises InputError when the rewards belong to other responses, prompts or texts.
    """
    rows, k, digest = read_responses(folder)
    path = folder / f"rewards_{reward_model}.jsonl"
    recorded = finished(folder, f"step3 {reward_model}", [path.name], "step3_reward_annotation.py")
    if recorded["inputs"]["responses"] != digest:
        raise InputError(
            f"{path}: expected rewards of the present responses, found rewards of earlier ones; "
            "run step 3 again"
        )
    scored = list(read_jsonl(path, ("id", "rewards", "texts")))
    if [row["id"] for row in scored] != [row["id"] for row in rows]:
        raise InputError(
            f"{path}: expected the prompts of responses.jsonl, found others; run step 3 again"
        )
    for row, score in zip(rows, scored, strict=True):
        rewards = score["rewards"]
        texts = [text_digest(row["query"], text) for text in row["responses"]]
        _check_rewards(path, row["id"], rewards, k)
        _check_texts(path, row["id"], score["texts"], texts)
        ranks = _ranks(rewards)
        for i in range(k):
            yield {
                "id": row["id"],
                "k": i,
                "query": row["query"],
                "response": row["responses"][i],
                "reward": rewards[i],
                "rank": int(ranks[i]),
                "text": texts[i],
            }


def _check_rewards(path, prompt_id, rewards, k):
    are_finite = all(isinstance(r, (int, float)) and math.isfinite(r) for r in rewards)
    if len(rewards) != k or not are_finite:
        message = f"{path}: expected {k} finite rewards of {prompt_id}, found {rewards}"
        raise InputError(message[:300])


def _check_texts(path, prompt_id, scored_texts, texts):
    """InputError when the digests of the scored texts are not those of the present responses."""
    if scored_texts != texts:
        index = next(i for i, text in enumerate(texts) if text != scored_texts[i])
        raise InputError(
            f"{path}: expected the reward of response {index} to {prompt_id}, found that of "
            "another text; run step 3 again"
        )


def _ranks(rewards):
    """Place of each reward (K,), 1 for the highest; the stable sort ranks ties by position."""
    ranks = np.empty(len(rewards), int)
    ranks[np.argsort([-r for r in rewards], kind="stable")] = np.arange(1, len(rewards) + 1)
    return ranks


class Records:
    """The records of one split: checked once in full, then read from disk response by response.

    K: responses per prompt. ids: the N prompt ids. digest: sha256 of the file.
    `n_samples`: how many of the recorded responses to use; None: all of them.
    """

    KEYS = ("id", "k", "query", "response", "reward", "rank", "text")

    def __init__(
        self,
        folder: str | Path,
        reward_model: str,
        data_class: str,
        n_samples: int | None = None,
    ):
        self.path = Path(folder) / f"records_{reward_model}_{data_class}.jsonl"
        entry, producer = f"step3.5 {reward_model} {data_class}", "step3.5_processing_data.py"
        recorded = finished(folder, entry, [], producer)
        self.K = recorded["arguments"]["n_samples"]
        if n_samples is not None and n_samples > self.K:
            raise InputError(
                f"{self.path}: expected at least n_samples = {n_samples} responses per prompt, "
                f"found {self.K}; lower n_samples or generate more in step 2"
            )
        # the content first: its message says which record is wrong, the digest only that some is
        self.offsets, self.ids = self._check()
        finished(folder, entry, [self.path.name], producer)
        self.digest = recorded["outputs"][self.path.name]["sha256"]
        self.K = n_samples or self.K

    def _check(self):
        """Byte offsets (N, K) of the records in the file, and the N prompt ids."""
        if not self.path.is_file():
            raise InputError(
                f"{self.path} not found; run step3.5_processing_data.py, which writes it, again"
            )
        offsets, ids, offset = [], [], 0
        with open(self.path, "rb") as file:
            for index, line in enumerate(file):
                record = _parse_object(self.path, index + 1, line, self.KEYS)
                if index % self.K == 0:
                    ids.append(record["id"])
                self._check_record(index, record, ids[-1])
                offsets.append(offset)
                offset += len(line)
        if not offsets or len(offsets) % self.K or len(set(ids)) < len(ids):
            raise InputError(
                f"{self.path}: expected {self.K} records per prompt, found {len(offsets)} records "
                f"of {len(set(ids))} prompts"
            )
        return np.array(offsets).reshape(-1, self.K), ids

    def _check_record(self, index, record, prompt_id):
        """InputError unless record number `index` is the next response, with its scored text."""
        where, k = f"{self.path} line {index + 1}", index % self.K
        if record["k"] != k or record["id"] != prompt_id:
            raise InputError(
                f"{where}: expected response {k} to {prompt_id}, found response {record['k']} to "
                f"{record['id']}; run step 3.5 again"
            )
        if record["text"] != text_digest(record["query"], record["response"]):
            raise InputError(
                f"{where}: expected the text that was scored, found another response under "
                f"k {record['k']} of {record['id']}; run step 3.5 again"
            )

    def of(self, k: int) -> Iterator[dict]:
        """Yield the records of response k, one for each of the N prompts."""
        with open(self.path, "rb") as file:
            for offset in self.offsets[:, k]:
                file.seek(offset)
                yield json.loads(file.readline())
