"""The prepared file of the interpretable-reward studies: embeddings, and labels of attributes.

One .safetensors file, or its shards {stem}-{idx:05d}-of-{n:05d}.safetensors:

embeddings         (n, D) rated responses, or (n, 2, D) pairs, chosen then rejected; float16 or
                   float32
prompt_embeddings  (n, D') embeddings of the prompts alone; optional
labels             (n, A) float32, NaN where missing; of pairs: P(response 0 is preferred), in
                   [0, 1]; optional
groups             (n,) int64 prompt numbers, equal for rows with the same prompt text
metadata (JSON)    ids (n), attributes (A), subsets (n) or null, source (what the file was made
                   of), left_out (number and ids of rows that were too long)

Files are memory-mapped and read in blocks of float32 rows: memory does not grow with n x D.
"""

import glob
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.errors import InputError
from studies.interpretable import tensor_files

MADE_BY = "studies/interpretable_prepare.py"
METADATA = ("ids", "attributes", "subsets", "source", "left_out")
SHARD = re.compile(r"(?P<stem>.+)-(?P<idx>\d{5})-of-(?P<n>\d{5})\.safetensors")


@dataclass(frozen=True)
class Rated:
    """n rated responses or n pairs of responses.

    embeddings: list of arrays (n_i, D) or (n_i, 2, D), one for each file, whose n_i add up to n;
    prompt_embeddings: list of arrays (n_i, D'), or None; labels: (n, A) float32 with NaN where
    missing, or None; groups: (n,) int64 prompt numbers; ids: n strings; attributes: A names;
    subsets: n names, or None; source: what the file was made of (JSON); left_out: ids of rows that
    were too long; digests: {file name: sha256}; path: file or pattern of files.
    """

    embeddings: list[np.ndarray]
    groups: np.ndarray
    ids: list[str]
    prompt_embeddings: list[np.ndarray] | None = None
    labels: np.ndarray | None = None
    attributes: list[str] = field(default_factory=list)
    subsets: list[str] | None = None
    source: dict = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, D) of rated responses, (n, 2, D) of pairs."""
        return sum(map(len, self.embeddings)), *self.embeddings[0].shape[1:]

    @property
    def is_pairs(self) -> bool:
        return self.embeddings[0].ndim == 3

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of m row numbers, (m, D) or (m, 2, D) float32."""
        return gather(self.embeddings, rows)

    def take_prompts(self, rows: np.ndarray) -> np.ndarray:
        """Prompt embeddings of m row numbers, (m, D') float32."""
        return gather(self.prompt_embeddings, rows)

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (slice of `rows`, embeddings of these rows, float32), in bounded memory."""
        step = tensor_files.rows_per_block(self.embeddings[0])
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            yield block, self.take(rows[block])

    def column(self, name: str) -> int:
        """Column of attribute `name` in `labels`; InputError where no attribute has this name."""
        if name not in self.attributes:
            raise InputError(
                f"{self.path}: expected an attribute among {', '.join(self.attributes)}, "
                f"found {name!r}"
            )
        return list(self.attributes).index(name)


def gather(parts: list[np.ndarray], rows: np.ndarray, dtype=np.float32) -> np.ndarray:
    """Rows of the concatenation of `parts`, as `dtype`. IndexError for a row that does not exist.

    Each array is read once, in ascending order of its rows.
    """
    rows, starts = np.asarray(rows, np.int64), np.cumsum([0, *map(len, parts)])
    if len(rows) and not 0 <= rows.min() <= rows.max() < starts[-1]:
        raise IndexError(f"rows {rows.min()} to {rows.max()} of {starts[-1]}")
    gathered = np.empty((len(rows), *parts[0].shape[1:]), dtype)
    order = np.argsort(rows, kind="stable")
    positions_by_part = np.split(order, np.searchsorted(rows[order], starts[1:-1]))
    for part, start, positions in zip(parts, starts[:-1], positions_by_part, strict=True):
        gathered[positions] = part[rows[positions] - start]
    return gathered


def groups_of(prompts: list[str]) -> np.ndarray:
    """Prompt numbers (n,) int64: equal texts have equal numbers, in every shard and every file."""
    digests = (hashlib.sha256(prompt.encode()).digest() for prompt in prompts)
    # 53 bits: programs that read JSON numbers as float64 keep them exactly.
    return np.fromiter(
        (int.from_bytes(digest[:8], "little") >> 11 for digest in digests), np.int64, len(prompts)
    )


def split_prompts(
    groups: np.ndarray, shares: dict[str, float], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Random split by prompt: {part: sorted row numbers}.

    groups: (n,) prompt number of each row; shares: {part: share of the rows}, which add up to 1; a
    share may be 0. InputError where a part with a share above 0 gets no prompt.
    """
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = rng.permutation(len(sizes))
    ends = np.cumsum(sizes[order])
    bounds = np.cumsum(list(shares.values())) * ends[-1]
    part = np.empty(len(sizes), int)
    # A prompt belongs to the part in which the middle of its rows falls.
    part[order] = np.searchsorted(bounds, ends - sizes[order] / 2)
    rows = {name: np.flatnonzero(part[group] == i) for i, name in enumerate(shares)}
    if empty := [name for name, share in shares.items() if share and not len(rows[name])]:
        parts = ", ".join(f"{share:.0%} {name}" for name, share in shares.items() if share)
        raise InputError(
            f"expected enough prompts for {parts}, found {len(sizes)}, which leaves none for "
            f"{', '.join(empty)}; add prompts or change the shares"
        )
    return rows


def shard_name(stem: str, idx: int, n: int) -> str:
    """File name of shard `idx` (from 0) of `n`."""
    return f"{stem}-{idx:05d}-of-{n:05d}.safetensors"


# ------------------------------------------------------------------------------------------ reading


def read(
    path: str | Path,
    *,
    labels: bool | None = None,
    pairs: bool | None = None,
    attributes: list[str] | None = None,
) -> Rated:
    """Open and check a prepared file, or all shards that match the pattern "data-*.safetensors".

    labels: True requires at least one label for every attribute; pairs: True requires (n, 2, D)
    embeddings, False (n, D); attributes: names of the attributes to keep (None: all). InputError
    where the content is not as required.
    """
    files = _find(path)
    if len(files) > 1 or SHARD.fullmatch(files[0].name):
        rated = merge(files)
    else:
        rated = _open(files[0])
    if not rated.shape[0]:
        raise InputError(f"{path}: no rows; {len(rated.left_out)} rows were left out as too long")
    if pairs is not None and pairs != rated.is_pairs:
        expected = "(n, 2, D) pairs, chosen then rejected" if pairs else "(n, D) rated responses"
        kind = "pairs" if rated.is_pairs else "rated responses"
        raise InputError(
            f"{path}: expected embeddings {expected}, found {rated.shape}: {kind}; "
            "prepare the other data"
        )
    if labels and rated.labels is None:
        raise InputError(f"{path}: no labels; prepare the data with labels")
    if attributes:
        columns = [rated.column(name) for name in attributes]
        values = None if rated.labels is None else rated.labels[:, columns]
        rated = replace(rated, attributes=list(attributes), labels=values)
        _check_attributes(rated, path)
    if labels:
        is_unlabelled = np.isnan(rated.labels).all(0)
        if unlabelled := [rated.attributes[a] for a in np.flatnonzero(is_unlabelled)]:
            raise InputError(
                f"{path}: no labels for {', '.join(unlabelled)}; leave these attributes out"
            )
    return rated


def _find(path):
    """The files that `path`, a file name or a pattern, stands for."""
    path = Path(path)
    if path.is_file():
        return [path]
    files = sorted(map(Path, glob.glob(str(path))))
    if not files:
        raise InputError(f"{path}: no prepared file and no shards; {MADE_BY} writes them")
    return files


def _open(path):
    """One file as Rated, checked."""
    arrays, metadata = tensor_files.map_tensors(path)
    for name in ("embeddings", "groups"):
        if name not in arrays:
            raise InputError(
                f"{path}: expected a tensor {name!r}, found {', '.join(arrays)}; "
                f"{MADE_BY} writes prepared files"
            )
    try:
        content = {name: json.loads(metadata.get(name, "null")) for name in METADATA}
    except ValueError:
        raise InputError(
            f"{path}: expected JSON in the metadata, found {metadata}; prepare the file again"
        ) from None
    labels = arrays.get("labels")
    rated = Rated(
        embeddings=[arrays["embeddings"]],
        prompt_embeddings=[arrays["prompt_embeddings"]] if "prompt_embeddings" in arrays else None,
        labels=None if labels is None else np.array(labels, np.float32),
        groups=np.array(arrays["groups"]),
        ids=content["ids"] or [],
        attributes=content["attributes"] or [],
        subsets=content["subsets"],
        source=content["source"] or {},
        left_out=(content["left_out"] or {}).get("ids", []),
        digests={Path(path).name: artifacts.sha256(path)},
        path=Path(path),
    )
    check(rated)
    return rated


# ------------------------------------------------------------------------------------------- shards


def merge(paths: list[Path]) -> Rated:
    """Join shards in the order of their numbers, whatever the order of `paths`.

    InputError where a shard is missing or comes twice, or where shards hold different data.
    """
    paths = [Path(path) for path in paths]
    names = {path: SHARD.fullmatch(path.name) for path in paths}
    for path, match in names.items():
        if not match:
            raise InputError(
                f"{path}: expected shards named {shard_name('stem', 0, 2)}, found {path.name}; "
                "give a narrower pattern"
            )
    paths = sorted(paths, key=lambda path: int(names[path]["idx"]))
    stem, n = names[paths[0]]["stem"], int(names[paths[0]]["n"])
    for path in paths:
        if (names[path]["stem"], int(names[path]["n"])) != (stem, n):
            raise InputError(
                f"{path}: expected one of the {n} shards of {stem}, as {paths[0].name} is; "
                "give a narrower pattern"
            )
    numbers = [int(names[path]["idx"]) for path in paths]
    if len(set(numbers)) < len(numbers) or numbers[-1] >= n:
        raise InputError(
            f"{paths[0].parent}: expected each of the shards 0-{n - 1} of {stem} once, "
            f"found {numbers}"
        )
    if missing := sorted(set(range(n)) - set(numbers)):
        raise InputError(
            f"{paths[0].parent / shard_name(stem, missing[0], n)} is missing: expected {n} shards, "
            f"found {len(paths)}, without {', '.join(map(str, missing))}; run {MADE_BY} "
            f"--n_shards {n} --shard_idx {missing[0]}"
        )
    return _concatenate([_open(path) for path in paths])


def _concatenate(shards):
    first = shards[0]
    for shard in shards[1:]:
        _check_same(first, shard)

    def joined(name):
        if getattr(first, name) is None:
            return None
        return [item for shard in shards for item in getattr(shard, name)]

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
    """InputError unless both shards hold parts of the same data in the same form."""
    forms = {
        "source": lambda rated: rated.source,
        "attributes": lambda rated: list(rated.attributes),
        "embeddings": lambda rated: (str(rated.embeddings[0].dtype), *rated.shape[1:]),
        "prompt_embeddings": lambda rated: (
            rated.prompt_embeddings and rated.prompt_embeddings[0].shape[1:]
        ),
        "labels": lambda rated: rated.labels is not None,
        "subsets": lambda rated: rated.subsets is not None,
    }
    for name, form in forms.items():
        if form(shard) != form(first):
            raise InputError(
                f"{shard.path}: expected {name} {form(first)} as in {first.path.name}, "
                f"found {form(shard)}; prepare all shards with one command that differs only in "
                "--shard_idx"
            )


# ------------------------------------------------------------------------------------------- checks


def check(rated: Rated) -> None:
    """InputError unless shapes, types, names and values are those of a prepared file or a shard."""
    n, path = len(rated.groups), rated.path
    _check_shapes(rated)
    _check_rows(rated.embeddings, f"{path}: embeddings", rated.ids)
    if rated.prompt_embeddings is not None:
        shapes = [part.shape for part in rated.prompt_embeddings]
        if any(len(shape) != 2 for shape in shapes) or sum(shape[0] for shape in shapes) != n:
            raise InputError(
                f"{path}: prompt_embeddings: expected ({n}, D), found {', '.join(map(str, shapes))}"
            )
        _check_rows(rated.prompt_embeddings, f"{path}: prompt_embeddings", rated.ids)
    _check_ids(rated.ids, path)
    for name, values in (("ids", rated.ids), ("subsets", rated.subsets)):
        if values is not None and len(values) != n:
            raise InputError(
                f"{path}: {name}: expected {n}, one for each row, found {len(values)}; "
                "prepare the file again"
            )
    _check_attributes(rated, path)


def _check_shapes(rated):
    """InputError unless the embeddings and the prompt numbers have the shapes of one data set."""
    groups, path = rated.groups, rated.path
    for part in rated.embeddings:
        is_rated, is_pairs = part.ndim == 2, part.ndim == 3 and part.shape[1] == 2
        if not (is_rated or is_pairs) or 0 in part.shape[1:]:
            raise InputError(
                f"{path}: embeddings: expected (n, D) rated responses or (n, 2, D) pairs, "
                f"found {part.shape}"
            )
    if groups.ndim != 1 or groups.dtype != np.int64:
        raise InputError(
            f"{path}: groups: expected (n,) int64, found {groups.shape} {groups.dtype}"
        )
    if rated.shape[0] != len(groups):
        raise InputError(
            f"{path}: groups: expected ({rated.shape[0]},) as the embeddings, "
            f"found ({len(groups)},)"
        )
    if len(groups) and groups.min() < 0:
        raise InputError(
            f"{path}: groups: expected prompt numbers of at least 0, found {groups.min()}; "
            "renumber the prompts"
        )


def _check_ids(ids, path):
    if not all(isinstance(name, str) for name in ids):
        other = next(name for name in ids if not isinstance(name, str))
        raise InputError(f"{path}: ids: expected strings, found {other!r}")
    if len(set(ids)) != len(ids):
        seen = set()
        repeated = next(name for name in ids if name in seen or seen.add(name))
        raise InputError(
            f"{path}: ids: expected {len(ids)} different ids, found {repeated!r} twice; "
            "give each row an id of its own"
        )


def _check_attributes(rated, path):
    names, labels = list(rated.attributes), rated.labels
    are_names = all(isinstance(name, str) and name.strip() for name in names)
    if not are_names or len(set(names)) != len(names):
        raise InputError(
            f"{path}: attributes: expected different names, none empty, found {names}; rename them"
        )
    if labels is None:
        return
    expected = (len(rated.groups), len(names))
    if labels.shape != expected or not names:
        raise InputError(
            f"{path}: labels: expected {expected}, a row for each embedding and a column for each "
            f"attribute, found {labels.shape}; prepare the file again"
        )
    bad, kind = np.isinf(labels), "finite numbers, or NaN where missing"
    if rated.is_pairs:
        bad |= (labels < 0) | (labels > 1)
        kind = "probabilities in [0, 1] for pairs, or NaN where missing"
    if bad.any():
        row, a = np.argwhere(bad)[0]
        raise InputError(
            f"{path}: labels: expected {kind}, found {labels[row, a]} in row {row}, {names[a]}"
        )


def _check_rows(parts, where, ids):
    """InputError that names the first row with a number that is not finite."""
    first_row = 0  # of the part, counted over all parts
    for part in parts:
        if part.dtype not in (np.float16, np.float32):
            raise InputError(
                f"{where}: expected float16 or float32, found {part.dtype}; convert the array"
            )
        step = tensor_files.rows_per_block(part)
        for start in range(0, len(part), step):
            block = part[start : start + step]
            is_finite = np.isfinite(block).reshape(len(block), -1).all(1)
            if not is_finite.all():
                row = first_row + start + int(np.argmin(is_finite))
                name = f" ({ids[row]!r})" if row < len(ids) else ""
                raise InputError(
                    f"{where}: expected finite numbers, found NaN or inf in row {row}{name}; "
                    "embed this row again"
                )
        first_row += len(part)


# ------------------------------------------------------------------------------------------ writing


def write(path: Path, rated: Rated) -> None:
    """Check `rated` and write it to one file, whatever the number of its parts, atomically."""
    check(replace(rated, path=path))
    tensors = {
        "groups": [rated.groups],
        "labels": None if rated.labels is None else [np.asarray(rated.labels, np.float32)],
        "embeddings": rated.embeddings,
        "prompt_embeddings": rated.prompt_embeddings,
    }
    content = {name: getattr(rated, name) for name in METADATA}
    content["left_out"] = {"count": len(rated.left_out), "ids": list(rated.left_out)}
    metadata = {name: json.dumps(value, sort_keys=True) for name, value in content.items()}
    tensor_files.write_tensors(path, tensors, metadata)
