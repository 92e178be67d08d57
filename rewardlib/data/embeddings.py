"""Reader of DATA_DIR: memory-mapped embeddings and golden rewards of N prompts, K responses each.

EMBD-TRAIN-split_{k}.npy    (N, D) response k of every prompt
EMBD-TEST-split_{k}.npy     (N, D) the same for test prompts
rewards_split_{k}.json      JSONL, line n is the golden reward of response k to prompt n
rewards_test_split_{k}.json the same for test prompts
manifest.json               sizes and digests as the writer of the files recorded them
.rewards_{split}.npz        cache: the rewards of these files as arrays, for the next reader
"""

import contextlib
import hashlib
import json
import math
import mmap
import re
from collections.abc import Callable, Iterator
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
# These programs can make their data again, so each may replace the data of the other. All other
# files in DATA_DIR are left alone.
PRODUCERS = ("convert_embeddings.py", "generate_demo_data.py")
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Responses:
    """K responses to each of N prompts.

    embeddings: K memory-mapped arrays (N, D). rewards: (N, K) float64 golden rewards. lengths:
    (N, K) characters of each response, or None where unknown. groups: (N,) integers, equal for
    prompts with the same text (all distinct where the text is unknown). digests: {file name:
    sha256}.
    """

    embeddings: list[np.ndarray]
    rewards: np.ndarray
    lengths: np.ndarray | None
    groups: np.ndarray
    digests: dict[str, str]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, K, D)."""
        return len(self.rewards), len(self.embeddings), self.embeddings[0].shape[1]

    def read(
        self, prompts: np.ndarray, responses: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield blocks of embeddings: (positions (b,), rows (b, D) in the dtype of the file).

        prompts, responses: (m,) indices of the rows to read. `positions` point into these two
        arrays. Each file is read in ascending order of its rows, and its pages go back to the
        operating system after every block, so that memory holds one block.
        """
        prompts, responses = np.asarray(prompts), np.asarray(responses)
        order = np.lexsort((prompts, responses))
        file_starts = np.flatnonzero(np.diff(responses[order])) + 1
        for in_file in np.split(order, file_starts) if len(order) else []:
            embedding = self.embeddings[responses[in_file[0]]]
            native = embedding.dtype.newbyteorder("=")
            step = max(1, READ_BYTES // (embedding.itemsize * self.shape[2]))
            for start in range(0, len(in_file), step):
                positions = in_file[start : start + step]
                rows = embedding[prompts[positions]].astype(native, order="C", copy=False)
                if isinstance(embedding, np.memmap):
                    # mapped pages count as memory of this process until they are given back
                    embedding._mmap.madvise(mmap.MADV_DONTNEED)
                yield positions, rows

    def take(self, prompts: np.ndarray, responses: np.ndarray) -> np.ndarray:
        """Embeddings (m, D) float32 of the responses at the indices prompts, responses (m,)."""
        rows = np.empty((len(prompts), self.shape[2]), np.float32)
        for positions, block in self.read(prompts, responses):
            rows[positions] = block
        return rows


def file_names(split: str, k: int) -> tuple[str, str]:
    """Names of the embedding file and the reward file of response k; split: "train" or "test"."""
    infix = "test_" if split == "test" else ""
    return f"EMBD-{split.upper()}-split_{k}.npy", f"rewards_{infix}split_{k}.json"


def find_splits(data_dir: Path | str, split: str) -> list[int]:
    """The numbers k for which `split` has an embedding file or a reward file, ascending."""
    infix = "test_" if split == "test" else ""
    pattern = re.compile(rf"EMBD-{split.upper()}-split_(\d+)\.npy|rewards_{infix}split_(\d+)\.json")
    matches = (pattern.fullmatch(path.name) for path in Path(data_dir).glob("*split_*"))
    return sorted({int(m[1] or m[2]) for m in matches if m})


def load(
    data_dir: Path | str, split: str = "train", cache_dir: Path | str | None = None
) -> Responses | None:
    """The checked responses of one split ("train" or "test") of DATA_DIR, memory-mapped.

    Returns None where DATA_DIR has no test split. Every file is checked once: dtype, shape, size
    against header, finite values, reward lines. A file that manifest.json lists with its present
    size, and that is not newer than the manifest, counts as checked by its writer. The digests of
    all other files are remembered in `cache_dir`/.inspected.json. Raises InputError.
    """
    data_dir = Path(data_dir)
    numbers = find_splits(data_dir, split)
    if not numbers and split == "test":
        return None
    names = _expected_names(data_dir, split, numbers)
    inspected = _Inspected(data_dir, cache_dir)
    embeddings = [open_npy(data_dir / name) for name, _ in names]
    for (name, _), array in zip(names, embeddings, strict=True):
        if array.shape != embeddings[0].shape:
            raise InputError(
                f"{data_dir / name}: expected shape {embeddings[0].shape} as in {names[0][0]}, "
                f"found {array.shape}; all splits hold the same prompts"
            )
    progress = tqdm(names, desc=f"checking {split} data", leave=False, disable=None, unit="file")
    digests = {}
    for (name, reward_name), array in zip(progress, embeddings, strict=True):
        digests[name] = inspected.digest(
            data_dir / name, lambda path, array=array: inspect(path, array)
        )
        digests[reward_name] = inspected.digest(data_dir / reward_name, artifacts.sha256)
    inspected.save()
    reward_names = [name for _, name in names]
    rewards, lengths, groups = _rewards(data_dir, split, reward_names, len(embeddings[0]), digests)
    return Responses(embeddings, rewards, lengths, groups, digests)


def _expected_names(data_dir, split, numbers):
    """[(embedding file, reward file)] of responses 0 ... K - 1; InputError if a file is missing.

    numbers: what `find_splits` found.
    """
    if not numbers:
        found = "none" if data_dir.is_dir() else "no such folder"
        raise InputError(
            f"{data_dir}: expected EMBD-TRAIN-split_0.npy and so on, found {found}; make them with "
            "convert_embeddings.py, generate_demo_data.py or steps 1-4 (RUN_GPU_STEPS=1)"
        )
    marker = data_dir / UNFINISHED
    if marker.exists():
        raise InputError(
            f"{data_dir}: the data in this folder are unfinished; run {marker.read_text()} again"
        )
    names = [file_names(split, k) for k in range(numbers[-1] + 1)]
    for name in (name for pair in names for name in pair):
        if not (data_dir / name).is_file():
            raise InputError(
                f"{data_dir / name} is missing: found splits {_ranges(numbers)}, expected every "
                f"split of 0-{numbers[-1]} with its embedding file and its reward file; restore "
                "the file or remove the later splits"
            )
    return names


def _rewards(data_dir, split, names, n, digests):
    """Golden rewards (N, K), lengths (N, K) or None, and groups (N,) of the reward files `names`.

    The parsed arrays are cached in DATA_DIR/.rewards_{split}.npz, if that folder is writable, and
    are valid as long as the digests of the files stay the same.
    """
    path = data_dir / f".rewards_{split}.npz"
    key = artifacts.hash_of([digests[name] for name in names])
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as cache:
            rewards, lengths, groups = (cache[name] for name in ("rewards", "lengths", "groups"))
            if str(cache["key"]) == key and len(rewards) == n:
                return rewards, lengths if lengths.size else None, groups
    except Exception:  # no cache, or a damaged one, which can raise anything: parse the files
        pass
    records_KN = [read_rewards(data_dir / name, n) for name in names]
    rewards_KN = [[record["reward"] for record in records_N] for records_N in records_KN]
    rewards = np.column_stack(rewards_KN).astype(float)
    lengths, groups = _lengths(records_KN), _groups(records_KN, names, data_dir)
    arrays = {"rewards": rewards, "lengths": [] if lengths is None else lengths, "groups": groups}
    with contextlib.suppress(OSError), artifacts.atomic(path) as file:
        np.savez(file, key=key, **arrays)
    return rewards, lengths, groups


def load_pair(
    data_dir: Path | str, cache_dir: Path | str | None = None
) -> tuple[Responses, Responses | None]:
    """The train responses and the test responses (None where absent) of DATA_DIR.

    Raises InputError where the two differ in D, or where either has one response per prompt.
    """
    train = load(data_dir, "train", cache_dir)
    test = load(data_dir, "test", cache_dir)
    if test is not None and test.shape[2] != train.shape[2]:
        raise InputError(
            f"{Path(data_dir) / file_names('test', 0)[0]}: expected {train.shape[2]} dimensions as "
            f"in the train files, found {test.shape[2]}; embed both with the same model"
        )
    for split, data in (("train", train), ("test", test)):
        if data is not None and data.shape[1] < 2:
            raise InputError(
                f"{data_dir}: expected at least 2 {split} responses per prompt, found 1 (only "
                f"{file_names(split, 0)[0]}); a ranking within a prompt needs two responses"
            )
    return train, test


def open_npy(path: Path) -> np.ndarray:
    """Memory-map an .npy file of floats, (prompts, dimensions), after checking header and size."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: expected a whole .npy file of numbers, found {path.stat().st_size} bytes "
            f"that do not fit their header ({reason}); the file is truncated or damaged: make it "
            "again"
        ) from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: expected an .npy file, found an archive; unpack it first")
    if array.ndim != 2 or array.dtype.name not in DTYPES or 0 in array.shape:
        raise InputError(
            f"{path}: expected (prompts, dimensions) of {' / '.join(DTYPES)}, "
            f"found {array.shape} of {array.dtype.name}"
        )
    expected, actual = array.offset + array.nbytes, path.stat().st_size
    if actual != expected:
        raise InputError(
            f"{path}: expected {expected} bytes by its header, found {actual}; make the file again"
        )
    return array


def inspect(path: Path, array: np.ndarray) -> str:
    """sha256 of the .npy file `path`, memory-mapped as `array`, whose values must all be finite.

    Raises InputError at the first row with another value. Reads the file once, in blocks.
    """
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(array.offset))
    step = max(1, BLOCK_BYTES // array[:1].nbytes)
    for start in range(0, len(array), step):
        block = np.ascontiguousarray(array[start : start + step])
        finite = np.abs(block) <= LARGEST  # False for NaN as well
        if not finite.all():
            row, column = np.unravel_index(np.argmin(finite), finite.shape)
            raise InputError(
                f"{path}: expected finite numbers, found {block[row, column]} in row "
                f"{start + int(row)}; embed that prompt again"
            )
        digest.update(block.data if array.flags.c_contiguous else block.tobytes())
    # rows of an array in Fortran order do not come in the order of the bytes in the file
    return digest.hexdigest() if array.flags.c_contiguous else artifacts.sha256(path)


def read_rewards(path: Path, n: int) -> list[dict]:
    """The n records of a JSONL reward file, each with a finite "reward". Raises InputError."""
    text = path.read_bytes().removesuffix(b"\n")
    lines = text.split(b"\n") if text else []
    try:
        records = [orjson.loads(line) for line in lines]
        # orjson rounds integers above 64 bits to floats, so two different ids could become equal:
        # a float id or query sends the file to the slower parser
        valid = all(
            math.isfinite(r["reward"]) and float not in (type(r.get("id")), type(r.get("query")))
            for r in records
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        valid = False
    if not valid:
        records = [_parse(path, number, line) for number, line in enumerate(lines, 1)]
    if len(records) != n:
        raise InputError(
            f"{path}: expected {n} lines, one for each row of its embedding file, "
            f"found {len(records)}; make both files from the same prompts"
        )
    return records


def _parse(path, number, line):
    """The record in one line of a file that the fast parser cannot take.

    Python's JSON also takes NaN (in keys other than "reward") and large integers. Raises
    InputError for anything else.
    """
    try:
        record = json.loads(line.decode())
        reward = record["reward"]
        finite = isinstance(reward, (int, float)) and math.isfinite(reward)
    except UnicodeDecodeError:
        raise InputError(
            f"{path}: expected JSONL text in UTF-8, found bytes of another encoding"
        ) from None
    except (ValueError, KeyError, TypeError, OverflowError):
        shown = line.decode(errors="replace")[:60]
        raise InputError(
            f'{path} line {number}: expected {{"reward": number}}, found {shown!r}; write one JSON '
            "object per line"
        ) from None
    if not finite:
        raise InputError(f"{path} line {number}: expected a finite reward, found {reward!r}")
    return record


def _lengths(records_KN):
    """Lengths of the responses in characters, (N, K), or None unless every record has one.

    The length is that of the text "response", else the number "length".
    """

    def length(record):
        text, number = record.get("response"), record.get("length")
        if isinstance(text, str):
            return len(text)
        return number if isinstance(number, (int, float)) else None

    lengths_KN = [[length(record) for record in records_N] for records_N in records_KN]
    if any(value is None for lengths_N in lengths_KN for value in lengths_N):
        return None
    return np.array(lengths_KN, float).T


def _groups(records_KN, names, data_dir):
    """Group numbers of the prompts, (N,): equal for equal "query", or equal "id" without a query.

    Raises InputError where two reward files disagree on the id or the query of a prompt.
    """
    for key in ("id", "query"):
        expected_N = [record.get(key) for record in records_KN[0]]
        for name, records_N in zip(names, records_KN, strict=True):
            for n, record in enumerate(records_N):
                if record.get(key) != expected_N[n]:
                    raise InputError(
                        f"{data_dir / name} line {n + 1}: expected {key} {expected_N[n]!r} as in "
                        f"{names[0]}, found {record.get(key)!r}; every split lists the same "
                        "prompts in the same order"
                    )
    keys_N = [
        json.dumps(r["query"] if "query" in r else r.get("id", n))
        for n, r in enumerate(records_KN[0])
    ]
    return np.unique(keys_N, return_inverse=True)[1]


def _ranges(numbers):
    """Ascending numbers as ranges: [0, 1, 2, 5] is "0-2, 5"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


class _Inspected:
    """Digests of checked files, from the manifest of DATA_DIR or from earlier checks.

    An earlier check holds as long as the size and the modification time of the file are the same.
    """

    def __init__(self, data_dir: Path, cache_dir: Path | str | None):
        self.manifest_path = data_dir / artifacts.MANIFEST
        self.recorded = artifacts.read_manifest(data_dir).get("files", {})
        self.path = Path(cache_dir) / ".inspected.json" if cache_dir else None
        self.cache = {}
        if self.path and self.path.exists():
            self.cache = artifacts.read_json(self.path, "the steps")

    def digest(self, path: Path, inspect_file: Callable[[Path], str]) -> str:
        """sha256 of `path`, by `inspect_file` where neither manifest nor cache answers.

        Raises InputError where the file differs from the manifest.
        """
        status = path.stat()
        recorded = self.recorded.get(path.name)
        if recorded:
            if recorded["bytes"] != status.st_size:
                self._refuse(path, f"{recorded['bytes']} bytes", f"{status.st_size} bytes")
            if status.st_mtime_ns <= self.manifest_path.stat().st_mtime_ns:
                return recorded["sha256"]
        key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        if self.cache.get(key, [])[:2] != stamp:
            self.cache[key] = [*stamp, inspect_file(path)]
        digest = self.cache[key][2]
        if recorded and recorded["sha256"] != digest:
            self._refuse(path, f"sha256 {recorded['sha256'][:12]}", digest[:12])
        return digest

    def _refuse(self, path, expected, found):
        raise InputError(
            f"{path}: expected {expected} as {self.manifest_path} says, found {found}; write the "
            "data again, or remove the manifest if you changed the file on purpose"
        )

    def save(self) -> None:
        """Keep the digests for the next run, if there is a cache folder."""
        if self.path:
            artifacts.write_json(self.path, self.cache)
