"""convert_embeddings.py: all formats and axis orders, refusals, killed and resumed conversions."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import convert_embeddings
from rewardlib import artifacts
from rewardlib.data import embeddings, published
from rewardlib.errors import InputError

REAL = ROOT.parent / "shared" / "data" / "alpaca"
K, N, D = 3, 4, 2
LONG = (
    "embd_model_name_gemma2b_dataset_orig_hh-rlhf-helpful-gpt4_gen_pref_model_name_gemma2b"
    "_golden_rm_name_rmmistral7b"
)
NAMES = {
    1: (
        "EMBD_hh-rlhf-helpful-gpt4_gemma2b_gemma2b_{}.npy",
        "REWARD_hh-rlhf-helpful-gpt4_rmmistral7b_gemma2b_{}.npy",
    ),
    2: (f"EMBD-{{}}-{LONG}.npy", f"REWARD-{{}}-{LONG}.npy"),
    "2 short": (f"EMBD-{{}}-{LONG}.npy", "REWARD-{}-helpful-gpt4-gemma2b.npy"),
    3: ("embd_gemma2b_gemma2b_helpful_{}.npy", "reward_gemma2b_gemma2b_helpful_{}.npy"),
}


def values(k=K, n=N, d=D, plus=0):
    """Embeddings (K, N, D) of value 100 k + 10 n + d and rewards (K, N) of value 10 k + n.

    Each value shows its position.
    """
    ks, ns, ds = np.meshgrid(range(k), range(n), range(d), indexing="ij")
    return (100 * ks + 10 * ns + ds + plus).astype(np.float32), (10.0 * ks + ns + plus)[
        :, :, 0
    ].astype(np.float32)


def publish(folder, form=1, split="train", arrays=None, order=None):
    """Save arrays (K, N, D) and (K, N) in a published format.

    order: axis order of the files, None for that of the format.
    """
    embedding, reward = arrays or values()
    order = order or ("NKD" if form == 3 else "KND")
    if order == "NKD":
        embedding, reward = embedding.swapaxes(0, 1).copy(), reward.T.copy()
    if form == 3:
        reward = reward[:, :, None]
    split = split if form in (1, 3) else split.upper()
    folder.mkdir(exist_ok=True, parents=True)
    paths = [folder / name.format(split) for name in NAMES[form]]
    np.save(paths[0], embedding)
    np.save(paths[1], reward)
    return paths


def convert(folder, out, *flags):
    convert_embeddings.main(["--embd_dir", str(folder), "--output_dir", str(out), *flags])


def convert_files(paths, out, *flags):
    files = ["--embd_file", str(paths[0]), "--reward_file", str(paths[1])]
    convert_embeddings.main([*files, "--output_dir", str(out), *flags])


def check(out, split="train", arrays=None):
    """Assert that DATA_DIR `out` holds the arrays (K, N, D), (K, N), for its reader and NumPy."""
    embedding, reward = arrays or values()
    data = embeddings.load(out, split)
    assert data.shape == (embedding.shape[1], embedding.shape[0], embedding.shape[2])
    np.testing.assert_array_equal(data.rewards, reward.T)
    for k, rows in enumerate(embedding):
        found = np.load(out / embeddings.file_names(split, k)[0])
        np.testing.assert_array_equal(found, rows)
        assert found.flags.c_contiguous


def visible(out):
    """{name: bytes} of the data files."""
    return {path.name: path.read_bytes() for path in out.iterdir() if "split_" in path.name}


@pytest.fixture(scope="module", autouse=True)
def quick_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def source(tmp_path):
    publish(tmp_path / "src")
    return tmp_path / "src"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# --------------------------------------------------------------------------------- formats and axes


@pytest.mark.parametrize("form", NAMES)
def test_each_format_lands_in_its_place(tmp_path, out, form):
    publish(tmp_path / "src" / "deep", form)
    publish(tmp_path / "src" / "deep", form, "test", values(5, 7))
    convert(tmp_path / "src", out)
    check(out)
    check(out, "test", values(5, 7))
    assert np.load(out / "EMBD-TRAIN-split_2.npy")[1, 0] == 210
    assert json.loads((out / "rewards_split_2.json").read_text().splitlines()[1]) == {
        "reward": 21.0
    }


def test_real_trap_format_3_is_called_nkd_but_is_knd(tmp_path, out):
    embedding, reward = values(3, 5)
    paths = publish(tmp_path / "src", 3, arrays=(embedding, reward))
    np.save(paths[0], embedding)
    np.save(paths[1], reward)
    convert(tmp_path / "src", out)
    check(out, arrays=(embedding, reward))


@pytest.mark.parametrize("trailing", [False, True])
@pytest.mark.parametrize("reward_order", ["KN", "NK"])
@pytest.mark.parametrize("order", ["KND", "NKD"])
def test_axes_flag_reads_every_combination(tmp_path, out, order, reward_order, trailing):
    embedding, reward = values()
    np.save(tmp_path / "e.npy", embedding if order == "KND" else embedding.swapaxes(0, 1).copy())
    reward = reward if reward_order == "KN" else reward.T
    np.save(tmp_path / "r.npy", reward[:, :, None] if trailing else reward)
    convert_files((tmp_path / "e.npy", tmp_path / "r.npy"), out, "--axes", order)
    check(out)


@pytest.mark.parametrize(
    ("embedding", "reward", "number", "settled"),
    [
        ((10, 605, 8), (10, 605), 1, ("KND", "KN")),
        ((605, 10, 8), (605, 10, 1), 3, ("NKD", "NK")),
        ((605, 10, 8), (605, 10), 3, ("NKD", "NK")),
        ((10, 605, 8), (10, 605, 1), 1, ("KND", "KN")),
        ((605, 10, 8), (10, 605), 1, ("NKD", "KN")),
        ((10, 605, 8), (605, 10, 1), 3, ("KND", "NK")),
        ((10, 605, 8), (10, 605), 3, ("KND", "KN")),
        ((605, 10, 8), (605, 10, 1), 1, ("NKD", "NK")),
        ((605, 10, 8), (605, 10, 1), None, ("NKD", "NK")),
        ((10, 605, 8), (10, 605), None, ("KND", "KN")),
    ],
)
def test_settled_axes(embedding, reward, number, settled):
    assert (
        published.settle_axes(embedding, reward, number, "auto", "x", convert_embeddings.WORDS)
        == settled
    )


@pytest.mark.parametrize(
    ("embedding", "reward", "number"),
    [
        ((500, 200, 8), (500, 200), 1),
        ((200, 500, 8), (200, 500, 1), 3),
        ((605, 10, 8), (605, 10), None),
    ],
)
def test_more_responses_than_prompts_is_refused_not_swapped(embedding, reward, number):
    few, many = sorted(embedding[:2])
    with pytest.raises(
        InputError, match=f"{many} responses to each of {few} prompts .*--axes KND .*--axes NKD"
    ):
        published.settle_axes(embedding, reward, number, "auto", "x", convert_embeddings.WORDS)
    assert published.settle_axes(
        embedding, reward, number, "KND", "x", convert_embeddings.WORDS
    ) == ("KND", "KN")


def test_equal_axes_are_refused_until_told(tmp_path, out):
    arrays = values(3, 3)
    publish(tmp_path / "src", arrays=arrays)
    with pytest.raises(
        InputError,
        match=r"both axis orders fit embeddings \(3, 3, 2\); give --axes KND or --axes NKD",
    ):
        convert(tmp_path / "src", out)
    assert not out.exists()
    convert(tmp_path / "src", out, "--axes", "KND")
    check(out, arrays=arrays)
    convert(tmp_path / "src", out, "--axes", "NKD")
    check(out, arrays=(arrays[0].swapaxes(0, 1), arrays[1].T))


@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (3, 4, 2), (12,), (3, 4, 1, 1)])
def test_rewards_that_do_not_fit_are_refused_with_both_shapes(source, out, shape):
    np.save(source / NAMES[1][1].format("train"), np.zeros(shape))
    with pytest.raises(
        InputError, match="one reward for each embedding, found rewards .* and embeddings .3, 4, 2."
    ):
        convert(source, out)


# -------------------------------------------------------------------------------- finding the files


def test_neighbours_are_never_taken(source, out):
    wrong = values(plus=7000)
    for name in (
        "PROMPTEMBD_hh-rlhf-helpful-gpt4_gemma2b_gemma2b_train.npy",
        "EMBD_hh-rlhf-helpful_gemma2b_gemma2b_train.npy",
        "EMBD_hh-rlhf-harmless-gpt4_gemma2b_gemma2b_train.npy",
        "EMBD_hh-rlhf-helpful-gpt4_gemma2b_gemma7b_train.npy",
        "EMBD_hh-rlhf-helpful-gpt4_gemma2b_gemma2b_train.npy.npy",
        "embd_gemma2b_gemma2b_harmless_train.npy",
    ):
        np.save(source / name, wrong[0])
    for name in (
        "REWARD_hh-rlhf-helpful-gpt4_rm_gemma7b_train.npy",
        "ATTRIBUTES_hh-rlhf-helpful-gpt4_gemma2b_train.npy",
    ):
        np.save(source / name, wrong[1])
    convert(source, out)
    check(out)


def test_another_data_set_is_not_taken_by_its_task(tmp_path, out):
    publish(tmp_path / "src", 3)
    with pytest.raises(InputError, match="embd_gemma2b_gemma2b_alpaca_train.npy"):
        convert(tmp_path / "src", out, "--dataset", "alpaca")


def test_case_and_the_two_names_of_llama(tmp_path, out):
    arrays = values()
    folder = tmp_path / "src"
    folder.mkdir()
    np.save(folder / "EMBD_hh-rlhf-Harmless-gpt4_llama3-8b_Gemma2B_train.npy", arrays[0])
    np.save(folder / "REWARD_hh-rlhf-harmless-gpt4_RayHarmless_gemma2b_train.npy", arrays[1])
    flags = ("--task", "Harmless", "--embed_model", "LLAMA38b")
    convert(folder, out, *flags)
    check(out)


def test_short_reward_name_of_llama(tmp_path, out):
    arrays = values()
    folder = tmp_path / "src"
    folder.mkdir()
    name = LONG.replace("gen_pref_model_name_gemma2b", "gen_pref_model_name_llama38b").replace(
        "-gpt4", ""
    )
    np.save(folder / f"EMBD-TRAIN-{name}.npy", arrays[0])
    np.save(folder / "REWARD-TRAIN-helpful-llama3-8b.npy", arrays[1])
    np.save(folder / "REWARD-TRAIN-helpful-gpt4-llama3-8b.npy", arrays[1] + 1)
    convert(folder, out, "--gen_model", "llama38b", "--sft_obj", "none")
    check(out)


def test_several_reward_models_are_listed_and_one_chosen(source, out):
    other = source / "REWARD_hh-rlhf-helpful-gpt4_otherrm_gemma2b_train.npy"
    np.save(other, values()[1] + 1)
    with pytest.raises(
        InputError, match="found 2: .*otherrm.*rmmistral7b.*--reward_model otherrm.rmmistral7b,"
    ):
        convert(source, out)
    convert(source, out, "--reward_model", "otherrm")
    check(out, arrays=(values()[0], values()[1] + 1))


def test_copies_in_sub_folders_are_listed(source, out):
    publish(source / "copy")
    with pytest.raises(
        InputError,
        match=r"expected one train embedding file, found 2: .*copy/EMBD.*narrower --embd_dir",
    ):
        convert(source, out)
    convert(source / "copy", out)
    check(out)


def test_nothing_found_names_the_patterns_and_what_is_similar(tmp_path, source, out):
    empty = tmp_path / "empty"
    empty.mkdir()
    expected = (
        "named EMBD_hh-rlhf-helpful-gpt4_gemma7b_gemma2b_train.npy "
        "or EMBD-TRAIN-embd_model_name_gemma7b_.* or embd_gemma2b_gemma7b_helpful_train.npy, "
        "found similar: EMBD_hh-rlhf-helpful-gpt4_gemma2b_gemma2b_train.npy"
    )
    with pytest.raises(InputError, match=expected):
        convert(source, out, "--embed_model", "gemma7b")
    with pytest.raises(InputError, match="found no embedding file at all"):
        convert(empty, out)
    with pytest.raises(InputError, match="absent: no such folder"):
        convert(source / "absent", out)
    assert not out.exists()


def test_missing_reward_file_is_an_error(source, out):
    (source / NAMES[1][1].format("train")).unlink()
    with pytest.raises(
        InputError,
        match=r"train reward file for EMBD_.* named REWARD_hh-rlhf-helpful-gpt4_\*_gemma2b_train",
    ):
        convert(source, out)


def test_missing_test_files_are_said_or_refused(source, out, capsys):
    convert(source, out)
    assert "no test file of these names" in capsys.readouterr().out
    assert json.loads((out / "manifest.json").read_text())["test"] is None
    with pytest.raises(InputError, match="expected a test embedding file"):
        convert(source, out, "--split", "test")
    publish(source, split="test")
    (source / NAMES[1][1].format("test")).unlink()
    with pytest.raises(InputError, match="expected a test reward file"):
        convert(source, out)


def test_missing_train_file_is_refused(tmp_path, out):
    publish(tmp_path / "src", split="test")
    with pytest.raises(InputError, match="expected a train embedding file"):
        convert(tmp_path / "src", out)
    convert(tmp_path / "src", out, "--split", "test")
    check(out, "test")


def test_another_task_needs_a_dataset(source, out):
    with pytest.raises(InputError, match="task summarize: this task needs a dataset as well"):
        convert(source, out, "--task", "summarize")


def test_explicit_files(tmp_path, out):
    train, test = (
        publish(tmp_path / "src"),
        publish(tmp_path / "src", split="test", arrays=values(5, 7)),
    )
    convert_files(test, out)
    check(out, "test", values(5, 7))
    files = [
        "--embd_file",
        str(train[0]),
        str(test[0]),
        "--reward_file",
        str(train[1]),
        str(test[1]),
    ]
    convert_embeddings.main([*files, "--output_dir", str(out)])
    check(out)
    check(out, "test", values(5, 7))
    with pytest.raises(
        InputError,
        match="this folder holds a train split, which a conversion of the test split alone",
    ):
        convert_files(test, out)
    for wrong in (
        ["--embd_file", "a.npy"],
        [],
        ["--embd_dir", "x", "--embd_file", "a", "--reward_file", "b"],
    ):
        with pytest.raises(
            InputError, match="expected either --embd_dir, or --embd_file with a --reward_file"
        ):
            convert_embeddings.main([*wrong, "--output_dir", str(out)])
    with pytest.raises(InputError, match="the train file and then the test file"):
        convert_embeddings.main([*[files[i] for i in (0, 2, 1, 3, 5, 4)], "--output_dir", str(out)])


def test_rewards_of_other_responses_are_refused(tmp_path, out):
    embedding, reward = publish(tmp_path / "src")
    other = reward.with_name(reward.name.replace("gemma2b", "gemma7b"))
    reward.rename(other)
    with pytest.raises(InputError, match="expected the rewards of gen gemma2b .* found gemma7b"):
        convert_files((embedding, other), out)


# --------------------------------------------------------------------------------- values and types


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("order", ["KND", "NKD"])
def test_bad_numbers_are_named_and_nothing_is_left(tmp_path, out, order, bad):
    embedding, reward = values()
    embedding[2, 1, 1] = bad
    publish(tmp_path / "src", arrays=(embedding, reward), order=order)
    with pytest.raises(
        InputError, match=f"train.npy, response 2 of prompt 1, dimension 1: .* found {bad}"
    ):
        convert(tmp_path / "src", out, "--axes", order)
    assert [path.name for path in out.iterdir()] == [".lock"]
    embedding[2, 1, 1], reward[0, 3] = 0, bad
    publish(tmp_path / "src", arrays=(embedding, reward), order=order)
    with pytest.raises(
        InputError, match=f"REWARD.*train.npy, response 0 of prompt 3: .* found {bad}"
    ):
        convert(tmp_path / "src", out, "--axes", order)
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_dtypes(tmp_path, out):
    embedding, reward = values()
    exact = embedding.astype(np.float64) + 2**-30
    publish(tmp_path / "src", arrays=(exact, reward.astype(np.int64)))
    convert(tmp_path / "src", out)
    check(out, arrays=(exact, reward))
    for dtype in ("float32", "float16"):
        convert(tmp_path / "src", out, "--dtype", dtype)
        assert embeddings.load(out).embeddings[0].dtype == dtype
        check(out, arrays=(exact.astype(dtype), reward))
    publish(tmp_path / "src", arrays=(embedding.astype(">f4"), reward))
    convert(tmp_path / "src", out)
    assert np.load(out / "EMBD-TRAIN-split_0.npy").dtype == np.dtype("<f4")
    check(out)


def test_fortran_order(tmp_path, out):
    embedding, reward = values()
    publish(tmp_path / "src", arrays=(np.asfortranarray(embedding), np.asfortranarray(reward)))
    convert(tmp_path / "src", out)
    check(out)


def test_overflow_of_float16_is_an_error(tmp_path, out):
    embedding, reward = values()
    embedding[1, 2, 0] = 70000
    publish(tmp_path / "src", arrays=(embedding, reward))
    with pytest.raises(
        InputError, match="response 1 of prompt 2, dimension 0: 70000.0 does not fit float16"
    ):
        convert(tmp_path / "src", out, "--dtype", "float16")


@pytest.mark.parametrize(
    "content", [np.zeros((3, 4, 2), int), np.zeros((3, 4)), np.zeros((3, 0, 2)), b"junk", "short"]
)
def test_files_that_are_no_embeddings(source, out, content):
    path = source / NAMES[1][0].format("train")
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(path.read_bytes()[:-1] if content == "short" else content)
    with pytest.raises(InputError, match="EMBD_.*expected"):
        convert(source, out)


def test_max_prompts_takes_the_first(tmp_path, out, capsys):
    publish(tmp_path / "src", 3, arrays=values(3, 6))
    convert(tmp_path / "src", out, "--max_prompts", "4")
    check(out, arrays=values(3, 4))
    convert(tmp_path / "src", out, "--max_prompts", "9")
    check(out, arrays=values(3, 6))
    assert (
        "all 6 prompts are taken; --max_prompts 9 is more than there are" in capsys.readouterr().out
    )


@pytest.mark.parametrize("order", ["KND", "NKD"])
def test_many_blocks_and_groups_of_files(tmp_path, out, monkeypatch, order):
    monkeypatch.setattr(embeddings, "BLOCK_BYTES", 60)
    monkeypatch.setattr(convert_embeddings, "OPEN_FILES", 2)
    arrays = values(5, 11, 3)
    publish(tmp_path / "src", arrays=arrays, order=order)
    convert(tmp_path / "src", out, "--axes", order)
    check(out, arrays=arrays)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 4)),
    dtype=st.sampled_from(["<f2", "<f4", "<f8"]),
    order=st.sampled_from(["KND", "NKD"]),
    seed=st.integers(0, 99),
)
def test_any_array_comes_back(shape, dtype, order, seed):
    rng = np.random.default_rng(seed)
    arrays = rng.standard_normal(shape).astype(dtype), rng.standard_normal(shape[:2]).astype("f4")
    with tempfile.TemporaryDirectory() as folder:
        publish(Path(folder) / "src", 3, arrays=arrays, order=order)
        convert(Path(folder) / "src", Path(folder) / "out", "--axes", order)
        check(Path(folder) / "out", arrays=arrays)


# --------------------------------------------------------------------------- finishing and resuming


def test_manifest_tells_the_truth(tmp_path, out):
    publish(tmp_path / "src")
    publish(tmp_path / "src", split="test", arrays=values(5, 7))
    convert(tmp_path / "src", out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["producer"] == "convert_embeddings.py"
    assert {key: manifest["test"][key] for key in ("K", "N", "D", "dtype")} == {
        "K": 5,
        "N": 7,
        "D": 2,
        "dtype": "float32",
    }
    rewards = values()[1]
    assert manifest["train"]["rewards"] == pytest.approx(
        {"mean": rewards.mean(), "sd": rewards.std(), "min": 0, "max": 23}, rel=1e-12
    )
    assert set(manifest["files"]) == set(visible(out))
    for name, entry in manifest["files"].items():
        assert entry == {
            "bytes": (out / name).stat().st_size,
            "sha256": artifacts.sha256(out / name),
        }
        assert (out / name).stat().st_mtime_ns <= (out / "manifest.json").stat().st_mtime_ns
    assert manifest["source"]["train"]["embedding"]["bytes"] == 128 + 4 * K * N * D
    assert manifest["source"]["train"]["axes"] == "KND"
    assert not (out / ".converting").exists()


def test_second_run_skips_and_force_repeats(source, out, capsys, monkeypatch):
    convert(source, out)
    stamps = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    convert(source, out)
    assert "already holds this conversion" in capsys.readouterr().out
    assert stamps == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setenv("FORCE", "1")
    convert(source, out)
    assert stamps["EMBD-TRAIN-split_0.npy"] != (out / "EMBD-TRAIN-split_0.npy").stat().st_mtime_ns


@pytest.mark.parametrize("damage", ["edited", "removed", "added", "source"])
def test_a_changed_folder_is_made_again(source, out, damage):
    convert(source, out)
    path = out / "rewards_split_1.json"
    if damage == "edited":
        path.write_text(path.read_text().replace("11.0", "99.0"))
    elif damage == "removed":
        path.unlink()
    elif damage == "added":
        path.with_name("rewards_split_3.json").write_text(path.read_text())
    else:
        publish(source, arrays=values(plus=1))
    convert(source, out)
    check(out, arrays=values(plus=damage == "source"))
    assert len(visible(out)) == 2 * K


def test_demo_data_is_replaced_and_stale_splits_go(tmp_path, source, out, capsys):
    publish(tmp_path / "old", arrays=values(6, 9))
    publish(tmp_path / "old", split="test", arrays=values(6, 9))
    convert(tmp_path / "old", out)
    manifest = json.loads((out / "manifest.json").read_text())
    artifacts.write_json(out / "manifest.json", {**manifest, "producer": "generate_demo_data.py"})
    convert(source, out)
    assert "24 files made by generate_demo_data.py will be replaced" in capsys.readouterr().out
    check(out)
    assert len(visible(out)) == 2 * K


@pytest.mark.parametrize("manifest", [None, {"producer": "step4"}, {}])
def test_data_put_there_by_hand_is_refused(source, out, manifest):
    out.mkdir()
    np.save(out / "EMBD-TRAIN-split_0.npy", np.zeros((2, 2)))
    if manifest is not None:
        artifacts.write_json(out / "manifest.json", manifest)
    before = visible(out)
    with pytest.raises(
        InputError, match="EMBD-TRAIN-split_0.npy put there by hand or by step 4; choose another"
    ):
        convert(source, out)
    assert visible(out) == before


def test_manifest_of_other_work_is_refused(source, out):
    out.mkdir()
    artifacts.write_json(out / "manifest.json", {"step5": {}})
    with pytest.raises(InputError, match="found manifest.json put there"):
        convert(source, out)


class Killed(BaseException):
    pass


def kill_at(monkeypatch, event):
    """Raise Killed at the event-th change of the disk (rename or removal) or digest."""
    seen = 0

    def counting(function):
        def wrapped(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == event:
                raise Killed
            if seen > event:  # a dead process does not clean up
                return None
            return function(*args, **kwargs)

        return wrapped

    for owner, name in (
        (os, "replace"),
        (Path, "unlink"),
        (convert_embeddings.shutil, "rmtree"),
        (artifacts, "sha256"),
    ):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))


@pytest.mark.parametrize("order", ["KND", "NKD"])
def test_killed_anywhere_leaves_old_or_new_or_a_refusal_and_completes(
    tmp_path, monkeypatch, capsys, order
):
    monkeypatch.setattr(artifacts, "git_revision", lambda: None)
    old, new, test = values(3, 4, plus=5000), values(2, 3), values(2, 4, plus=9)
    publish(tmp_path / "old", arrays=old)
    publish(tmp_path / "old", split="test", arrays=test)
    publish(tmp_path / "new", arrays=new, order=order)
    publish(tmp_path / "new", split="test", arrays=test, order=order)
    convert(tmp_path / "new", tmp_path / "reference", "--axes", order)
    expected = visible(tmp_path / "reference")
    went_on = 0
    for event in range(1, 200):
        out = tmp_path / f"out{event}"
        convert(tmp_path / "old", out)
        with monkeypatch.context() as patch:
            kill_at(patch, event)
            try:
                convert(tmp_path / "new", out, "--axes", order)
                break
            except Killed:
                pass
        try:
            found = (
                embeddings.load(out).rewards.T.tolist(),
                embeddings.load(out, "test").rewards.T.tolist(),
            )
            assert found in [(rewards.tolist(), test[1].tolist()) for rewards in (old[1], new[1])]
        except InputError as error:
            assert "missing" in str(error) or "expected EMBD-TRAIN-split_0.npy" in str(error)
        capsys.readouterr()
        convert(tmp_path / "new", out, "--axes", order)
        went_on += "continuing an earlier run" in capsys.readouterr().out
        assert visible(out) == expected
        assert {p.name for p in out.iterdir() if not p.name.startswith(".rewards_")} == {
            *expected,
            ".lock",
            "manifest.json",
        }
    assert event > 40 and went_on > 20


def test_killed_and_then_another_conversion(tmp_path, source, out, monkeypatch):
    publish(tmp_path / "other", arrays=values(2, 3))
    replace = os.replace

    def kill(path, to):
        if Path(to) == out / "EMBD-TRAIN-split_1.npy":
            raise Killed
        replace(path, to)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", kill)
        convert(source, out)
    with pytest.raises(InputError, match="missing"):
        embeddings.load(out)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(convert_embeddings, "stage", _die)
        convert(tmp_path / "other", out)
    convert(tmp_path / "other", out)
    check(out, arrays=values(2, 3))
    assert len(visible(out)) == 4


def test_finished_files_are_not_written_again(source, out, monkeypatch):
    written, write = [], convert_embeddings.write_embeddings

    def killed_after_two(staging, split, source, responses, *rest):
        if len(written) == 2:
            written.append("killed")
            raise Killed
        written.append(responses.start)
        return write(staging, split, source, responses, *rest)

    monkeypatch.setattr(convert_embeddings, "write_embeddings", killed_after_two)
    with pytest.raises(Killed):
        convert(source, out)
    assert not visible(out)
    convert(source, out)
    assert written == [0, 1, "killed", 2]
    check(out)


def test_a_lost_file_of_an_earlier_run_starts_it_over(source, out, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(convert_embeddings, "publish", _die)
        convert(source, out)
    (out / ".converting" / "EMBD-TRAIN-split_1.npy").unlink()
    convert(source, out)
    assert "continuing" not in capsys.readouterr().out
    check(out)


def _die(*args):
    raise Killed


def test_a_write_that_reads_back_differently_is_an_error(source, out, monkeypatch):
    monkeypatch.setattr(artifacts, "sha256", lambda path: "0" * 64)
    with pytest.raises(InputError, match="the file reads back with other content than was written"):
        convert(source, out)
    assert not visible(out)


def test_full_disk_is_told_before_the_work(source, out, monkeypatch):
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr(convert_embeddings.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="GB of free disk space, found 0.0 GB"):
        convert(source, out)


# --------------------------------------------------------------------------------- the command line


def run(*arguments, code=None):
    call = [
        sys.executable,
        *(["-c", code] if code else [str(ROOT / "convert_embeddings.py")]),
        *map(str, arguments),
    ]
    return subprocess.run(call, capture_output=True, text=True, cwd=ROOT)


def test_command_line(source, out):
    done = run("--embd_dir", source, "--output_dir", out)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.splitlines()[-1] == f"next: DATA_DIR={out} bash run_all.sh"
    assert "train: K=3 N=4 D=2 float32; rewards mean 11.5, sd" in done.stdout
    failed = run("--embd_dir", source, "--output_dir", out, "--gen_model", "gemma7b")
    assert failed.returncode == 2
    assert failed.stderr.startswith("convert_embeddings: ") and failed.stderr.count("\n") == 1
    check(out)


def test_killed_process_resumes_in_constant_memory(tmp_path, out):
    """A process is killed while writing; the next process completes the conversion.

    Its memory stays far below the size of the source.
    """
    shape, rng = (4, 3000, 2000), np.random.default_rng(0)
    folder = tmp_path / "src"
    folder.mkdir()
    array = np.lib.format.open_memmap(folder / NAMES[1][0].format("train"), "w+", np.float64, shape)
    rows = rng.standard_normal((50, shape[2]))
    array[:, ::60] = rows
    array.flush()
    np.save(folder / NAMES[1][1].format("train"), np.zeros(shape[:2]))
    arguments = ["--embd_dir", folder, "--output_dir", out, "--dtype", "float16"]
    code = """
import os, pathlib, signal, sys
import convert_embeddings
from rewardlib.data import published
real, blocks = published.read_block, 0
def read_block(*args):
    global blocks
    blocks += 1
    if blocks == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
published.read_block = read_block
convert_embeddings.main(sys.argv[1:])
if sys.platform == "linux":
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    print(*(line for line in lines if "VmHWM" in line))
"""
    assert run(*arguments, code=code).returncode == -signal.SIGKILL
    done = run(*arguments, code=code)
    assert done.returncode == 0, done.stderr
    assert "continuing an earlier run" in done.stdout
    if sys.platform == "linux":
        peak_kilobytes = int(done.stdout.split()[-2])
        assert peak_kilobytes * 1024 < 120e6 < array.nbytes
    for k in range(4):
        found = np.load(out / f"EMBD-TRAIN-split_{k}.npy")
        np.testing.assert_array_equal(found[::60], rows.astype(np.float16))
        assert np.count_nonzero(found.any(axis=1)) == 50


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data of ../shared/data/alpaca is not here")
def test_real_data(out):
    flags = ["--dataset", "alpaca", "--embed_model", "minilm", "--gen_model", "mix55"]
    convert(REAL, out, *flags)
    for split in ("train", "test"):
        names = (
            f"EMBD_alpaca_minilm_mix55_{split}.npy",
            f"REWARD_alpaca_gpt4turbo_mix55_{split}.npy",
        )
        check(out, split, [np.load(REAL / name) for name in names])
