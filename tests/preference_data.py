"""Recorded preference pairs that the tests share."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file


def rng(seed=0):
    return np.random.default_rng(seed)


def write(folder, kind, content):
    """Path of a file of this kind with the arrays of `content`; safetensors hold names as codes."""
    kind, *how = kind.split()
    path = Path(folder) / f"pairs.{kind}"
    if kind == "npz":
        (np.savez_compressed if how else np.savez)(path, **content)
    elif kind == "safetensors":
        coded, metadata = dict(content), None
        if "subset" in coded:
            names, coded["subset"] = np.unique(coded["subset"], return_inverse=True)
            metadata = {"subset_names": json.dumps(names.tolist())}
        save_file(
            {name: np.ascontiguousarray(array) for name, array in coded.items()}, path, metadata
        )
    else:
        write_parquet(path, content, bool(how))
    return path


def write_parquet(path, content, fixed=False):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    def column(array):
        nested = pa.array(array.ravel())
        for size in array.shape[:0:-1]:
            if fixed:
                nested = pa.FixedSizeListArray.from_arrays(nested, size)
            else:
                ends = np.arange(len(nested) // size + 1) * size
                nested = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), nested)
        return nested

    pyarrow.parquet.write_table(
        pa.table({name: column(array) for name, array in content.items()}), path
    )


def strict_json(content):
    return json.loads(json.dumps(content, allow_nan=False))
