"""Reader of DATA_DIR: memory-mapped embeddings and golden rewards of K responses to each of N prompts.

EMBD-TRAIN-split_{k}.npy  (N, D) response k of every prompt   rewards_split_{k}.json       JSONL, one line a prompt
EMBD-TEST-split_{k}.npy   (N, D) the same for test prompts    rewards_test_split_{k}.json
manifest.json             what the writer promises: sizes and digests
.rewards_{split}.npz      the rewards of these very files once more, as arrays, for the next reader
"""

import contextlib
import hashlib
import json
import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from tqdm import tqdm

from rewardlib import artifacts
from rewardlib.errors import InputError

DTYPES = ("float16", "float32", "float64")
BLOCK_BYTES = 1 << 25
READ_BYTES = 1 << 22
LARGEST = np.finfo(np.float32).max  # rows are read as float32
# Data of these writers can be made again, so they may replace each other's; anything else in
# DATA_DIR is left alone.
PRODUCERS = ("convert_embeddings.py", "generate_demo_data.py")
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Responses:
    """K responses to each of N prompts.

    embeddings: K memory-mapped arrays (N, D). rewards: (N, K) float64 golden rewards. lengths: (N,
    K) characters of each response, or None where unknown. groups: (N,) integers, equal for prompts
    with the same text (all distinct where the text is unknown). digests: {file name: sha256}.
    """

    embeddings: list
    rewards: np.ndarray
    lengths: np.ndarray | None
    groups: np.ndarray
    digests: dict

    @property
    def shape(self):
        return len(self.rewards), len(self.embeddings), self.embeddings[0].shape[1]

    def read(self, prompts, responses):
        """Yield (positions (m,), rows (m, D) as stored) of (prompt, response) index arrays, file by file, in blocks.

        Rows are read in ascending order, and the pages of the file given back to the system: memory
        is one block.
        """
        prompts, responses = np.asarray(prompts), np.asarray(responses)
        order = np.lexsort((prompts, responses))
        for at in (
            np.split(order, np.flatnonzero(np.diff(responses[order])) + 1) if len(order) else []
        ):
            embedding = self.embeddings[responses[at[0]]]
            step = max(1, READ_BYTES // (embedding.itemsize * self.shape[2]))
            for start in range(0, len(at), step):
                part = at[start : start + step]
                rows = embedding[prompts[part]].astype(
                    embedding.dtype.newbyteorder("="), order="C", copy=False
                )
                if isinstance(embedding, np.memmap):
                    embedding._mmap.madvise(mmap.MADV_DONTNEED)
                yield part, rows

    def take(self, prompts, responses):
        """Rows of the given (prompt, response) index arrays, (m, D) float32."""
        rows = np.empty((len(prompts), self.shape[2]), np.float32)
        for at, part in self.read(prompts, responses):
            rows[at] = part
        return rows


def file_names(split, k):
    """Names of the embedding and the reward file of response k; split is "train" or "test"."""
    infix = "test_" if split == "test" else ""
    return f"EMBD-{split.upper()}-split_{k}.npy", f"rewards_{infix}split_{k}.json"


def find_splits(data_dir, split):
    """The numbers k for which an embedding or reward file of `split` exists, ascending."""
    infix = "test_" if split == "test" else ""
    pattern = re.compile(rf"EMBD-{split.upper()}-split_(\d+)\.npy|rewards_{infix}split_(\d+)\.json")
    matches = (pattern.fullmatch(path.name) for path in Path(data_dir).glob("*split_*"))
    return sorted({int(m[1] or m[2]) for m in matches if m})


def load(data_dir, split="train", cache_dir=None):
    """Check and open the `split` ("train" or "test") of DATA_DIR.

    Every file is checked once: dtype, shape, size against header, finite values, reward lines.
    Files that manifest.json describes (same size, not newer than it) are taken as their writer
    checked them; what was learned of the others is kept in `cache_dir`/.inspected.json. Returns
    Responses, or None where a test split is absent; raises InputError.
    """
    data_dir = Path(data_dir)
    numbers = find_splits(data_dir, split)
    if not numbers:
        if split == "test":
            return None
        found = "no such folder" if not data_dir.is_dir() else "none"
        raise InputError(
            f"{data_dir}: expected EMBD-TRAIN-split_0.npy and so on, found {found}; "
            "make them with convert_embeddings.py, generate_demo_data.py or steps 1-4 (RUN_GPU_STEPS=1)"
        )
    if (data_dir / UNFINISHED).exists():
        raise InputError(
            f"{data_dir}: its data are unfinished; run {(data_dir / UNFINISHED).read_text()} again"
        )
    names = [file_names(split, k) for k in range(numbers[-1] + 1)]
    for name in (name for pair in names for name in pair):
        if not (data_dir / name).is_file():
            raise InputError(
                f"{data_dir / name} is missing: found splits {_ranges(numbers)}, expected every one of "
                f"0-{numbers[-1]} with its embedding and its reward file; restore it or remove the later ones"
            )
    known = _Inspected(data_dir, cache_dir)
    embeddings = [open_npy(data_dir / name) for name, _ in names]
    for (name, _), array in zip(names, embeddings, strict=True):
        if array.shape != embeddings[0].shape:
            raise InputError(
                f"{data_dir / name}: expected shape {embeddings[0].shape} as in {names[0][0]}, found {array.shape}; "
                "all splits hold the same prompts"
            )
    progress = tqdm(names, desc=f"checking {split} data", leave=False, disable=None, unit="file")
    digests = {}
    for (name, reward_name), array in zip(progress, embeddings, strict=True):
        digests[name] = known.digest(
            data_dir / name, lambda path, array=array: inspect(path, array)
        )
        digests[reward_name] = known.digest(data_dir / reward_name, artifacts.sha256)
    known.save()
    reward_names = [name for _, name in names]
    return Responses(
        embeddings,
        *_rewards(data_dir, split, reward_names, len(embeddings[0]), digests),
        digests=digests,
    )


def _rewards(data_dir, split, names, n, digests):
    """Golden rewards (N, K), lengths (N, K) or None and groups (N,) of the reward files, parsed once for their digests.

    They are kept in DATA_DIR/.rewards_{split}.npz, where that folder can be written to.
    """
    path, key = (
        data_dir / f".rewards_{split}.npz",
        artifacts.hash_of([digests[name] for name in names]),
    )
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as kept:
            rewards, lengths, groups = (kept[name] for name in ("rewards", "lengths", "groups"))
            if str(kept["key"]) == key and len(rewards) == n:
                return rewards, lengths if lengths.size else None, groups
    except Exception:  # absent, or damaged, which fails in any way: it is made again
        pass
    records = [read_rewards(data_dir / name, n) for name in names]
    rewards = np.column_stack([[record["reward"] for record in part] for part in records]).astype(
        float
    )
    lengths, groups = _lengths(records), _groups(records, names, data_dir)
    with contextlib.suppress(OSError), artifacts.atomic(path) as file:
        np.savez(
            file,
            key=key,
            rewards=rewards,
            lengths=[] if lengths is None else lengths,
            groups=groups,
        )
    return rewards, lengths, groups


def load_pair(data_dir, cache_dir=None):
    """The train responses and the test responses (None where absent) of DATA_DIR, agreeing on D."""
    train = load(data_dir, "train", cache_dir)
    test = load(data_dir, "test", cache_dir)
    if test is not None and test.shape[2] != train.shape[2]:
        raise InputError(
            f"{Path(data_dir) / file_names('test', 0)[0]}: expected {train.shape[2]} dimensions as in the train files, "
            f"found {test.shape[2]}; embed both with one model"
        )
    for name, data in (("train", train), ("test", test)):
        if data is not None and data.shape[1] < 2:
            raise InputError(
                f"{data_dir}: expected at least 2 {name} responses per prompt, found 1 "
                f"({file_names(name, 0)[0]} alone); ranking within a prompt needs two"
            )
    return train, test


def open_npy(path):
    """Memory-map a (rows, columns) .npy file of floats, after checking its header against its size."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: expected a whole .npy file of numbers, found {path.stat().st_size} bytes that do not fit their "
            f"header ({reason}); the file is truncated or damaged: make it again"
        ) from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: expected an .npy file, found an archive; unpack it first")
    if array.ndim != 2 or array.dtype.name not in DTYPES or 0 in array.shape:
        raise InputError(
            f"{path}: expected (prompts, dimensions) of {' / '.join(DTYPES)}, found {array.shape} of {array.dtype.name}"
        )
    end = array.offset + array.nbytes
    if path.stat().st_size != end:
        raise InputError(
            f"{path}: expected {end} bytes by its header, found {path.stat().st_size}; make it again"
        )
    return array


def inspect(path, array):
    """sha256 of an .npy file; InputError at the first row that is not finite. One pass, in bounded memory."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(array.offset))
    step = max(1, BLOCK_BYTES // array[:1].nbytes)
    for start in range(0, len(array), step):
        block = np.ascontiguousarray(array[start : start + step])
        finite = np.abs(block) <= LARGEST
        if not finite.all():
            row, column = np.unravel_index(np.argmin(finite), finite.shape)
            bad, row = block[row, column], start + int(row)
            raise InputError(
                f"{path}: expected finite numbers, found {bad} in row {row}; embed that prompt again"
            )
        digest.update(block.data if array.flags.c_contiguous else block.tobytes())
    return digest.hexdigest() if array.flags.c_contiguous else artifacts.sha256(path)


def read_rewards(path, n):
    """The n records of a reward JSONL file, each with a finite "reward"."""
    text = path.read_bytes().removesuffix(b"\n")
    lines = text.split(b"\n") if text else []
    try:
        records = [orjson.loads(line) for line in lines]
        taken = all(
            math.isfinite(r["reward"]) and float not in (type(r.get("id")), type(r.get("query")))
            for r in records
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        taken = False
    if not taken:  # bad, or of a wider kind: the fast parser rounds integers above 64 bits, so two ids could become one
        records = [_parse(path, number, line) for number, line in enumerate(lines, 1)]
    if len(records) != n:
        raise InputError(
            f"{path}: expected {n} lines, one for each row of its embedding file, found {len(records)}; "
            "make both files from the same prompts"
        )
    return records


def _parse(path, number, line):
    """A record that the fast parser did not take: InputError unless JSON of a wider kind (other keys NaN, say)."""
    try:
        record = json.loads(line.decode())
        reward = record["reward"]
        finite = isinstance(reward, (int, float)) and math.isfinite(reward)
    except UnicodeDecodeError:
        raise InputError(
            f"{path}: expected JSONL text in UTF-8, found bytes that are not"
        ) from None
    except (ValueError, KeyError, TypeError, OverflowError):
        shown = line.decode(errors="replace")[:60]
        raise InputError(
            f'{path} line {number}: expected {{"reward": number}}, found {shown!r}; one JSON object a line'
        ) from None
    if not finite:
        raise InputError(f"{path} line {number}: expected a finite reward, found {reward!r}")
    return record


def _lengths(records):
    """(N, K) response lengths in characters from the records' "response" or "length", None unless all have one."""

    def length(record):
        text, length = record.get("response"), record.get("length")
        return (
            len(text)
            if isinstance(text, str)
            else length
            if isinstance(length, (int, float))
            else None
        )

    lengths = [[length(record) for record in part] for part in records]
    return (
        np.array(lengths, float).T if all(v is not None for part in lengths for v in part) else None
    )


def _groups(records, names, data_dir):
    """(N,) group numbers: prompts with equal "query" (or, without one, equal "id") are one group."""
    for key in ("id", "query"):
        first = [record.get(key) for record in records[0]]
        for name, part in zip(names, records, strict=True):
            for n, record in enumerate(part):
                if record.get(key) != first[n]:
                    raise InputError(
                        f"{data_dir / name} line {n + 1}: expected {key} {first[n]!r} as in {names[0]}, "
                        f"found {record.get(key)!r}; every split lists the same prompts in the same order"
                    )
    keys = [
        json.dumps(r["query"] if "query" in r else r.get("id", n)) for n, r in enumerate(records[0])
    ]
    return np.unique(keys, return_inverse=True)[1]


def _ranges(numbers):
    """[0, 1, 2, 5] as "0-2, 5"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


class _Inspected:
    """Digests of checked files: told by DATA_DIR's manifest, or remembered by size and modification time."""

    def __init__(self, data_dir, cache_dir):
        self.manifest_path = data_dir / artifacts.MANIFEST
        self.told = artifacts.read_manifest(data_dir).get("files", {})
        self.path = Path(cache_dir) / ".inspected.json" if cache_dir else None
        self.cache = {}
        if self.path and self.path.exists():
            self.cache = artifacts.read_json(self.path, "the steps")

    def digest(self, path, inspect_file):
        status = path.stat()
        told = self.told.get(path.name)
        if told:
            if told["bytes"] != status.st_size:
                self.differs(path, f"{told['bytes']} bytes", f"{status.st_size} bytes")
            if status.st_mtime_ns <= self.manifest_path.stat().st_mtime_ns:
                return told["sha256"]
        key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        if self.cache.get(key, [])[:2] != stamp:
            self.cache[key] = [*stamp, inspect_file(path)]
        digest = self.cache[key][2]
        if told and told["sha256"] != digest:
            self.differs(path, f"sha256 {told['sha256'][:12]}", digest[:12])
        return digest

    def differs(self, path, expected, found):
        raise InputError(
            f"{path}: expected {expected} as {self.manifest_path} says, found {found}; write the data again, or remove "
            "the manifest if you changed the file on purpose"
        )

    def save(self):
        if self.path:
            artifacts.write_json(self.path, self.cache)
