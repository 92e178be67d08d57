"""Small data and in-process steps shared by the tests of the pipeline."""

import importlib
from pathlib import Path

import pytest
import torch

import generate_demo_data

ROOT = Path(__file__).resolve().parent.parent
STEPS = {
    5: "step5_train_rms",
    6: "step6_eval_rms",
    7: "step7_isotonic_distillation",
    8: "step8_validate_distillation",
}
SMALL = ["--n_sample", "20", "--n_pairs", "4", "--ensemble_number", "3"]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("FORCE", "REWARDLIB_LOCKED_DIR"):
        monkeypatch.delenv(name, raising=False)


def make_data(folder, *flags):
    sizes = [
        "--n_prompts",
        "60",
        "--n_splits",
        "5",
        "--n_test_prompts",
        "20",
        "--n_test_splits",
        "12",
    ]
    generate_demo_data.main([*sizes, "--emb_dim", "24", "--output_dir", str(folder), *flags])
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small DATA_DIR with train and test prompts; tests that change it take a copy."""
    return make_data(tmp_path_factory.mktemp("data"))


def run_step(number, data, out, *flags):
    module = importlib.import_module(STEPS[number])
    distillation = ["--distill_epochs", "4"] if number >= 7 else []
    module.main([*SMALL, *distillation, "--data_dir", str(data), "--output_dir", str(out), *flags])


def run_steps(data, out, *flags, steps=(5, 6, 7, 8)):
    for number in steps:
        run_step(number, data, out, *flags)
    return out


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """OUTPUT_DIR of a finished small run. Tests read it; those that change it take a copy."""
    return run_steps(data, tmp_path_factory.mktemp("finished"))
