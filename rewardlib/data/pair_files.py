"""Reader of human preference pairs: one file with the embeddings of the preferred and of the other response.

embeddings         (n, 2, D) chosen then rejected; or chosen (n, D) and rejected (n, D); float16, float32 or float64
prompt_ids         (n,) whole numbers or text, equal for pairs on one prompt        optional
prompt_embeddings  (n, P) equal for pairs on one prompt                             optional
subset             (n,) names                                                       optional
ties               (n,) True where neither response was preferred                   optional
length_chars       (n, 2) characters of the chosen and of the rejected response     optional

.npz          memory-mapped as np.savez writes it, read whole as np.savez_compressed does
.safetensors  memory-mapped; it holds no text: subset is (n,) positions in the JSON list "subset_names" of its metadata
.parquet      one row a pair, embeddings as lists, fixed-size or not; read in blocks; needs pyarrow
Nothing is unpickled.
"""

import hashlib
import json
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rewardlib import artifacts
from rewardlib.data.embeddings import BLOCK_BYTES, DTYPES, LARGEST, Responses
from rewardlib.errors import InputError

EMBEDDINGS = ("embeddings", "chosen", "rejected", "prompt_embeddings")
NAMES = (*EMBEDDINGS, "prompt_ids", "subset", "ties", "length_chars")
PARQUET_ROWS = 1024


@dataclass(frozen=True)
class HumanPairs:
    """n pairs of responses, response 0 preferred to response 1 except in ties.

    responses: the pairs as n prompts of two responses. Its rewards are 1 and 0, for ties 0.5 and
    0.5; its groups are equal for pairs that share a prompt or an answer, directly or through other
    pairs. subset: (n,) names, or None. ties: (n,) bool. about: what was found, for people and
    records, as a JSON-able dict; see `describe`.
    """

    responses: Responses
    subset: np.ndarray | None
    ties: np.ndarray
    about: dict

    def __len__(self):
        return len(self.ties)


def load(path):
    """Check and open the pairs in `path`, see the top of this file. Returns HumanPairs; raises InputError."""
    path = Path(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise InputError(
            f"{path}: expected a file named {', '.join(readers)}, found {path.suffix or 'no extension'}; "
            "save the pairs in one of these formats"
        )
    if not path.is_file():
        raise InputError(f"{path}: expected a file of preference pairs, found none; check the path")
    arrays, others = readers[path.suffix.lower()](path)
    sides = _sides(path, arrays, others)
    n = len(sides[0])
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != n:
            raise InputError(
                f"{path}: expected {n} rows of {name}, one for each pair, found shape {array.shape}; "
                "save all arrays from the same pairs"
            )
    answers = np.concatenate(
        [
            _row_digests(path, name, side)
            for name, side in zip(_side_names(arrays), sides, strict=True)
        ]
    )
    prompts = {}
    if "prompt_ids" in arrays:
        prompts["prompt_ids"] = _names(path, "prompt_ids", arrays["prompt_ids"])
    if "prompt_embeddings" in arrays:
        _check_floats(path, "prompt_embeddings", arrays["prompt_embeddings"], "(n, dimensions)", 2)
        prompts["prompt_embeddings"] = _row_digests(
            path, "prompt_embeddings", arrays["prompt_embeddings"]
        )
    ties = _ties(path, arrays["ties"]) if "ties" in arrays else np.zeros(n, bool)
    groups = link(n, [*prompts.values(), answers])
    about = {
        "n": n,
        "dimensions": sides[0].shape[1],
        "n_ties": int(ties.sum()),
        "n_same_responses": int((answers[:n] == answers[n:]).sum()),
        "prompts_told_by": list(prompts),
        "n_groups": int(groups.max()) + 1,
        "n_linked": _n_linked(groups),
        "n_linked_by_prompt": _n_linked(link(n, list(prompts.values()))),
        "largest_group": int(np.bincount(groups).max()),
        "unused_names": sorted(others),
    }
    rewards = np.where(ties[:, None], 0.5, [1.0, 0.0])
    lengths = _lengths(path, arrays["length_chars"]) if "length_chars" in arrays else None
    responses = Responses(sides, rewards, lengths, groups, {path.name: artifacts.sha256(path)})
    subset = _names(path, "subset", arrays["subset"]).astype(str) if "subset" in arrays else None
    return HumanPairs(responses, subset, ties, about)


def describe(about):
    """Lines for people about what `load` found."""
    lines = [
        f"{about['n']} preference pairs x {about['dimensions']} dimensions, {about['n_ties']} of them ties"
    ]
    linked, by_prompt = about["n_linked"], about["n_linked_by_prompt"]
    lines.append(
        f"{linked} pairs linked to others, {by_prompt} by their prompt, {linked - by_prompt} by an answer alone: "
        f"{about['n_groups']} groups, the largest of {about['largest_group']}, each on one side of every split"
    )
    if not about["prompts_told_by"]:
        lines.append(
            "warning: neither prompt_ids nor prompt_embeddings: two pairs on one prompt may be on two sides of a split"
        )
    if same := about["n_same_responses"]:
        lines.append(
            f"{same} pairs hold one embedding twice: no model can order them, they count one half"
        )
    if about["unused_names"]:
        lines.append(f"not used: {', '.join(about['unused_names'])}; known: {', '.join(NAMES)}")
    return lines


# ------------------------------------------------------------------------------------------ formats


def _read_npz(path):
    """({known name: array}, other names) of an .npz file; arrays that are stored as they are come memory-mapped."""
    arrays, others = {}, []
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in NAMES:
                    arrays[name] = _npz_array(path, archive, member)
                else:
                    others.append(name)
    except (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, "a whole .npz file of numbers and text", error) from None
    return arrays, others


def _npz_array(path, archive, member):
    with archive.open(member) as file:
        if member.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(file, allow_pickle=False)
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read_header(file)
        header = file.tell()
    if dtype.hasobject:
        raise ValueError("Object arrays are pickled; save text as np.array(names, dtype=str)")
    if 0 in shape:
        return np.empty(shape, dtype)
    with open(
        path, "rb"
    ) as file:  # a zip member: 30 bytes, its name and extra field (sizes at byte 26), its data
        file.seek(member.header_offset + 26)
        start = member.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
    return np.memmap(path, dtype, "r", start + header, shape, "F" if fortran else "C")


def _read_safetensors(path):
    """As _read_npz. safe_open checks the header against the file, but returns copies: floats are mapped here."""
    dtypes = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
    arrays = {}
    try:
        with safe_open(path, framework="numpy") as file, open(path, "rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
            metadata = header.pop("__metadata__", {})
            for name in NAMES:
                entry = header.get(name)
                if entry is None:
                    continue
                if entry["dtype"].startswith(("BF", "F8")):  # numpy has no such numbers
                    raise InputError(
                        f"{path}: expected {name} of dtype {' / '.join(DTYPES)}, found {entry['dtype']}; "
                        "save it as float16 or float32"
                    )
                if entry["dtype"] not in dtypes or 0 in entry["shape"]:
                    arrays[name] = file.get_tensor(name)
                else:
                    start = 8 + size + entry["data_offsets"][0]
                    arrays[name] = np.memmap(
                        path, dtypes[entry["dtype"]], "r", start, tuple(entry["shape"])
                    )
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise _unreadable(path, "a whole .safetensors file", error) from None
    if "subset" in arrays and "subset_names" in metadata:
        arrays["subset"] = _decode_subset(path, arrays["subset"], metadata["subset_names"])
    return arrays, sorted(header.keys() - set(NAMES))


def _decode_subset(path, codes, text):
    try:
        names = np.array(json.loads(text))
        if names.ndim != 1 or names.dtype.kind != "U" or codes.min(initial=0) < 0:
            raise IndexError
        return names[codes]
    except (ValueError, IndexError):
        raise InputError(
            f"{path}: expected subset to hold positions in the JSON list subset_names of its metadata, found "
            f"{text[:60]!r} for {codes.dtype} {codes.min(initial=0)} to {codes.max(initial=0)}"
        ) from None


def _read_parquet(path):
    """As _read_npz; the columns are filled block by block, each in its own dtype."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{path}: expected pyarrow to read .parquet, found none; install it, or save .npz"
        ) from None
    arrays, done = {}, 0
    try:
        with parquet.ParquetFile(path) as file:
            found, n = file.schema_arrow.names, file.metadata.num_rows
            columns = [name for name in NAMES if name in found]
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                for name in columns:
                    block = _parquet_block(path, name, batch.column(name), done)
                    if name not in arrays:
                        arrays[name] = np.empty((n, *block.shape[1:]), block.dtype)
                    elif arrays[name].shape[1:] != block.shape[1:]:
                        raise _ragged(path, name, done, arrays[name].shape[1:], block.shape[1:])
                    elif (
                        block.dtype.kind == "U" and block.itemsize > arrays[name].itemsize
                    ):  # longer names than before
                        arrays[name] = arrays[name].astype(block.dtype)
                    arrays[name][done : done + len(block)] = block
                done += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, "a whole .parquet file", error) from None
    if n == 0:
        raise InputError(f"{path}: expected at least one pair, found no rows")
    return arrays, sorted(set(found) - set(NAMES))


def _parquet_block(path, name, column, start):
    """A block of a column, whose first row is row `start` of the file, as an array: (rows, lengths of its lists)."""
    import pyarrow.compute
    from pyarrow import types

    shape, values_per_row = [len(column)], 1
    while True:
        if column.null_count:
            row = (
                start
                + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))) // values_per_row
            )
            raise InputError(
                f"{path}: expected {name} in every row, found null in row {row}; drop the row or fill it"
            )
        if not (
            types.is_list(column.type)
            or types.is_large_list(column.type)
            or types.is_fixed_size_list(column.type)
        ):
            break
        sizes = pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False)
        odd = int(np.argmax(sizes != sizes[0]))
        if sizes[odd] != sizes[0]:
            raise _ragged(
                path, name, start + odd // values_per_row, (int(sizes[0]),), (int(sizes[odd]),)
            )
        shape.append(int(sizes[0]))
        values_per_row *= shape[-1]
        column = column.flatten()
        if not len(column):
            break
    numeric = (
        types.is_floating(column.type)
        or types.is_integer(column.type)
        or types.is_boolean(column.type)
    )
    values = column.to_numpy(zero_copy_only=False) if numeric else np.array(column.to_pylist())
    return values.reshape(shape)


def _ragged(path, name, row, expected, found):
    return InputError(
        f"{path}: expected {name} of one length in every row, {expected}, found {found} in row {row}"
    )


def _unreadable(path, expected, error):
    reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    return InputError(
        f"{path}: expected {expected}, found an unreadable one ({reason}); make it again"
    )


# ------------------------------------------------------------------------------------------- checks


def _side_names(arrays):
    return (
        ("embeddings (chosen)", "embeddings (rejected)")
        if "embeddings" in arrays
        else ("chosen", "rejected")
    )


def _sides(path, arrays, others):
    """[chosen (n, D), rejected (n, D)]; InputError on another shape or dtype, or on no pairs."""
    if "embeddings" in arrays and not {"chosen", "rejected"} & arrays.keys():
        array = arrays["embeddings"]
        _check_floats(path, "embeddings", array, "(n, 2, D), chosen then rejected", 3)
        if array.shape[1] != 2:
            raise InputError(
                f"{path}: expected embeddings of shape (n, 2, D), chosen then rejected, found {array.shape}; "
                "one row holds the two responses of a pair"
            )
        return [array[:, 0], array[:, 1]]
    if "embeddings" in arrays or not {"chosen", "rejected"} <= arrays.keys():
        found = ", ".join([*arrays, *others]) or "nothing"
        raise InputError(
            f"{path}: expected either embeddings (n, 2, D) or chosen and rejected (n, D), found {found}"
        )
    for name in ("chosen", "rejected"):
        _check_floats(path, name, arrays[name], "(n, D)", 2)
    if arrays["chosen"].shape != arrays["rejected"].shape:
        raise InputError(
            f"{path}: expected rejected of shape {arrays['chosen'].shape} as chosen, found {arrays['rejected'].shape}; "
            "row i of either is pair i"
        )
    return [arrays["chosen"], arrays["rejected"]]


def _check_floats(path, name, array, axes, rank):
    if array.ndim != rank or array.dtype.name not in DTYPES:
        raise InputError(
            f"{path}: expected {name} of shape {axes} and dtype {' / '.join(DTYPES)}, found {array.shape} of "
            f"{array.dtype.name}"
        )
    if 0 in array.shape:
        raise InputError(
            f"{path}: expected at least one pair and one dimension, found {name} of shape {array.shape}"
        )


def _row_digests(path, name, array):
    """(n,) digest of every row, equal for equal rows; InputError at the first that is not finite. In bounded memory."""
    step = max(1, BLOCK_BYTES // (4 * array.shape[1]))
    digests = []
    for start in range(0, len(array), step):
        block = np.asarray(array[start : start + step])
        finite = np.abs(block) <= LARGEST
        if not finite.all():
            row, column = np.unravel_index(np.argmin(finite), finite.shape)
            raise InputError(
                f"{path}: expected finite numbers, found {block[row, column]} in row {start + int(row)} of {name}; "
                "embed that text again"
            )
        block = np.ascontiguousarray(block, np.float32) + np.float32(
            0
        )  # -0.0 and 0.0 are one number
        digests += [hashlib.blake2b(row, digest_size=16).digest() for row in block]
    return np.array(digests, "S16")


def _names(path, name, array):
    """(n,) of text or whole numbers."""
    array = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else np.asarray(array)
    if array.ndim != 1 or array.dtype.kind not in "Uiu":
        raise InputError(
            f"{path}: expected {name} of shape (n,), text or whole numbers, found {array.shape} of {array.dtype}"
        )
    return array


def _ties(path, array):
    if array.ndim != 1 or not np.isin(array, (0, 1)).all():
        raise InputError(
            f"{path}: expected ties of shape (n,), True or False, found {array.shape} of {array.dtype}"
        )
    return np.asarray(array, bool)


def _lengths(path, array):
    if (
        array.ndim != 2
        or array.shape[1] != 2
        or array.dtype.kind not in "iuf"
        or not (np.isfinite(array).all())
    ):
        raise InputError(
            f"{path}: expected length_chars of shape (n, 2), chosen then rejected, all finite, found {array.shape} of "
            f"{array.dtype}"
        )
    return np.asarray(array, float)


# -------------------------------------------------------------------------------------------- links


def link(n, keys):
    """(n,) group numbers of n rows: rows that have a key in common, directly or through other rows, are one group.

    keys: arrays of n, 2n, ... keys, one name space each; key i belongs to row i modulo n. The
    groups are the connected components of the graph of rows and keys, numbered by their first row.
    """
    rows, nodes, size = [np.arange(0)], [np.arange(0)], n
    for column in keys:
        found, key = np.unique(column, return_inverse=True)
        rows.append(np.arange(len(column)) % n)
        nodes.append(size + key)
        size += len(found)
    rows, nodes = np.concatenate(rows), np.concatenate(nodes)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, nodes)), shape=(size, size))
    labels = connected_components(graph, directed=False)[1][:n]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _n_linked(groups):
    """How many rows share their group with another row."""
    return int((np.bincount(groups)[groups] > 1).sum())
