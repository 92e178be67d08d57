"""Reader of human preference pairs: one file with the embeddings of both responses of each pair.

embeddings         (n, 2, D) chosen, then rejected; or two arrays chosen (n, D) and rejected (n, D);
                   float16, float32 or float64
prompt_ids         (n,) whole numbers or text, equal for pairs on one prompt        optional
prompt_embeddings  (n, P) equal for pairs on one prompt                             optional
subset             (n,) names                                                       optional
ties               (n,) True where neither response was preferred                   optional
length_chars       (n, 2) characters of the chosen and of the rejected response     optional

.npz          memory-mapped if np.savez wrote the file, read whole if np.savez_compressed did
.safetensors  memory-mapped; the format holds no text, so subset is (n,) positions in the JSON list
              "subset_names" of the metadata
.parquet      one row per pair, embeddings as lists of fixed or variable size; read in blocks; needs
              pyarrow
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
    """n pairs of responses; response 0 is preferred to response 1, except in ties.

    responses: the pairs as n prompts with two responses each. Their rewards are 1 and 0, in a tie
    0.5 and 0.5; their groups are equal for pairs that share a prompt or an answer, directly or
    through other pairs. subset: (n,) names, or None. ties: (n,) bool. about: summary of the file as
    a JSON-able dict, for records and for `describe`.
    """

    responses: Responses
    subset: np.ndarray | None
    ties: np.ndarray
    about: dict

    def __len__(self) -> int:
        return len(self.ties)


def load(path: Path | str) -> HumanPairs:
    """The checked preference pairs of one file; the top of this module describes the formats.

    Raises InputError.
    """
    path = Path(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise InputError(
            f"{path}: expected a file named {', '.join(readers)}, "
            f"found {path.suffix or 'no extension'}; save the pairs in one of these formats"
        )
    if not path.is_file():
        raise InputError(f"{path}: no such file of preference pairs; check the path")
    arrays, unknown_names = readers[path.suffix.lower()](path)
    sides = _sides(path, arrays, unknown_names)
    n = len(sides[0])
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != n:
            raise InputError(
                f"{path}: expected {n} rows of {name}, one for each pair, found shape "
                f"{array.shape}; save all arrays from the same pairs"
            )
    side_names = _side_names(arrays)
    answers = np.concatenate(
        [_row_digests(path, name, side) for name, side in zip(side_names, sides, strict=True)]
    )
    prompts = _prompt_keys(path, arrays)
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
        "unused_names": sorted(unknown_names),
    }
    rewards = np.where(ties[:, None], 0.5, [1.0, 0.0])
    lengths = _lengths(path, arrays["length_chars"]) if "length_chars" in arrays else None
    responses = Responses(sides, rewards, lengths, groups, {path.name: artifacts.sha256(path)})
    subset = _names(path, "subset", arrays["subset"]).astype(str) if "subset" in arrays else None
    return HumanPairs(responses, subset, ties, about)


def describe(about: dict) -> list[str]:
    """Lines to print about a file of pairs. about: the summary in HumanPairs."""
    linked, by_prompt = about["n_linked"], about["n_linked_by_prompt"]
    lines = [
        f"{about['n']} preference pairs x {about['dimensions']} dimensions, "
        f"{about['n_ties']} of them ties",
        f"{linked} pairs linked to others, {by_prompt} by their prompt, {linked - by_prompt} by an "
        f"answer alone: {about['n_groups']} groups, the largest of {about['largest_group']} pairs; "
        "a split never divides a group",
    ]
    if not about["prompts_told_by"]:
        lines.append(
            "warning: the file has neither prompt_ids nor prompt_embeddings: a split may put pairs "
            "on the same prompt on both sides"
        )
    if same := about["n_same_responses"]:
        lines.append(
            f"pairs whose two embeddings are identical: {same}; no model can order them, so each "
            "counts as half right"
        )
    if about["unused_names"]:
        lines.append(f"not used: {', '.join(about['unused_names'])}; known: {', '.join(NAMES)}")
    return lines


# ------------------------------------------------------------------------------------------ formats


def _read_npz(path):
    """({known name: array}, [unknown names]) of an .npz file, uncompressed arrays memory-mapped."""
    arrays, unknown_names = {}, []
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in NAMES:
                    arrays[name] = _npz_array(path, archive, member)
                else:
                    unknown_names.append(name)
    except (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, "a whole .npz file of numbers and text", error) from None
    return arrays, unknown_names


def _npz_array(path, archive, member):
    """One array of an .npz archive: memory-mapped if stored uncompressed, else read."""
    with archive.open(member) as file:
        if member.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(file, allow_pickle=False)
        if np.lib.format.read_magic(file) == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        npy_header_size = file.tell()
    if dtype.hasobject:
        raise ValueError("Object arrays are pickled; save text as np.array(names, dtype=str)")
    if 0 in shape:
        return np.empty(shape, dtype)
    # A member of a zip file is 30 bytes, then its name and its extra field (two sizes, at byte 26),
    # then its data. The central directory may give another size of the extra field.
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)
        start = member.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
    return np.memmap(path, dtype, "r", start + npy_header_size, shape, "F" if fortran else "C")


def _read_safetensors(path):
    """({known name: array}, [unknown names]) of a .safetensors file, floats memory-mapped.

    safe_open checks the header against the file but returns copies, hence the own memory map.
    """
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
                        f"{path}: expected {name} of dtype {' / '.join(DTYPES)}, found "
                        f"{entry['dtype']}; save the array as float16 or float32"
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
    """Names (n,) of the subsets from their positions (n,) in `text`, a JSON list of names."""
    try:
        names = np.array(json.loads(text))
        if names.ndim != 1 or names.dtype.kind != "U" or codes.min(initial=0) < 0:
            raise IndexError
        return names[codes]
    except (ValueError, IndexError):
        raise InputError(
            f"{path}: expected subset to hold positions in the JSON list subset_names of the "
            f"metadata, found {codes.dtype} positions {codes.min(initial=0)} to "
            f"{codes.max(initial=0)} and the list {text[:60]!r}"
        ) from None


def _read_parquet(path):
    """({known name: array}, [unknown names]) of a .parquet file, read in blocks of rows.

    Each array has the dtype of its column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f"{path}: pyarrow, which reads .parquet, is not installed; install it, or save .npz"
        ) from None
    arrays, start = {}, 0
    try:
        with parquet.ParquetFile(path) as file:
            names, n = file.schema_arrow.names, file.metadata.num_rows
            columns = [name for name in NAMES if name in names]
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                for name in columns:
                    block = _parquet_block(path, name, batch.column(name), start)
                    if name not in arrays:
                        arrays[name] = np.empty((n, *block.shape[1:]), block.dtype)
                    array = arrays[name]
                    if array.shape[1:] != block.shape[1:]:
                        raise _ragged(path, name, start, array.shape[1:], block.shape[1:])
                    if block.dtype.kind == "U" and block.itemsize > array.itemsize:
                        # NumPy would cut names that are longer than those of the first block
                        array = arrays[name] = array.astype(block.dtype)
                    array[start : start + len(block)] = block
                start += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, "a whole .parquet file", error) from None
    if n == 0:
        raise InputError(f"{path}: expected at least one pair, found no rows")
    return arrays, sorted(set(names) - set(NAMES))


def _parquet_block(path, name, column, start):
    """One block of a column as an array, (rows, lengths of the lists in them).

    start: number of the first row of the block in the file. Raises InputError for null and for
    lists of different lengths.
    """
    import pyarrow.compute
    from pyarrow import types

    shape, values_per_row = [len(column)], 1
    # each turn checks and removes one level of lists, until the column holds plain values
    while True:
        if column.null_count:
            position = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise InputError(
                f"{path}: expected {name} in every row, found null in row "
                f"{start + position // values_per_row}; drop the row or fill in the value"
            )
        if not (
            types.is_list(column.type)
            or types.is_large_list(column.type)
            or types.is_fixed_size_list(column.type)
        ):
            break
        lengths = pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False)
        length, odd = int(lengths[0]), int(np.argmax(lengths != lengths[0]))
        if lengths[odd] != length:
            row = start + odd // values_per_row
            raise _ragged(path, name, row, (length,), (int(lengths[odd]),))
        shape.append(length)
        values_per_row *= length
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
    """InputError for a row whose list has another length than those before."""
    return InputError(
        f"{path}: expected {name} of the same length in every row, {expected}, "
        f"found {found} in row {row}"
    )


def _unreadable(path, expected, error):
    """InputError for a file that its format's reader refused with `error`."""
    reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    return InputError(
        f"{path}: expected {expected}, found a file that cannot be read ({reason}); make it again"
    )


# ------------------------------------------------------------------------------------------- checks


def _side_names(arrays):
    """How error messages name the chosen and the rejected embeddings."""
    if "embeddings" in arrays:
        return "embeddings (chosen)", "embeddings (rejected)"
    return "chosen", "rejected"


def _sides(path, arrays, unknown_names):
    """[chosen (n, D), rejected (n, D)]; InputError for another shape or dtype, or for no pairs."""
    if "embeddings" in arrays and not {"chosen", "rejected"} & arrays.keys():
        array = arrays["embeddings"]
        _check_floats(path, "embeddings", array, "(n, 2, D), chosen then rejected", 3)
        if array.shape[1] != 2:
            raise InputError(
                f"{path}: expected embeddings of shape (n, 2, D), chosen then rejected, "
                f"found {array.shape}; one row holds the two responses of a pair"
            )
        return [array[:, 0], array[:, 1]]
    if "embeddings" in arrays or not {"chosen", "rejected"} <= arrays.keys():
        names = ", ".join([*arrays, *unknown_names]) or "no arrays"
        raise InputError(
            f"{path}: expected either embeddings (n, 2, D) or chosen and rejected (n, D), "
            f"found {names}"
        )
    for name in ("chosen", "rejected"):
        _check_floats(path, name, arrays[name], "(n, D)", 2)
    if arrays["chosen"].shape != arrays["rejected"].shape:
        raise InputError(
            f"{path}: expected rejected of the shape of chosen, {arrays['chosen'].shape}, found "
            f"{arrays['rejected'].shape}; row i of either array belongs to pair i"
        )
    return [arrays["chosen"], arrays["rejected"]]


def _prompt_keys(path, arrays):
    """{name: (n,) keys} of the arrays that tell which pairs share a prompt."""
    keys = {}
    if "prompt_ids" in arrays:
        keys["prompt_ids"] = _names(path, "prompt_ids", arrays["prompt_ids"])
    if "prompt_embeddings" in arrays:
        embeddings = arrays["prompt_embeddings"]
        _check_floats(path, "prompt_embeddings", embeddings, "(n, dimensions)", 2)
        keys["prompt_embeddings"] = _row_digests(path, "prompt_embeddings", embeddings)
    return keys


def _check_floats(path, name, array, axes, rank):
    """InputError unless `array` has `rank` axes, none of them empty, and a dtype of DTYPES."""
    if array.ndim != rank or array.dtype.name not in DTYPES:
        raise InputError(
            f"{path}: expected {name} of shape {axes} and dtype {' / '.join(DTYPES)}, "
            f"found {array.shape} of {array.dtype.name}"
        )
    if 0 in array.shape:
        raise InputError(
            f"{path}: expected at least one pair and one dimension, "
            f"found {name} of shape {array.shape}"
        )


def _row_digests(path, name, array):
    """Digests (n,) of the rows, equal for equal rows, whatever the float type. Reads in blocks.

    Raises InputError at the first row with a value that is not finite.
    """
    step = max(1, BLOCK_BYTES // (4 * array.shape[1]))
    digests = []
    for start in range(0, len(array), step):
        block = np.asarray(array[start : start + step])
        finite = np.abs(block) <= LARGEST
        if not finite.all():
            row, column = np.unravel_index(np.argmin(finite), finite.shape)
            raise InputError(
                f"{path}: expected finite numbers, found {block[row, column]} in row "
                f"{start + int(row)} of {name}; embed that text again"
            )
        # adding 0 turns -0.0 into 0.0: equal numbers must have equal bytes
        block = np.ascontiguousarray(block, np.float32) + np.float32(0)
        digests += [hashlib.blake2b(row, digest_size=16).digest() for row in block]
    return np.array(digests, "S16")


def _names(path, name, array):
    """The (n,) array of text or whole numbers, bytes decoded as UTF-8; else InputError."""
    array = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else np.asarray(array)
    if array.ndim != 1 or array.dtype.kind not in "Uiu":
        raise InputError(
            f"{path}: expected {name} of shape (n,), text or whole numbers, "
            f"found {array.shape} of {array.dtype}"
        )
    return array


def _ties(path, array):
    """The (n,) array of ties as bool; InputError for another shape or other values."""
    if array.ndim != 1 or not np.isin(array, (0, 1)).all():
        raise InputError(
            f"{path}: expected ties of shape (n,), True or False, "
            f"found {array.shape} of {array.dtype}"
        )
    return np.asarray(array, bool)


def _lengths(path, array):
    """The (n, 2) lengths in characters as float64; InputError for another shape or dtype."""
    is_two_columns = array.ndim == 2 and array.shape[1] == 2 and array.dtype.kind in "iuf"
    if not is_two_columns or not np.isfinite(array).all():
        raise InputError(
            f"{path}: expected length_chars of shape (n, 2), chosen then rejected, all finite, "
            f"found {array.shape} of {array.dtype}"
        )
    return np.asarray(array, float)


# -------------------------------------------------------------------------------------------- links


def link(n: int, keys: list[np.ndarray]) -> np.ndarray:
    """Group numbers (n,) of n rows: rows that share a key, directly or through others, are a group.

    keys: arrays of n, 2n, ... keys; key i belongs to row i modulo n, and keys of different arrays
    never count as shared. The groups are the connected components of the graph of rows and keys,
    numbered in the order of their first rows.
    """
    rows, nodes, n_nodes = [np.arange(0)], [np.arange(0)], n
    for column in keys:
        distinct, key = np.unique(column, return_inverse=True)
        rows.append(np.arange(len(column)) % n)
        nodes.append(n_nodes + key)
        n_nodes += len(distinct)
    rows, nodes = np.concatenate(rows), np.concatenate(nodes)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, nodes)), shape=(n_nodes, n_nodes))
    labels = connected_components(graph, directed=False)[1][:n]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _n_linked(groups):
    """Number of rows whose group holds another row as well."""
    return int((np.bincount(groups)[groups] > 1).sum())
