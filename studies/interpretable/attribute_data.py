"""The prepared file of the interpretable-reward studies: embeddings, and labels of named attributes where known.

One .safetensors file, or its shards {stem}-{idx:05d}-of-{n:05d}.safetensors:

embeddings         (n, D) rated responses, or (n, 2, D) pairs, chosen then rejected; float16 or float32
prompt_embeddings  (n, D') of the prompt alone; may be absent
labels             (n, A) float32, NaN where missing; of pairs: P(side 0 is preferred), in [0, 1]; may be absent
groups             (n,) int64, equal for rows with the same prompt text
metadata (JSON)    ids (n), attributes (A), subsets (n) or null, source (what it was made of), left_out (count, ids)

Files are memory-mapped and given out in blocks of float32 rows: memory does not grow with n x D.
"""

import glob
import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from rewardlib import artifacts
from rewardlib.data.embeddings import BLOCK_BYTES
from rewardlib.errors import InputError

MADE_BY = "studies/interpretable_prepare.py"
DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I64": np.int64}
METADATA = ("ids", "attributes", "subsets", "source", "left_out")
SHARD = re.compile(r"(?P<stem>.+)-(?P<idx>\d{5})-of-(?P<n>\d{5})\.safetensors")
LONGEST_HEADER = 100_000_000  # bytes; readers of the format refuse a longer one


@dataclass(frozen=True)
class Rated:
    """n rated responses or n pairs of responses.

    embeddings: list of arrays (n_i, D) or (n_i, 2, D), one per file, n_i adding up to n;
    prompt_embeddings: the same of (n_i, D'), or None; labels: (n, A) float32 with NaN where
    missing, or None; groups: (n,) int64 prompt numbers; ids: n strings; attributes: A names;
    subsets: n names, or None; source: what the file was made of (JSON); left_out: ids of rows that
    were too long; digests: {file name: sha256}; path: where it was read from.
    """

    embeddings: list
    groups: np.ndarray
    ids: list
    prompt_embeddings: list | None = None
    labels: np.ndarray | None = None
    attributes: list = field(default_factory=list)
    subsets: list | None = None
    source: dict = field(default_factory=dict)
    left_out: list = field(default_factory=list)
    digests: dict = field(default_factory=dict)
    path: Path | None = None

    @property
    def shape(self):
        """(n, D) of rated responses, (n, 2, D) of pairs."""
        return sum(map(len, self.embeddings)), *self.embeddings[0].shape[1:]

    @property
    def is_pairs(self):
        return self.embeddings[0].ndim == 3

    def take(self, rows):
        """Embeddings of the given row numbers, (m, D) or (m, 2, D) float32."""
        return gather(self.embeddings, rows)

    def take_prompts(self, rows):
        """Prompt embeddings of the given row numbers, (m, D') float32."""
        return gather(self.prompt_embeddings, rows)

    def blocks(self, rows):
        """Yield (slice into `rows`, embeddings (m, D) or (m, 2, D) float32) over `rows`, in bounded memory."""
        step = _block_rows(self.embeddings[0])
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            yield part, self.take(rows[part])

    def column(self, name):
        """The position of attribute `name`; InputError where there is none."""
        if name not in self.attributes:
            raise InputError(
                f"{self.path}: expected an attribute among {', '.join(self.attributes)}, found {name!r}"
            )
        return list(self.attributes).index(name)


def _block_rows(array):
    return max(1, BLOCK_BYTES // (4 * max(1, int(np.prod(array.shape[1:])))))


def gather(parts, rows, dtype=np.float32):
    """Rows, as `dtype`, of arrays that follow one another; each array is read once, in ascending order."""
    rows, starts = np.asarray(rows, np.int64), np.cumsum([0, *map(len, parts)])
    if len(rows) and not 0 <= rows.min() <= rows.max() < starts[-1]:
        raise IndexError(f"rows {rows.min()} to {rows.max()} of {starts[-1]}")
    found = np.empty((len(rows), *parts[0].shape[1:]), dtype)
    order = np.argsort(rows, kind="stable")
    wanted = np.split(order, np.searchsorted(rows[order], starts[1:-1]))
    for part, start, at in zip(parts, starts[:-1], wanted, strict=True):
        found[at] = part[rows[at] - start]
    return found


def groups_of(prompts):
    """(n,) int64 from the prompts' texts: equal texts, equal numbers, in every shard and every file."""
    digests = (hashlib.sha256(prompt.encode()).digest() for prompt in prompts)
    # 53 bits: whole in the JSON of every program.
    return np.fromiter(
        (int.from_bytes(digest[:8], "little") >> 11 for digest in digests), np.int64, len(prompts)
    )


def split_prompts(groups, shares, rng):
    """Deal rows to roles, whole prompts at a time: {role: sorted row numbers}.

    groups: (n,) prompt of each row; shares: {role: share of the rows}, which add up to 1; a share
    may be 0. InputError where there are too few prompts for the others.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = rng.permutation(len(sizes))
    ends = np.cumsum(sizes[order])
    bounds = np.cumsum(list(shares.values())) * ends[-1]
    role = np.empty(len(sizes), int)
    role[order] = np.searchsorted(bounds, ends - sizes[order] / 2)
    found = {name: np.flatnonzero(role[group] == i) for i, name in enumerate(shares)}
    if empty := [name for name, share in shares.items() if share and not len(found[name])]:
        told = ", ".join(f"{share:.0%} {name}" for name, share in shares.items() if share)
        raise InputError(
            f"expected prompts enough for {told}, found {len(sizes)} and none for {', '.join(empty)}; add prompts or "
            "change the shares"
        )
    return found


def shard_name(stem, idx, n):
    """File name of shard `idx` (from 0) of `n`."""
    return f"{stem}-{idx:05d}-of-{n:05d}.safetensors"


# ------------------------------------------------------------------------------------------ reading


def read(path, *, labels=None, pairs=None, attributes=None):
    """Check and open a prepared file, or all shards that the pattern `path` ("data-*.safetensors") matches.

    labels: True asks for labels, with at least one for every attribute; pairs: True asks for (n, 2,
    D), False for (n, D); attributes: names of those to keep. Returns Rated; InputError with what
    was expected and found.
    """
    files = _find(path)
    rated = merge(files) if len(files) > 1 or SHARD.fullmatch(files[0].name) else _open(files[0])
    n, *rest = rated.shape
    if not n:
        raise InputError(
            f"{path}: expected at least one row, found none; {len(rated.left_out)} were left out"
        )
    if pairs is not None and pairs != rated.is_pairs:
        wanted = "(n, 2, D) pairs, chosen then rejected" if pairs else "(n, D) rated responses"
        found = "pairs" if rated.is_pairs else "rated responses"
        raise InputError(
            f"{path}: expected embeddings {wanted}, found {(n, *rest)}: {found}; prepare the other data"
        )
    if labels and rated.labels is None:
        raise InputError(
            f"{path}: expected labels ({n}, attributes), found none; prepare the data with labels"
        )
    if attributes:
        columns = [rated.column(name) for name in attributes]
        kept = None if rated.labels is None else rated.labels[:, columns]
        rated = replace(rated, attributes=list(attributes), labels=kept)
        _check_attributes(rated, path)
    if labels:
        empty = [
            name
            for name, column in zip(rated.attributes, rated.labels.T, strict=True)
            if np.isnan(column).all()
        ]
        if empty:
            raise InputError(
                f"{path}: expected labels for every attribute, found none for {', '.join(empty)}; leave it out"
            )
    return rated


def _find(path):
    """The files that `path`, a file name or a pattern, stands for."""
    path = Path(path)
    if path.is_file():
        return [path]
    files = sorted(map(Path, glob.glob(str(path))))
    if not files:
        raise InputError(
            f"{path}: expected a prepared file or a pattern of shards, found none; {MADE_BY} writes it"
        )
    return files


def merge(paths):
    """The shards `paths` as one Rated, in the order of their numbers, whatever the order of `paths`.

    InputError where a shard is missing or there twice, or where shards are of different data.
    """
    paths = [Path(path) for path in paths]
    names = {path: SHARD.fullmatch(path.name) for path in paths}
    for path, match in names.items():
        if not match:
            raise InputError(
                f"{path}: expected shards named {shard_name('stem', 0, 2)}, found {path.name}; narrow it"
            )
    paths = sorted(paths, key=lambda path: int(names[path]["idx"]))
    stem, n = names[paths[0]]["stem"], int(names[paths[0]]["n"])
    for path in paths:
        if (names[path]["stem"], int(names[path]["n"])) != (stem, n):
            raise InputError(
                f"{path}: expected a shard of {stem}, {n} in all, as {paths[0].name}; narrow the pattern"
            )
    numbers = [int(names[path]["idx"]) for path in paths]
    if len(set(numbers)) < len(numbers) or numbers[-1] >= n:
        raise InputError(
            f"{paths[0].parent}: expected each of the shards 0-{n - 1} of {stem} once, found {numbers}"
        )
    if missing := sorted(set(range(n)) - set(numbers)):
        raise InputError(
            f"{paths[0].parent / shard_name(stem, missing[0], n)} is missing: expected {n} shards, found {len(paths)}, "
            f"without {', '.join(map(str, missing))}; run {MADE_BY} --n_shards {n} --shard_idx {missing[0]}"
        )
    return _concatenate([_open(path) for path in paths])


def _concatenate(shards):
    first = shards[0]
    for shard in shards[1:]:
        _check_same(first, shard)

    def joined(name):
        return (
            None
            if getattr(first, name) is None
            else [item for shard in shards for item in getattr(shard, name)]
        )

    rated = Rated(
        embeddings=joined("embeddings"),
        prompt_embeddings=joined("prompt_embeddings"),
        labels=None if first.labels is None else np.concatenate([shard.labels for shard in shards]),
        groups=np.concatenate([shard.groups for shard in shards]),
        ids=joined("ids"),
        attributes=first.attributes,
        subsets=joined("subsets"),
        source=first.source,
        left_out=joined("left_out"),
        digests={name: digest for shard in shards for name, digest in shard.digests.items()},
        path=first.path.parent / f"{SHARD.fullmatch(first.path.name)['stem']}-*.safetensors",
    )
    _check_ids(rated.ids, rated.path)
    return rated


def _check_same(first, shard):
    """InputError unless both shards are of the same data in the same form."""
    for what, of in {
        "source": lambda rated: rated.source,
        "attributes": lambda rated: list(rated.attributes),
        "embeddings": lambda rated: (str(rated.embeddings[0].dtype), *rated.shape[1:]),
        "prompt_embeddings": lambda rated: (
            rated.prompt_embeddings and rated.prompt_embeddings[0].shape[1:]
        ),
        "labels": lambda rated: rated.labels is not None,
        "subsets": lambda rated: rated.subsets is not None,
    }.items():
        if of(shard) != of(first):
            raise InputError(
                f"{shard.path}: expected {what} {of(first)} as in {first.path.name}, found {of(shard)}; "
                "prepare all shards with one command, but for --shard_idx"
            )


def _open(path):
    """One file as Rated, checked."""
    arrays, metadata = map_tensors(path)
    for name in ("embeddings", "groups"):
        if name not in arrays:
            raise InputError(
                f"{path}: expected a tensor {name!r}, found {', '.join(arrays)}; {MADE_BY} writes it"
            )
    try:
        told = {name: json.loads(metadata.get(name, "null")) for name in METADATA}
    except ValueError:
        raise InputError(
            f"{path}: expected JSON in its metadata, found {metadata}; prepare it again"
        ) from None
    labels = arrays.get("labels")
    rated = Rated(
        embeddings=[arrays["embeddings"]],
        prompt_embeddings=[arrays["prompt_embeddings"]] if "prompt_embeddings" in arrays else None,
        labels=None if labels is None else np.array(labels, np.float32),
        groups=np.array(arrays["groups"]),
        ids=told["ids"] or [],
        attributes=told["attributes"] or [],
        subsets=told["subsets"],
        source=told["source"] or {},
        left_out=(told["left_out"] or {}).get("ids", []),
        digests={Path(path).name: artifacts.sha256(path)},
        path=Path(path),
    )
    check(rated)
    return rated


def map_tensors(path):
    """({name: memory-mapped array}, {metadata key: string}) of a .safetensors file; InputError where it is damaged."""
    try:
        with safe_open(path, "np") as file:  # header and size agree, or it raises
            file.keys()
        with open(path, "rb") as file:
            start = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start))
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: expected a whole .safetensors file, found: {error}; {MADE_BY} writes it"
        ) from None
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name, told in header.items():
        if told["dtype"] not in DTYPES:
            raise InputError(
                f"{path}: {name}: expected one of {', '.join(DTYPES)}, found {told['dtype']}; convert it"
            )
        where = {"dtype": DTYPES[told["dtype"]], "shape": tuple(told["shape"])}
        # An array without elements cannot be mapped.
        empty = 0 in where["shape"]
        offset = 8 + start + told["data_offsets"][0]
        arrays[name] = (
            np.empty(**where) if empty else np.memmap(path, mode="r", offset=offset, **where)
        )
    return arrays, metadata


# ------------------------------------------------------------------------------------------- checks


def check(rated):
    """InputError unless shapes, types, names and values of `rated` are those of a prepared file (or of one shard)."""
    n, where = len(rated.groups), rated.path
    for part in rated.embeddings:
        if (
            part.ndim not in (2, 3)
            or (part.ndim == 3 and part.shape[1] != 2)
            or 0 in part.shape[1:]
        ):
            raise InputError(
                f"{where}: embeddings: expected (n, D) rated responses or (n, 2, D) pairs, found {part.shape}"
            )
    if rated.groups.ndim != 1 or rated.groups.dtype != np.int64:
        raise InputError(
            f"{where}: groups: expected (n,) int64, found {rated.groups.shape} {rated.groups.dtype}"
        )
    if rated.shape[0] != n:
        raise InputError(
            f"{where}: groups: expected ({rated.shape[0]},) as the embeddings, found ({n},)"
        )
    if n and rated.groups.min() < 0:
        raise InputError(
            f"{where}: groups: expected numbers of at least 0, found {rated.groups.min()}; renumber them"
        )
    _check_rows(rated.embeddings, f"{where}: embeddings", rated.ids)
    if rated.prompt_embeddings is not None:
        shapes = [part.shape for part in rated.prompt_embeddings]
        if any(len(shape) != 2 for shape in shapes) or sum(shape[0] for shape in shapes) != n:
            raise InputError(
                f"{where}: prompt_embeddings: expected ({n}, D), found {', '.join(map(str, shapes))}"
            )
        _check_rows(rated.prompt_embeddings, f"{where}: prompt_embeddings", rated.ids)
    _check_ids(rated.ids, where)
    for name, values in (("ids", rated.ids), ("subsets", rated.subsets)):
        if values is not None and len(values) != n:
            raise InputError(
                f"{where}: {name}: expected {n}, one for each row, found {len(values)}; prepare it again"
            )
    _check_attributes(rated, where)


def _check_ids(ids, where):
    if not all(isinstance(name, str) for name in ids):
        raise InputError(
            f"{where}: ids: expected strings, found {next(i for i in ids if not isinstance(i, str))!r}"
        )
    if len(set(ids)) != len(ids):
        seen = set()
        twice = next(name for name in ids if name in seen or seen.add(name))
        raise InputError(
            f"{where}: ids: expected {len(ids)} different ones, found {twice!r} twice; name rows apart"
        )


def _check_attributes(rated, where):
    names, labels = list(rated.attributes), rated.labels
    if any(not isinstance(name, str) or not name.strip() for name in names) or len(
        set(names)
    ) != len(names):
        raise InputError(
            f"{where}: attributes: expected different names, none empty, found {names}; rename them"
        )
    if labels is None:
        return
    expected = (len(rated.groups), len(names))
    if labels.shape != expected or not names:
        raise InputError(
            f"{where}: labels: expected {expected}, a row for each of the embeddings and a column for each of the "
            f"attributes, found {labels.shape}; prepare it again"
        )
    bad = np.isinf(labels)
    kind = "finite numbers, or NaN where missing"
    if rated.is_pairs:
        bad, kind = (
            bad | (labels < 0) | (labels > 1),
            "probabilities in [0, 1] for pairs, or NaN where missing",
        )
    if bad.any():
        row, a = np.argwhere(bad)[0]
        raise InputError(
            f"{where}: labels: expected {kind}, found {labels[row, a]} in row {row}, {names[a]}"
        )


def _check_rows(parts, where, ids):
    """InputError at the first row that is not finite."""
    first = 0
    for part in parts:
        if part.dtype not in (np.float16, np.float32):
            raise InputError(
                f"{where}: expected float16 or float32, found {part.dtype}; convert them"
            )
        step = _block_rows(part)
        for start in range(0, len(part), step):
            finite = (
                np.isfinite(part[start : start + step])
                .reshape(len(part[start : start + step]), -1)
                .all(1)
            )
            if not finite.all():
                row = first + start + int(np.argmin(finite))
                name = f" ({ids[row]!r})" if row < len(ids) else ""
                raise InputError(
                    f"{where}: expected finite numbers, found NaN or inf in row {row}{name}; embed it again"
                )
        first += len(part)


# ------------------------------------------------------------------------------------------ writing


def write(path, rated):
    """Check `rated` and write it to `path`, one file whatever the number of its parts, atomically and in blocks."""
    check(replace(rated, path=path))
    tensors = {
        "groups": [rated.groups],
        "labels": None if rated.labels is None else [np.asarray(rated.labels, np.float32)],
        "embeddings": rated.embeddings,
        "prompt_embeddings": rated.prompt_embeddings,
    }
    told = {name: getattr(rated, name) for name in METADATA}
    told["left_out"] = {"count": len(rated.left_out), "ids": list(rated.left_out)}
    write_tensors(
        path, tensors, {name: json.dumps(value, sort_keys=True) for name, value in told.items()}
    )


def write_tensors(path, tensors, metadata):
    """Write {name: arrays that follow one another, or None} and {key: string} as a .safetensors file, atomically.

    Streams, which safetensors' own writer does not; and orders the metadata, so that equal content
    is equal bytes.
    """
    tensors = {
        name: [np.asanyarray(part) for part in parts]
        for name, parts in tensors.items()
        if parts is not None
    }
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name, parts in tensors.items():
        shape = [sum(map(len, parts)), *parts[0].shape[1:]]
        begin, end = end, end + sum(part.nbytes for part in parts)
        header[name] = {
            "dtype": names[parts[0].dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise InputError(
            f"{path}: expected ids and names of at most {LONGEST_HEADER} bytes, found {len(text)}; use shorter ids"
        )
    with artifacts.atomic(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in (part for parts in tensors.values() for part in parts):
            step = _block_rows(part)
            for start in range(0, len(part), step):
                file.write(np.ascontiguousarray(part[start : start + step]).tobytes())
