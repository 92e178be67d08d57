"""api.py: five calls from files to best-of-n; formats, axis orders, pairs, metrics, refusals."""

import ast
import mmap
import pickle
import shutil
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import convert_embeddings
import rewardlib
from rewardlib import api, calc_bon, calc_spearmanr, load_embd_data, pair_annotate
from rewardlib.data import embeddings, pairs
from rewardlib.errors import InputError
from rewardlib.measures import ranking
from rewardlib.models.mlp import BT_MLP, CLF_MLP

REAL = ROOT.parent / "shared" / "data" / "alpaca"
K, N, D = 3, 4, 2
SNIPPET = """
train_embeddings, train_rewards = load_embd_data(task='Harmless', res_gen_model='Gemma2b-sft', embed_model='Gemma2b', split='train')   # (N, K, D), (N, K, 1)
test_embeddings, test_rewards = load_embd_data(task='Harmless', res_gen_model='Gemma2b-sft', embed_model='Gemma2b', split='test')
train_comparisons, train_labels = pair_annotate(train_embeddings, train_rewards, annotation_quality=0.1)      # (M, 2, D), (M,)
reward_model = BT_MLP(); reward_model.fit(train_comparisons, train_labels)
rm_predictions = reward_model.predict(test_embeddings)                                                        # (N, K, 1)
bon_500 = calc_bon(rm_predictions, test_rewards, N=500); rho = calc_spearmanr(rm_predictions, test_rewards)
"""  # noqa: E501
LONG = (
    "embd_model_name_gemma2b_dataset_orig_hh-rlhf-harmless-gpt4_gen_pref_model_name_gemma2b"
    "_golden_rm_name_ray"
)
NAMES = {
    1: (
        "EMBD_hh-rlhf-harmless-gpt4_gemma2b_gemma2b_{}.npy",
        "REWARD_hh-rlhf-harmless-gpt4_ray_gemma2b_{}.npy",
    ),
    2: (f"EMBD-{{}}-{LONG}.npy", f"REWARD-{{}}-{LONG}.npy"),
    "2 short": (f"EMBD-{{}}-{LONG}.npy", "REWARD-{}-harmless-gpt4-gemma2b.npy"),
    3: ("embd_Gemma2b-sft_Gemma2b_Harmless_{}.npy", "reward_Gemma2b-sft_Gemma2b_Harmless_{}.npy"),
}
CALL = {
    "task": "Harmless",
    "res_gen_model": "Gemma2b-sft",
    "embed_model": "Gemma2b",
    "split": "train",
}


def values(k=K, n=N, d=D, plus=0):
    """Embeddings (N, K, D) of value 100 k + 10 n + d and rewards (N, K, 1) of value 10 k + n.

    Each value shows its position.
    """
    ns, ks, ds = np.meshgrid(range(n), range(k), range(d), indexing="ij")
    return (100 * ks + 10 * ns + ds + plus).astype(np.float32), (10.0 * ks + ns + plus)[
        :, :, :1
    ].astype(np.float32)


def publish(folder, form=3, split="train", data=None, order=None, reward_order=None, trailing=None):
    """Save arrays (N, K, D) and (N, K, 1) in a published format.

    order, reward_order: axis orders of the files, None for those of the format.
    """
    embedding, reward = data or values()
    order = order or ("NKD" if form == 3 else "KND")
    reward = reward[:, :, 0] if (reward_order or order[:2]) == "NK" else reward[:, :, 0].T
    names = [name.format(split if form in (1, 3) else split.upper()) for name in NAMES[form]]
    folder.mkdir(exist_ok=True, parents=True)
    np.save(folder / names[0], embedding if order == "NKD" else embedding.swapaxes(0, 1).copy())
    np.save(
        folder / names[1],
        reward[:, :, None].copy() if (form == 3 if trailing is None else trailing) else reward,
    )
    return [folder / name for name in names]


def load(root, **changed):
    return load_embd_data(**{**CALL, "root": root, **changed})


def is_mapped(array):
    """True if the memory of the array is that of a file, so that nothing was read or copied yet."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return isinstance(array.base, mmap.mmap)


def check(loaded, data=None):
    for found, expected in zip(loaded, data or values(), strict=True):
        assert isinstance(found, np.memmap) and is_mapped(found)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.fixture(autouse=True)
def no_root(monkeypatch):
    monkeypatch.delenv("EMBD_REPO_DIR", raising=False)


def rng(seed=0):
    return np.random.default_rng(seed)


# -------------------------------------------------------------------------------------- the snippet


def _statements(page):
    """Statements of the page's code blocks, as ast.unparse writes them."""
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    return {ast.unparse(step) for block in blocks for step in ast.parse(block).body}


def test_the_snippet_verbatim(tmp_path, monkeypatch, capsys):
    """500 test responses to each of 501 prompts; the reward is the first dimension."""
    for split, n, k, d in (("train", 1000, 10, 2), ("test", 501, 500, 2)):
        data = rng(n).standard_normal((n, k, d)).astype(np.float32)
        publish(tmp_path, 3, split, (data, data[:, :, :1]))
    monkeypatch.setenv("EMBD_REPO_DIR", str(tmp_path))
    found = {name: getattr(rewardlib, name) for name in rewardlib.PUBLIC}
    exec(SNIPPET, found)
    assert found["train_embeddings"].shape == (1000, 10, 2) and found["train_rewards"].shape == (
        1000,
        10,
        1,
    )
    assert found["train_comparisons"].shape == (10000, 2, 2) and found["train_labels"].shape == (
        10000,
    )
    assert found["rm_predictions"].shape == found["test_rewards"].shape == (501, 500, 1)
    best = calc_bon(found["test_rewards"], found["test_rewards"], 500)
    assert 0.3 < found["rho"] <= 1 and 1 < found["bon_500"] <= best
    assert (
        "10000 random pairs on 1000 prompts; 0 of equal reward left out; label error 0.4"
        in capsys.readouterr().out
    )
    documented = _statements((ROOT / "docs" / "api.md").read_text())
    assert all(ast.unparse(step) in documented for step in ast.parse(SNIPPET).body)


def test_importing_the_library_is_light():
    code = (
        "import sys, rewardlib; "
        "assert not {'numpy', 'scipy', 'sklearn', 'torch'} & set(sys.modules), 1"
    )
    loading = (
        "from rewardlib import calc_bon; "
        "assert 'torch' not in sys.modules and 'sklearn' not in sys.modules, 2"
    )
    subprocess.run([sys.executable, "-c", f"{code}; {loading}"], cwd=ROOT, check=True)
    assert {"load_embd_data", "pair_annotate", "calc_bon", "calc_spearmanr", "__version__"} <= set(
        dir(rewardlib)
    )
    with pytest.raises(AttributeError, match="'rewardlib' has no attribute 'calc_best'"):
        _ = rewardlib.calc_best


# --------------------------------------------------------------------------------- formats and axes


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("form", NAMES)
def test_each_format_is_found_and_mapped_in_one_order(tmp_path, form, split, capsys):
    for other, data in (
        (split, values()),
        ({"train": "test", "test": "train"}[split], values(5, 7)),
    ):
        publish(tmp_path / "deep" / "er", form, other, data)
    loaded = load(tmp_path, split=split.upper())
    check(loaded)
    assert loaded[0][2, 1, 1] == 121 and loaded[1][2, 1, 0] == 12
    line = capsys.readouterr().out
    assert (
        f"load_embd_data: {split}: 4 prompts x 3 responses x 2 dimensions, float32, from {tmp_path}"
        in line
    )
    assert f"(format {str(form)[0]}, {'NKD' if form == 3 else 'KND'})" in line


@pytest.mark.parametrize("trailing", [False, True])
@pytest.mark.parametrize("reward_order", ["KN", "NK"])
@pytest.mark.parametrize("order", ["KND", "NKD"])
@pytest.mark.parametrize("form", [1, 3])
def test_every_axis_order(tmp_path, form, order, reward_order, trailing):
    publish(tmp_path, form, order=order, reward_order=reward_order, trailing=trailing)
    check(load(tmp_path, axes=order.lower()))
    documented = {"NK" if trailing else "KN", "NK" if form == 3 else "KN"}
    if reward_order in documented:
        check(load(tmp_path))
    else:
        with pytest.raises(InputError, match="give axes='KND' .* or axes='NKD'"):
            load(tmp_path)


def test_equal_axes_are_refused_until_told(tmp_path):
    data = values(3, 3)
    publish(tmp_path, 3, data=data)
    with pytest.raises(
        InputError, match=r"both axis orders fit .*; give axes='KND' or axes='NKD'$"
    ):
        load(tmp_path)
    check(load(tmp_path, axes="NKD"), data)
    check(load(tmp_path, axes="KND"), [array.swapaxes(0, 1) for array in data])


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_the_embeddings_keep_their_type(tmp_path, dtype):
    data = values()[0].astype(dtype), values()[1].astype(np.float64)
    publish(tmp_path, 1, data=data)
    check(load(tmp_path), data)


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.uint8])
def test_other_rewards_become_float64(tmp_path, dtype):
    publish(tmp_path, data=(values()[0], values()[1].astype(dtype)))
    rewards = load(tmp_path)[1]
    assert rewards.dtype == np.float64 and rewards.shape == (N, K, 1)
    np.testing.assert_array_equal(rewards, values()[1])


@pytest.mark.parametrize("form", [1, 3])
def test_max_prompts_takes_the_first(tmp_path, form, capsys):
    publish(tmp_path, form)
    check(load(tmp_path, max_prompts=2), [array[:2] for array in values()])
    assert "train: 2 prompts x 3 responses" in capsys.readouterr().out
    check(load(tmp_path, max_prompts=np.int64(9)))
    assert (
        "all 4 prompts are taken; max_prompts 9 is more than there are" in capsys.readouterr().out
    )
    for wrong in (0, 2.0, "all"):
        with pytest.raises(
            InputError, match="max_prompts: expected a whole number of at least 1, found"
        ):
            load(tmp_path, max_prompts=wrong)


# ------------------------------------------------------------------------------- names and the root


@pytest.mark.parametrize(
    "names", [("harmless", "gemma2b-sft", "gemma2b"), ("HARMLESS", "GEMMA2B-SFT", "Gemma2B")]
)
@pytest.mark.parametrize("form", NAMES)
def test_names_are_found_case_aside(tmp_path, form, names):
    publish(tmp_path, form)
    check(load(tmp_path, **dict(zip(("task", "res_gen_model", "embed_model"), names, strict=True))))


def test_tuned_and_plain_generators_are_told_apart(tmp_path):
    embedding, reward = publish(tmp_path, 3)
    with pytest.raises(
        InputError,
        match=r"expected a train embedding file .*embd_gemma2b_Gemma2b_Harmless_train.npy",
    ):
        load(tmp_path, res_gen_model="gemma2b")
    for path in (embedding, reward):
        path.rename(path.with_name(path.name.replace("-sft", "")))
    check(load(tmp_path, res_gen_model="gemma2b"))
    with pytest.raises(
        InputError, match="similar: embd_Gemma2b_Gemma2b_Harmless_train.npy; set dataset=, task="
    ):
        load(tmp_path)


def test_a_data_set_without_gpt4_is_not_tuned(tmp_path):
    for path in publish(tmp_path, 1):
        path.rename(path.with_name(path.name.replace("-gpt4", "")))
    check(load(tmp_path, res_gen_model="Gemma2b"))
    with pytest.raises(InputError, match="expected a train embedding file"):
        load(tmp_path)
    check(load(tmp_path, dataset="hh-rlhf-harmless"))


def test_two_data_sets_are_listed_and_dataset_settles(tmp_path):
    publish(tmp_path, 1)
    for path in publish(tmp_path / "plain", 1, data=values(plus=500)):
        path.rename(path.with_name(path.name.replace("-gpt4", "")))
    message = (
        "expected one train embedding file, found 2: EMBD_hh-rlhf-harmless-gpt4_.*, "
        "plain/EMBD_hh-rlhf-harmless_.*; "
        r"choose with dataset='hh-rlhf-harmless\|hh-rlhf-harmless-gpt4'"
    )
    with pytest.raises(InputError, match=message):
        load(tmp_path, res_gen_model="gemma2b")
    check(load(tmp_path, res_gen_model="gemma2b", dataset="HH-RLHF-Harmless"), values(plus=500))
    check(load(tmp_path))


def test_two_reward_models_are_listed_and_reward_model_settles(tmp_path):
    publish(tmp_path, 1)
    np.save(
        tmp_path / "REWARD_hh-rlhf-harmless-gpt4_Other_gemma2b_train.npy",
        values()[1][:, :, 0].T + 1,
    )
    with pytest.raises(
        InputError, match=r"expected one train reward file, found 2: .*reward_model='Other\|ray'"
    ):
        load(tmp_path)
    check(load(tmp_path, reward_model="other"), (values()[0], values()[1] + 1))


def test_two_formats_are_listed_and_a_root_settles(tmp_path):
    publish(tmp_path / "one", 1)
    publish(tmp_path / "three", 3)
    with pytest.raises(
        InputError, match="found 2: three/embd_.*one/EMBD_.*choose with a root that holds only"
    ):
        load(tmp_path)
    check(load(tmp_path / "three"))


def test_other_tasks_are_their_own_data_set(tmp_path):
    for path in publish(tmp_path, 1):
        path.rename(path.with_name(path.name.replace("hh-rlhf-harmless-gpt4", "alpaca")))
    check(load(tmp_path, task="Alpaca", res_gen_model="gemma2b"))
    check(load(tmp_path, res_gen_model="gemma2b", dataset="alpaca"))


def test_without_a_root(tmp_path, monkeypatch):
    """The environment variable, then run_all.sh's folder, then the working directory."""
    monkeypatch.chdir(tmp_path)
    for folder, plus in (("here", 10), ("embd/RM-Embeddings", 20), ("elsewhere", 30)):
        publish(tmp_path / folder, data=values(plus=plus))
    monkeypatch.setenv("EMBD_REPO_DIR", "elsewhere")
    check(load(None), values(plus=30))
    monkeypatch.delenv("EMBD_REPO_DIR")
    check(load(None), values(plus=20))
    shutil.rmtree("embd")
    shutil.rmtree("elsewhere")
    check(load(None), values(plus=10))
    with pytest.raises(
        InputError, match="absent: no such folder .* check root, or set EMBD_REPO_DIR"
    ):
        load("absent")


def test_what_is_missing_is_named(tmp_path):
    _, reward = publish(tmp_path)
    reward.unlink()
    with pytest.raises(
        InputError,
        match=r"expected a train reward file for embd_Gemma2b-sft.* named reward_Gemma2b-s",
    ):
        load(tmp_path)
    with pytest.raises(
        InputError,
        match=r"named EMBD_hh-rlhf-Harmless-gpt4_Gemma2b_Gemma2b-sft_test.npy or .* found ",
    ):
        load(tmp_path, split="test")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "validation"}, "split: expected 'train', 'test', found 'validation'"),
        ({"axes": "NDK"}, "axes: expected 'KND', 'NKD', found 'NDK'"),
        ({"task": None}, "task: expected a name as in the file names, found None"),
        ({"embed_model": ""}, "embed_model: expected a name"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, changed, message):
    publish(tmp_path)
    with pytest.raises(InputError, match=message):
        load(tmp_path, **changed)


def test_a_cut_file_is_refused(tmp_path):
    embedding, _ = publish(tmp_path)
    embedding.write_bytes(embedding.read_bytes()[:-4])
    with pytest.raises(InputError, match="expected a whole .npy file"):
        load(tmp_path)


# ----------------------------------------------------------------------------------------- DATA_DIR


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A DATA_DIR that convert_embeddings.py made, below a root."""
    root = tmp_path_factory.mktemp("root")
    publish(root / "src", 1)
    names = ["--task", "harmless", "--embed_model", "gemma2b", "--gen_model", "gemma2b"]
    convert_embeddings.main(
        ["--embd_dir", str(root / "src"), *names, "--output_dir", str(root / "data")]
    )
    shutil.rmtree(root / "src")
    return root


def test_a_data_dir_is_mapped_file_by_file(data, capsys):
    for split, shape in (("train", (60, 5, 24)), ("test", (20, 12, 24))):
        stacked, rewards = load(data, split=split)
        files = [np.load(data / embeddings.file_names(split, k)[0]) for k in range(shape[1])]
        assert (
            stacked.shape == shape
            and rewards.shape == (*shape[:2], 1)
            and rewards.dtype == np.float64
        )
        assert len(stacked) == shape[0] and stacked.ndim == 3 and stacked.dtype == np.float32
        assert all(map(is_mapped, stacked.arrays))
        np.testing.assert_array_equal(np.asarray(stacked), np.stack(files, 1))
        np.testing.assert_array_equal(rewards[:, :, 0], embeddings.load(data, split).rewards)
    assert f"from DATA_DIR {data} (it records no names to compare)" in capsys.readouterr().out
    few, rewards = load(data, max_prompts=7)
    assert (
        few.shape == (7, 5, 24) and rewards.shape == (7, 5, 1) and all(map(is_mapped, few.arrays))
    )


KEYS = [
    np.s_[2], np.s_[-1], np.s_[1:3], np.s_[:], np.s_[..., 0], np.s_[1, 2], np.s_[1, 2, 1],
    np.s_[:, 1], np.s_[::2, :1], np.s_[:, :, 1], np.s_[..., 1:], np.s_[1:, ..., 0],
    np.s_[[0, 3, 0]], np.s_[[0, 3], [2, 1]], np.s_[[[0, 1], [2, 3]]], np.s_[[0, 3], :, 1],
    np.s_[:, [2, 0], 1:], np.s_[np.arange(4) > 1], np.s_[np.eye(4, 3) > 0], np.s_[0, [1, 1]],
    np.s_[np.int64(3)], np.s_[4:], np.s_[()], np.s_[None],
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=repr)
def test_stacked_files_are_indexed_as_one_array(key):
    array = values()[0]
    stacked = api.StackedFiles(list(array.swapaxes(0, 1)))
    found = stacked[key]
    assert found.shape == array[key].shape and found.dtype == array.dtype
    np.testing.assert_array_equal(found, array[key])


def test_stacked_files_refuse_what_they_cannot_index():
    stacked = api.StackedFiles(list(values()[0].swapaxes(0, 1)))
    for key in (np.s_[:, :, [0, 1]], np.s_[0, 0, 0, 0], np.s_[9], np.s_[:, 3], np.s_[:, :, None]):
        with pytest.raises(IndexError):
            stacked[key]
    with pytest.raises(ValueError, match="the 3 files are not one array in memory"):
        np.array(stacked, copy=False)
    assert np.asarray(stacked, np.float64).dtype == np.float64 and np.array(
        stacked, copy=True
    ).shape == (N, K, D)
    assert repr(stacked) == "StackedFiles(shape=(4, 3, 2), dtype=float32)"


def test_a_data_dir_below_the_root_is_found_by_the_names_it_was_made_from(converted, capsys):
    stacked, rewards = load(converted, res_gen_model="gemma2b")
    np.testing.assert_array_equal(stacked[:], values()[0])
    np.testing.assert_array_equal(rewards, values()[1])
    assert (
        "made from EMBD_hh-rlhf-harmless-gpt4_gemma2b_gemma2b_train.npy" in capsys.readouterr().out
    )
    assert (
        load(converted)[0].shape
        == load(converted / "data", reward_model="Ray")[0].shape
        == (N, K, D)
    )


def test_a_data_dir_of_other_names_is_never_taken(converted):
    for root in (converted, converted / "data"):
        for changed in ({"task": "helpful"}, {"embed_model": "gemma7b"}, {"reward_model": "other"}):
            message = (
                "expected a train embedding file .*DATA_DIR .*data: "
                "EMBD_hh-rlhf-harmless-gpt4_gemma2b_gemma2b_t"
            )
            with pytest.raises(InputError, match=message):
                load(root, **changed)


def test_a_data_dir_without_names_is_taken_only_by_itself(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    with pytest.raises(
        InputError,
        match="DATA_DIR .*data: no names .a DATA_DIR without names is taken as root= itself",
    ):
        load(tmp_path)
    assert load(tmp_path / "data")[0].shape == (60, 5, 24)
    (tmp_path / "data" / "EMBD-TRAIN-split_1.npy").unlink()
    with pytest.raises(InputError, match="EMBD-TRAIN-split_1.npy is missing"):
        load(tmp_path / "data")


def test_files_and_the_data_dir_made_from_them_are_both_listed(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "both")
    publish(tmp_path / "both" / "src", 1)
    with pytest.raises(
        InputError,
        match="expected one source of train embeddings, found 2: .*both/data, .*both/src/EMBD",
    ):
        load(tmp_path / "both")
    check(load(tmp_path / "both" / "src"))


def test_a_data_dir_of_step_4_is_found_by_its_names(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    arguments = {
        "dataset": "hh-rlhf-harmless-gpt4",
        "embed_model_name": "gemma2b",
        "gen_pref_model_name": "gemma2b",
    }
    manifest = {
        "producer": "step4_gen_embeddings.py",
        "arguments": {**arguments, "reward_model": "rayharmless"},
        "files": {},
    }
    rewardlib.artifacts.write_json(tmp_path / "data" / "manifest.json", manifest)
    assert (
        load(tmp_path)[0].shape
        == load(tmp_path, reward_model="rayharmless")[0].shape
        == (60, 5, 24)
    )
    with pytest.raises(InputError, match="expected a train embedding file"):
        load(tmp_path, reward_model="rmmistral7b")


# ----------------------------------------------------------------------------------------- annotate


def annotate(rewards, quality=-1, **changed):
    """pair_annotate of embeddings that are the row numbers."""
    rewards = np.asarray(rewards, float)
    rows = np.arange(rewards.size, dtype=float).reshape(*rewards.shape[:2], 1)
    return pair_annotate(rows, rewards, quality, **changed)


def test_all_pairs_by_hand(capsys):
    """Rewards 1, 3, 2 and 4, 4, 5: three pairs and two, each once; the label is the better side."""
    rewards = [[1, 3, 2], [4, 4, 5]]
    comparisons, labels = annotate(rewards, pairs_per_prompt=3)
    assert comparisons.shape == (5, 2, 1) and labels.shape == (5,) and labels.dtype == np.int64
    sides = comparisons[:, :, 0].astype(int)
    assert {frozenset(pair) for pair in sides.tolist()} == {
        frozenset(p) for p in ((0, 1), (0, 2), (1, 2), (3, 5), (4, 5))
    }
    flat = np.ravel(rewards)
    assert labels.tolist() == (flat[sides[:, 0]] > flat[sides[:, 1]]).astype(int).tolist()
    line = (
        "pair_annotate: 5 random pairs on 2 prompts; 1 of equal reward left out; "
        "label error 0.000 (quality -1, scale"
    )
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("strategy", api.STRATEGIES)
def test_pairs_are_unique_turned_and_labelled(strategy):
    rewards = rng(1).standard_normal((60, 10, 1))
    annotated = annotate(rewards, pair_strategy=strategy)
    (comparisons, labels), flat = annotated, rewards.ravel()
    index = comparisons[:, :, 0].astype(int)
    assert len({frozenset(pair) for pair in index.tolist()}) == len(labels) == 600
    np.testing.assert_array_equal(labels, flat[index[:, 0]] > flat[index[:, 1]])
    assert 0.4 < labels.mean() < 0.6
    prompts, responses = annotated.pairs.prompts, annotated.pairs.responses
    np.testing.assert_array_equal(prompts * 10 + responses, index)
    reward_diff = flat[index[:, 0]] - flat[index[:, 1]]
    np.testing.assert_array_equal(annotated.pairs.reward_diff, reward_diff)
    assert ((prompts[:, 0] == prompts[:, 1]) == (strategy != "cross_prompt")).all()
    assert np.bincount(prompts[:, 0]).sum() == 600


@pytest.mark.parametrize("strategy", api.STRATEGIES)
def test_groups_share_no_prompt(strategy):
    annotated = annotate(rng(1).standard_normal((60, 10, 1)), pair_strategy=strategy)
    of_prompt = {}
    for group, sides in zip(
        annotated.groups.tolist(), annotated.pairs.prompts.tolist(), strict=True
    ):
        for prompt in sides:
            assert of_prompt.setdefault(prompt, group) == group
    assert len(set(annotated.groups)) == (3 if strategy == "cross_prompt" else 60)
    few = annotate(rng(1).standard_normal((3, 4, 1)), pair_strategy=strategy, pairs_per_prompt=2)
    assert len(few[1]) == len(few.groups) == 6


def test_diverse_and_similar_by_hand():
    """Ranks of the four responses: 2 0 3 1. Of equal gaps, the middle ranks come first."""
    rewards = np.array([[3.0, 1, 4, 2]])
    response_of = {rank: response for response, rank in enumerate((2, 0, 3, 1))}
    orders = {True: [(0, 3), (0, 2), (1, 3), (1, 2), (0, 1), (2, 3)]}
    orders[False] = [(1, 2), (0, 1), (2, 3), (0, 2), (1, 3), (0, 3)]
    for widest, order in orders.items():
        expected = [[response_of[low], response_of[high]] for low, high in order]
        for n in range(1, 7):
            assert api.by_rank_gap(rewards, n, widest).tolist() == [expected[:n]]
    for strategy, pair in (("diverse", {1, 2}), ("similar", {3, 0})):
        index, _ = annotate(rewards, pair_strategy=strategy, pairs_per_prompt=1, return_index=True)
        assert set(index.ravel().tolist()) == pair


@pytest.mark.parametrize("k", [2, 3, 5, 8, 10])
def test_the_first_diverse_and_similar_pair_are_those_of_step_5(k):
    rewards = rng(k).integers(4, size=(30, k)).astype(float)
    for widest, consider_first_n in ((True, -1), (False, -2)):
        found = api.by_rank_gap(rewards, 1, widest)[:, 0]
        np.testing.assert_array_equal(found, pairs.candidates(rewards, consider_first_n))


def test_strategies_differ_in_reward_gap():
    rewards = rng(1).standard_normal((300, 10, 1))
    gaps = [
        np.abs(annotate(rewards, pair_strategy=name, pairs_per_prompt=n).pairs.reward_diff).mean()
        for n in (1, 10)
        for name in ("similar", "random", "diverse")
    ]
    assert gaps[:3] == sorted(gaps[:3]) and gaps[3:] == sorted(gaps[3:])
    assert gaps[0] < 0.5 * gaps[1] and gaps[5] > 1.5 * gaps[4]


def test_noisy_labels_and_the_error_that_is_kept(capsys):
    """Quality 1 on rewards with sd 1: 27.5 % wrong (arXiv 2411.04991).

    The default scale is the sd of the rewards.
    """
    rewards = rng(1).standard_normal((3000, 5, 1))
    annotated = annotate(rewards, 1.0, pairs_per_prompt=4)
    assert annotated.pairs.label_error == pytest.approx(0.275, abs=0.01)
    wrong = np.mean((annotated[1] == 1) != (annotated.pairs.reward_diff > 0))
    assert (
        annotated.pairs.label_error == wrong
        and f"label error {wrong:.3f} (quality 1, scale" in capsys.readouterr().out
    )
    larger = annotate(100 * rewards, 1.0, pairs_per_prompt=4)
    assert np.array_equal(larger[1], annotated[1]) and np.array_equal(larger[0], annotated[0])
    fixed = annotate(rewards, 1.0, pairs_per_prompt=4, reward_scale=0.1)
    assert fixed.pairs.label_error < 0.1
    assert annotate(rewards, 0.0).pairs.label_error == pytest.approx(0.5, abs=0.02)


def test_index_pairs_name_the_same_rows_and_read_none(tmp_path):
    class Unread:
        shape, dtype = (30, 5, 3), np.dtype(np.float32)

        def __getitem__(self, key):
            raise AssertionError("an embedding was read")

        __array__ = __getitem__

    data = (
        rng().standard_normal((30, 5, 3)).astype(np.float32),
        rng(1).standard_normal((30, 5, 1)).astype(np.float32),
    )
    for form in (1, 3):
        publish(tmp_path / str(form), form, data=data)
        rows, rewards = load(tmp_path / str(form))
        comparisons, labels = pair_annotate(rows, rewards, 5)
        index, again = pair_annotate(Unread(), rewards, 5, return_index=True)
        assert index.shape == (300, 2) and index.dtype.kind == "i" and np.array_equal(labels, again)
        np.testing.assert_array_equal(comparisons, data[0].reshape(-1, 3)[index])
        assert type(comparisons) is np.ndarray or not is_mapped(comparisons)
    stacked = api.StackedFiles(list(data[0].swapaxes(0, 1)))
    np.testing.assert_array_equal(pair_annotate(stacked, rewards, 5)[0], comparisons)


def test_pairs_fit_a_model_as_arrays_or_as_index_pairs(data):
    rows, rewards = load(data)
    annotated = pair_annotate(rows, rewards, 10)
    index, labels = pair_annotate(rows, rewards, 10, return_index=True)
    model, groups = BT_MLP(hidden=(16, 8)), annotated.groups
    a = model.fit(*annotated, groups=groups).predict(rows)
    b = model.fit(index, labels, embeddings=np.reshape(rows, (-1, 24)), groups=groups).predict(
        np.asarray(rows)
    )
    assert a.shape == rewards.shape
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", api.STRATEGIES)
def test_seeds(strategy):
    rewards = rng(1).standard_normal((40, 6, 1))
    options = {"pair_strategy": strategy, "pairs_per_prompt": 3}
    default, zero, other = (
        annotate(rewards, 2, rng=seed, **options) for seed in (None, 0, np.int64(5))
    )
    for a, b in zip(default, zero, strict=True):
        assert a.tobytes() == b.tobytes()
    assert default[0].tobytes() != other[0].tobytes()
    generator = rng(7)
    first, second = (annotate(rewards, 2, rng=generator, **options)[0] for _ in range(2))
    assert first.tobytes() != second.tobytes()
    assert first.tobytes() == annotate(rewards, 2, rng=rng(7), **options)[0].tobytes()


def test_what_was_annotated_can_be_kept():
    annotated = annotate([[1, 2, 3]], pairs_per_prompt=2)
    again = pickle.loads(pickle.dumps(annotated))
    assert isinstance(annotated, tuple) and len(annotated) == 2
    assert np.array_equal(again[0], annotated[0]) and again.pairs.label_error == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"embeddings": np.zeros((3, 4, 2))},
            r"embeddings: expected \(N, K, D\) = \(4, 3, D\) .* found \(3, 4, 2\)",
        ),
        (
            {"embeddings": np.zeros((12, 2))},
            r"embeddings: expected \(N, K, D\) = \(4, 3, D\) .* found \(12, 2\)",
        ),
        (
            {"rewards": np.zeros(12)},
            r"rewards: expected numbers in \(N, K, 1\) or \(N, K\), .* found \(12,\) of float64",
        ),
        ({"rewards": np.zeros((4, 3, 2))}, r"rewards: expected .* found \(4, 3, 2\)"),
        ({"rewards": np.full((4, 3), "a")}, "rewards: expected numbers .* of <U1"),
        (
            {"rewards": [[1, 2, 3]] * 3 + [[1, np.nan, 3]]},
            "rewards: expected finite numbers, found nan at prompt 3, resp",
        ),
        (
            {"rewards": np.ones((4, 3))},
            r"golden rewards: both sides of all \d+ pairs have the same reward",
        ),
        ({"annotation_quality": np.nan}, "annotation_quality: expected a finite number, found nan"),
        (
            {"annotation_quality": "high"},
            "annotation_quality: expected a finite number, found 'high'",
        ),
        (
            {"pair_strategy": "xprompt"},
            "pair_strategy: expected 'random', 'diverse', 'similar', 'cross_prompt', found",
        ),
        (
            {"pairs_per_prompt": 4},
            "pairs_per_prompt: expected at most 3, the pairs of 3 responses, found 4",
        ),
        (
            {"pairs_per_prompt": 4, "pair_strategy": "diverse"},
            "pairs_per_prompt: expected at most 3",
        ),
        (
            {"pairs_per_prompt": 0},
            "pairs_per_prompt: expected a whole number of at least 1, found 0",
        ),
        ({"reward_scale": 0}, "reward_scale: expected a number above 0, found 0"),
        ({"rng": -1}, "rng: expected a whole number of at least 0, found -1"),
        ({"rng": "seed"}, "rng: expected a whole number"),
    ],
)
def test_annotation_refusals(changed, message):
    arguments = {
        "embeddings": np.zeros((N, K, D)),
        "rewards": values()[1],
        "annotation_quality": 1,
        "pairs_per_prompt": 2,
    }
    with pytest.raises(InputError, match=message):
        pair_annotate(**{**arguments, **changed})


# ------------------------------------------------------------------------------------------ measure

# Prompt 0 is ranked correctly, prompt 1 half wrongly; prompt 2 has a tie in scores and rewards; the
# golden rewards of prompt 3 are equal, so it has no ranking.
GOLDEN = np.array([[1.0, 2, 3], [3, 1, 2], [1, 1, 2], [5, 5, 5]])
SCORES = np.array([[0.1, 0.5, 0.9], [0.1, 0.5, 0.9], [0.2, 0.2, 0.9], [0.3, 0.1, 0.2]])


@pytest.mark.parametrize(("n", "expected"), [(1, 31 / 12), (2, 11 / 4), (3, 3)])
def test_best_of_n_by_hand(n, expected):
    """Rows: 2 8/3 3, 2 5/3 2, 4/3 5/3 2, 5 5 5."""
    assert calc_bon(SCORES, GOLDEN, N=n) == pytest.approx(expected, abs=1e-12)
    assert calc_bon(
        SCORES[:, :, None], GOLDEN[:, :, None].astype(np.float32), N=np.int32(n)
    ) == pytest.approx(expected)
    assert calc_bon(SCORES.tolist(), GOLDEN[:, :, None], n) == calc_bon(
        SCORES[:, :, None], GOLDEN, n
    )


@given(st.integers(1, 3), st.integers(1, 6), st.data())
@settings(deadline=None)
def test_best_of_n_is_the_mean_over_all_subsets(n_prompts, k, data):
    ties = st.integers(-2, 2).map(float)
    scores, golden = (data.draw(arrays(float, (n_prompts, k), elements=ties)) for _ in range(2))
    n = data.draw(st.integers(1, k))
    subsets = [list(subset) for subset in combinations(range(k), n)]
    tops = [
        g[at][s[at] == s[at].max()].mean()
        for s, g in zip(scores, golden, strict=True)
        for at in subsets
    ]
    assert calc_bon(scores, golden, n) == pytest.approx(np.mean(tops), abs=1e-12)


def test_spearman_by_hand_leaves_out_what_has_no_ranking(capsys):
    assert calc_spearmanr(SCORES[:3], GOLDEN[:3]) == pytest.approx(0.5)
    assert capsys.readouterr().out == ""
    assert calc_spearmanr(SCORES[:, :, None], GOLDEN) == pytest.approx(0.5)
    assert "calc_spearmanr: 1 of 4 prompts left out: all their rewards" in capsys.readouterr().out
    assert np.isnan(calc_spearmanr(np.zeros((4, 3, 1)), GOLDEN))
    assert "4 of 4 prompts left out" in capsys.readouterr().out
    assert calc_spearmanr(-GOLDEN[:3], GOLDEN[:3]) == -1
    assert (
        type(calc_spearmanr(SCORES[:3], GOLDEN[:3])) is type(calc_bon(SCORES, GOLDEN, 2)) is float
    )


@pytest.mark.parametrize(
    ("predictions", "rewards", "message"),
    [
        (
            SCORES.ravel(),
            GOLDEN,
            r"predictions: expected numbers in \(N, K, 1\) or \(N, K\), "
            r".* found \(12,\) of float64",
        ),
        (SCORES, GOLDEN[:, :, None, None], r"rewards: expected numbers in .* found \(4, 3, 1, 1\)"),
        (np.zeros((4, 3, 2)), GOLDEN, r"predictions: expected .* found \(4, 3, 2\)"),
        (np.zeros((0, 3)), np.zeros((0, 3)), r"predictions: expected .* found \(0, 3\)"),
        (SCORES.T, GOLDEN, "predictions: expected one for each of 4 x 3 rewards, found 3 x 4"),
        (
            np.where(SCORES == 0.5, np.nan, SCORES),
            GOLDEN,
            "predictions: expected finite numbers, found nan at prompt 0, r",
        ),
        (
            SCORES,
            np.where(GOLDEN == 5, np.inf, GOLDEN),
            "rewards: expected finite numbers, found inf at prompt 3",
        ),
        (SCORES.astype(complex), GOLDEN, "predictions: expected numbers .* of complex128"),
    ],
)
def test_measures_refuse_other_arrays(predictions, rewards, message):
    for call in (calc_spearmanr, lambda *arrays_: calc_bon(*arrays_, N=2)):
        with pytest.raises(InputError, match=message):
            call(predictions, rewards)


def test_n_is_a_number_of_responses():
    with pytest.raises(
        InputError, match="N: expected at most 3, the responses to each prompt, found 500"
    ):
        calc_bon(SCORES, GOLDEN, N=500)
    for wrong in (0, -1, 2.5, None):
        with pytest.raises(InputError, match="N: expected a whole number of at least 1, found"):
            calc_bon(SCORES, GOLDEN, N=wrong)


# -------------------------------------------------------------------------------- order consistency


def test_order_and_classification_errors_by_hand():
    """Pair 1 has the right order and classes, 4 is tied, 5 has the wrong order.

    Pairs 2 and 3 have the right order, but the worse side of 2 is too high, the better side of 3
    too low.
    """
    scores = np.array([[2.0, -1], [1, 3], [-1, -3], [0.5, 0.5], [1, -2]])
    found = ranking.order_consistency(scores, np.array([1, 0, 1, 0, 0]))
    assert found["order_error"] == pytest.approx(1.5 / 5)
    assert found["better_error"] == pytest.approx(2 / 5) and found["worse_error"] == pytest.approx(
        3 / 5
    )
    assert found["bound"] == pytest.approx(1) and found["least_bound"] == pytest.approx(3 / 5)
    moved = ranking.order_consistency(scores + 7, np.array([1, 0, 1, 0, 0]), threshold=7)
    assert moved == pytest.approx(found)


@given(st.integers(1, 12), st.data())
@settings(deadline=None)
def test_the_bound_holds_on_any_pairs_at_any_threshold(m, data):
    ties = st.integers(-3, 3).map(float)
    scores = data.draw(arrays(float, (m, 2), elements=ties))
    labels = data.draw(arrays(int, m, elements=st.integers(0, 1)))
    thresholds = np.arange(-4, 4.5, 0.5)
    found = [ranking.order_consistency(scores, labels, threshold) for threshold in thresholds]
    for each in found:
        assert each["order_error"] <= each["bound"] + 1e-12
        assert each["bound"] == pytest.approx(each["better_error"] + each["worse_error"])
        assert each["least_bound"] == pytest.approx(min(other["bound"] for other in found))


@pytest.mark.parametrize("k", [2, 3, 4, 10])
def test_no_order_is_so_good_that_the_bound_of_all_pairs_is_small(k):
    """Of all pairs of K responses (K - 2) / (2 K - 2) or more lie on one side of the threshold.

    A perfect order reaches this number for even K.
    """
    golden = rng(k).permuted(np.tile(np.arange(k, dtype=float), (20, 1)), axis=1)
    least = (k - 2) / (2 * k - 2) if k % 2 == 0 else (k - 1) / (2 * k)
    for scores in (golden, rng(1).standard_normal(golden.shape)):
        index, labels = annotate(golden, pairs_per_prompt=k * (k - 1) // 2, return_index=True)
        found = ranking.order_consistency(scores.ravel()[index], labels)
        assert found["least_bound"] >= (k - 2) / (2 * k - 2) - 1e-12
        if scores is golden:
            assert found["order_error"] == 0 and found["least_bound"] == pytest.approx(least)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (
            np.zeros(4),
            np.ones(4),
            r"expected scores \(M, 2\) and M labels of 0 and 1, found \(4,\) and \(4,\)",
        ),
        (np.zeros((4, 2)), np.ones(3), r"found \(4, 2\) and \(3,\)"),
        (np.zeros((4, 2)), [0, 1, 2, 1], r"labels of 0 and 1"),
        (np.zeros((0, 2)), [], r"found \(0, 2\)"),
        (np.full((1, 2), np.nan), [1], "expected finite scores, found NaN"),
    ],
)
def test_order_consistency_refuses_other_arrays(scores, labels, message):
    with pytest.raises(InputError, match=message):
        ranking.order_consistency(scores, np.asarray(labels))


def test_the_bound_on_demo_data(data, capsys):
    """The bound of a classification reward model is below one half on pairs that are far apart.

    On all pairs the bound of any scorer is (K - 2) / (2 K - 2) or more.
    """
    train, test = load(data), load(data, split="test")
    annotated = pair_annotate(*train, 10, pair_strategy="diverse")
    model = CLF_MLP(hidden=(64, 32), epochs=20).fit(*annotated, groups=annotated.groups)
    scores = model.predict(test[0]).ravel()
    assert calc_spearmanr(scores.reshape(20, 12), test[1]) > 0.4
    found = {}
    for strategy, n in (("diverse", 3), ("random", 66)):
        index, better = pair_annotate(
            *test, -1, pair_strategy=strategy, pairs_per_prompt=n, return_index=True
        )
        found[strategy] = ranking.order_consistency(scores[index], better)
        assert (
            found[strategy]["order_error"] < 0.35
            and found[strategy]["order_error"] <= found[strategy]["bound"]
        )
    assert found["diverse"]["least_bound"] < 0.5 - 0.1
    assert found["random"]["least_bound"] > 10 / 22  # (K - 2) / (2 K - 2) of K = 12
    noisy = pair_annotate(*test, 1, pairs_per_prompt=66, return_index=True)
    labelled = ranking.order_consistency(scores[noisy[0]], noisy[1])
    golden = ranking.order_consistency(scores[noisy[0]], noisy.pairs.reward_diff > 0)
    assert golden["order_error"] <= labelled["bound"] + noisy.pairs.label_error


# ---------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not REAL.is_dir(), reason="the real embeddings are not here")
def test_real_files():
    names = {"task": "alpaca", "res_gen_model": "Mix55", "embed_model": "MiniLM", "root": REAL}
    (train, rewards), (test, golden) = (
        load_embd_data(**names, split=split) for split in ("train", "test")
    )
    assert (
        train.shape == (605, 10, 384) and test.shape == (200, 50, 384) and train.dtype == np.float16
    )
    assert is_mapped(train) and is_mapped(rewards) and rewards.shape == (605, 10, 1)
    np.testing.assert_array_equal(
        train[:, 3], np.load(REAL / "EMBD_alpaca_minilm_mix55_train.npy")[3]
    )
    index, _ = pair_annotate(train, rewards, 10, pairs_per_prompt=45, return_index=True)
    assert len(index) == 25_738  # 1,487 of 27,225 have equal rewards, most of them clipped
    assert calc_bon(golden, golden, 1) == pytest.approx(golden.mean(dtype=float))
