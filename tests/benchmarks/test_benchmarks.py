"""benchmarks/: a deterministic case on which the reference and our steps finish; the tables."""

import argparse
import io
import json
import re
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from conftest import run_steps

from benchmarks import case, cpu_pipeline, reference, ridge, roofline, scale
from rewardlib import artifacts
from rewardlib.data import embeddings

TINY = {"n": 60, "k": 3, "d": case.LATENT_DIM, "n_test": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return case.make(tmp_path_factory.mktemp("case"), **TINY)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*split_*")}


# --------------------------------------------------------------------------------------------- case


def test_the_case_is_the_same_under_one_seed(folder, tmp_path):
    first = contents(folder)
    assert len(first) == 12
    assert contents(case.make(tmp_path / "again", **TINY)) == first
    other = contents(case.make(tmp_path / "other", **TINY, seed=1))
    assert other.keys() == first.keys() and all(other[name] != first[name] for name in first)


def test_a_case_that_is_there_is_not_made_again(folder, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_npy", None)
        assert case.make(folder, **TINY) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    case.make(tmp_path, **TINY)
    case.make(tmp_path, **{**TINY, "n": 50}, dtype=np.float16)
    train, _ = embeddings.load_pair(tmp_path)
    assert train.shape == (50, 3, TINY["d"]) and train.embeddings[0].dtype == np.float16


def test_the_case_is_a_data_folder_of_what_it_says(tmp_path):
    """Rewards: signal of sd 2, noise of sd 0.25. Embeddings: variance 1, half from the prompt."""
    sizes = {"n": 1500, "k": 4, "d": 64, "n_test": 300, "k_test": 2}
    train, test = embeddings.load_pair(case.make(tmp_path, **sizes))
    assert (train.shape, test.shape) == ((1500, 4, 64), (300, 2, 64))
    rows = np.stack(train.embeddings)
    assert rows.var() == pytest.approx(1, rel=0.02)
    assert (rows[0] * rows[1]).mean() == pytest.approx(0.5, rel=0.05)
    for data in (train, test):
        assert data.rewards.std() == pytest.approx(np.hypot(case.SIGNAL_SD, case.NOISE_SD), rel=0.1)
        assert abs(data.rewards.mean()) < 0.3
    manifest = artifacts.read_manifest(tmp_path)
    assert manifest["arguments"]["k_test"] == 2 and len(manifest["files"]) == 12


def test_train_and_test_prompts_can_be_made_apart(folder, tmp_path):
    whole = contents(folder)
    train = contents(case.make(tmp_path / "train", **TINY | {"n_test": 0}))
    fresh = contents(case.make(tmp_path / "fresh", **TINY | {"n": 0}))
    assert len(train) == len(fresh) == 6 and train | fresh == whole


# ---------------------------------------------------------------------------------------- reference


@pytest.fixture(scope="module")
def reference_run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    run_reference(data_dir=folder, output_dir=out, members=2, n_pairs=60, epochs=3)
    return out


def run_reference(steps=reference.STEPS, **flags):
    with torch.random.fork_rng():
        for step in steps:
            reference.STEPS[step](argparse.Namespace(**{"pairs": None, "seed": 6} | flags))


def test_the_reference_finishes(folder, reference_run):
    names = {
        "member_0.ckpt",
        "member_1.ckpt",
        "eval.json",
        "student.ckpt",
        "map.joblib",
        "validation.json",
    }
    assert {path.name for path in reference_run.iterdir()} == names
    evaluated = json.loads((reference_run / "eval.json").read_text())
    assert list(evaluated) == ["mean", "min", "0", "1"]
    assert all(len(row) == 5 and np.isfinite(row).all() for row in evaluated.values())
    validated = json.loads((reference_run / "validation.json").read_text())
    assert list(validated) == [
        "member_0 raw",
        "member_0 isotonic",
        "student raw",
        "student isotonic",
    ]
    assert all(np.isfinite(row).all() for row in validated.values())


def test_the_reference_trains_the_published_network(reference_run):
    state = torch.load(reference_run / "member_0.ckpt", weights_only=True)
    assert [tuple(value.shape) for value in state.values()] == [
        (1024, TINY["d"]), (1024,), (512, 1024), (512,), (1, 512), (1,)
    ]  # fmt: skip


def test_the_reference_learns(tmp_path):
    """On a reward that is one dimension of the embedding, the ranking is far above chance."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4, 200, 8)).astype(np.float32)
    for k in range(4):
        np.save(tmp_path / f"EMBD-TRAIN-split_{k}.npy", rows[k])
        lines = [json.dumps({"reward": float(row[0])}) for row in rows[k]]
        (tmp_path / f"rewards_split_{k}.json").write_text("\n".join(lines) + "\n")
    flags = {
        "data_dir": tmp_path,
        "output_dir": tmp_path,
        "members": 1,
        "n_pairs": 300,
        "epochs": 10,
    }
    run_reference(steps=("step5", "step6"), **flags)
    assert json.loads((tmp_path / "eval.json").read_text())["mean"][0] > 0.8


def test_the_reference_trains_on_the_pairs_it_is_given(folder, tmp_path):
    """Reversed labels reverse the ranking of the train prompts."""
    train, _ = embeddings.load_pair(folder)
    rng, rho = np.random.default_rng(0), []
    (n, m), (k, j) = (rng.integers(size, size=(2, 400)) for size in train.shape[:2])
    better = train.rewards[n, k] > train.rewards[m, j]
    flags = {"data_dir": folder, "output_dir": tmp_path, "members": 1, "epochs": 10}
    for labels in (better, ~better):
        np.save(tmp_path / "pairs.npy", np.column_stack([n, k, m, j, labels]).astype(np.int32))
        run_reference(steps=("step5", "step6"), **flags, pairs=tmp_path / "pairs.npy")
        rho.append(json.loads((tmp_path / "eval.json").read_text())["mean"][0])
    assert rho[0] > 0.2 and rho[1] < -0.2


def test_our_steps_finish_on_the_case(folder, tmp_path):
    run_steps(folder, tmp_path)
    results = artifacts.read_json(tmp_path / "validation_results.json", "step 8")
    assert np.isfinite(results["test"]["Student"]["spearman"])


# ------------------------------------------------------------------------------------------- tables


def output(module, *argv):
    text = io.StringIO()
    with redirect_stdout(text):
        module.main(list(map(str, argv)))
    return text.getvalue()


@pytest.mark.parametrize("with_test", [[], ["--with_test"]], ids=["train", "with_test"])
def test_the_pipeline_benchmark_measures_both_sides(tmp_path, with_test):
    sizes = [
        "--repeats",
        1,
        "--n_prompts",
        60,
        "--dim",
        32,
        "--n_test_prompts",
        20,
        "--n_members",
        2,
        "--n_pairs",
        40,
    ]
    few = [
        *sizes,
        "--reference_epochs",
        2,
        "--variant",
        "small=--hidden 16 8 --precision fp32",
        *with_test,
    ]
    text = output(cpu_pipeline, *few, "--output", tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())
    assert set(results["reference"]["medians"]) == set(cpu_pipeline.STEPS)
    assert set(results["ours"]["small"]["medians"]) == {"all", *cpu_pipeline.STEPS}
    for side in (results["reference"], results["ours"]["small"]):
        for row in side["medians"].values():
            assert row["cpu"] > 0 and row["wall"] > 0 and row["peak_mb"] > 10
        for name in ("members", "ensemble", "student"):
            assert -1 <= side["ranking"][name]["spearman"] <= 1
            assert 0 <= side["ranking"][name]["pair_accuracy"] <= 1
    for part in ("reference", "small", "5-8", "fresh prompts", results["machine"]):
        assert part in text


def test_the_ridge_benchmark_measures_both_sides_and_they_agree(tmp_path):
    sizes = ["--n", 200, "--dimensions", 30, "--attributes", 5, "--sources", 2, "--repeats", 1]
    text = output(ridge, *sizes, "--output", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["found"]
    assert [row["patterns"] for row in rows] == [1, 2] and "ratio_wall" in text
    for row in rows:
        assert (
            row["largest_difference"] < 1e-4 and row["ratio_wall"] > 0 and row["ours_peak_gb"] > 0
        )


def test_the_roofline_tells_rates_and_shares(tmp_path):
    sizes = ["--dim", 16, "--hidden", 8, 4, "--batch_size", 10, "--seconds", 0.01, "--repeats", 1]
    text = output(roofline, *sizes, "--output", tmp_path / "out.json")
    results = json.loads((tmp_path / "out.json").read_text())
    for name in ("fp32", "bf16"):
        assert re.search(rf"^{name}\b.*%", text, re.MULTILINE)
        assert all(rate > 0 for rate in results[name]["matrix"])
        for job, share in results[name]["shares"].items():
            assert share == pytest.approx(results[name][job][0] / results[name]["matrix"][0])


def test_the_scale_benchmark_runs_every_size_once(tmp_path, monkeypatch):
    """No step runs here: the stub records the flags of each run."""
    runs = []

    def alone(flags, output_dir):
        runs.append(flags)
        return {step: {"cpu": 1.0, "wall": 1.0, "peak_mb": 1.0} for step in cpu_pipeline.STEPS}

    monkeypatch.setattr(cpu_pipeline, "run_alone", alone)
    text = output(scale, "--shrink", 10, "--output", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 12 and len(runs) == 9, "the size that all rows share is measured once"
    assert [row["members"] for row in rows[-3:]] == list(scale.SIZES["members"])
    assert len(text.splitlines()) == 13
