"""run_all.sh from prompts to a validated student, with tiny models: reruns, kills, preflight."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_models
from conftest import ROOT

from rewardlib.cli import preflight
from rewardlib.errors import InputError

for name in ("transformers", "trl", "peft", "datasets", "accelerate"):
    pytest.importorskip(name, reason="steps 1 to 4 need the extra [llm]")

RESULTS = ("EMBD-*.npy", "rewards_*.json")


def environment(tiny, out, **settings):
    inherited = {
        name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ
    }
    variables = {
        "RUN_GPU_STEPS": 1,
        "MODEL_NAME": tiny / "language",
        "REWARD_MODEL": tiny / "reward",
        "DATASET": tiny / "sft.jsonl",
        "EVAL_DATASET": tiny / "prompts_{data_class}.jsonl",
        "N_TRAIN_RESPONSES": 4,
        "N_TEST_RESPONSES": 6,
        "MAX_LEN": 8,
        "SFT_EPOCHS": 1,
        "N_SAMPLE": "all",
        "N_PAIRS": 4,
        "ENSEMBLE_NUMBER": 2,
        "DISTILL_EPOCHS": 2,
        "DATA_DIR": out / "data",
        "GEN_DIR": out / "gen",
        "SFT_DIR": out / "sft",
        "OUTPUT_DIR": out / "results",
        **settings,
    }
    fixed = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**inherited, **fixed, **{key: str(value) for key, value in variables.items()}}


def run_all(tiny, out, **settings):
    out.mkdir(exist_ok=True)
    command, env = ["bash", str(ROOT / "run_all.sh")], environment(tiny, out, **settings)
    return subprocess.run(command, cwd=out, env=env, capture_output=True, text=True)


def data_of(out):
    return {
        path.name: path.read_bytes() for pattern in RESULTS for path in (out / "data").glob(pattern)
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models.make_all(tmp_path_factory.mktemp("tiny"), n_train=40, n_test=8)


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("done")
    return out, run_all(tiny, out)


def test_whole_run_then_a_rerun_that_skips_everything(tiny, done):
    out, first = done
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    results = json.loads((out / "results" / "validation_results.json").read_text())
    assert 0 <= results["Student + Isotonic"]["pair_accuracy"] <= 1
    assert len(data_of(out)) == 2 * (4 + 6)
    before = data_of(out)
    again = run_all(tiny, out)
    # step 1, five parts of train and test in steps 2 and 3, step 3.5 twice, steps 4 to 8
    assert again.returncode == 0 and again.stdout.count("already done") == 1 + 10 + 10 + 2 + 5
    assert data_of(out) == before


def test_killed_in_steps_2_and_4_and_run_again(tiny, done, tmp_path):
    out, _ = done
    for killed_at in ("gen/*/train-part_1/responses.jsonl", "data/.embedding/train_*/*.json"):
        kill_at(tiny, tmp_path, killed_at, SFT_DIR=out / "sft")
    assert run_all(tiny, tmp_path, SFT_DIR=out / "sft", STOP_STEP=4).returncode == 0
    assert data_of(tmp_path) == data_of(out)


def kill_at(tiny, out, pattern, **settings):
    """Start run_all.sh and kill all its processes once a file that matches `pattern` exists."""
    running = subprocess.Popen(
        ["bash", str(ROOT / "run_all.sh")],
        cwd=out,
        env=environment(tiny, out, **settings),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.time() + 120
    while not list(out.glob(pattern)) and running.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def test_preflight_compares_the_weights_with_the_memory():
    problems = preflight._memory({"generator": "gemma7b"}, {"generator": 10**15})
    assert len(problems) == 1 and problems[0].startswith(
        "generator gemma7b: expected 1200000.0 GB of "
    )
    assert preflight._memory({"generator": "gemma7b"}, {"generator": 10**6}) == []


def test_preflight_names_missing_packages(tiny, monkeypatch):
    monkeypatch.setattr(preflight, "PACKAGES", ("transformers", "no-such-package"))
    with pytest.raises(InputError, match="missing packages: no-such-package; pip install"):
        preflight.check({}, "", "", "", "none", {}, None, tiny)


def test_preflight_names_everything_that_is_missing(tiny, tmp_path):
    prompts = tmp_path / "no_{data_class}.jsonl"
    result = run_all(tiny, tmp_path, REWARD_MODEL="no/such", EVAL_DATASET=prompts)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "reward: no/such: expected a local folder or a model on the hub" in result.stderr
    assert "no_train.jsonl not found" in result.stderr
    assert not (tmp_path / "sft" / "adapter").exists() and "==> step1" not in result.stdout
