"""studies/interpretable_gating.py: results, splits by prompt, reports and refusals."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from interpretable_data import D_PROMPT, NAMES, QUICK, D, make_gate, make_heads, make_pairs, script

from rewardlib import artifacts
from rewardlib.errors import InputError
from studies.interpretable import attribute_data, gating, multi_objective

SCRIPT = ROOT / "studies" / "interpretable_gating.py"


def run(folder, *flags):
    flags = [str(flag) for flag in flags]
    script("interpretable_gating").main(
        ["--pairs", str(folder / "train.safetensors"), "--model_dir", str(folder), *flags]
    )
    return json.loads((folder / gating.RECORD).read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_gate(tmp_path_factory.mktemp("models") / "model")


# ------------------------------------------------------------------------------------------ results


def test_the_gate_beats_every_set_of_weights_for_all_prompts(trained):
    """On raw scores the gate cannot: verbosity would drown what prompts ask for."""
    record = artifacts.read_json(trained / gating.RECORD, "gating")
    accuracy = {method: row["accuracy"] for method, row in record["held_out"]["methods"].items()}
    others = [value for method, value in accuracy.items() if method != "gate"]
    assert accuracy["gate"] > 0.85 and accuracy["gate"] > max(others) + 0.1
    gap = record["held_out"]["gate_minus"]["global_weights"]
    assert gap["ci95"][0] > 0 and gap["p_value"] < 0.01
    assert record["best_epoch"] >= 1 and record["null_reason"] is None
    assert record["n_pairs"] == {"fit": 280, "validation": 40, "held_out": 80}


def test_weights_sum_to_1_and_follow_the_prompt(trained):
    new = make_pairs(trained / "new.safetensors", seed=1)
    weights = gating.weights(gating.load(trained, new), new, np.arange(400))
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    asks_help = new.prompt_embeddings[0][:, 0] > 0
    assert weights[asks_help, 0].mean() > weights[~asks_help, 0].mean() + 0.4
    assert weights[~asks_help, 1].mean() > weights[asks_help, 1].mean() + 0.4
    recorded = artifacts.read_json(trained / gating.RECORD, "gating")["weights"]
    assert sum(recorded["mean"].values()) == pytest.approx(1, abs=1e-6)
    assert (
        recorded["n_prompts"] == 80
        and recorded["of"] == "held_out"
        and recorded["sd_between_prompts"]["helpful"] > 0.2
    )


def test_it_is_debiased_scores_of_fit_prompts_that_are_standardised(trained):
    data = attribute_data.read(trained / "train.safetensors")
    split = artifacts.read_json(trained / gating.SPLIT, "gating")
    fit = data.embeddings[0][np.isin(data.groups, split["fit"])]
    loaded = gating.load(trained)
    np.testing.assert_allclose(loaded.centre, fit[..., :4].reshape(-1, 4).mean(0), atol=1e-5)
    np.testing.assert_allclose(loaded.spread, fit[..., :4].reshape(-1, 4).std(0), rtol=1e-5)


def test_reported_accuracies_are_those_of_the_saved_gate(trained):
    data = attribute_data.read(trained / "train.safetensors")
    split = artifacts.read_json(trained / gating.SPLIT, "gating")
    rows = np.flatnonzero(np.isin(data.groups, split["held_out"]))
    methods = artifacts.read_json(trained / gating.RECORD, "gating")["held_out"]["methods"]
    for method, scores in gating.rewards(gating.load(trained), data, rows).items():
        assert methods[method]["accuracy"] == pytest.approx((scores[:, 0] > scores[:, 1]).mean())


def test_the_same_command_gives_the_same_bytes(trained, tmp_path):
    again = make_gate(tmp_path / "model")
    for name in ("gate.safetensors", "gate.json", "gating_split.json"):
        ours, theirs = (
            (folder / name).read_text("latin1").replace(str(folder), "")
            for folder in (trained, again)
        )
        assert ours == theirs, name


def test_a_finished_gate_is_not_trained_again_until_the_heads_change(
    trained, tmp_path, capsys, monkeypatch
):
    folder = make_gate(tmp_path / "model")
    before = artifacts.sha256(folder / gating.GATE)
    monkeypatch.setattr(
        script("interpretable_gating"),
        "train_gate",
        lambda *_, **__: pytest.fail("it was trained again"),
    )
    capsys.readouterr()
    run(folder, *QUICK, "--epochs", 12)
    assert "already done" in capsys.readouterr().out
    monkeypatch.undo()
    make_heads(folder, penalties=[0.0, 0, 0, 0])
    run(folder, *QUICK, "--epochs", 12)
    assert artifacts.sha256(folder / gating.GATE) != before


def test_without_debiasing_the_gate_is_worse(trained, tmp_path):
    folder = make_heads(tmp_path / "model", penalties=[0.0, 0, 0, 0])
    make_pairs(folder / "train.safetensors")
    accuracy = run(folder, *QUICK, "--epochs", 12)["held_out"]["methods"]["gate"]["accuracy"]
    debiased = artifacts.read_json(trained / gating.RECORD, "gating")["held_out"]["methods"][
        "gate"
    ]["accuracy"]
    assert accuracy < debiased - 0.1


def test_another_folder_takes_the_heads_along(trained, tmp_path):
    run(trained, "--output_dir", tmp_path / "other", *QUICK, "--epochs", 12)
    assert artifacts.sha256(tmp_path / "other" / multi_objective.HEADS) == artifacts.sha256(
        trained / multi_objective.HEADS
    )
    gating.load(tmp_path / "other")
    assert multi_objective.HEADS in artifacts.read_manifest(tmp_path / "other")["gating"]["outputs"]


def test_dropped_and_frozen_attributes(tmp_path, capsys):
    folder = make_gate(tmp_path / "model", "--drop", "verbosity", "--freeze", "clear=0.25")
    record = artifacts.read_json(folder / gating.RECORD, "gating")
    assert record["attributes"] == ["helpful", "safe", "clear"] and record["frozen"] == {
        "clear": 0.25
    }
    assert (
        record["weights"]["mean"]["clear"] == 0.25
        and record["weights"]["sd_between_prompts"]["clear"] == 0
    )
    assert "attribute verbosity" not in record["held_out"]["methods"]
    data = attribute_data.read(folder / "train.safetensors")
    weights = gating.weights(gating.load(folder), data, np.arange(10))
    np.testing.assert_allclose(weights[:, :2].sum(1), 0.75, rtol=1e-5)
    assert "clear" in capsys.readouterr().out


# --------------------------------------------------------------------------------- held-out prompts


def test_prompts_of_the_heads_are_not_held_out(tmp_path, capsys):
    folder = make_heads(tmp_path / "model", prompts=[f"train {i}" for i in range(300)])
    make_pairs(folder / "train.safetensors")
    record = run(folder, *QUICK, "--epochs", 2)
    seen = attribute_data.groups_of([f"train {i}" for i in range(300)])
    split = artifacts.read_json(folder / gating.SPLIT, "gating")
    assert not set(split["held_out"]) & set(seen.tolist()) and len(split["held_out"]) == 80
    assert (
        record["prompts_of_heads"]["shared"] == 300 and record["prompts_of_heads"]["held_out"] == 0
    )
    assert (
        "300 of 400 prompts are among those the attribute heads were fitted on"
        in capsys.readouterr().out
    )


def test_no_accuracy_is_reported_where_the_heads_saw_every_prompt(tmp_path, capsys):
    folder = make_heads(tmp_path / "model", prompts=[f"train {i}" for i in range(400)])
    make_pairs(folder / "train.safetensors")
    record = run(folder, *QUICK, "--epochs", 2)
    assert (
        record["held_out"] is None
        and record["null_reason"] == "the attribute heads were fitted on every prompt"
    )
    assert record["weights"]["of"] == "validation"
    assert (
        "no held-out accuracy: the attribute heads were fitted on every prompt"
        in capsys.readouterr().out
    )


def test_it_says_where_shared_prompts_cannot_be_told(tmp_path, capsys):
    folder = make_heads(tmp_path / "model")
    make_pairs(folder / "train.safetensors", groups=np.arange(400), source={"dataset": "numbered"})
    record = run(folder, *QUICK, "--epochs", 2)
    assert record["prompts_of_heads"]["shared"] is None and record["held_out"]["n_prompts"] == 80
    assert "cannot be told from the files" in capsys.readouterr().out
    assert artifacts.read_json(folder / gating.SPLIT, "gating")["heads"] is None


def test_pairs_of_one_prompt_stay_on_one_side(tmp_path):
    folder = make_heads(tmp_path / "model")
    make_pairs(folder / "train.safetensors", prompts=[f"train {i // 4}" for i in range(400)])
    record = run(folder, *QUICK, "--epochs", 2)
    split = artifacts.read_json(folder / gating.SPLIT, "gating")
    sides = [set(split[name]) for name in ("fit", "validation", "held_out")]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 100
    assert record["held_out"]["n_pairs"] == 4 * record["held_out"]["n_prompts"] == 80


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (
            ["--drop", "length"],
            "expected attributes among helpful, safe, verbosity, clear, found 'length'",
        ),
        (["--freeze", "safe"], "expected NAME=WEIGHT, found 'safe'"),
        (["--freeze", "safe=1"], "less than 1, found safe=1"),
        (["--dropout", "1"], "--dropout: expected a number of at least 0 and below 1"),
        (["--validation_share", "0"], "to fit and to validate on"),
        (["--pairs", "nowhere.safetensors"], "nowhere.safetensors: no prepared file and no shards"),
        (["--model_dir", "nowhere"], "attribute_heads.safetensors not found"),
    ],
)
def test_flags_that_cannot_be_followed(trained, tmp_path, flags, match):
    with pytest.raises(InputError, match=match):
        run(trained, "--output_dir", tmp_path, *flags)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"embeddings": [np.zeros((400, D), np.float32)]},
            r"expected embeddings \(n, 2, D\) pairs",
        ),
        (
            {"embeddings": [np.zeros((400, 2, D + 1), np.float32)]},
            f"of {D} dimensions, to which .* found {D + 1}",
        ),
        ({"prompt_embeddings": None}, "no prompt_embeddings, which the gate reads"),
        (
            {"embeddings": [np.zeros((400, 2, D), np.float32)]},
            "helpful: all responses have the same score",
        ),
    ],
    ids=["rated", "D", "no prompts", "constant"],
)
def test_data_that_do_not_fit(tmp_path, changes, match):
    folder = make_heads(tmp_path / "model")
    make_pairs(folder / "train.safetensors", **changes)
    with pytest.raises(InputError, match=match):
        run(folder)


def test_the_command_line(trained, tmp_path):
    call = [
        sys.executable,
        str(SCRIPT),
        "--pairs",
        str(trained / "train.safetensors"),
        "--model_dir",
        str(trained),
    ]
    done = subprocess.run(
        [*call, "--output_dir", str(tmp_path), *QUICK, "--epochs", "1"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "held-out accuracy" in done.stdout and all(name in done.stdout for name in NAMES)


def test_a_gate_for_prompt_embeddings_of_its_own_size(trained):
    assert gating.load(trained).gate.layers[0].in_features == D_PROMPT
