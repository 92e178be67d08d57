"""Files of recorded preference pairs: formats that come back, damage and misuse refused."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from preference_data import rng, strict_json, write
from safetensors.numpy import save_file

from rewardlib.data import pair_files
from rewardlib.errors import InputError

FORMATS = ["npz", "npz compressed", "safetensors", "parquet", "parquet fixed"]


def values(n=5, d=3):
    """Embeddings (n, 2, d), all different and exact in float16."""
    return np.arange(n * 2 * d, dtype=np.float32).reshape(n, 2, d) / 8 - 1


# ------------------------------------------------------------------------------------------ formats


@st.composite
def files(draw):
    n, d = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    emb = draw(arrays(dtype, (n, 2, d), elements=st.integers(-3, 3)))
    stacked = draw(st.booleans())
    content = {"embeddings": emb} if stacked else {"chosen": emb[:, 0], "rejected": emb[:, 1]}
    optional = {
        "prompt_ids": draw(arrays(np.int64, n, elements=st.integers(0, 3))),
        "prompt_embeddings": draw(arrays(np.float16, (n, 2), elements=st.integers(0, 1))),
        "subset": np.array(
            draw(st.lists(st.sampled_from(["a", "ümlaut", "long name"]), min_size=n, max_size=n))
        ),
        "ties": draw(arrays(bool, n)),
        "length_chars": draw(arrays(np.int32, (n, 2), elements=st.integers(0, 99))),
    }
    return emb, content | {
        name: optional[name] for name in draw(st.sets(st.sampled_from(sorted(optional))))
    }


@pytest.mark.parametrize("kind", FORMATS)
@given(case=files())
@settings(deadline=None, max_examples=40)
def test_every_format_comes_back(kind, case):
    emb, content = case
    with tempfile.TemporaryDirectory() as folder:
        found = pair_files.load(write(folder, kind, content))
        ties = content.get("ties", np.zeros(len(emb), bool))
        for side in (0, 1):
            np.testing.assert_array_equal(found.responses.embeddings[side], emb[:, side])
            assert found.responses.embeddings[side].dtype == emb.dtype
        assert found.responses.shape == emb.shape and len(found) == len(emb)
        np.testing.assert_array_equal(found.ties, ties)
        np.testing.assert_array_equal(
            found.responses.rewards[:, 0] - found.responses.rewards[:, 1], ~ties
        )
        for name, array in (("subset", found.subset), ("length_chars", found.responses.lengths)):
            if name in content:
                np.testing.assert_array_equal(array, content[name])
            else:
                assert array is None
        assert strict_json(found.about)["n_groups"] == len(set(found.responses.groups))


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_large_arrays_are_mapped_not_read(tmp_path, kind):
    found = pair_files.load(
        write(tmp_path, kind, {"embeddings": values(), "prompt_ids": np.arange(5)})
    )
    side = found.responses.embeddings[1]
    assert isinstance(side, np.memmap) and not side.flags.writeable
    np.testing.assert_array_equal(found.responses.take([3, 0], [1, 0]), values()[[3, 0], [1, 0]])


def test_parquet_blocks_fit_together_with_longer_names_later(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_files, "PARQUET_ROWS", 2)
    names = np.array(["a", "b", "much longer", "c", "d"])
    path = write(
        tmp_path, "parquet", {"embeddings": values(), "subset": names, "prompt_ids": names}
    )
    found = pair_files.load(path)
    np.testing.assert_array_equal(found.subset, names)
    np.testing.assert_array_equal(found.responses.embeddings[1], values()[:, 1])


def test_categories_of_pandas_are_names(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    sides = {name: pa.array(list(values()[:, i])) for i, name in enumerate(("chosen", "rejected"))}
    table = pa.table(sides | {"subset": pa.array(["a", "b", "a", "b", "b"]).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    assert pair_files.load(tmp_path / "pairs.parquet").subset.tolist() == ["a", "b", "a", "b", "b"]


def test_codes_without_names_are_names_and_bytes_are_text(tmp_path):
    save_file(
        {"embeddings": values(), "subset": np.array([2, 0, 1, 0, 0])},
        tmp_path / "pairs.safetensors",
    )
    assert pair_files.load(tmp_path / "pairs.safetensors").subset.tolist() == [
        "2",
        "0",
        "1",
        "0",
        "0",
    ]
    path = write(
        tmp_path,
        "npz",
        {"embeddings": values(), "prompt_ids": np.array([b"a", b"b", b"a", b"c", b"d"])},
    )
    assert pair_files.load(path).responses.groups.tolist() == [0, 1, 0, 2, 3]


def test_what_was_found_is_told(tmp_path):
    emb = values(4)
    emb[1, 0], emb[3, 1] = emb[0, 1], emb[3, 0]
    content = {"embeddings": emb, "ties": np.array([0, 1, 0, 0]), "prompt_id": np.arange(4)}
    lines = pair_files.describe(pair_files.load(write(tmp_path, "npz", content)).about)
    assert lines == [
        "4 preference pairs x 3 dimensions, 1 of them ties",
        "2 pairs linked to others, 0 by their prompt, 2 by an answer alone: 3 groups, the largest "
        "of 2 pairs; a split never divides a group",
        "warning: the file has neither prompt_ids nor prompt_embeddings: a split may put pairs on "
        "the same prompt on both sides",
        "pairs whose two embeddings are identical: 1; no model can order them, so each counts as "
        "half right",
        "not used: prompt_id; known: embeddings, chosen, rejected, prompt_embeddings, prompt_ids, "
        "subset, ties, length_chars",
    ]


# ----------------------------------------------------------------------------------------- refusals


def with_nan(array, *at):
    array = array.copy()
    array[at] = np.nan
    return array


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"embeddings": values()[:, 0]},
            r"expected embeddings of shape \(n, 2, D\), chosen then.*found \(5, 3\)",
        ),
        (
            {"embeddings": values(4).reshape(2, 4, 3)},
            r"expected embeddings of shape \(n, 2, D\).*found \(2, 4, 3\)",
        ),
        (
            {"chosen": values(), "rejected": values()},
            r"expected chosen of shape \(n, D\) and.*found \(5, 2, 3\)",
        ),
        (
            {"embeddings": np.ones((3, 2, 2), int)},
            r"dtype float16 / float32 / float64, found \(3, 2, 2\) of int64",
        ),
        (
            {"chosen": values()[:, 0]},
            r"either embeddings \(n, 2, D\) or chosen and rejected \(n, D\), found chosen$",
        ),
        (
            {"embeddings": values(), "chosen": values()[:, 0]},
            "either embeddings .* or chosen and rejected",
        ),
        (
            {"chosen": values()[:, 0], "rejected": values()[:, 0, :2]},
            r"rejected of the shape of chosen, \(5, 3\), found \(5, 2\)",
        ),
        (
            {"embeddings": with_nan(values(), 3, 1, 2)},
            r"found nan in row 3 of embeddings \(rejected\)",
        ),
        (
            {"embeddings": np.full((2, 2, 1), 1e300)},
            r"found 1e\+300 in row 0 of embeddings \(chosen\)",
        ),
        (
            {"embeddings": values(), "prompt_embeddings": with_nan(values(), 4)[:, 0]},
            "found nan in row 4 of prompt_embeddings",
        ),
        (
            {"embeddings": values(), "prompt_ids": np.arange(5) / 2},
            "text or whole numbers, found .* of float64",
        ),
        ({"embeddings": values(), "ties": np.arange(5)}, r"ties of shape \(n,\), True or False"),
        (
            {"embeddings": values(), "length_chars": np.arange(5)},
            r"length_chars of shape \(n, 2\).*found \(5,\)",
        ),
    ],
)
def test_bad_arrays_are_refused(tmp_path, kind, content, message):
    with pytest.raises(InputError, match=message):
        pair_files.load(write(tmp_path, kind, content))


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
# Not with parquet, where all columns have one length.
@pytest.mark.parametrize("name", ["prompt_ids", "prompt_embeddings", "ties", "length_chars"])
def test_another_number_of_rows_is_refused(tmp_path, kind, name):
    shape = {"prompt_embeddings": (4, 3), "length_chars": (4, 2)}.get(name, (4,))
    content = {
        "embeddings": values(),
        name: np.zeros(shape, np.float32 if name == "prompt_embeddings" else int),
    }
    with pytest.raises(
        InputError, match=rf"expected 5 rows of {name}, one for each pair, found shape \(4,"
    ):
        pair_files.load(write(tmp_path, kind, content))


@pytest.mark.parametrize("kind", FORMATS)
def test_no_pairs_are_refused(tmp_path, kind):
    with pytest.raises(InputError, match="expected at least one pair"):
        pair_files.load(write(tmp_path, kind, {"embeddings": values(1)[:0]}))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_refused(tmp_path, kind):
    path = write(tmp_path, kind, {"embeddings": rng().random((200, 2, 8))})
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(InputError, match=f"expected a whole .{kind.split()[0]} file"):
        pair_files.load(path)
    if kind.startswith("npz"):
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
        with pytest.raises(InputError, match="expected a whole .npz file"):
            pair_files.load(path)


@pytest.mark.parametrize("how", [np.savez, np.savez_compressed])
def test_nothing_is_unpickled(tmp_path, how):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "trap").touch, ())

    how(tmp_path / "pairs.npz", embeddings=values(2), subset=np.array(["a", Trap()], object))
    with pytest.raises(InputError, match=r"Object arrays .* (dtype=str|allow_pickle=False)"):
        pair_files.load(tmp_path / "pairs.npz")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pairs.npy", "expected a file named .npz, .safetensors, .parquet, found .npy"),
        ("pairs", "found no extension"),
        ("pairs.npz", "no such file of preference pairs; check the path"),
    ],
)
def test_other_files_are_refused(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        pair_files.load(tmp_path / name)


def test_bfloat16_is_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_tensors

    save_tensors(
        {"embeddings": torch.ones(3, 2, 2, dtype=torch.bfloat16)}, tmp_path / "pairs.safetensors"
    )
    with pytest.raises(InputError, match="found BF16; save the array as float16 or float32"):
        pair_files.load(tmp_path / "pairs.safetensors")


@pytest.mark.parametrize("codes", [[0, 1, 2], [0, -1, 1]])
def test_codes_without_a_name_are_refused(tmp_path, codes):
    content = {"embeddings": values(3), "subset": np.array(codes)}
    save_file(content, tmp_path / "pairs.safetensors", {"subset_names": '["a", "b"]'})
    with pytest.raises(
        InputError, match="expected subset to hold positions in the JSON list subset_names"
    ):
        pair_files.load(tmp_path / "pairs.safetensors")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            [[1.0, 2], [1], [1, 2]],
            r"chosen of the same length in every row, \(2,\), found \(1,\) in row 1",
        ),
        ([[1.0, 2], [3, 4], [1, 2, 3]], r"found \(3,\) in row 2"),
        ([[1.0, 2], None, [1, 2]], "expected chosen in every row, found null in row 1"),
        ([[1.0, 2], [3, 4], [1, None]], "expected chosen in every row, found null in row 2"),
    ],
)
@pytest.mark.parametrize("block", [1, 1024])
def test_gaps_in_a_parquet_column_are_refused(tmp_path, column, message, block, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    monkeypatch.setattr(pair_files, "PARQUET_ROWS", block)
    table = pa.table({"chosen": pa.array(column), "rejected": pa.array([[1.0, 2]] * 3)})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(InputError, match=message):
        pair_files.load(tmp_path / "pairs.parquet")


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path, "parquet", {"embeddings": values()})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        InputError,
        match="pyarrow, which reads .parquet, is not installed; install it, or save .npz",
    ):
        pair_files.load(path)
