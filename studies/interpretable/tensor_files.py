"""Files of named arrays (.safetensors): memory-mapped when read, streamed when written.

Memory does not grow with the size of the arrays, and equal content gives equal bytes.
"""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from rewardlib import artifacts
from rewardlib.data.embeddings import BLOCK_BYTES
from rewardlib.errors import InputError

DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I64": np.int64}
LONGEST_HEADER = 100_000_000  # bytes; readers of the format refuse a longer header


def rows_per_block(array: np.ndarray) -> int:
    """Number of rows of `array`, at least 1, that fill BLOCK_BYTES as float32."""
    return max(1, BLOCK_BYTES // (4 * max(1, int(np.prod(array.shape[1:])))))


def map_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: memory-mapped array}, {metadata key: text}) of a .safetensors file.

    InputError where the file is damaged or holds an array of another type than DTYPES.
    """
    try:
        with safe_open(path, "np") as file:  # raises unless header and file size agree
            file.keys()
        with open(path, "rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: expected a complete .safetensors file, found: {error}; write the file again"
        ) from None
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise InputError(
                f"{path}: {name}: expected one of {', '.join(DTYPES)}, found {entry['dtype']}; "
                "convert the array"
            )
        layout = {"dtype": DTYPES[entry["dtype"]], "shape": tuple(entry["shape"])}
        if 0 in layout["shape"]:
            arrays[name] = np.empty(**layout)  # an array without elements cannot be mapped
        else:
            offset = 8 + header_size + entry["data_offsets"][0]
            arrays[name] = np.memmap(path, mode="r", offset=offset, **layout)
    return arrays, metadata


def write_tensors(path: Path, tensors: dict, metadata: dict[str, str]) -> None:
    """Write arrays and metadata as a .safetensors file, atomically and in blocks of rows.

    tensors: {name: list of arrays that are concatenated along the first axis, or None: not
    written}; metadata: {key: text}. The writer of the safetensors package does not stream, and
    keeps no order of the metadata; here the metadata are sorted, so that equal content gives equal
    bytes.
    """
    tensors = {
        name: [np.asanyarray(part) for part in parts]
        for name, parts in tensors.items()
        if parts is not None
    }
    type_names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name, parts in tensors.items():
        begin, end = end, end + sum(part.nbytes for part in parts)
        header[name] = {
            "dtype": type_names[parts[0].dtype],
            "shape": [sum(map(len, parts)), *parts[0].shape[1:]],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the arrays to 8 bytes
    if len(text) > LONGEST_HEADER:
        raise InputError(
            f"{path}: expected ids and names of at most {LONGEST_HEADER} bytes, found {len(text)}; "
            "use shorter ids"
        )
    with artifacts.atomic(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in (part for parts in tensors.values() for part in parts):
            step = rows_per_block(part)
            for start in range(0, len(part), step):
                file.write(np.ascontiguousarray(part[start : start + step]).tobytes())
