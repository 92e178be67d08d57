"""Settings of run_all.sh: one home for name, default and meaning; what is not set is not passed."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from rewardlib.cli import chain, settings
from rewardlib.errors import InputError

NEWLY_REACHABLE = {
    "REWARD_SCALE": ("6.0", 6.0),
    "REPLACEMENT": ("1", True),
    "BATCH_SIZE": ("32", 32),
    "DISTILL_LEARNING_RATE": ("1e-3", 0.001),
    "DISTILL_BATCH_SIZE": ("16", 16),
    "DISTILL_STEPS": ("40", 40),
    "DISTILL_RESPONSES": ("400", 400),
    "CV_FOLDS": ("3", 3),
    "ISOTONIC": ("plain", "plain"),
    "BINARIZE_THRESHOLD": ("-0.5", -0.5),
    "TEACHER_CKPT": ("a.ckpt b.ckpt", ["a.ckpt", "b.ckpt"]),
}


def test_nothing_set_is_nothing_passed():
    values = settings.read({"PATH": "/bin", "SEED": ""})
    assert values == {}
    assert all(settings.flags_of(stage, values) == [] for stage in settings.STAGES)


@pytest.mark.parametrize("name", NEWLY_REACHABLE)
def test_every_flag_of_steps_5_to_8_is_reached_from_the_environment(name):
    text, value = NEWLY_REACHABLE[name]
    for stage in ("step7", "step8"):
        args = settings.parse(stage, settings.read({name: text}))
        assert getattr(args, name.lower()) == value


def test_every_flag_of_a_step_is_a_setting_but_for_a_known_few():
    for stage in settings.STAGES:
        parser = settings.load_script(settings.STAGES[stage]).make_parser()
        flags = {action.dest for action in parser._actions} - {"help", "debug"}
        reached = {action.dest for action in settings.actions_of(stage).values()}
        assert flags - reached == settings.NO_SETTING.get(stage, set())


def test_steps_that_share_a_variable_share_its_default():
    defaults = {}
    for stage in ("chain", *settings.STAGES):
        for name, action in settings.actions_of(stage).items():
            defaults.setdefault(name, {})[stage] = action.default
    # step 4 sees to its own numbers of responses; of published files any golden reward model is
    # taken, and DATASET follows from TASK and SFT_OBJ
    published = {name: by_stage.pop("convert", None) for name, by_stage in defaults.items()}
    differing = {n: d for n, d in defaults.items() if len({repr(x) for x in d.values()}) > 1}
    assert differing == {}
    assert published["MODEL_NAME"] == "gemma2b" and published["TASK"] == "helpful"


def test_settings_that_follow_from_others():
    def derived(**values):
        with_derived = chain.with_derived(settings.parse("chain", values), values)
        return {n: text for n, text in with_derived.items() if values.get(n) != text}

    assert derived() == derived(MODEL_NAME="small") == derived(RUN_GPU_STEPS="1") == {}
    assert derived(TASK="harmless", RUN_GPU_STEPS="1") == {
        "DATASET": "hh-rlhf-harmless-gpt4",
        "EVAL_DATASET": "hh-rlhf-harmless",
    }
    assert derived(DATASET="mine.jsonl", RUN_GPU_STEPS="1") == {"EVAL_DATASET": "hh-rlhf-helpful"}
    assert derived(MODEL_NAME="small", RUN_GPU_STEPS="1") == {"GEN_PREF_MODEL": "small"}
    published = {"EMBD_REPO_DIR": "embd/RM-Embeddings"}
    assert derived(USE_REPO_EMBD="1", GEN_PREF_MODEL="gemma7b") == {
        **published,
        "GEN_PREF_MODEL": "gemma2b",
    }
    assert derived(USE_REPO_EMBD="1", REPO_GEN_MODEL="gemma7b", TASK="helpful") == {
        **published,
        "GEN_PREF_MODEL": "gemma7b",
    }
    with pytest.raises(InputError, match="TASK=poetry: expected DATASET beside it"):
        derived(TASK="poetry")


# ---------------------------------------------------------------------------------------- misspelt


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ANOTATION_QUALITY", "ANNOTATION_QUALITY"),
        ("ANNOTATION_QUALTIY", "ANNOTATION_QUALITY"),
        ("N_SAMPLES", "N_SAMPLE"),
        ("SEDE", "SEED"),
        ("SEEDS", "SEED"),
        ("DATADIR", "DATA_DIR"),
        ("ENSEMBLE_NUMER", "ENSEMBLE_NUMBER"),
        ("PAIRNG", "PAIRING"),
    ],
)
def test_a_mistyped_setting_is_refused_with_the_nearest_one(name, nearest):
    with pytest.raises(InputError, match=f"^{name}: no such setting; did you mean {nearest}\\?"):
        settings.read({name: "1"})


def test_other_variables_of_a_machine_are_no_settings():
    others = (
        "PATH HOME LANG TMPDIR USER SHELL TERM PWD OLDPWD SHLVL HOSTTYPE OSTYPE LS_COLORS EDITOR "
        "OMP_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES HF_HOME HF_HUB_OFFLINE PYTHON "
        "PYTHONPATH VIRTUAL_ENV CONDA_PREFIX SLURM_JOB_ID SLURM_NTASKS SRC_DIR LOG_DIR PAGER TYPE "
        "MODEL_HOME MODEL_BASE MPLBACKEND DISPLAY CI DEBUG TOKENIZERS_PARALLELISM PIP_INDEX_URL"
    )
    assert settings.read(dict.fromkeys(others.split(), "1")) == {}


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("seed", "", 4), ("seed", "sede", 1), ("seed", "sed", 1), ("ab", "ba", 1),
     ("kitten", "sitting", 3), ("abc", "abd", 1)],
)  # fmt: skip
def test_edit_distance(a, b, distance):
    assert settings.edit_distance(a, b) == settings.edit_distance(b, a) == distance


def test_run_all_refuses_a_mistyped_setting_before_anything_runs(tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "ANOTATION_QUALITY": "1"}
    command = ["bash", str(ROOT / "run_all.sh")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "did you mean ANNOTATION_QUALITY?" in result.stderr
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------- tables


def test_docs_hold_the_settings_as_the_parsers_have_them():
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert text.endswith(settings.tables()), "python -m rewardlib.cli.settings prints the tables"


def test_the_readmes_table_is_part_of_them():
    rows = set(settings.tables().splitlines())
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in readme if re.match(r"\| `[A-Z_]+` \|", line)]
    assert len(table) > 8 and set(table) <= rows


def test_a_default_stands_in_one_place():
    """No shell script repeats a default: what is not set is not passed on."""
    for path in (ROOT / "run_all.sh", ROOT / "driver.sh", ROOT / "studies" / "interpretable.sh"):
        assert re.findall(r"\$\{[A-Z_]+:-[^}]+\}", path.read_text()) == [], path
