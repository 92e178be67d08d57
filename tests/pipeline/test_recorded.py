"""Recorded preference pairs: formats, refusals, leakage by duplicates, metrics, calibration."""

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from rewardlib import artifacts, seeds
from rewardlib.data import embeddings, pair_files
from rewardlib.errors import InputError
from rewardlib.measures import intervals, preferences
from rewardlib.models import scoring
from rewardlib.models.mlp import BT_MLP
from rewardlib.nets import mlp
from rewardlib.nets.training import Training, train_ensemble
from rewardlib.pipeline import preference_maps, recorded

REAL = ROOT.parent / "shared" / "data" / "pairs"
FORMATS = ["npz", "npz compressed", "safetensors", "parquet", "parquet fixed"]
SETTINGS = Training(epochs=6, learning_rate=3e-3, batch_size=16)


def rng(seed=0):
    return np.random.default_rng(seed)


def values(n=5, d=3):
    """Embeddings (n, 2, d), all different and exact in float16."""
    return np.arange(n * 2 * d, dtype=np.float32).reshape(n, 2, d) / 8 - 1


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


def in_memory(emb, groups=None, ties=None, subset=None, lengths=None):
    """HumanPairs that come from no file."""
    n = len(emb)
    groups = np.arange(n) if groups is None else np.asarray(groups)
    ties = np.zeros(n, bool) if ties is None else np.asarray(ties)
    rewards = np.where(ties[:, None], 0.5, [1.0, 0.0])
    responses = embeddings.Responses(
        [emb[:, 0], emb[:, 1]], rewards, lengths, groups, {"pairs.npz": "digest"}
    )
    return pair_files.HumanPairs(responses, subset, ties, {"n": n})


def made_preferences(n=300, d=6, noise=0.3, seed=0, **more):
    """Pairs that a linear utility with logistic noise chose, all of different prompts."""
    emb = rng(seed).standard_normal((n, 2, d)).astype(np.float32)
    gap = (emb[:, 0] - emb[:, 1]) @ np.linspace(-1, 1.5, d) + noise * rng(seed + 1).logistic(size=n)
    wrong = gap < 0
    emb[wrong] = emb[wrong, ::-1]
    return in_memory(emb, **more)


def weights_for(n, resamples=200, seed=0):
    return intervals.resample_weights(n, rng(seed), resamples)


def strict_json(content):
    return json.loads(json.dumps(content, allow_nan=False))


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


# -------------------------------------------------------------------------------------------- links


def test_links_worked_by_hand():
    """Shared: a prompt by rows 0 and 2, an answer by 2 and 5, a prompt embedding by 1 and 4.

    The answer is on different sides of rows 2 and 5. Row 3 shares nothing.
    """
    ids = np.array([7, 8, 7, 9, 6, 5])
    other = np.array([0, 1, 2, 3, 1, 4])
    answers = np.array(list("abcdef") + list("ghijkc"))
    assert pair_files.link(6, [ids, other, answers]).tolist() == [0, 1, 0, 2, 1, 0]
    assert pair_files.link(6, [ids]).tolist() == [0, 1, 0, 2, 3, 4]
    assert pair_files.link(3, []).tolist() == [0, 1, 2]


@given(st.integers(1, 12), st.integers(0, 10**6))
@settings(deadline=None)
def test_links_are_the_closure_of_shared_keys(n, seed):
    keys = [rng(seed + i).integers(0, 2 * n, size=(1 + i) * n) for i in range(2)]
    near = np.eye(n, dtype=bool)
    for column in keys:
        for i in range(len(column)):
            near[i % n, np.flatnonzero(column == column[i]) % n] = True
    for k in range(n):
        near |= near[:, [k]] & near[[k]]
    groups = pair_files.link(n, keys)
    np.testing.assert_array_equal(groups[:, None] == groups, near)
    np.testing.assert_array_equal(np.unique(groups), np.arange(groups.max() + 1))


def planted(tmp_path, duplicate):
    """40 pairs, where row 39 shares the named part with row 0."""
    emb, ids = rng().standard_normal((40, 2, 4)).astype(np.float16), np.arange(40)
    prompt_emb = rng(1).standard_normal((40, 3)).astype(np.float16)
    emb[0, 0, 0] = 0.0
    if duplicate == "prompt id":
        ids[39] = 0
    elif duplicate == "prompt embedding":
        prompt_emb[39] = prompt_emb[0]
    elif duplicate == "answer":
        emb[39, 0] = emb[0, 0]
    elif duplicate == "answer on the other side":
        emb[39, 1] = emb[0, 0]
    else:
        emb[39, 1] = np.where(emb[0, 0] == 0, -0.0, emb[0, 0])
    return pair_files.load(
        write(
            tmp_path, "npz", {"embeddings": emb, "prompt_ids": ids, "prompt_embeddings": prompt_emb}
        )
    )


@pytest.mark.parametrize(
    "duplicate",
    ["prompt id", "prompt embedding", "answer", "answer on the other side", "answer with -0"],
)
def test_duplicates_stay_on_one_side_of_every_split(tmp_path, duplicate):
    data = planted(tmp_path, duplicate)
    assert data.about["n_linked"] == 2 and data.about[
        "n_linked_by_prompt"
    ] == 2 * duplicate.startswith("prompt")
    splits = [recorded.split(data, seed) for seed in range(30)]
    assert {np.isin([0, 39], roles["held_out"]).sum() for roles in splits} == {0, 2}
    for roles in splits:
        assert all(np.isin([0, 39], rows).sum() in (0, 2) for rows in roles.values())
        assert np.sort(np.concatenate(list(roles.values()))).tolist() == list(range(40))


def test_roles_have_60_20_20_percent():
    data = made_preferences(100)
    assert [len(rows) for rows in recorded.split(data, 6).values()] == [60, 20, 20]


def test_a_saved_split_comes_back_and_a_changed_one_is_refused(tmp_path):
    data = made_preferences(20, groups=np.arange(20) // 2)
    roles = recorded.split(data, 6)
    recorded.save_split(tmp_path, roles, 6)
    found = recorded.load_split(tmp_path, data)
    assert list(found) == ["train", "calibration", "held_out"]
    for role in found:
        np.testing.assert_array_equal(found[role], roles[role])
    with pytest.raises(InputError, match="expected each of 22 pairs once, found other pairs"):
        recorded.load_split(tmp_path, made_preferences(22))
    for role in ("held_out", "calibration"):
        swapped = {name: rows.copy() for name, rows in roles.items()}
        swapped["train"][0], swapped[role][0] = roles[role][0], roles["train"][0]
        recorded.save_split(tmp_path, swapped, 6)
        with pytest.raises(
            InputError, match="leakage: .* has 2 groups of linked pairs on two sides"
        ):
            recorded.load_split(tmp_path, data)


def test_a_run_of_other_pairs_or_settings_is_refused(tmp_path):
    data = made_preferences(20)
    run = recorded.run_settings({"seed": 6, "n_sample": 100, "annotation_quality": 10.0}, data)
    assert run["n_sample"] == 20 and run["pairing"] == "human" and run["annotation_quality"] is None
    with pytest.raises(InputError, match="no finished reward models; run step 5"):
        recorded.open_run(tmp_path, run, data)
    recorded.save_split(tmp_path, recorded.split(data, 6), 6)
    artifacts.write_json(tmp_path / "orm.json", {"prompts": [0], "folds": [0], "members": []})
    entry = {"arguments": run, "inputs": {"pairs.npz": "digest"}, "record": "orm.json"}
    artifacts.write_json(tmp_path / "manifest.json", {"step5": entry})
    roles, record = recorded.open_run(tmp_path, run, data)
    assert len(roles["held_out"]) == 4 and record["members"] == []
    with pytest.raises(InputError, match="found seed 6, not 7"):
        recorded.open_run(tmp_path, run | {"seed": 7}, data)
    artifacts.write_json(
        tmp_path / "manifest.json", {"step5": entry | {"inputs": {"pairs.npz": "other"}}}
    )
    with pytest.raises(
        InputError,
        match="expected the pairs that its reward models were trained on, found other pairs",
    ):
        recorded.open_run(tmp_path, run, data)


# ----------------------------------------------------------------------------------- training pairs


def test_labels_say_where_the_preferred_response_went():
    data = made_preferences(200, groups=np.arange(200) // 2)
    positions = np.arange(20, 180)
    pairs = recorded.draw(data, positions, 6)
    preferred = pairs.index[np.arange(160), np.where(pairs.labels == 1, 0, 1)]
    np.testing.assert_array_equal(pairs.rows[preferred], data.responses.embeddings[0][positions])
    np.testing.assert_array_equal(
        pairs.rows[pairs.index.sum(1) - preferred], data.responses.embeddings[1][positions]
    )
    assert 60 < pairs.labels.sum() < 100
    assert all(len(set(pairs.folds[pairs.prompts[:, 0] == g])) == 1 for g in pairs.prompts[:, 0])
    assert np.bincount(pairs.folds).tolist() == [32] * 5 and pairs.n_folds == 5


def test_ties_are_trained_on_never():
    ties = np.arange(60) % 3 == 0
    data = made_preferences(60, ties=ties)
    pairs = recorded.draw(data, np.arange(60), 6)
    assert len(pairs.labels) == 40 and len(pairs.rows) == 80
    assert not np.isin(data.responses.groups[ties], pairs.prompts).any()
    with pytest.raises(
        InputError, match="at least 2 prompts with a preference to train on, found 0"
    ):
        recorded.draw(data, np.flatnonzero(ties), 6)
    with pytest.raises(
        InputError, match="at least 2 prompts with a preference to evaluate on, found 1"
    ):
        recorded.part(data, np.array([0, 1]), rng())


def test_one_seed_one_draw():
    data = made_preferences(50)
    a, b, other = (recorded.draw(data, np.arange(50), seed) for seed in (6, 6, 7))
    for name in ("rows", "index", "labels", "prompts", "folds"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.labels != other.labels).any() and (a.folds != other.folds).any()


def test_estimators_take_the_drawn_pairs():
    data = made_preferences()
    pairs = recorded.draw(data, np.arange(200), 6)
    model = BT_MLP(hidden=(16, 8), epochs=10, learning_rate=0.01)
    model.fit(pairs.index, pairs.labels, embeddings=pairs.rows, groups=pairs.prompts[:, 0])
    positions = np.arange(200, 300)
    difference = recorded.model_differences(model.predict, data, positions)
    sides = [model.predict(data.responses.embeddings[side][positions])[:, 0] for side in (0, 1)]
    np.testing.assert_allclose(difference, sides[0] - sides[1], rtol=1e-5, atol=1e-6)
    assert (difference > 0).mean() > 0.85


# ------------------------------------------------------------------------------------------ metrics

differences = arrays(float, st.integers(2, 30), elements=st.floats(-6, 6))


def test_losses_by_hand():
    found = preferences.preference_losses(np.array([0.0, np.log(3), -np.log(3), 1000.0, -1000.0]))
    np.testing.assert_allclose(found["nll"], [np.log(2), np.log(4 / 3), np.log(4), 0, 1000])
    np.testing.assert_allclose(found["brier"], [1 / 4, 1 / 16, 9 / 16, 0, 1])


@given(differences, st.integers(0, 99))
@settings(deadline=None)
def test_losses_are_scikit_learns_whichever_response_comes_first(log_odds, seed):
    shown = rng(seed).random(len(log_odds)) < 0.5  # the recorded choice is shown second
    label, p = np.where(shown, 0, 1), expit(np.where(shown, -log_odds, log_odds))
    found = preferences.preference_metrics(log_odds, np.arange(len(p)), weights_for(len(p)))
    assert found["nll"] == pytest.approx(log_loss(label, p, labels=[0, 1]))
    assert found["brier"] == pytest.approx(brier_score_loss(label, p, labels=[0, 1]))


def test_reliability_by_hand():
    """Probability 0.9 three times, right twice, and 0.6 once, right.

    The bins at 0.1, 0.4, 0.6 and 0.9 observe 1/3, 0, 1 and 2/3.
    """
    found = preferences.preference_reliability(
        logit(np.array([0.9001, 0.9001, 0.0999, 0.6001])), bins=10
    )
    assert found["bins"]["count"] == [3, 1, 1, 3]
    np.testing.assert_allclose(found["bins"]["predicted"], [0.0999, 0.3999, 0.6001, 0.9001])
    np.testing.assert_allclose(found["bins"]["observed"], [1 / 3, 0, 1, 2 / 3])
    assert found["ece"] == pytest.approx((3 * (0.9001 - 2 / 3) + 1 * 0.3999) / 4)
    assert found["mce"] == pytest.approx(0.3999)


@given(differences)
@settings(deadline=None)
def test_reliability_is_scikit_learns_on_pairs_and_mirror_images(log_odds):
    # Away from the edges of the bins, which the two close on different sides.
    log_odds = log_odds + 1e-3 * math.pi
    p, y = expit(np.concatenate([log_odds, -log_odds])), np.repeat([1, 0], len(log_odds))
    observed, predicted = calibration_curve(y, p, n_bins=20)
    found = preferences.preference_reliability(log_odds)
    np.testing.assert_allclose(found["bins"]["predicted"], predicted)
    np.testing.assert_allclose(found["bins"]["observed"], observed)
    gap = np.abs(observed - predicted)
    assert found["ece"] == pytest.approx(np.average(gap, weights=found["bins"]["count"]))
    assert found["mce"] == pytest.approx(gap.max())


def test_a_certain_model_fills_the_outermost_bins():
    right, wrong = (preferences.preference_reliability(np.full(4, x)) for x in (800.0, -800.0))
    assert (
        right["bins"]["count"] == [4, 4]
        and right["ece"] == right["mce"] == 0
        and wrong["ece"] == wrong["mce"] == 1
    )
    assert preferences.preference_reliability(np.array([800.0, logit(0.97)]))["bins"]["count"] == [
        2,
        2,
    ]


def test_the_error_of_perfect_calibration_is_that_of_labels_drawn_from_the_probabilities():
    p = rng().uniform(0.5, 0.95, size=400)
    drawn = [logit(np.where(rng(i).random(400) < p, p, 1 - p)) for i in range(300)]
    found = [preferences.preference_reliability(x) for x in drawn]
    assert np.mean([f["ece"] for f in found]) == pytest.approx(
        found[0]["ece_if_calibrated"], rel=0.05
    )


def test_accuracy_by_subset_by_hand():
    """Prompt 0 is right and right, prompt 1 wrong and tied, prompt 2 right.

    Subset b is the tie of prompt 1 and prompt 2.
    """
    difference, prompts = np.array([1.0, 2, -1, 0, 3]), np.array([0, 0, 1, 1, 2])
    weights = np.array([[1, 1, 1], [2, 1, 0], [0, 3, 0], [0, 0, 3]])
    found = strict_json(
        preferences.preference_accuracy(
            difference, prompts, weights, np.array(["a", "a", "a", "b", "b"])
        )
    )
    assert (found["accuracy"], found["n_pairs"], found["n_prompts"]) == (0.7, 5, 3)
    np.testing.assert_allclose(
        found["accuracy_ci95"], np.percentile([0.7, 4.5 / 6, 0.25, 1], [2.5, 97.5])
    )
    a, b = found["by_subset"]["a"], found["by_subset"]["b"]
    assert (a["accuracy"], a["n_pairs"], a["n_prompts"]) == (pytest.approx(2 / 3), 3, 2)
    assert (b["accuracy"], b["n_pairs"], b["n_prompts"]) == (0.75, 2, 2)
    np.testing.assert_allclose(b["accuracy_ci95"], np.percentile([0.75, 0.5, 0.5, 1], [2.5, 97.5]))
    assert "by_subset" not in preferences.preference_accuracy(difference, prompts, weights)


def test_intervals_are_over_prompts_not_pairs():
    difference = rng().normal(0.3, 1, size=100)
    alone = preferences.preference_accuracy(difference, np.arange(100), weights_for(100))
    thrice = preferences.preference_accuracy(
        np.repeat(difference, 3), np.repeat(np.arange(100), 3), weights_for(100)
    )
    assert (
        thrice["accuracy_ci95"] == pytest.approx(alone["accuracy_ci95"])
        and thrice["n_pairs"] == 300
    )
    losses = [
        preferences.preference_metrics(
            np.repeat(difference, n), np.repeat(np.arange(100), n), weights_for(100)
        )
        for n in (1, 3)
    ]
    for name in ("nll", "nll_ci95", "brier", "brier_ci95", "ece", "mce"):
        assert losses[0][name] == pytest.approx(losses[1][name]), name


# -------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize(("right", "n"), [(6, 10), (9, 10), (51, 100)])
def test_temperature_by_hand(right, n):
    """All differences are +-2: sigmoid(2 / T) has to be the share that is right."""
    difference = np.where(np.arange(n) < right, 2.0, -2.0)
    assert preference_maps.fit_temperature(difference) == pytest.approx(2 / logit(right / n))


def test_temperature_is_that_of_logistic_regression():
    difference = rng().normal(0.5, 2, size=300)
    both, label = np.concatenate([difference, -difference])[:, None], np.repeat([1, 0], 300)
    slope = (
        LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(both, label).coef_[0, 0]
    )
    assert preference_maps.fit_temperature(difference) == pytest.approx(1 / slope, rel=1e-5)
    assert preference_maps.fit_temperature(1e6 * difference) == pytest.approx(1e6 / slope, rel=1e-5)


def test_temperature_where_there_is_no_optimum():
    assert preference_maps.fit_temperature(np.array([1.0, -2])) == math.inf, (
        "wrong on average: one half everywhere"
    )
    assert preference_maps.fit_temperature(np.zeros(3)) == 1.0
    all_right = np.array([1.0, 2, 3])
    assert expit(2 / preference_maps.fit_temperature(all_right)) == pytest.approx(4 / 5), (
        "odds of 4 to 1 from three pairs"
    )


def test_the_map_by_hand():
    """|d| = 1 is right in one pair of two, |d| = 3 in both.

    With the mirror images, the map is 0 at -3, 1/2 from -1 to 1, and 1 at 3.
    """
    numbers = strict_json(preference_maps.fit_map(np.array([1.0, -1, 3, 3])))
    assert numbers["x"] == pytest.approx([-3, 0, 3]) and numbers["y"] == pytest.approx([0, 0.5, 1])
    found = preference_maps.probability(numbers, np.array([0, 0.6, -0.6, 1.8, 3, 50, -50]))
    np.testing.assert_allclose(found, [0.5, 0.6, 0.4, 0.8, 5 / 6, 5 / 6, 1 / 6])


@given(arrays(float, st.integers(1, 40), elements=st.floats(-1e3, 1e3).map(lambda x: round(x, 3))))
@settings(deadline=None)
def test_the_map_is_odd_and_rises_and_does_not_know_which_response_comes_first(difference):
    numbers = strict_json(preference_maps.fit_map(difference))
    grid = np.concatenate([np.linspace(-1100, 1100, 101), difference, np.linspace(-2, 2, 41)])
    grid = np.sort(np.concatenate([grid, -grid]))
    found = preference_maps.probability(numbers, grid)
    np.testing.assert_allclose(found + found[::-1], 1, atol=1e-6)
    assert (np.diff(found) >= 0).all() and preference_maps.probability(
        numbers, 0.0
    ) == pytest.approx(0.5, abs=1e-6)
    edge = 1 / (len(difference) + 2)
    assert found.min() >= edge and found.max() <= 1 - edge


def test_a_map_of_the_truth_is_the_truth():
    gap = rng().normal(size=20_000)
    difference = np.where(rng(1).random(20_000) < expit(3 * gap), gap, -gap)
    numbers = preference_maps.fit_map(difference)
    grid = np.array([0.1, 0.3, 0.6, 1.0])
    np.testing.assert_allclose(
        preference_maps.probability(numbers, grid), expit(3 * grid), atol=0.03
    )
    assert preference_maps.fit_temperature(difference) == pytest.approx(1 / 3, rel=0.05)


def test_scores_that_point_the_wrong_way_say_one_half():
    difference = rng().normal(-1, 0.5, size=50)
    numbers = preference_maps.fit_map(difference)
    np.testing.assert_allclose(preference_maps.probability(numbers, difference), 0.5, atol=1e-4)
    found = preference_maps.calibrated(
        difference, preference_maps.fit_temperature(difference), numbers
    )
    assert (found["temperature_scaled"] == 0).all() and np.abs(found["isotonic"]).max() < 1e-3


def test_no_fold_enters_its_own_calibration():
    difference, folds = rng().normal(0.5, 1, size=60), np.arange(60) % 5
    before = preference_maps.out_of_fold(difference, folds)
    changed = np.where(folds == 2, -7 * difference, difference)
    after = preference_maps.out_of_fold(changed, folds)
    rest = difference[folds != 2]
    np.testing.assert_array_equal(after["uncalibrated"], changed)
    expected = changed / preference_maps.fit_temperature(rest)
    np.testing.assert_array_equal(after["temperature_scaled"][folds == 2], expected[folds == 2])
    expected = logit(preference_maps.probability(preference_maps.fit_map(rest), changed))
    np.testing.assert_array_equal(after["isotonic"][folds == 2], expected[folds == 2])
    for name in ("temperature_scaled", "isotonic"):
        assert (after[name][folds == 1] != before[name][folds == 1]).any()


# ----------------------------------------------------------------------------------- the whole line


def train(data, pairs, rows, objective="bt", n_members=3, seed=6):
    """Members trained as step 5 trains them, on the scale that step 6 measures, and their logs."""
    jobs = []
    for member in range(n_members):
        held = pairs.folds == member % pairs.n_folds
        torch_seed = seeds.torch_seed(seed, "member", member)
        jobs.append((np.flatnonzero(~held), np.flatnonzero(held), torch_seed))
    trained = train_ensemble(pairs.rows, pairs.index, pairs.labels, jobs, objective, SETTINGS)
    models, logs = zip(*trained, strict=True)
    scale = scoring.scale(models, data.responses, rows)
    return scoring.ScaledEnsemble(models, *scale), logs


def run(data, seed=6, objective="bt"):
    roles = recorded.split(data, seed)
    pairs = recorded.draw(data, roles["train"], seed)
    ensemble, logs = train(data, pairs, roles["train"], objective, seed=seed)
    return recorded.evaluate(ensemble, pairs, data, roles, seed), logs, ensemble


@pytest.mark.parametrize("objective", ["bt", "clf"])
def test_a_learnable_preference_is_learned(objective):
    subset = np.array(["first", "second"])[np.arange(300) % 2]
    ties = np.arange(300) % 10 == 0
    lengths = rng(3).integers(1, 99, size=(300, 2)).astype(float)
    results, logs, _ = run(
        made_preferences(subset=subset, ties=ties, lengths=lengths), objective=objective
    )
    results = strict_json(results)
    held, mean = results["held_out"], results["held_out"]["aggregations"]["mean"]
    assert (
        held["n_pairs"] + held["n_ties"] == 60
        and results["calibration"]["n_pairs"] == 60 - results["calibration"]["n_ties"]
    )
    assert (
        mean["accuracy"] > 0.8
        and mean["accuracy_ci95"][0] < mean["accuracy"] < mean["accuracy_ci95"][1]
    )
    assert (
        sum(row["n_pairs"] for row in mean["by_subset"].values()) == held["n_pairs"]
        and len(mean["by_subset"]) == 2
    )
    assert list(held["baselines"]) == ["linear_probe", "random", "longer", "shorter"]
    assert held["baselines"]["linear_probe"]["accuracy"] > 0.85
    assert held["baselines"]["longer"]["accuracy"] + held["baselines"]["shorter"][
        "accuracy"
    ] == pytest.approx(1)
    assert len(held["members"]) == len(logs) == 3 and all(
        "validation_loss" in log[0] for log in logs
    )
    assert set(results["maps"]) == {*held["aggregations"], "linear_probe"}
    for variant in ("uncalibrated", "temperature_scaled", "isotonic"):
        assert mean[variant]["nll"] < math.log(2) and mean[variant]["brier"] < 0.25
    lines = recorded.summary(results)
    assert f"held out: {held['n_pairs']} pairs" in lines[
        0
    ] and f"mean          {mean['accuracy']:.3f} [" in "".join(lines)


def test_held_out_pairs_are_calibrated_by_calibration_pairs_alone():
    """The saved temperature and map, applied to held-out differences, give the held-out table."""
    data = made_preferences()
    results, _, ensemble = run(data)
    roles = recorded.split(data, 6)
    held, fitted = (
        recorded.differences(ensemble, np.zeros(6), data, roles[role], 6)["aggregations"]["mean"]
        for role in ("held_out", "calibration")
    )
    maps, found = results["maps"]["mean"], results["held_out"]["aggregations"]["mean"]
    assert maps == {
        "temperature": preference_maps.fit_temperature(fitted),
        "isotonic": preference_maps.fit_map(fitted),
    }
    assert found["accuracy"] == np.mean(held > 0)
    assert found["uncalibrated"]["nll"] == pytest.approx(
        log_loss(np.ones(60), expit(held), labels=[0, 1])
    )
    scaled = expit(held / maps["temperature"])
    assert found["temperature_scaled"]["nll"] == pytest.approx(
        log_loss(np.ones(60), scaled, labels=[0, 1])
    )
    mapped = preference_maps.probability(maps["isotonic"], held)
    assert found["isotonic"]["brier"] == pytest.approx(
        brier_score_loss(np.ones(60), mapped, labels=[0, 1])
    )


def test_differences_of_an_ensemble_are_in_the_logits_of_its_members():
    data, positions = made_preferences(60), np.arange(40, 60)
    pairs = recorded.draw(data, np.arange(40), 6)
    ensemble, _ = train(data, pairs, np.arange(40))
    logits = np.array(
        [
            recorded.model_differences(lambda x, m=m: mlp.predict(m, x), data, positions)
            for m in ensemble.models
        ]
    )
    found = recorded.differences(ensemble, np.arange(6.0), data, positions, 6)
    np.testing.assert_allclose(found["members"], logits, rtol=1e-4, atol=1e-5)
    expected = (logits / ensemble.spread[:, None]).mean(0) * ensemble.spread.mean()
    np.testing.assert_allclose(found["aggregations"]["mean"], expected, rtol=1e-4, atol=1e-5)
    chosen, rejected = (
        data.responses.embeddings[side][positions] @ np.arange(6.0) for side in (0, 1)
    )
    np.testing.assert_allclose(
        found["baselines"]["linear_probe"], chosen - rejected, rtol=1e-4, atol=1e-4
    )


def test_coin_flips_are_not_learned():
    emb = rng(5).standard_normal((400, 2, 6)).astype(np.float32)
    results, _, _ = run(in_memory(emb))
    low, high = results["held_out"]["aggregations"]["mean"]["accuracy_ci95"]
    assert low < 0.5 < high and "longer" not in results["held_out"]["baselines"]


def test_one_seed_one_result_to_the_byte():
    first, second, other = (json.dumps(run(made_preferences(100), seed)[0]) for seed in (6, 6, 7))
    assert first == second != other


# --------------------------------------------------------------------------------------------- data


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real pairs in {REAL}")
@pytest.mark.parametrize(
    ("name", "shape", "n_groups", "n_linked"),
    [
        ("hh_harmless", (1800, 2, 384), 1798, 4),
        ("llmbar", (885, 2, 384), 756, 194),
        ("rmbench", (2394, 2, 384), 796, 2394),
    ],
)
def test_real_pairs_are_read_and_linked(name, shape, n_groups, n_linked):
    data = pair_files.load(REAL / f"{name}.npz")
    assert data.responses.shape == shape and (data.about["n_groups"], data.about["n_linked"]) == (
        n_groups,
        n_linked,
    )
    assert (data.subset is None) == (name == "hh_harmless")
