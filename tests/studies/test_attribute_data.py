"""attribute_data.py: the prepared file and its shards, refusals, and blocks in bounded memory."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from rewardlib.errors import InputError
from studies.interpretable import attribute_data, tensor_files
from studies.interpretable.attribute_data import Rated

N, D = 6, 2
NAMES = ["helpful", "verbosity"]


def rated(pairs=False, n=N, dtype=np.float32, **more):
    """n rows whose values tell their position; labels in [0, 1], so that they suit pairs too."""
    shape = (n, 2, D) if pairs else (n, D)
    x = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    fields = {
        "embeddings": [x],
        "groups": attribute_data.groups_of([f"prompt {i % 3}" for i in range(n)]),
        "ids": [f"row {i}" for i in range(n)],
        "prompt_embeddings": [x.reshape(n, -1)[:, :1].copy()],
        "labels": (np.arange(n * 2).reshape(n, 2) / (2 * n)).astype(np.float32),
        "attributes": NAMES,
        "subsets": [f"subset {i % 2}" for i in range(n)],
        "source": {"producer": "test", "dataset": "d"},
        "left_out": ["long"],
    }
    return Rated(**{**fields, **more})


def part_of(data, rows):
    def cut(values):
        return values if values is None else values[rows]

    return replace(
        data,
        embeddings=[data.embeddings[0][rows]],
        prompt_embeddings=[data.prompt_embeddings[0][rows]],
        groups=data.groups[rows],
        ids=data.ids[rows],
        labels=cut(data.labels),
        subsets=cut(data.subsets),
    )


def write_shards(folder, data, n=3, stem="data"):
    folder.mkdir(exist_ok=True)
    ends = np.linspace(0, len(data.ids), n + 1).astype(int)
    paths = [folder / attribute_data.shard_name(stem, idx, n) for idx in range(n)]
    for path, start, end in zip(paths, ends[:-1], ends[1:], strict=True):
        part = part_of(data, slice(start, end))
        attribute_data.write(
            path, replace(part, left_out=data.left_out if path == paths[0] else [])
        )
    return paths


def assert_same(actual, expected):
    everything = np.arange(len(expected.ids))
    np.testing.assert_array_equal(actual.take(everything), expected.take(everything))
    np.testing.assert_array_equal(actual.groups, expected.groups)
    np.testing.assert_array_equal(actual.labels, expected.labels)
    for name in ("ids", "attributes", "subsets", "source", "left_out"):
        assert getattr(actual, name) == getattr(expected, name)


# --------------------------------------------------------------------------------- writing, reading


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_written_is_read(tmp_path, pairs, dtype):
    data = rated(pairs, dtype=dtype)
    attribute_data.write(tmp_path / "a.safetensors", data)
    loaded = attribute_data.read(tmp_path / "a.safetensors", labels=True, pairs=pairs)
    assert_same(loaded, data)
    assert loaded.shape == ((N, 2, D) if pairs else (N, D)) and loaded.is_pairs == pairs
    assert isinstance(loaded.embeddings[0], np.memmap) and loaded.embeddings[0].dtype == dtype
    assert loaded.take([1]).dtype == loaded.take_prompts([1]).dtype == np.float32
    assert list(loaded.digests) == ["a.safetensors"]


def test_the_file_is_one_of_safetensors_own(tmp_path):
    data = rated()
    attribute_data.write(tmp_path / "a.safetensors", data)
    tensors = load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(tensors["embeddings"], data.embeddings[0])
    np.testing.assert_array_equal(tensors["groups"], data.groups)
    metadata = tensor_files.map_tensors(tmp_path / "a.safetensors")[1]
    assert json.loads(metadata["left_out"]) == {"count": 1, "ids": ["long"]}
    save_file({**tensors}, tmp_path / "b.safetensors", metadata=metadata)
    assert_same(attribute_data.read(tmp_path / "b.safetensors"), data)


def test_equal_content_is_equal_bytes(tmp_path):
    for name in "ab":
        attribute_data.write(tmp_path / name, rated())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_optional_parts_may_be_absent(tmp_path):
    bare = rated(
        True, labels=None, attributes=[], subsets=None, prompt_embeddings=None, left_out=[]
    )
    attribute_data.write(tmp_path / "a", bare)
    loaded = attribute_data.read(tmp_path / "a", pairs=True)
    assert (
        loaded.labels is loaded.subsets is loaded.prompt_embeddings is None
        and loaded.left_out == []
    )


def test_missing_labels_stay_missing(tmp_path):
    labels = rated().labels
    labels[2:, 0] = np.nan
    attribute_data.write(tmp_path / "a", rated(labels=labels))
    np.testing.assert_array_equal(attribute_data.read(tmp_path / "a", labels=True).labels, labels)


def test_attributes_can_be_chosen_in_any_order(tmp_path):
    labels = rated().labels
    labels[:, 0] = np.nan
    attribute_data.write(tmp_path / "a", rated(labels=labels))
    loaded = attribute_data.read(tmp_path / "a", labels=True, attributes=["verbosity"])
    assert loaded.attributes == ["verbosity"] and (loaded.labels[:, 0] == labels[:, 1]).all()
    assert loaded.column("verbosity") == 0


def test_a_failed_write_leaves_the_old_file(tmp_path):
    attribute_data.write(tmp_path / "a", rated())
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(InputError):
        attribute_data.write(tmp_path / "a", rated(ids=["x"] * N))
    assert (tmp_path / "a").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------- take, blocks


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(sum), st.booleans(), st.data())
@settings(deadline=None)
def test_take_is_fancy_indexing_whatever_the_parts(sizes, pairs, data):
    array = rated(pairs, sum(sizes)).embeddings[0]
    split = replace(rated(pairs, sum(sizes)), embeddings=np.split(array, np.cumsum(sizes)[:-1]))
    rows = data.draw(st.lists(st.integers(0, sum(sizes) - 1), max_size=12))
    np.testing.assert_array_equal(split.take(rows), array[np.array(rows, int)])


@pytest.mark.parametrize("row", [-1, N])
def test_rows_that_do_not_exist(row):
    with pytest.raises(IndexError):
        rated().take([0, row])


@given(st.integers(1, 40), st.booleans(), st.data())
@settings(deadline=None)
def test_blocks_cover_the_rows_once_in_bounded_memory(block_bytes, pairs, data):
    prepared = rated(pairs)
    rows = np.array(data.draw(st.permutations(range(N)))[: data.draw(st.integers(1, N))])
    seen = np.full((len(rows), *prepared.shape[1:]), np.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "BLOCK_BYTES", block_bytes)
        for part, x in prepared.blocks(rows):
            assert (
                x.nbytes <= max(block_bytes, 4 * np.prod(prepared.shape[1:]))
                and np.isnan(seen[part]).all()
            )
            seen[part] = x
    np.testing.assert_array_equal(seen, prepared.embeddings[0][rows])


# ------------------------------------------------------------------------------------------- shards


def test_shards_are_one_file_in_the_order_of_their_numbers(tmp_path):
    data = rated()
    paths = write_shards(tmp_path / "shards", data)
    assert_same(attribute_data.read(tmp_path / "shards" / "data-*.safetensors"), data)
    for order in ([2, 0, 1], [1, 2, 0]):
        attribute_data.write(tmp_path / "merged", attribute_data.merge([paths[i] for i in order]))
        attribute_data.write(tmp_path / "whole", data)
        assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()


def test_numbers_are_ordered_as_numbers_and_a_shard_may_be_empty(tmp_path):
    data = rated(n=11)
    write_shards(tmp_path, data, n=12)
    assert_same(attribute_data.read(tmp_path / "*.safetensors"), data)


def test_a_missing_shard_is_named(tmp_path):
    paths = write_shards(tmp_path, rated())
    paths[1].unlink()
    message = (
        r"data-00001-of-00003\.safetensors is missing: expected 3 shards, found 2, without 1; "
        ".* --shard_idx 1"
    )
    for pattern in ("data-*.safetensors", "data-00000-of-00003.safetensors"):
        with pytest.raises(
            InputError,
            match=message if "*" in pattern else "is missing: expected 3 shards, found 1",
        ):
            attribute_data.read(tmp_path / pattern)


def test_the_same_shard_twice(tmp_path):
    paths = write_shards(tmp_path / "a", rated())
    with pytest.raises(
        InputError, match=r"expected each of the shards 0-2 of data once, found \[0, 1, 1, 2\]"
    ):
        attribute_data.merge([*paths, write_shards(tmp_path / "b", rated())[1]])


def test_a_number_beyond_the_last(tmp_path):
    paths = write_shards(tmp_path, rated())
    paths[2].rename(tmp_path / "data-00003-of-00003.safetensors")
    with pytest.raises(
        InputError, match=r"expected each of the shards 0-2 of data once, found \[0, 1, 3\]"
    ):
        attribute_data.read(tmp_path / "*.safetensors")


@pytest.mark.parametrize(
    ("stem", "n"), [("other", 3), ("data", 2)], ids=["another stem", "another number"]
)
def test_a_pattern_that_catches_other_data(tmp_path, stem, n):
    write_shards(tmp_path, rated())
    write_shards(tmp_path, rated(), n=n, stem=stem)
    with pytest.raises(
        InputError, match=r"expected one of the \d shards of data, as data-00000-of-0000\d"
    ):
        attribute_data.read(tmp_path / "*.safetensors")


def test_a_pattern_that_catches_the_merged_file(tmp_path):
    write_shards(tmp_path, rated())
    attribute_data.write(tmp_path / "data.safetensors", rated())
    with pytest.raises(
        InputError,
        match=r"expected shards named stem-00000-of-00002\.safetensors, found data\.safe",
    ):
        attribute_data.read(tmp_path / "data*")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"source": {"producer": "another"}},
            "expected source {.*} as in data-00000-of-00003.safetensors, found",
        ),
        ({"attributes": ["helpful", "length"]}, "expected attributes .* found"),
        ({"labels": None, "attributes": NAMES}, "expected labels True as in .* found False"),
        ({"subsets": None}, "expected subsets True as in .* found False"),
        (
            {"embeddings": [np.zeros((2, D + 1), np.float32)]},
            r"expected embeddings \('float32', 2\) .* 3\)",
        ),
        (
            {"embeddings": [np.zeros((2, D), np.float16)]},
            r"expected embeddings \('float32', 2\) .*'float16'",
        ),
        ({"ids": ["row 0", "x"]}, "ids: expected 6 different ids, found 'row 0' twice"),
    ],
    ids=["source", "attributes", "labels", "subsets", "dimensions", "dtype", "ids"],
)
def test_shards_of_different_data(tmp_path, change, message):
    paths = write_shards(tmp_path, rated())
    attribute_data.write(paths[1], replace(part_of(rated(), slice(2, 4)), **change))
    with pytest.raises(InputError, match=message):
        attribute_data.read(tmp_path / "*.safetensors")


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"embeddings": [np.zeros((N, 3, D), np.float32)]},
            r"expected \(n, D\) .* \(n, 2, D\) pairs, found \(6, 3",
        ),
        (
            {"embeddings": [np.zeros(N, np.float32)]},
            r"expected \(n, D\) rated responses or .* found \(6,\)",
        ),
        (
            {"embeddings": [np.zeros((N, D), int)]},
            "embeddings: expected float16 or float32, found int64",
        ),
        (
            {"embeddings": [np.zeros((N + 1, D), np.float32)]},
            r"groups: expected \(7,\) as the embeddings, found \(6",
        ),
        ({"groups": np.zeros(N, np.int32)}, r"groups: expected \(n,\) int64, found \(6,\) int32"),
        ({"groups": np.arange(N) - 1}, "groups: expected prompt numbers of at least 0, found -1"),
        (
            {"prompt_embeddings": [np.zeros((N - 1, D), np.float32)]},
            r"prompt_.*: expected \(6, D\), found \(5, 2",
        ),
        (
            {"labels": np.zeros((N - 1, 2), np.float32)},
            r"labels: expected \(6, 2\), a row for each .* found \(5, 2\)",
        ),
        (
            {"labels": np.zeros((N, 3), np.float32)},
            r"labels: expected \(6, 2\), .* column for each .* found \(6, 3\)",
        ),
        (
            {"labels": np.full((N, 2), np.inf, np.float32)},
            "expected finite .* found inf in row 0, helpful",
        ),
        (
            {"attributes": ["a", "a"]},
            r"attributes: expected different names, none empty, found \['a', 'a'\]",
        ),
        ({"attributes": ["a", " "]}, "attributes: expected different names, none empty"),
        ({"ids": ["x"] * N}, "ids: expected 6 different ids, found 'x' twice"),
        ({"ids": list(range(N))}, "ids: expected strings, found 0"),
        ({"ids": ["x"]}, "ids: expected 6, one for each row, found 1"),
        ({"subsets": ["x"]}, "subsets: expected 6, one for each row, found 1"),
    ],
)
def test_content_that_does_not_fit(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        attribute_data.write(tmp_path / "a", rated(**change))


@pytest.mark.parametrize("bad", [-0.1, 1.1])
def test_labels_of_pairs_are_probabilities(tmp_path, bad):
    labels = rated().labels
    labels[3, 1] = bad
    with pytest.raises(
        InputError,
        match=rf"probabilities in \[0, 1\] for pairs, .* found {bad:g}\S* in row 3, verb",
    ):
        attribute_data.write(tmp_path / "a", rated(True, labels=labels))
    attribute_data.write(tmp_path / "a", rated(labels=labels))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("name", ["embeddings", "prompt_embeddings"])
def test_a_row_that_is_not_finite_is_named(tmp_path, bad, pairs, name, monkeypatch):
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 32)
    data = rated(pairs)
    getattr(data, name)[0][4, ..., -1] = bad
    with pytest.raises(
        InputError, match=rf"a: {name}: expected finite .* NaN or inf in row 4 \('row 4'\)"
    ):
        attribute_data.write(tmp_path / "a", data)


def test_a_row_that_is_not_finite_in_a_file(tmp_path):
    attribute_data.write(tmp_path / "a", rated(embeddings=[np.full((N, D), 1.0, np.float32)]))
    content = (
        (tmp_path / "a")
        .read_bytes()
        .replace(np.float32(1).tobytes() * 2, np.float32(np.nan).tobytes() * 2, 1)
    )
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match="expected finite numbers, found NaN or inf in row 0"):
        attribute_data.read(tmp_path / "a")


def test_pairs_where_ratings_are_asked_for_and_the_other_way_round(tmp_path):
    attribute_data.write(tmp_path / "pairs", rated(True))
    attribute_data.write(tmp_path / "ratings", rated())
    with pytest.raises(
        InputError, match=r"expected embeddings \(n, D\) rated responses, found \(6, 2, 2\): pairs"
    ):
        attribute_data.read(tmp_path / "pairs", pairs=False)
    with pytest.raises(
        InputError,
        match=r"expected embeddings \(n, 2, D\) pairs, .* found \(6, 2\): rated responses",
    ):
        attribute_data.read(tmp_path / "ratings", pairs=True)


def test_labels_that_are_asked_for(tmp_path):
    attribute_data.write(tmp_path / "none", rated(labels=None))
    with pytest.raises(InputError, match="none: no labels; prepare the data with labels"):
        attribute_data.read(tmp_path / "none", labels=True)
    labels = rated().labels
    labels[:, 1] = np.nan
    attribute_data.write(tmp_path / "empty", rated(labels=labels))
    with pytest.raises(
        InputError,
        match="empty: no labels for verbosity; leave these attributes out",
    ):
        attribute_data.read(tmp_path / "empty", labels=True)


def test_an_attribute_that_is_not_there(tmp_path):
    attribute_data.write(tmp_path / "a", rated())
    message = "expected an attribute among helpful, verbosity, found 'safety'"
    with pytest.raises(InputError, match=message):
        attribute_data.read(tmp_path / "a", attributes=["helpful", "safety"])
    with pytest.raises(InputError, match=message):
        attribute_data.read(tmp_path / "a").column("safety")
    with pytest.raises(InputError, match="expected different names"):
        attribute_data.read(tmp_path / "a", attributes=["helpful", "helpful"])


def test_no_file_no_rows_and_other_files(tmp_path):
    with pytest.raises(
        InputError,
        match=r"no prepared file and no shards; studies/interpretable_prepare.py writes them",
    ):
        attribute_data.read(tmp_path / "nowhere.safetensors")
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(InputError, match=r"text: expected a complete \.safetensors file"):
        attribute_data.read(tmp_path / "text")
    save_file({"weights": np.zeros(3)}, tmp_path / "weights")
    with pytest.raises(InputError, match="expected a tensor 'embeddings', found weights"):
        attribute_data.read(tmp_path / "weights")
    save_file(
        {"embeddings": np.zeros((2, D), np.int8), "groups": np.zeros(2, int)}, tmp_path / "bytes"
    )
    with pytest.raises(
        InputError, match="embeddings: expected one of F16, F32, F64, I64, found I8"
    ):
        attribute_data.read(tmp_path / "bytes")
    attribute_data.write(tmp_path / "empty", part_of(rated(), slice(0, 0)))
    with pytest.raises(InputError, match="empty: no rows; 1 rows were left out as too long"):
        attribute_data.read(tmp_path / "empty")


@pytest.mark.parametrize("n_bytes", [0, 7, 100, -1])
def test_a_truncated_file(tmp_path, n_bytes):
    attribute_data.write(tmp_path / "a", rated())
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:n_bytes])
    with pytest.raises(InputError, match=r"a: expected a complete \.safetensors file, found"):
        attribute_data.read(tmp_path / "a")


def test_names_longer_than_readers_of_the_format_take(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "LONGEST_HEADER", 100)
    with pytest.raises(InputError, match="expected ids and names of at most 100 bytes, found"):
        attribute_data.write(tmp_path / "a", rated())


# ---------------------------------------------------------------------------------- prompts, splits


def test_equal_prompts_are_one_group_in_every_file():
    groups = attribute_data.groups_of(["a", "b", "a", "é"])
    assert groups[0] == groups[2] and len(set(groups)) == 3
    assert attribute_data.groups_of(["b"])[0] == groups[1]
    assert groups.dtype == np.int64 and groups.min() >= 0 and groups.max() < 2**53
    assert (
        groups[0] == 0x1957A379425032
    )  # of sha256("a"): another number would be another prompt in files of today


SHARES = {"fit": 0.5, "validation": 0.2, "reference": 0.0, "held_out": 0.3}


@given(st.lists(st.integers(1, 3), min_size=12, max_size=40), st.integers(0, 5))
@settings(deadline=None)
def test_a_prompt_is_in_one_part_and_every_row_is_in_one(sizes, seed):
    groups = np.random.default_rng(seed).permutation(np.repeat(1000 * np.arange(len(sizes)), sizes))
    rows_by_part = attribute_data.split_prompts(groups, SHARES, np.random.default_rng(seed))
    np.testing.assert_array_equal(
        np.sort(np.concatenate(list(rows_by_part.values()))), np.arange(len(groups))
    )
    parts = [set(groups[rows]) for rows in rows_by_part.values()]
    assert sum(map(len, parts)) == len(set(groups))
    assert not len(rows_by_part["reference"])


def test_the_parts_have_their_shares_and_follow_the_prompts():
    groups = np.repeat(np.arange(500), 4)
    rows_by_part = attribute_data.split_prompts(groups, SHARES, np.random.default_rng(0))
    assert [len(rows_by_part[name]) for name in SHARES] == [1000, 400, 0, 600]
    order = np.random.default_rng(1).permutation(len(groups))
    moved = attribute_data.split_prompts(groups[order], SHARES, np.random.default_rng(0))
    for name in SHARES:
        assert set(groups[order][moved[name]]) == set(groups[rows_by_part[name]])


def test_too_few_prompts_to_split():
    with pytest.raises(
        InputError, match=r"50% fit, 20% validation, .* found 2, which leaves none for validation"
    ):
        attribute_data.split_prompts(np.array([7, 7, 9, 9]), SHARES, np.random.default_rng(0))
