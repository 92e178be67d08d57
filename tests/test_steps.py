"""Steps 5 to 8 together: what they write and repeat; leaks and bad input refused."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from copy import deepcopy

import joblib
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, STEPS, make_data, run_step, run_steps

import convert_embeddings
import step7_isotonic_distillation
from rewardlib import artifacts, calibration
from rewardlib.data import embeddings, splits
from rewardlib.errors import InputError
from rewardlib.measures import ranking
from rewardlib.models import model_files, scoring
from rewardlib.nets import mlp, student, training
from rewardlib.nets.training import _train_member
from rewardlib.pipeline import variants

REAL = ROOT.parent / "shared" / "data" / "alpaca"
CHANGING = {"manifest.json", ".inspected.json", ".lock"}


def read(folder, name):
    return json.loads((folder / name).read_text())


def contents(folder):
    """{file name: bytes} of all results, without the records of when and where."""
    return {
        p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in CHANGING
    }


@pytest.fixture
def copy(finished, tmp_path):
    """A finished OUTPUT_DIR that a test may change."""
    return shutil.copytree(finished, tmp_path / "out")


def test_results_have_the_documented_form(finished):
    results = read(finished, "validation_results.json")
    assert results["n_heldout_prompts"] == 12
    for block, sizes in ((results, ["1", "2", "5"]), (results["test"], ["1", "2", "5", "10"])):
        for variant in variants.VARIANTS:
            row = block[variant]
            assert list(row["best_of_n"]) == sizes
            for name in ("spearman", "pair_accuracy"):
                low, high = row[f"{name}_ci95"]
                assert low <= row[name] <= high
            assert (row["mse"] is None) == (row["r2"] is None) == (variant == "Teacher ORM")
        assert "no unit" in block["Teacher ORM"]["null_reason"]
        assert set(block["baselines"]) == {"random", "mean_reward", "linear_probe"}
    assert results["no_leakage"]["held_out_prompts_in_fits"] == 0
    assert {"step5", "step6", "step7", "step8"} <= set(read(finished, "manifest.json"))


def test_published_numbers_are_those_of_the_saved_predictions(data, finished):
    results, split = read(finished, "validation_results.json"), read(finished, "prompt_split.json")
    predictions = np.load(finished / "predictions_held_out.npy")
    golden = embeddings.load(data).rewards[split["held_out"]]
    assert np.array_equal(np.load(finished / "golden_held_out.npy"), golden)
    for variant, values in zip(variants.VARIANTS, predictions, strict=True):
        assert results[variant]["spearman"] == np.nanmean(ranking.spearman(values, golden))
        if variant != "Teacher ORM":
            assert results[variant]["mse"] == pytest.approx(
                np.mean((values - golden) ** 2), rel=1e-12
            )


def test_demo_shows_the_point(tmp_path):
    """Demo data: teacher far above random, calibrated MSE under the variance, student near it."""
    make_data(tmp_path / "data", "--n_prompts", "200", "--n_splits", "10", "--emb_dim", "256")
    flags = [
        "--n_sample",
        "100",
        "--n_pairs",
        "1",
        "--ensemble_number",
        "10",
        "--distill_epochs",
        "20",
    ]
    run_steps(tmp_path / "data", tmp_path, *flags[:6], steps=(5, 6))
    run_steps(tmp_path / "data", tmp_path, *flags, steps=(7, 8))
    results = read(tmp_path, "validation_results.json")
    best = read(tmp_path / "data", "manifest.json")["truth"]["best_reachable"]["test"]
    test = results["test"]
    assert (
        test["Teacher ORM"]["spearman_ci95"][0]
        > test["baselines"]["random"]["spearman_ci95"][1] + 0.2
    )
    assert test["Teacher ORM"]["spearman"] < best["spearman"]
    assert test["Teacher + Isotonic"]["mse"] < 0.75 * test["golden_variance"]
    assert test["Student"]["spearman"] > test["Teacher ORM"]["spearman"] - 0.03


def test_calibration_keeps_every_ranking_metric_of_the_teacher(finished):
    for block in (
        read(finished, "validation_results.json"),
        read(finished, "validation_results.json")["test"],
    ):
        raw, calibrated = block["Teacher ORM"], block["Teacher + Isotonic"]
        for name in ("spearman", "pair_accuracy", "selected_quantile"):
            assert raw[name] == pytest.approx(calibrated[name], abs=1e-12)
        assert raw["best_of_n"] == pytest.approx(calibrated["best_of_n"], abs=1e-12)


def test_same_command_gives_the_same_bytes(data, finished, tmp_path):
    run_steps(data, tmp_path)
    first, second = contents(finished), contents(tmp_path)
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_seed_changes_the_result(data, finished, tmp_path):
    run_steps(data, tmp_path, "--seed", "7")
    assert (
        read(tmp_path, "prompt_split.json")["held_out"]
        != read(finished, "prompt_split.json")["held_out"]
    )


def test_finished_steps_are_skipped_and_only_dependents_run_again(data, copy, capsys):
    run_steps(data, copy)
    assert capsys.readouterr().out.count("already done") == 4
    for number in (5, 6):
        run_step(number, data, copy)
    for number in (7, 8):
        run_step(number, data, copy, "--distill_epochs", "5")
    out = capsys.readouterr().out
    assert out.count("already done") == 2
    assert "step7: student explains" in out
    assert "Student - teacher" in out


def test_one_way_to_write_a_number(data, copy, capsys):
    run_step(5, data, copy, "--learning_rate", "1e-3", "--annotation_quality", "10.0")
    assert "already done" in capsys.readouterr().out


def test_more_members_keep_the_trained_ones(data, copy):
    before = {path: path.stat().st_mtime_ns for path in copy.glob("XPrompt*.ckpt")}
    run_step(5, data, copy, "--ensemble_number", "4")
    assert len(list(copy.glob("XPrompt*.ckpt"))) == 4
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


def test_replaced_settings_are_told(data, copy, capsys):
    run_step(5, data, copy, "--annotation_quality", "1")
    assert "annotation_quality 10.0 -> 1.0" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"annotation_quality 1\.0, not 10\.0"):
        run_step(6, data, copy)


NO_EVALUATION = "no evaluation of these settings and data found; run step 6 first"


def test_an_evaluation_of_other_members_is_refused(data, copy):
    run_step(5, data, copy, "--annotation_quality", "1")
    run_step(7, data, copy, "--annotation_quality", "1")
    with pytest.raises(InputError, match=NO_EVALUATION):
        run_step(8, data, copy, "--annotation_quality", "1")


def test_an_evaluation_under_another_name_is_refused(data, copy):
    """The members have the same bytes whatever the task is called."""
    for number in (5, 7):
        run_step(number, data, copy, "--task", "poetry")
    with pytest.raises(InputError, match=NO_EVALUATION):
        run_step(8, data, copy, "--task", "poetry")


def test_an_evaluation_of_a_member_that_was_exchanged_is_refused(data, copy):
    """Under the same settings: forge the record of step 5; only the digests of step 6 tell."""
    member = next(copy.glob("XPrompt*_1_*.ckpt"))
    model_files.save_mlp(member, mlp.MLP(24, generator=torch.Generator().manual_seed(0)))
    manifest = read(copy, "manifest.json")
    manifest["step5"]["outputs"][member.name] = artifacts.describe_file(member)
    artifacts.write_json(copy / "manifest.json", manifest)
    run_step(7, data, copy)
    with pytest.raises(InputError, match=NO_EVALUATION):
        run_step(8, data, copy)


@pytest.mark.parametrize("name", ["scores_held_out.npy", "scores_test.npy", "eval_results"])
@pytest.mark.parametrize("change", ["changed", "missing"])
def test_an_evaluation_that_was_changed_is_refused(data, copy, name, change):
    path = next(copy.glob(f"{name}*"))
    if change == "missing":
        path.unlink()
    elif path.suffix == ".npy":
        np.save(path, np.load(path) + np.float32(1))
    else:
        path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(InputError, match=NO_EVALUATION):
        run_step(8, data, copy)


def test_an_evaluation_without_the_new_test_set_is_refused(data, tmp_path):
    """The test files came after step 6."""
    later = change(data, tmp_path)
    kept = tmp_path / "kept"
    kept.mkdir()
    for path in [*later.glob("EMBD-TEST*"), *later.glob("rewards_test*")]:
        path.rename(kept / path.name)
    out = run_steps(later, tmp_path / "out")
    assert read(out, "validation_results.json")["test"] is None
    assert not (out / "scores_test.npy").exists()
    for path in kept.iterdir():
        path.rename(later / path.name)
    with pytest.raises(InputError, match=NO_EVALUATION):
        run_step(8, later, out)
    run_steps(later, out, steps=(6, 8))
    assert read(out, "validation_results.json")["test"]["n_prompts"] == 20


def test_scores_of_step_6_are_those_of_the_members_on_the_scale_of_step_5(data, finished):
    """And that scale is the one that the checkpoints have when they are loaded by their names."""
    train, test = embeddings.load_pair(data)
    split, record = (
        read(finished, "prompt_split.json"),
        read(finished, next(finished.glob("orm_*.json")).name),
    )
    settings = read(finished, "validation_results.json")["settings"]
    dtype = mlp.TYPES[settings["precision"]]
    paths = [finished / member["file"] for member in record["members"]]
    fit = np.concatenate([split["student_train"], split["calibration"]])
    ensemble = scoring.load(paths, train, fit, dtype)
    np.testing.assert_allclose(record["scale"]["centre"], ensemble.centre, rtol=1e-6)
    np.testing.assert_allclose(record["scale"]["spread"], ensemble.spread, rtol=1e-6)
    for name, data_set, prompts in (
        ("held_out", train, split["held_out"]),
        ("test", test, np.arange(20)),
    ):
        scores = np.load(finished / f"scores_{name}.npy")
        assert scores.shape == (3, len(prompts), data_set.shape[1]) and scores.dtype == np.float32
        np.testing.assert_allclose(scores, scoring.score(ensemble, data_set, prompts), atol=1e-5)
        predicted = np.load(finished / f"predictions_{name}.npy")[0]
        np.testing.assert_allclose(predicted, scores.astype(float).mean(0), atol=1e-12)


def test_step_8_says_the_same_whether_it_scores_the_teacher_or_reads_its_scores(
    data, finished, copy, monkeypatch
):
    """Named in another order, the members are scored again."""
    monkeypatch.setenv("FORCE", "1")
    record = read(copy, next(copy.glob("orm_*.json")).name)
    paths = [str(copy / member["file"]) for member in reversed(record["members"])]
    for number in (7, 8):
        run_step(number, data, copy, "--teacher_ckpt", *paths)
    files = [
        member["file"] for member in read(copy, "distillation_config.json")["teacher"]["members"]
    ]
    assert files == [member["file"] for member in reversed(record["members"])]
    for name in ("predictions_held_out.npy", "predictions_test.npy"):
        np.testing.assert_allclose(np.load(copy / name)[0], np.load(finished / name)[0], atol=1e-5)
        np.testing.assert_allclose(np.load(copy / name)[1], np.load(finished / name)[1], atol=1e-3)
    before, after = (
        read(folder, "validation_results.json")["Teacher ORM"] for folder in (finished, copy)
    )
    assert after["spearman"] == pytest.approx(before["spearman"], abs=1e-5)


# ------------------------------------------------------------------------- precision, size, samples


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_either_precision_gives_the_same_bytes_again(data, tmp_path, precision):
    flags = ["--precision", precision, "--hidden", "64", "32"]
    first, second = (contents(run_steps(data, tmp_path / name, *flags)) for name in ("a", "b"))
    assert [name for name in first if first[name] != second[name]] == []
    assert read(tmp_path / "a", "validation_results.json")["settings"]["precision"] == precision


def test_both_precisions_rank_alike_and_are_told_apart(data, tmp_path, capsys):
    results = {}
    for precision in ("fp32", "bf16"):
        out = run_steps(data, tmp_path / precision, "--precision", precision)
        assert f"computing in {precision} on " in capsys.readouterr().out
        results[precision] = read(out, "validation_results.json")["test"]
    for variant in variants.VARIANTS:
        exact, rounded = (results[precision][variant]["spearman"] for precision in ("fp32", "bf16"))
        assert exact > 0.2 and rounded == pytest.approx(exact, abs=0.02)
    with pytest.raises(InputError, match="precision 'bf16', not 'fp32'"):
        run_step(6, data, tmp_path / "bf16", "--precision", "fp32")


def test_hidden_units_are_those_of_members_and_student(data, tmp_path):
    run_steps(data, tmp_path, "--hidden", "16", "8")
    for path in tmp_path.glob("*.ckpt"):
        state = torch.load(path, weights_only=True)
        assert state["fc1.weight"].shape == (16, 24) and state["fc2.weight"].shape == (8, 16), path
    with pytest.raises(InputError, match=r"hidden \[16, 8\], not \[1024, 512\]"):
        run_step(6, data, tmp_path)


@pytest.mark.parametrize(("limit", "shape"), [(10_000, (48, 5)), (150, (48, 3)), (60, (30, 2))])
def test_the_student_learns_from_as_many_responses_as_are_allowed(data, copy, limit, shape):
    for number in (7, 8):
        run_step(number, data, copy, "--distill_responses", str(limit))
    fitted = np.load(copy / "responses_fit.npy")
    n, k = shape
    assert fitted.shape == (n, 1 + k) and n * k <= limit
    assert not set(fitted[:, 0]) & set(read(copy, "prompt_split.json")["held_out"])
    for name in ("teacher", "student"):
        assert np.load(copy / f"predictions_{name}_fit.npy").shape == shape
    student = read(copy, "distillation_config.json")["student"]
    assert student["prompts"] == fitted[:, 0].tolist() and student["responses_per_prompt"] == k
    assert student["interpolated_responses"] + n * k <= limit
    model = model_files.load_mlp(copy / student["file"], 24)
    rows = embeddings.load(data).take(np.repeat(fitted[:, 0], k), fitted[:, 1:].ravel())
    settings = read(copy, "validation_results.json")["settings"]
    scores = mlp.predict(model, rows, mlp.TYPES[settings["precision"]]).reshape(shape)
    np.testing.assert_allclose(
        np.load(copy / "predictions_student_fit.npy"), scores, rtol=1e-3, atol=1e-2
    )


def test_fewer_steps_are_fewer_passes(data, copy):
    run_step(7, data, copy, "--distill_steps", "6")
    assert len((copy / "student_log.jsonl").read_text().splitlines()) == 2, (
        "48 prompts twice over make 3 batches"
    )


def test_one_member_is_in_memory_at_a_time(data, tmp_path, monkeypatch):
    made, alive, train_member = weakref.WeakSet(), [], _train_member

    def train(model, *args):
        made.add(model)
        alive.append(len(made))
        return train_member(model, *args)

    monkeypatch.setattr(training, "_train_member", train)
    run_step(5, data, tmp_path / "out", "--ensemble_number", "4")
    assert alive == [1, 1, 1, 1]


def test_the_start_of_the_student_is_not_held_while_it_is_trained(data, copy, monkeypatch):
    starts, alive, student_start, train = [], [], scoring.student_start, student.train

    def start(*args):
        model = deepcopy(student_start(*args))
        starts.append(weakref.ref(model))
        return model

    def look(*args):
        alive.append(starts[0]() is not None)
        return train(*args)

    monkeypatch.setattr(scoring, "student_start", start)
    monkeypatch.setattr(student, "train", look)
    run_step(7, data, copy, "--distill_epochs", "3")
    assert alive == [False]


def test_a_finished_step_is_recorded_before_it_reports(data, copy, monkeypatch):
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(step7_isotonic_distillation, "report", closed)
    with pytest.raises(BrokenPipeError):
        run_step(7, data, copy, "--distill_epochs", "3")
    assert artifacts.read_manifest(copy)["step7"]["arguments"]["distill_epochs"] == 3


def test_member_names_follow_the_contract(finished):
    name = "XPrompt_mlp_bt_2_seed6_firstn_2_n_20_pair_4_replacement_false_epoch2_lr0.001.ckpt"
    state = torch.load(finished / name, weights_only=True)
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "fc1.weight": (1024, 24), "fc1.bias": (1024,),
        "fc2.weight": (512, 1024), "fc2.bias": (512,),
        "fc3.weight": (1, 512), "fc3.bias": (1,),
    }  # fmt: skip


def test_pairs_touch_no_held_out_prompt_and_validation_shares_no_prompt(finished):
    record = read(finished, next(finished.glob("orm_*.json")).name)
    pairs = np.load(next(finished.glob("pairs_*.npy")))
    split = read(finished, "prompt_split.json")
    assert np.intersect1d(pairs[:, [0, 2]], split["held_out"]).size == 0
    fold = dict(zip(record["prompts"], record["folds"], strict=True))
    assert all(fold[a] == fold[b] for a, b in pairs[:, [0, 2]].tolist())
    sides = {tuple(row) for row in pairs[:, :4].tolist()}
    assert not any((c, d, a, b) in sides for a, b, c, d in sides)
    assert len(np.load(next(finished.glob("plist_*.npy")))) == len(pairs)


@pytest.mark.parametrize(
    "flags", [["--pairing", "sameprompt"], ["--consider_first_n", "-1", "--n_pairs", "1"]]
)
@pytest.mark.parametrize("objective", ["bt", "clf"])
def test_other_settings_run_through(data, tmp_path, objective, flags):
    flags = ["--rm_objective", objective, "--replacement", "1", "--student_loss", "mse", *flags]
    run_steps(
        data, tmp_path, *[f for f in flags if f not in ("--student_loss", "mse")], steps=(5, 6)
    )
    run_steps(data, tmp_path, *flags, steps=(7, 8))
    assert (tmp_path / f"distilled_rm_helpful_{objective}.ckpt").exists()
    assert read(tmp_path, "validation_results.json")["Student"]["spearman"] > 0


def test_all_prompts_are_calibrated_on_out_of_bag_scores(data, tmp_path):
    run_steps(data, tmp_path, "--n_sample", "all", "--ensemble_number", "5")
    assert "out-of-bag" in read(tmp_path, "validation_results.json")["calibrated_on"]
    record = read(tmp_path, next(tmp_path.glob("orm_*.json")).name)
    assert len(record["prompts"]) == 48


def test_units_of_the_target(data, copy):
    train = embeddings.load(data)
    split = splits.load(copy, train.shape[0])
    fit = np.concatenate([split["calibration"], split["student_train"]])
    for number in (7, 8):
        run_step(number, data, copy, "--normalize_rewards", "1")
    results = read(copy, "validation_results.json")
    golden = (train.rewards[split["held_out"]] - train.rewards[fit].mean()) / train.rewards[
        fit
    ].std()
    assert results["golden_variance"] == pytest.approx(golden.var())
    for number in (7, 8):
        run_step(number, data, copy, "--binarize_rewards", "1")
    results = read(copy, "validation_results.json")
    assert set(np.unique(np.load(copy / "golden_held_out.npy"))) == {0.0, 1.0}
    assert results["Teacher + Isotonic"]["mse"] < 0.25
    with pytest.raises(InputError, match="at most one of them"):
        run_step(7, data, copy, "--binarize_rewards", "1", "--normalize_rewards", "1")
    with pytest.raises(InputError, match="expected a value between the golden rewards"):
        run_step(7, data, copy, "--binarize_rewards", "1", "--binarize_threshold", "1e9")


def test_joblib_map_and_its_json_twin_agree(finished):
    x = np.linspace(-5, 5, 101)
    for name in ("isotonic_teacher_map", "isotonic_student_map", "isotonic_map"):
        numbers = read(finished, f"{name}.json")
        assert np.array_equal(
            joblib.load(finished / f"{name}.joblib").predict(x),
            calibration.from_numbers(numbers)(x),
        )


def test_published_checkpoint_as_teacher(data, copy, tmp_path, capsys):
    reference = torch.nn.Sequential(
        torch.nn.Linear(24, 1024),
        torch.nn.ReLU(),
        torch.nn.Linear(1024, 512),
        torch.nn.ReLU(),
        torch.nn.Linear(512, 1),
    )
    state = {
        f"fc{i}.{part}": reference.state_dict()[f"{2 * (i - 1)}.{part}"]
        for i in (1, 2, 3)
        for part in ("weight", "bias")
    }
    torch.save(state, tmp_path / "published.ckpt")
    for number in (7, 8):
        run_step(number, data, copy, "--teacher_ckpt", str(tmp_path / "publish*.ckpt"))
    assert "cannot tell whether they saw held-out prompts" in capsys.readouterr().out
    results = read(copy, "validation_results.json")
    assert results["no_leakage"]["external_teacher_files"] == [str(tmp_path / "published.ckpt")]
    rows = embeddings.load(data, "test").take(np.arange(20), np.zeros(20, int))
    loaded = model_files.load_mlp(tmp_path / "published.ckpt", 24)
    with torch.inference_mode():
        expected = reference(torch.from_numpy(rows))[:, 0].numpy()
        assert np.array_equal(loaded(torch.from_numpy(rows)).numpy(), expected)


# ------------------------------------------------------------------------------------------ leakage


def test_changed_split_is_caught(data, copy):
    split = read(copy, "prompt_split.json")
    split["held_out"][0], split["calibration"][0] = split["calibration"][0], split["held_out"][0]
    artifacts.write_json(copy / "prompt_split.json", split)
    with pytest.raises(InputError, match=r"prompt_split\.json is not the file that step5 wrote"):
        run_step(8, data, copy)


@pytest.mark.parametrize("fit", ["reward models", "isotonic maps", "student"])
def test_held_out_prompt_in_a_fit_is_caught(data, copy, fit):
    """Plant the leak and forge the manifest: only the comparison of the prompts can find it."""
    held_out = read(copy, "prompt_split.json")["held_out"][0]
    name = (
        next(copy.glob("orm_*.json")).name if fit == "reward models" else "distillation_config.json"
    )
    content = read(copy, name)
    place = {
        "reward models": content,
        "isotonic maps": content.get("calibration"),
        "student": content.get("student"),
    }[fit]
    place["prompts"][0] = held_out
    artifacts.write_json(copy / name, content)
    manifest = read(copy, "manifest.json")
    manifest["step5" if fit == "reward models" else "step7"]["outputs"][name] = (
        artifacts.describe_file(copy / name)
    )
    artifacts.write_json(copy / "manifest.json", manifest)
    with pytest.raises(InputError, match="leakage: 1 held-out prompts"):
        run_step(8, data, copy)


def test_test_set_enters_no_fit(data, finished, tmp_path):
    """Other test rewards change what is measured on the test set, and no trained file."""
    other = shutil.copytree(data, tmp_path / "data")
    (other / "manifest.json").unlink()
    for path in other.glob("rewards_test_*.json"):
        path.write_text("".join(f'{{"reward": {i * 7 % 5}}}\n' for i in range(20)))
    run_steps(other, tmp_path / "out")
    for name in (
        "distilled_rm_helpful_bt.ckpt",
        "isotonic_student_map.json",
        "predictions_held_out.npy",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes()


# ---------------------------------------------------------------------------------------- bad input


def run_script(number, *flags, **more):
    command = [sys.executable, str(ROOT / f"{STEPS[number]}.py"), *SMALL, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, **more)


def refused(number, data, out, *flags):
    """Run a step as a command, expect exit status 2 and one line on stderr, and return the line."""
    result = run_script(number, "--data_dir", data, "--output_dir", out, *flags)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.startswith(f"step{number}: ")
    return result.stderr


def test_bad_input_is_one_line_and_status_2(data, tmp_path):
    assert "found no such folder" in refused(5, tmp_path / "nowhere", tmp_path / "out")
    assert "rm_objective" in refused(5, data, tmp_path / "out", "--rm_objective", "rank")
    assert "expected 4 to 48" in refused(5, data, tmp_path / "out", "--n_sample", "49")
    assert not list((tmp_path / "out").glob("*.ckpt"))
    (tmp_path / "file").write_text("")
    assert "expected a writable folder" in refused(5, data, tmp_path / "file" / "out")
    assert "written by step 5" in refused(6, data, tmp_path / "out")


def change(data, tmp_path):
    """A copy of the data without its manifest, as if put there by hand."""
    copy = shutil.copytree(data, tmp_path / "data")
    (copy / "manifest.json").unlink()
    return copy


def test_equal_rewards_are_refused(data, tmp_path):
    copy = change(data, tmp_path)
    for path in copy.glob("rewards_split_*.json"):
        path.write_text('{"reward": 1.0}\n' * 60)
    with pytest.raises(
        InputError, match="no preference can be learned and no ranking metric is defined"
    ):
        run_step(5, copy, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.ckpt"))


def test_binary_rewards_are_counted_out(data, tmp_path, capsys):
    copy = change(data, tmp_path)
    for path in copy.glob("rewards_split_*.json"):
        rewards = [json.loads(line)["reward"] for line in path.read_text().splitlines()]
        path.write_text("".join(f'{{"reward": {int(r > 0)}}}\n' for r in rewards))
    run_steps(copy, tmp_path / "out", "--pairing", "sameprompt")
    out = capsys.readouterr().out
    assert " 0 of equal reward" not in out
    assert (
        read(tmp_path / "out", "validation_results.json")["Student"]["n_prompts_without_spearman"]
        > 0
    )


def test_one_response_is_refused(tmp_path):
    make_data(tmp_path / "data", "--n_splits", "1")
    with pytest.raises(InputError, match="expected at least 2 train responses per prompt, found 1"):
        run_step(5, tmp_path / "data", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_unreadable_checkpoints(data, copy, content):
    member = next(copy.glob("XPrompt*_1_*.ckpt"))
    member.unlink() if content is None else member.write_bytes(content)
    with pytest.raises(InputError, match=r"XPrompt.*\.ckpt"):
        run_step(6, data, copy)


def test_checkpoint_of_another_dimension(data, copy, tmp_path):
    model_files.save_mlp(
        tmp_path / "other.ckpt", mlp.MLP(32, generator=torch.Generator().manual_seed(0))
    )
    with pytest.raises(
        InputError, match=r"24-dimensional embeddings, found fc1\.weight of shape \(1024, 32\)"
    ):
        run_step(7, data, copy, "--teacher_ckpt", str(tmp_path / "other.ckpt"))
    with pytest.raises(InputError, match="not found"):
        run_step(7, data, copy, "--teacher_ckpt", str(tmp_path / "nothing*.ckpt"))


def test_data_changed_after_training_is_noticed(data, copy, tmp_path, capsys):
    other = change(data, tmp_path)
    path = other / "EMBD-TRAIN-split_0.npy"
    values = np.load(path)
    values[0, 0] += 1
    np.save(path, values)
    run_step(5, other, copy)
    assert "already done" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ killing


def test_killed_training_goes_on_with_the_same_result(data, finished, tmp_path):
    flags = ["--data_dir", data, "--output_dir", tmp_path]
    command = [sys.executable, str(ROOT / "step5_train_rms.py"), *SMALL, *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("XPrompt*.ckpt")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not orm_record(tmp_path)
    run_steps(data, tmp_path)
    assert contents(tmp_path) == contents(finished)


def orm_record(folder):
    return list(folder.glob("orm_*.json"))


@pytest.mark.parametrize("number", [5, 6, 7, 8])
def test_stopped_at_every_write(data, finished, tmp_path, monkeypatch, number):
    """Fail at every rename of a step in turn; the same command must then give the same files."""
    real, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == limit:
            raise KeyboardInterrupt
        real(source, target)

    out = run_steps(data, tmp_path / "start", steps=range(5, number))
    for limit in (1, 2, 4, 7):
        calls.clear()
        place = (
            shutil.copytree(out, tmp_path / f"out{limit}")
            if out.exists()
            else tmp_path / f"out{limit}"
        )
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            with contextlib.suppress(KeyboardInterrupt):
                run_step(number, data, place)
        assert not list(place.glob(".*.tmp"))
        run_step(number, data, place)
        assert all(value == contents(finished)[name] for name, value in contents(place).items())


@pytest.mark.skipif(not REAL.is_dir(), reason="the real embeddings are not beside the repository")
def test_real_data(tmp_path):
    """484 same-prompt labels on real embeddings: teacher far above random, student close to it."""
    names = ["--dataset", "alpaca", "--embed_model", "minilm", "--gen_model", "mix55"]
    convert_embeddings.main(
        ["--embd_dir", str(REAL), *names, "--output_dir", str(tmp_path / "data")]
    )
    flags = [
        "--n_sample",
        "all",
        "--n_pairs",
        "1",
        "--pairing",
        "sameprompt",
        "--ensemble_number",
        "5",
    ]
    run_steps(tmp_path / "data", tmp_path / "out", *flags)
    test = read(tmp_path / "out", "validation_results.json")["test"]
    assert test["Teacher ORM"]["spearman"] > 0.47
    assert test["Student"]["spearman"] > test["Teacher ORM"]["spearman"] - 0.03
    assert np.isfinite(np.load(tmp_path / "out" / "predictions_test.npy")).all()
