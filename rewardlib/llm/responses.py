"""The files between the steps that generate (2), score (3), join (3.5) and embed (4) responses.

GEN_DIR/{prompts}_{generator}_{adapter}/
    {train,test}-part_{p}/responses.jsonl     {"id", "query", "responses" [K]}: a fifth of the prompts, generation order
    {train,test}-part_{p}/prompts.json        how many prompts there were, which were dropped
    {train,test}-part_{p}/rewards_{rm}.jsonl  {"id", "rewards" [K], "texts" [K] digests of what was scored}
    records_{rm}_{train,test}.jsonl           {"id", "k", "query", "response", "reward", "rank", "text"}, in that order
    manifest.json, and one in each part       what is finished, and from what

k is the number of a response in generation order, from 0; rank is its place by reward within the
prompt, 1 the highest (equal rewards in generation order). "text" is the digest of query + response
as it was scored.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.llm.loading import NAMES
from rewardlib.llm.prompts import cut

PARTS = 5


def label(name):
    """A short file-name form of a model, data set or path; paths get a digest, as folders of one name may differ."""
    if name in NAMES:
        return {"llama3-8b": "llama38b"}.get(name, name)
    path = Path(name)
    plain = re.sub(r"[^\w.+-]+", "-", path.stem if path.suffix in (".jsonl", ".csv") else path.name)
    if path.exists() or path.suffix in (".jsonl", ".csv"):
        return f"{plain}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:6]}"
    return re.sub(r"[^\w.+-]+", "-", name)


def adapter_folder(sft_dir, model, dataset):
    """Where step 1 puts the fine-tuned adapter of `model` on `dataset`."""
    return Path(sft_dir) / f"{label(model)}_{label(dataset)}"


def run_folder(gen_dir, eval_dataset, model, adapter_name, dataset):
    """Where steps 2, 3 and 3.5 put the responses of one generator to one set of prompts."""
    tuned = f"sft-{label(dataset)}" if adapter_name == "sft" else label(adapter_name)
    return Path(gen_dir) / f"{label(eval_dataset)}_{label(model)}_{tuned}"


def part_folder(folder, data_class, part):
    return Path(folder) / f"{data_class}-part_{part}"


def part_of(rows, part):
    """The rows of one part: consecutive fifths."""
    return rows[len(rows) * part // PARTS : len(rows) * (part + 1) // PARTS]


def parts_named(text):
    """[0..4] of "all", or the one part named."""
    return range(PARTS) if text == "all" else [int(text)]


def text_digest(query, response):
    return hashlib.sha256((query + response).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ reading


def finished(folder, entry, files, made_by):
    """The manifest entry of finished work, after checking that `files` are as they were written."""
    told = artifacts.read_manifest(folder).get(entry)
    if told is None:
        raise InputError(
            f"{folder}: expected the finished files of {made_by}, found none; run that first"
        )
    for name in files:
        path = Path(folder) / name
        if not path.is_file() or artifacts.describe_file(path) != told["outputs"][name]:
            found = "it changed" if path.is_file() else "nothing"
            raise InputError(
                f"{path}: expected the file as {made_by} wrote it, found {found}; run {made_by} again"
            )
    return told


def read_jsonl(path, keys):
    """Yield the objects of a JSONL file; each must have the `keys`."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                assert all(key in row for key in keys)
            except (ValueError, AssertionError, TypeError):
                raise InputError(
                    f"{path} line {number}: expected JSON with {keys}, found {line[:60]!r}"
                ) from None
            yield row


def read_responses(folder):
    """(rows, K, digest) of a part's responses: {"id", "query", "responses"}, the responses cut at the next turn."""
    told = finished(folder, "step2", ["responses.jsonl"], "step2_gen_sample.py")
    path, k = folder / "responses.jsonl", told["arguments"]["n_samples"]
    rows = []
    for row in read_jsonl(path, ("id", "query", "responses")):
        if len(row["responses"]) != k:
            raise InputError(
                f"{path}: expected {k} responses to {row['id']}, found {len(row['responses'])}"
            )
        rows.append({**row, "responses": [cut(text) for text in row["responses"]]})
    return rows, k, told["outputs"]["responses.jsonl"]["sha256"]


def join(folder, reward_model):
    """Yield the records of a part: responses with their own rewards. InputError where they do not belong together."""
    rows, k, digest = read_responses(folder)
    name = f"rewards_{reward_model}.jsonl"
    told = finished(folder, f"step3 {reward_model}", [name], "step3_reward_annotation.py")
    if told["inputs"]["responses"] != digest:
        raise InputError(
            f"{folder / name}: expected rewards of the present responses, found older; run step 3 again"
        )
    scored = list(read_jsonl(folder / name, ("id", "rewards", "texts")))
    if [row["id"] for row in scored] != [row["id"] for row in rows]:
        raise InputError(
            f"{folder / name}: expected the prompts of responses.jsonl, found others; run step 3 again"
        )
    for row, score in zip(rows, scored, strict=True):
        rewards, texts = (
            score["rewards"],
            [text_digest(row["query"], text) for text in row["responses"]],
        )
        if len(rewards) != k or not all(
            isinstance(r, (int, float)) and math.isfinite(r) for r in rewards
        ):
            raise InputError(
                f"{folder / name}: expected {k} finite rewards of {row['id']}, found {rewards}"[
                    :300
                ]
            )
        if texts != score["texts"]:
            at = next(i for i, text in enumerate(texts) if text != score["texts"][i])
            raise InputError(
                f"{folder / name}: expected the reward of response {at} to {row['id']}, found that of another text; "
                "run step 3 again"
            )
        ranks = np.empty(k, int)
        ranks[np.argsort([-r for r in rewards], kind="stable")] = np.arange(1, k + 1)
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


class Records:
    """The records of one split, checked once and then read response by response from disk."""

    KEYS = ("id", "k", "query", "response", "reward", "rank", "text")

    def __init__(self, folder, reward_model, data_class, n_samples=None):
        self.path = Path(folder) / f"records_{reward_model}_{data_class}.jsonl"
        made_by = "step3.5_processing_data.py"
        told = finished(folder, f"step3.5 {reward_model} {data_class}", [], made_by)
        self.K = told["arguments"]["n_samples"]
        if n_samples is not None and n_samples > self.K:
            raise InputError(
                f"{self.path}: expected at least the n_samples {n_samples} asked for, found {self.K} responses; "
                "lower --n_samples or generate more in step 2"
            )
        self.offsets, self.ids = self._check()
        finished(folder, f"step3.5 {reward_model} {data_class}", [self.path.name], made_by)
        self.digest = told["outputs"][self.path.name]["sha256"]
        self.K = n_samples or self.K

    def _check(self):
        """Offsets (N, K) of the records in the file, and the N ids."""
        if not self.path.is_file():
            raise InputError(
                f"{self.path} not found; it is written by step3.5_processing_data.py: run that again"
            )
        offsets, ids, at = [], [], 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                try:
                    record = json.loads(line)
                    whole = all(key in record for key in self.KEYS)
                except ValueError:
                    whole = False
                if not whole:
                    raise InputError(
                        f"{self.path} line {number + 1}: expected a record, found {line[:60]!r}"
                    )
                if number % self.K == 0:
                    ids.append(record["id"])
                if record["k"] != number % self.K or record["id"] != ids[-1]:
                    raise InputError(
                        f"{self.path} line {number + 1}: expected response {number % self.K} to {ids[-1]}, found "
                        f"response {record['k']} to {record['id']}; run step 3.5 again"
                    )
                if record["text"] != text_digest(record["query"], record["response"]):
                    raise InputError(
                        f"{self.path} line {number + 1}: expected the text that was scored, found another response "
                        f"under k {record['k']} of {record['id']}; run step 3.5 again"
                    )
                offsets.append(at)
                at += len(line)
        if not offsets or len(offsets) % self.K or len(set(ids)) < len(ids):
            raise InputError(
                f"{self.path}: expected {self.K} records of each prompt, found {len(offsets)} in all"
            )
        return np.array(offsets).reshape(-1, self.K), ids

    def of(self, k):
        """The N records of response k."""
        with open(self.path, "rb") as file:
            for offset in self.offsets[:, k]:
                file.seek(offset)
                yield json.loads(file.readline())
