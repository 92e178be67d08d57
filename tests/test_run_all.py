"""run_all.sh as a user runs it: settings, skipping, failures, kills, two runs at once, the demo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from rewardlib.cli import chain, console
from rewardlib.cli.settings import all_names

SMALL = {"N_SAMPLE": "20", "N_PAIRS": "2", "ENSEMBLE_NUMBER": "2", "DISTILL_EPOCHS": "2"}


def environment(**settings):
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ
    }
    return {
        **kept,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        **SMALL,
        **{k: str(v) for k, v in settings.items()},
    }


def run_all(cwd, **settings):
    command = ["bash", str(ROOT / "run_all.sh")]
    return subprocess.run(
        command, cwd=cwd, env=environment(**settings), capture_output=True, text=True
    )


def start(cwd, **settings):
    command = ["bash", str(ROOT / "run_all.sh")]
    out = subprocess.PIPE
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**settings),
        stdout=out,
        stderr=out,
        text=True,
        start_new_session=True,
    )


def results(folder):
    changing = {"manifest.json", ".inspected.json", ".lock", "report.html"}
    return {
        p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in changing
    }


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """(working folder, result) of one whole run, which tests read or repeat."""
    folder = tmp_path_factory.mktemp("run all")
    return folder, run_all(folder, DATA_DIR=data)


def test_whole_run(done):
    folder, result = done
    assert result.returncode == 0, result.stderr
    out = folder / "distill_out"
    for name in ("step5", "step6", "step7", "step8"):
        assert f"==> {name}: " in result.stdout
        assert (out / "logs" / f"{name}.log").stat().st_size
    assert "Student + Isotonic" in result.stdout
    assert "report: wrote distill_out/report.html" in result.stdout.splitlines()[-1]
    assert (out / "report.html").stat().st_size > 10_000


def test_second_run_does_nothing_and_one_change_reruns_what_depends_on_it(done, data):
    folder, _ = done
    before = results(folder / "distill_out")
    again = run_all(folder, DATA_DIR=data, LEARNING_RATE="1e-3", ANNOTATION_QUALITY="10.0")
    assert again.stdout.count("already done") == 4
    assert "Student + Isotonic" in again.stdout
    assert results(folder / "distill_out") == before
    changed = run_all(folder, DATA_DIR=data, RANKING_LAMBDA="0.5", STOP_STEP=7)
    assert changed.stdout.count("already done") == 2
    back = run_all(folder, DATA_DIR=data)
    assert back.stdout.count("already done") == 3
    assert results(folder / "distill_out") == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"RM_OBJECTIVE": "rank"}, "RM_OBJECTIVE (--rm_objective): invalid choice: 'rank'"),
        ({"PAIRING": "both"}, "PAIRING (--pairing): invalid choice: 'both'"),
        (
            {"N_SAMPLE": "many"},
            "N_SAMPLE (--n_sample): expected a whole number of at least 1, found 'many'",
        ),
        ({"CONSIDER_FIRST_N": "3"}, "CONSIDER_FIRST_N (--consider_first_n): invalid choice: 3"),
        ({"LEARNING_RATE": "-1"}, "LEARNING_RATE (--learning_rate): expected a number above 0"),
        (
            {"MAX_PROMPTS": "0"},
            "MAX_PROMPTS (--max_prompts): expected a whole number of at least 1, found '0'",
        ),
        ({"NORMALIZE_REWARDS": "2"}, "NORMALIZE_REWARDS (--normalize_rewards): expected 1 or 0"),
        ({"FORCE": "yes"}, "FORCE (--force): expected one of 0 1, found 'yes'"),
        ({"RM_MODEL": "ridge"}, "found ridge bt"),
        ({"START_STEP": "3.5", "STOP_STEP": "3.5"}, "expected at most STOP_STEP=3.5"),
        ({"NORMALIZE_REWARDS": "1", "BINARIZE_REWARDS": "1"}, "at most one of them"),
        ({"START_STEP": "9"}, "START_STEP (--start_step): invalid choice: '9'"),
        ({"START_STEP": "7", "STOP_STEP": "6"}, "expected at most STOP_STEP=6"),
        ({"TASK": "poetry"}, "TASK=poetry: expected DATASET beside it"),
        ({"TASK": "a/b", "DATASET": "x"}, "without slashes"),
        ({"RUN_GPU_STEPS": "1", "USE_REPO_EMBD": "1"}, "at most one"),
    ],
)
def test_unknown_values_are_refused_before_anything_runs(
    tmp_path, monkeypatch, capsys, settings, message
):
    """In this process, as run_all.sh calls the chain; test_settings.py refuses in the shell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["chain"])
    for name in all_names():
        monkeypatch.delenv(name, raising=False)
    for name, value in {**SMALL, **settings}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        console.run(chain.main, "run_all.sh")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_own_empty_data_folder_is_not_filled_with_demo_data(tmp_path):
    result = run_all(tmp_path, DATA_DIR="mine")
    assert (result.returncode, "DATA_DIR=mine: no EMBD-TRAIN-split_0.npy" in result.stderr) == (
        2,
        True,
    )
    assert not (tmp_path / "mine").exists()


def test_a_failing_step_is_named_with_its_log_and_the_way_on(data, tmp_path):
    result = run_all(tmp_path, DATA_DIR=data, N_SAMPLE="1000", OUTPUT_DIR="my results")
    assert result.returncode == 2
    assert "step5 failed after" in result.stderr
    assert "expected 4 to 48" in result.stderr
    assert "the whole log: my results/logs/step5.log" in result.stderr
    assert "==> step6" not in result.stdout


def test_killed_and_run_again_gives_the_same_results(done, data, tmp_path):
    process = start(tmp_path, DATA_DIR=data)
    out = tmp_path / "distill_out"
    while process.poll() is None and not list(out.glob("*_1_seed*.ckpt")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "validation_results.json").exists()
    assert run_all(tmp_path, DATA_DIR=data).returncode == 0
    assert results(out) == results(done[0] / "distill_out")


def test_steps_that_are_killed_are_told(data, tmp_path):
    """As the system does where memory runs out: the shell is left to say it."""
    process = start(tmp_path, DATA_DIR=data)
    log = tmp_path / "distill_out" / "logs" / "step5.log"
    while process.poll() is None and not log.exists():
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert (
        len(children) == 1
        and b"rewardlib.cli.chain" in Path(f"/proc/{children[0]}/cmdline").read_bytes()
    )
    os.kill(int(children[0]), signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 137
    assert (
        "run_all.sh: the run was killed (status 137); the same command goes on from there" in error
    )


def test_two_runs_in_one_folder_take_turns(data, tmp_path):
    many = {"DATA_DIR": data, "ENSEMBLE_NUMBER": 60}  # long enough for the second one to start
    first = start(tmp_path, **many)
    while not (tmp_path / "distill_out" / "logs" / "step5.log").exists():
        time.sleep(0.02)
    second = start(tmp_path, **many)
    out, error = second.communicate()
    assert (first.wait(), second.returncode) == (0, 0)
    assert "another run is using distill_out: waiting" in error
    assert out.count("already done") == 4
    first.communicate()


def test_published_files_and_then_a_partial_run(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    (tmp_path / "embd").mkdir()
    for split, n in (("train", 60), ("test", 20)):
        rewards = rng.standard_normal((4, n))
        np.save(
            tmp_path / "embd" / f"EMBD_poems_tiny_bard_{split}.npy",
            rewards[:, :, None] + rng.standard_normal((4, n, 8)),
        )
        np.save(tmp_path / "embd" / f"REWARD_poems_judge_bard_{split}.npy", rewards)
    settings = {
        "USE_REPO_EMBD": 1,
        "EMBD_REPO_DIR": "embd",
        "TASK": "poetry",
        "DATASET": "poems",
        "DATA_DIR": "converted",
    }
    settings |= {"MODEL_NAME": "tiny", "REPO_GEN_MODEL": "bard"}
    result = run_all(tmp_path, **settings, STOP_STEP=5)
    assert result.returncode == 0, result.stderr
    assert "==> step6" not in result.stdout
    result = run_all(tmp_path, **settings, START_STEP=6)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "distill_out" / "distilled_rm_poetry_bt.ckpt").exists()


def test_demo_by_default(tmp_path):
    """Demo data of the documented size are made in data/, and the run ends well."""
    result = run_all(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "best reachable: Spearman" in result.stdout
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert (manifest["train"]["N"], manifest["train"]["K"], manifest["train"]["D"]) == (
        200,
        10,
        2048,
    )


def test_scripts_show_help_without_work(tmp_path):
    scripts = [p for p in ROOT.glob("*.py") if p.name != "networks.py"]
    assert len(scripts) >= 6
    for script in scripts:
        result = subprocess.run(
            [sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        for part in ("Reads", "Writes", "Example"):
            assert part in result.stdout, (script, part)
    assert list(tmp_path.iterdir()) == []
