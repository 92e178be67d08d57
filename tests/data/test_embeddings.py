"""embeddings.py: formats of DATA_DIR, refusals, and which files are read again."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convert_embeddings
import generate_demo_data
from rewardlib import artifacts
from rewardlib.data import embeddings
from rewardlib.errors import InputError
from rewardlib.llm import staging
from rewardlib.nets import mlp

N, D = 4, 2


def values(k, n=N, d=D):
    """Embeddings (k, n, d) of value 100 k + 10 n + d, so that each value shows its position."""
    return np.add.outer(np.add.outer(100.0 * np.arange(k), 10 * np.arange(n)), np.arange(d)).astype(
        np.float32
    )


def write_lines(path, lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write(folder, k=3, split="train", arrays=None, **more):
    """A DATA_DIR of K `arrays` (N, D) with rewards k + n / 10; more: other keys of the records."""
    folder.mkdir(exist_ok=True, parents=True)
    for i, array in enumerate(values(k) if arrays is None else arrays):
        embedding_file, reward_file = embeddings.file_names(split, i)
        np.save(folder / embedding_file, array)
        records = [
            {"reward": i + n / 10, **{key: column[n] for key, column in more.items()}}
            for n in range(len(array))
        ]
        write_lines(folder / reward_file, map(json.dumps, records))
    return folder


def write_manifest(folder):
    """Write the manifest that a writer of this data would write last."""
    files = {path.name: artifacts.describe_file(path) for path in sorted(folder.glob("*split_*"))}
    artifacts.write_json(
        folder / "manifest.json", {"producer": "generate_demo_data.py", "files": files}
    )
    return folder


def in_memory(arrays, **more):
    """Responses in memory."""
    n = len(arrays[0])
    fields = {
        "rewards": np.zeros((n, len(arrays))),
        "lengths": None,
        "groups": np.arange(n),
        "digests": {},
    }
    return embeddings.Responses(list(arrays), **{**fields, **more})


def forbid(monkeypatch, *names):
    def reads(path, *_):
        raise AssertionError(f"{path} was read")

    if "embeddings" in names:
        monkeypatch.setattr(embeddings, "inspect", reads)
    if "rewards" in names:
        monkeypatch.setattr(artifacts, "sha256", reads)


# ------------------------------------------------------------------------------------------ reading


def test_every_value_in_its_place(tmp_path):
    data = embeddings.load(write(tmp_path))
    assert data.shape == (N, 3, D)
    np.testing.assert_array_equal(np.stack(data.embeddings), values(3))
    np.testing.assert_array_equal(data.rewards, np.add.outer(np.arange(N) / 10, np.arange(3)))
    assert data.rewards.dtype == np.float64 and data.lengths is None
    assert data.groups.tolist() == list(range(N))
    assert data.digests == {path.name: artifacts.sha256(path) for path in tmp_path.glob("*split_*")}
    assert all(isinstance(array, np.memmap) for array in data.embeddings)


def test_split_10_comes_after_split_9(tmp_path):
    data = embeddings.load(write(tmp_path, k=12))
    assert data.rewards[0].tolist() == list(range(12))
    assert [int(array[0, 0]) for array in data.embeddings] == [100 * k for k in range(12)]


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    write(tmp_path)
    for name in (
        "EMBD-TRAIN-split_7.npy.tmp",
        "EMBD-TRAIN-split_x.npy",
        "old_rewards_split_9.json",
        "notes.txt",
    ):
        (tmp_path / name).write_text("?")
    assert embeddings.load(tmp_path).shape == (N, 3, D)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_types_and_orders(tmp_path, dtype, order):
    arrays = [np.asarray(array, dtype, order=order) for array in values(2)]
    data = embeddings.load(write(tmp_path, arrays=arrays))
    rows = data.take([0, 3, 1], [1, 0, 1])
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, values(2)[[1, 0, 1], [0, 3, 1]])
    assert data.digests["EMBD-TRAIN-split_1.npy"] == artifacts.sha256(
        tmp_path / "EMBD-TRAIN-split_1.npy"
    )


def test_train_and_test_are_told_apart(tmp_path):
    write(tmp_path, k=2)
    assert embeddings.load(tmp_path, "test") is None
    write(tmp_path, split="test", arrays=values(5, n=7))
    train, test = embeddings.load_pair(tmp_path)
    assert train.shape == (N, 2, D) and test.shape == (7, 5, D)
    assert embeddings.find_splits(tmp_path, "train") == [0, 1]


def test_lengths_are_of_the_response_else_the_given_ones(tmp_path):
    data = embeddings.load(
        write(tmp_path / "a", k=2, response=["", "ab", "é", "abc"], length=[9, 9, 9, 9])
    )
    assert data.lengths.tolist() == [[0, 0], [2, 2], [1, 1], [3, 3]]
    write(tmp_path / "b", k=2, length=[5, 6, 7, 8])
    write_lines(tmp_path / "b" / "rewards_split_1.json", ['{"reward": 1, "length": 9}'] * N)
    assert embeddings.load(tmp_path / "b").lengths.tolist() == [[5, 9], [6, 9], [7, 9], [8, 9]]


def test_lengths_are_unknown_when_one_response_has_none(tmp_path):
    write(tmp_path, k=2, response=["a", "b", "c", "d"])
    write_lines(
        tmp_path / "rewards_split_1.json",
        ['{"reward": 1, "response": "a"}'] * 3 + ['{"reward": 1}'],
    )
    assert embeddings.load(tmp_path).lengths is None


def test_equal_queries_are_one_group(tmp_path):
    data = embeddings.load(write(tmp_path, id=["a", "b", "c", "d"], query=["x", "y", "x", "z"]))
    assert data.groups[0] == data.groups[2]
    assert sorted(data.groups) == [0, 0, 1, 2]


def test_without_a_query_equal_ids_are_one_group(tmp_path):
    groups = embeddings.load(write(tmp_path, id=[5, 6, 6, 7])).groups
    assert groups[1] == groups[2] and sorted(groups) == [0, 1, 1, 2]


def test_line_separators_inside_a_response_do_not_end_its_line(tmp_path):
    """JSON strings may hold U+2028, U+0085 and similar; only a line feed ends a line of JSONL."""
    write(tmp_path, k=2)
    texts = ["a\u2028b", "a\u2029b", "a\u0085b", "plain"]
    lines = [json.dumps({"reward": 1.5, "response": text}, ensure_ascii=False) for text in texts]
    write_lines(tmp_path / "rewards_split_0.json", lines)
    write_lines(tmp_path / "rewards_split_1.json", lines)
    data = embeddings.load(tmp_path)
    assert data.lengths[:, 0].tolist() == [3, 3, 3, 5]


def test_windows_line_ends_and_a_missing_last_one(tmp_path):
    write(tmp_path, k=2)
    for k in range(2):
        (tmp_path / f"rewards_split_{k}.json").write_bytes(
            b'{"reward": 1}\r\n{"reward": 2}\r\n{"reward": 3}\r\n{"reward": 4}'
        )
    assert embeddings.load(tmp_path).rewards[:, 1].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "more",
    [
        '"score": NaN',
        '"score": -Infinity',
        '"query": "\\ud800"',
        f'"count": 1{"0" * 30}',
        '"score": 1e400',
    ],
    ids=["NaN", "infinity", "lone surrogate", "31 digits", "1e400"],
)
def test_json_of_a_wider_kind_is_accepted_beside_the_reward(tmp_path, more):
    """JSON as Python writes and reads it by default, in one of the files or in all of them."""
    write(tmp_path, k=2)
    lines = [f'{{"reward": {n}.5, {more}}}' for n in range(N)]
    for name in ("rewards_split_0.json", "rewards_split_1.json"):
        write_lines(tmp_path / name, lines)
        data = (
            embeddings.load(tmp_path) if "query" not in more or name.endswith("_1.json") else None
        )
    assert data.rewards.tolist() == [[n + 0.5] * 2 for n in range(N)]


def test_a_lone_surrogate_is_one_character(tmp_path):
    write(tmp_path, k=2, response=["a", "\ud800", "", "a\udfff"])
    assert embeddings.load(tmp_path).lengths[:, 0].tolist() == [1, 1, 0, 2]


@pytest.mark.parametrize("key", ["id", "query"])
def test_whole_numbers_above_64_bits_stay_apart(tmp_path, key):
    """2^64 and 2^64 + 1 are equal as floats, which would make two prompts one."""
    numbers = [2**64, 2**64 + 1, 2**64, 7]
    write(tmp_path, k=2, **{key: numbers})
    lines = [json.dumps({"reward": 1, "score": float("nan"), key: number}) for number in numbers]
    write_lines(tmp_path / "rewards_split_1.json", lines)
    groups = embeddings.load(tmp_path).groups
    assert groups[0] == groups[2] and len(set(groups)) == 3


# --------------------------------------------------------------------------------------- take, read


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.data())
@settings(deadline=None)
def test_take_is_fancy_indexing(n, k, d, data):
    arrays = values(k, n, d)
    count = data.draw(st.integers(0, 12))
    prompts = data.draw(st.lists(st.integers(0, n - 1), min_size=count, max_size=count))
    responses = data.draw(st.lists(st.integers(0, k - 1), min_size=count, max_size=count))
    rows = in_memory(arrays.astype(np.float16)).take(prompts, responses)
    assert rows.shape == (count, d) and rows.dtype == np.float32
    if count:
        np.testing.assert_array_equal(rows, arrays[responses, prompts].astype(np.float16))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 40), st.data())
@settings(deadline=None)
def test_read_gives_every_row_once_in_blocks_of_bounded_size(n, k, block_bytes, data):
    """Any positions in any order, some repeated, are read file by file, rows ascending."""
    arrays = values(k, n)
    places = data.draw(
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, k - 1)), max_size=30)
    )
    prompts, responses = np.array(places, int).reshape(-1, 2).T
    seen, order = np.full((len(places), D), np.nan), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "READ_BYTES", block_bytes)
        for at, rows in in_memory(arrays).read(prompts, responses):
            assert rows.nbytes <= max(block_bytes, 4 * D) and len(set(responses[at])) == 1
            assert np.isnan(seen[at]).all()
            seen[at] = rows
            order += zip(responses[at], prompts[at], strict=True)
    np.testing.assert_array_equal(seen, arrays[responses, prompts])
    assert order == sorted(order)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_gather_fills_a_tensor_with_what_read_gives(tmp_path, monkeypatch, dtype, order):
    arrays = [np.asarray(array, dtype, order=order) for array in values(3, n=50)]
    data = embeddings.load(write(tmp_path, arrays=arrays))
    prompts, responses = np.random.default_rng(0).permutation(
        np.stack(np.divmod(np.arange(150), 3)), axis=1
    )
    expected = values(3, n=50)[responses, prompts]
    for block_bytes in (1, 7 * 8 * D, 1 << 20):
        monkeypatch.setattr(embeddings, "READ_BYTES", block_bytes)
        parts = list(data.read(prompts, responses))
        assert {rows.dtype for _, rows in parts} == {np.dtype(dtype).newbyteorder("=")}
        assert all(rows.flags.c_contiguous for _, rows in parts)
        for name in ("fp32", "bf16"):
            kind = mlp.TYPES[name]
            rows = mlp.gather(data.read(prompts, responses), 150, D, kind)
            assert torch.equal(rows, torch.from_numpy(expected).to(kind))


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["EMBD-TRAIN-split_1.npy", "rewards_split_1.json"])
def test_a_missing_split_in_the_middle_is_named(tmp_path, name):
    (write(tmp_path, k=4) / name).unlink()
    with pytest.raises(
        InputError, match=rf"{name} is missing: found splits 0-3, expected every split of 0-3"
    ):
        embeddings.load(tmp_path)


def test_missing_splits_are_told_by_those_found(tmp_path):
    write(tmp_path, k=5)
    for k in (1, 2):
        for name in embeddings.file_names("train", k):
            (tmp_path / name).unlink()
    with pytest.raises(
        InputError,
        match=r"EMBD-TRAIN-split_1\.npy is missing: found splits 0, 3-4, expected .* 0-4",
    ):
        embeddings.load(tmp_path)


def test_no_data_and_no_folder(tmp_path):
    with pytest.raises(
        InputError, match=r"expected EMBD-TRAIN-split_0\.npy and so on, found none; make them with"
    ):
        embeddings.load(tmp_path)
    with pytest.raises(InputError, match="found no such folder"):
        embeddings.load(tmp_path / "nowhere")


@pytest.mark.parametrize("shape", [(N - 1, D), (N, D + 1)], ids=["N", "D"])
def test_splits_of_unequal_shape(tmp_path, shape):
    write(tmp_path)
    np.save(tmp_path / "EMBD-TRAIN-split_2.npy", np.zeros(shape, np.float32))
    message = (
        r"split_2\.npy: expected shape \(4, 2\) as in EMBD-TRAIN-split_0\.npy, "
        rf"found \({shape[0]}, {shape[1]}\)"
    )
    with pytest.raises(InputError, match=message):
        embeddings.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 60, 128, 159], ids=lambda kept: f"{kept} bytes")
def test_a_truncated_file(tmp_path, kept):
    path = write(tmp_path) / "EMBD-TRAIN-split_1.npy"
    assert path.stat().st_size == 160
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        InputError, match=rf"split_1\.npy: expected a whole \.npy file .* found {kept} bytes"
    ):
        embeddings.load(tmp_path)


def test_bytes_after_the_end(tmp_path):
    path = write(tmp_path) / "EMBD-TRAIN-split_1.npy"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(
        InputError, match=r"split_1\.npy: expected 160 bytes by its header, found 164"
    ):
        embeddings.load(tmp_path)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((N, D), np.int64), r"\(4, 2\) of int64"),
        (np.zeros((N, D), complex), r"\(4, 2\) of complex128"),
        (np.zeros((N, D, 1), np.float32), r"\(4, 2, 1\) of float32"),
        (np.zeros(N, np.float32), r"\(4,\) of float32"),
        (np.zeros((N, 0), np.float32), r"\(4, 0\) of float32|found 128 bytes"),
    ],
    ids=["integers", "complex", "3-d", "1-d", "no dimension"],
)
def test_other_types_and_shapes(tmp_path, array, found):
    np.save(write(tmp_path) / "EMBD-TRAIN-split_0.npy", array)
    with pytest.raises(InputError, match=found):
        embeddings.load(tmp_path)


def test_pickled_objects_are_not_loaded(tmp_path):
    np.save(write(tmp_path) / "EMBD-TRAIN-split_0.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(InputError, match=r"split_0\.npy: expected a whole \.npy file of numbers"):
        embeddings.load(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_value_that_is_not_finite_is_found_with_file_and_row(tmp_path, bad, order, monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 3 * 4 * D)
    arrays = values(2, n=11)
    arrays[1, 7, 1] = bad
    write(tmp_path, arrays=[np.asarray(array, order=order) for array in arrays])
    with pytest.raises(
        InputError, match=rf"split_1\.npy: expected finite numbers, found {bad} in row 7"
    ):
        embeddings.load(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'reward': 1}", r'line 3: expected {"reward": number}, found "{'),
        ("", r"line 3: expected .* found ''; write one JSON object per line"),
        ('{"score": 1}', r"line 3: expected .* found '{\"score\": 1}'"),
        ("1.5", "line 3: expected .* found '1.5'"),
        ('{"reward": NaN}', "line 3: expected a finite reward, found nan"),
        ('{"reward": -Infinity}', "line 3: expected a finite reward, found -inf"),
        ('{"reward": "1.5"}', "line 3: expected a finite reward, found '1.5'"),
        ('{"reward": null}', "line 3: expected a finite reward, found None"),
        ('{"reward": [1]}', r"line 3: expected a finite reward, found \[1\]"),
        (f'{{"reward": 1{"0" * 400}}}', "line 3: expected"),
    ],
    ids=[
        "quotes",
        "empty",
        "no reward",
        "no object",
        "NaN",
        "infinity",
        "text",
        "null",
        "list",
        "400 digits",
    ],
)
def test_a_bad_reward_line_is_named(tmp_path, line, message):
    write(tmp_path)
    write_lines(
        tmp_path / "rewards_split_1.json", ['{"reward": 1}', '{"reward": 2}', line, '{"reward": 4}']
    )
    with pytest.raises(InputError, match=rf"rewards_split_1\.json {message}"):
        embeddings.load(tmp_path)


@pytest.mark.parametrize("count", [0, N - 1, N + 1])
def test_reward_lines_too_few_or_too_many(tmp_path, count):
    write_lines(write(tmp_path) / "rewards_split_2.json", ['{"reward": 1}'] * count)
    with pytest.raises(
        InputError, match=rf"rewards_split_2\.json: expected 4 lines, .* found {count}"
    ):
        embeddings.load(tmp_path)


def test_rewards_that_are_not_utf_8(tmp_path):
    (write(tmp_path) / "rewards_split_0.json").write_bytes(b'{"reward": 1, "query": "\xff"}\n' * N)
    with pytest.raises(InputError, match=r"rewards_split_0\.json: expected JSONL text in UTF-8"):
        embeddings.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    ['{"reward": 1}\n'.encode("utf-16") * N, b'{"reward": 1, "id": "\xed\xa0\x80"}\n' * N],
)
def test_rewards_in_encodings_that_pythons_json_takes_for_utf_8(tmp_path, content):
    (write(tmp_path) / "rewards_split_0.json").write_bytes(content)
    with pytest.raises(InputError, match=r"rewards_split_0\.json: expected JSONL text in UTF-8"):
        embeddings.load(tmp_path)


@pytest.mark.parametrize("key", ["id", "query"])
def test_splits_that_list_other_prompts(tmp_path, key):
    write(tmp_path, **{key: ["a", "b", "c", "d"]})
    lines = [json.dumps({"reward": 1, key: value}) for value in "abdc"]
    write_lines(tmp_path / "rewards_split_2.json", lines)
    message = (
        rf"rewards_split_2\.json line 3: expected {key} 'c' as in rewards_split_0\.json, found 'd'"
    )
    with pytest.raises(InputError, match=message):
        embeddings.load(tmp_path)


def test_unfinished_data(tmp_path):
    (write(tmp_path) / ".unfinished").write_text("convert_embeddings.py")
    with pytest.raises(
        InputError,
        match=r"the data in this folder are unfinished; run convert_embeddings\.py again",
    ):
        embeddings.load(tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_response_a_prompt_cannot_be_ranked(tmp_path, split):
    write(tmp_path, k=1 if split == "train" else 2)
    write(tmp_path, k=1 if split == "test" else 2, split="test")
    with pytest.raises(
        InputError, match=f"expected at least 2 {split} responses per prompt, found 1"
    ):
        embeddings.load_pair(tmp_path)


def test_train_and_test_of_different_dimension(tmp_path):
    write(write(tmp_path), split="test", arrays=values(2, d=D + 1))
    with pytest.raises(
        InputError, match=r"EMBD-TEST-split_0\.npy: expected 2 dimensions .* found 3"
    ):
        embeddings.load_pair(tmp_path)


# ---------------------------------------------------------------------------- manifest, remembering


def test_data_with_a_manifest_are_trusted_without_reading_them(tmp_path, monkeypatch):
    expected = embeddings.load(write(tmp_path)).digests
    write_manifest(tmp_path)
    forbid(monkeypatch, "embeddings", "rewards")
    assert embeddings.load(tmp_path).digests == expected


@pytest.mark.parametrize("name", ["EMBD-TRAIN-split_1.npy", "rewards_split_1.json"])
def test_bytes_that_changed_after_the_manifest(tmp_path, name):
    path = write_manifest(write(tmp_path)) / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    later = (tmp_path / "manifest.json").stat().st_mtime_ns + 1
    os.utime(path, ns=(later, later))
    with pytest.raises(
        InputError, match=rf"{name}: expected sha256 \w+ as .*manifest\.json says, found \w+"
    ):
        embeddings.load(tmp_path)


@pytest.mark.parametrize("name", ["EMBD-TRAIN-split_1.npy", "rewards_split_1.json"])
def test_a_size_that_the_manifest_does_not_know(tmp_path, name):
    """The size is compared even if the file is older than the manifest."""
    path = write_manifest(write(tmp_path)) / name
    size = path.stat().st_size
    if name.endswith("npy"):
        np.save(path, values(3)[1].astype(np.float64))
    else:
        write_lines(path, [json.dumps({"reward": n, "more": "text"}) for n in range(N)])
    os.utime(path, ns=(0, 0))
    with pytest.raises(
        InputError,
        match=rf"{name}: expected {size} bytes as .*manifest\.json says, found \d+ bytes",
    ):
        embeddings.load(tmp_path)


def test_files_written_again_with_the_same_bytes_are_accepted(tmp_path):
    folder = write_manifest(write(tmp_path))
    later = (folder / "manifest.json").stat().st_mtime_ns + 10**9
    for path in folder.glob("*split_*"):
        os.utime(path, ns=(later, later))
    assert embeddings.load(folder).shape == (N, 3, D)


def test_checked_files_are_remembered_until_they_change(tmp_path, monkeypatch):
    data, cache = write(tmp_path / "data"), tmp_path / "out"
    cache.mkdir()
    expected = embeddings.load(data, cache_dir=cache).digests
    with monkeypatch.context() as patch:
        forbid(patch, "embeddings", "rewards")
        assert embeddings.load(data, cache_dir=cache).digests == expected
        os.utime(data / "EMBD-TRAIN-split_1.npy", ns=(1, 1))
        with pytest.raises(AssertionError, match=r"split_1\.npy was read"):
            embeddings.load(data, cache_dir=cache)
        with pytest.raises(AssertionError, match=r"split_0\.npy was read"):
            embeddings.load(data)


def test_bad_data_are_never_remembered_as_good(tmp_path):
    arrays = values(2)
    arrays[1, 2, 0] = np.nan
    data, cache = write(tmp_path / "data", arrays=arrays), tmp_path / "out"
    cache.mkdir()
    for _ in range(2):
        with pytest.raises(InputError, match="found nan in row 2"):
            embeddings.load(data, cache_dir=cache)


def test_the_digest_found_on_the_way_is_that_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 24)
    path = write(tmp_path, arrays=values(2, n=9, d=3)) / "EMBD-TRAIN-split_1.npy"
    assert embeddings.inspect(path, embeddings.open_npy(path)) == artifacts.sha256(path)


# ------------------------------------------------------------------------------------- kept rewards


def same_rewards(a, b):
    equal = [
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("rewards", "lengths", "groups")
    ]
    types = [getattr(a, name).dtype == getattr(b, name).dtype for name in ("rewards", "groups")]
    return all(equal) and all(types)


def parsed(monkeypatch):
    """A list that collects the names of the reward files parsed from now on."""
    names, read_rewards = [], embeddings.read_rewards

    def read(path, n):
        names.append(path.name)
        return read_rewards(path, n)

    monkeypatch.setattr(embeddings, "read_rewards", read)
    return names


REWARD_FILES = [f"rewards_split_{k}.json" for k in range(3)]


@pytest.mark.parametrize(
    "more", [{}, {"response": ["a", "", "b", "c"], "query": ["x", "y", "x", "z"]}]
)
def test_rewards_are_parsed_once_for_all_that_read_them(tmp_path, monkeypatch, more):
    names = parsed(monkeypatch)
    first = embeddings.load(write(tmp_path, **more))
    assert names == REWARD_FILES and (tmp_path / ".rewards_train.npz").exists()
    second = embeddings.load(tmp_path)
    assert names == REWARD_FILES
    assert same_rewards(first, second) and (second.lengths is None) == (not more)
    assert first.digests == second.digests


def test_train_and_test_rewards_are_kept_apart(tmp_path, monkeypatch):
    write(write(tmp_path), split="test", arrays=values(2, n=7))
    first, names = embeddings.load_pair(tmp_path), parsed(monkeypatch)
    second = embeddings.load_pair(tmp_path)
    assert names == [] and all(same_rewards(*pair) for pair in zip(first, second, strict=True))
    assert {path.name for path in tmp_path.glob(".*")} == {
        ".rewards_train.npz",
        ".rewards_test.npz",
    }


def test_a_changed_reward_file_is_parsed_again(tmp_path, monkeypatch):
    embeddings.load(write(tmp_path))
    write_lines(tmp_path / "rewards_split_1.json", ['{"reward": 9}'] * N)
    names = parsed(monkeypatch)
    for _ in range(2):
        assert embeddings.load(tmp_path).rewards[:, 1].tolist() == [9] * N
    assert names == REWARD_FILES


def test_fewer_or_exchanged_splits_are_parsed_again(tmp_path, monkeypatch):
    embeddings.load(write(tmp_path))
    for name in embeddings.file_names("train", 2):
        (tmp_path / name).unlink()
    assert embeddings.load(tmp_path).rewards.shape == (N, 2)
    zero, one = (tmp_path / name for name in REWARD_FILES[:2])
    contents = zero.read_bytes(), one.read_bytes()
    zero.write_bytes(contents[1])
    one.write_bytes(contents[0])
    assert embeddings.load(tmp_path).rewards[0].tolist() == [1, 0]


def test_kept_rewards_of_fewer_prompts_than_embeddings_are_not_used(tmp_path):
    """The reward files stay the same, but the embeddings now belong to other prompts."""
    embeddings.load(write(tmp_path))
    for k, array in enumerate(values(3, n=N + 1)):
        np.save(tmp_path / f"EMBD-TRAIN-split_{k}.npy", array)
    with pytest.raises(InputError, match=r"rewards_split_0\.json: expected 5 lines, .* found 4"):
        embeddings.load(tmp_path)


def test_damaged_kept_rewards_are_made_again(tmp_path):
    """Any changed byte, any truncation, any other content."""
    data = embeddings.load(write(tmp_path, length=[1, 2, 3, 4]))
    path = tmp_path / ".rewards_train.npz"
    cache = path.read_bytes()
    contents = [b"", b"text", cache[:100], cache[:-1], cache[1:], cache + b"more"]
    contents += [
        cache[:i] + bytes([cache[i] ^ 0x41]) + cache[i + 1 :] for i in range(0, len(cache), 5)
    ]
    for content in contents:
        path.write_bytes(content)
        assert same_rewards(embeddings.load(tmp_path), data)
    for other in (np.zeros(3), np.array([{"a": 1}])):
        path.unlink()
        with open(path, "wb") as file:
            np.save(file, other, allow_pickle=True)
        assert same_rewards(embeddings.load(tmp_path), data)
        assert len(path.read_bytes()) == len(cache), "the damaged cache is written again"


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(artifacts, "atomic", refuse)
    for _ in range(2):
        assert embeddings.load(write(tmp_path)).rewards.shape == (N, 3)
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_no_kept_rewards(tmp_path, monkeypatch):
    def fail(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    assert embeddings.load(write(tmp_path)).rewards.shape == (N, 3)
    assert not list(tmp_path.glob(".*"))


def test_kept_rewards_are_no_data_to_those_that_write_data(tmp_path):
    """Each writer replaces the data of the other, and leaves no cached rewards of them behind."""
    source, folder = tmp_path / "embd", tmp_path / "data"
    source.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 20), ("test", 5)):
        np.save(source / f"EMBD_poems_tiny_bard_{split}.npy", rng.standard_normal((3, n, 8)))
        np.save(source / f"REWARD_poems_judge_bard_{split}.npy", rng.standard_normal((3, n)))
    names = [
        "--task",
        "poetry",
        "--dataset",
        "poems",
        "--embed_model",
        "tiny",
        "--gen_model",
        "bard",
    ]
    sizes = [
        "--n_prompts",
        "20",
        "--n_splits",
        "2",
        "--n_test_prompts",
        "5",
        "--n_test_splits",
        "2",
        "--emb_dim",
        "16",
    ]

    def convert():
        convert_embeddings.main(["--embd_dir", str(source), *names, "--output_dir", str(folder)])

    def make():
        generate_demo_data.main([*sizes, "--output_dir", str(folder)])

    shapes = []
    for write_data in (convert, convert, make, make, convert):
        write_data()
        train, test = embeddings.load_pair(folder)
        shapes.append((train.shape, test.shape))
        lines = (folder / "rewards_split_1.json").read_text().splitlines()
        assert train.rewards[:, 1].tolist() == [json.loads(line)["reward"] for line in lines]
        assert embeddings.find_splits(folder, "train") == list(range(train.shape[1]))
        assert not any("npz" in name for name in staging.data_files(folder))
    converted, demo = ((20, 3, 8), (5, 3, 8)), ((20, 2, 16), (5, 2, 16))
    assert shapes == [converted, converted, demo, demo, converted]
