"""studies/interpretable_regression.py: results, no tuning on held-out prompts, and refusals."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from scipy.special import expit
from scipy.stats import spearmanr

from rewardlib.errors import InputError
from studies import interpretable_regression as script
from studies.interpretable import attribute_data, attribute_metrics, multi_objective
from studies.interpretable.attribute_data import Rated

NAMES = ["helpful", "verbosity", "safe"]
FILES = ("attribute_heads.safetensors", "attribute_heads.json", "regression_split.json")
SHARED = ROOT.parent / "shared" / "data" / "alpaca"


def make(n_prompts=150, k=8, d=10, seed=0, pairs=False):
    """k responses to each prompt: helpful ones tend to be long, safe ones short.

    60 % of the labels of safe are missing.
    """
    rng = np.random.default_rng(seed)
    n = n_prompts * k
    x = (
        rng.standard_normal((n, 2, d) if pairs else (n, d))
        + np.repeat(rng.standard_normal((n_prompts, d)), k, 0)[
            (slice(None), None) if pairs else slice(None)
        ]
    )
    x = x.astype(np.float32)
    heads = 2 * np.linalg.qr(rng.standard_normal((d, 3)))[0]
    heads[:, 0] += 0.7 * heads[:, 1]
    heads[:, 2] -= 0.5 * heads[:, 1]
    labels = (x[:, 0] - x[:, 1] if pairs else x) @ heads
    labels = expit(labels) if pairs else labels + rng.standard_normal(labels.shape)
    labels[rng.random(n) < 0.6, 2] = np.nan
    groups = attribute_data.groups_of([f"prompt {seed} {i // k}" for i in range(n)])
    ids = [f"{seed} {i}" for i in range(n)]
    return Rated(
        [x],
        groups,
        ids,
        labels=labels.astype(np.float32),
        attributes=NAMES,
        source={"producer": "test"},
    )


def write(path, data=None, **more):
    attribute_data.write(path, data or make(**more))
    return path


def run(data, out, *flags):
    script.main(["--data", str(data), "--output_dir", str(out), *flags])
    return json.loads((out / script.RECORD).read_text())


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "rated.safetensors")


@pytest.fixture(scope="module")
def finished(rated, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    return out, run(rated, out)


def content(out):
    return {name: (out / name).read_bytes() for name in FILES}


def test_the_model_is_that_of_the_recorded_split(rated, finished):
    out, _ = finished
    data, split = attribute_data.read(rated), json.loads((out / script.SPLIT).read_text())
    rows = {part: np.flatnonzero(np.isin(data.groups, groups)) for part, groups in split.items()}
    assert set(rows) == {"fit", "validation", "reference", "held_out"}
    assert sum(map(len, split.values())) == 150 and len(np.concatenate(list(rows.values()))) == 1200
    fitted = multi_objective.fit_ridge(data, rows["fit"], rows["validation"])
    model = multi_objective.load(out, data)
    np.testing.assert_array_equal(model.heads, fitted.heads.astype(np.float32))
    raw = multi_objective.score_rows(model, data, rows["reference"])
    penalties = multi_objective.find_penalties(raw, NAMES, "verbosity")
    np.testing.assert_array_equal(model.penalties, penalties.penalties)
    assert (model.penalties[[0, 2]] != 0).all() and model.penalties[1] == 0


def test_the_record_holds_what_the_model_does_on_held_out_prompts(rated, finished):
    out, record = finished
    data, model = attribute_data.read(rated), multi_objective.load(out)
    split = json.loads((out / script.SPLIT).read_text())
    for part in ("reference", "held_out"):
        rows = np.flatnonzero(np.isin(data.groups, split[part]))
        raw = multi_objective.score_rows(model, data, rows)
        debiased = multi_objective.debias(model, raw)
        for a in (0, 2):
            entry = record["debiasing"]["attributes"][NAMES[a]]
            assert entry["penalty"] == model.penalties[a]
            for when, scores in (("before", raw), ("after", debiased)):
                expected = spearmanr(scores[:, a], raw[:, 1]).statistic
                assert entry[part][when]["spearman"] == pytest.approx(expected, abs=1e-9)
            assert abs(entry[part]["before"]["spearman"]) > 0.1
        assert all(abs(r["reference"]["after"]["spearman"]) <= 0.03 for r in (entry,))
    held = record["regression"]["helpful"]["held_out"]
    assert held["mse"] == pytest.approx(np.mean((raw[:, 0] - data.labels[rows, 0]) ** 2)) and held[
        "n"
    ] == len(rows)
    assert held["r2"] > 0.5 > 0 >= held["baseline"]["r2"]
    assert (
        record["regression"]["safe"]["n"]["fit"]
        == np.isfinite(data.labels[np.isin(data.groups, split["fit"]), 2]).sum()
    )


def test_debiasing_holds_on_held_out_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(attribute_metrics, "RANK_RESAMPLES", 20)
    shares = ("--reference_share", "0.3", "--held_out_share", "0.3")
    record = run(write(tmp_path / "large", n_prompts=20_000, k=2, d=6), tmp_path / "out", *shares)
    for name in ("helpful", "safe"):
        entry = record["debiasing"]["attributes"][name]
        assert abs(entry["held_out"]["before"]["spearman"]) > 0.3
        assert abs(entry["reference"]["after"]["spearman"]) <= 0.001
        assert abs(entry["held_out"]["after"]["spearman"]) <= 0.03


def test_a_correlation_that_is_left_on_held_out_prompts_is_told(finished, capsys):
    debiasing = json.loads(json.dumps(finished[1]["debiasing"]))
    for ci, warned in (
        ([-0.1, 0.02], False),
        ([0.031, 0.1], True),
        ([-0.3, -0.1], True),
        ([None, None], False),
    ):
        for name, interval in (("helpful", [-0.1, 0.1]), ("safe", ci)):
            debiasing["attributes"][name]["held_out"]["after"] = {
                "spearman": 0.0,
                "spearman_ci95": interval,
            }
        if ci[0] is None:
            debiasing["attributes"]["safe"]["held_out"]["after"]["spearman"] = None
        script.report_debiasing(debiasing, "verbosity")
        output = capsys.readouterr().out
        assert (
            "warning: |rho| of safe stays above the threshold on held-out prompts" in output
        ) == warned
        assert "warning: |rho| of helpful" not in output


def spoil(data, groups, parts):
    """The data with random labels (and embeddings, where `parts` names them) on some prompts."""
    rows, rng = np.isin(data.groups, groups), np.random.default_rng(9)
    x, labels = data.take(np.arange(len(data.ids))), data.labels.copy()
    if "embeddings" in parts:
        x[rows] = rng.standard_normal(x[rows].shape)
    labels[rows] = rng.standard_normal(labels[rows].shape)
    return Rated([x], data.groups, data.ids, labels=labels, attributes=NAMES, source=data.source)


def test_held_out_prompts_enter_nothing_and_labels_of_the_reference_neither(
    rated, finished, tmp_path
):
    out, _ = finished
    split, data = json.loads((out / script.SPLIT).read_text()), attribute_data.read(rated)
    held = spoil(data, split["held_out"], ["embeddings", "labels"])
    for name, spoilt in (
        ("held", held),
        ("reference", spoil(data, split["reference"], ["labels"])),
    ):
        run(write(tmp_path / name, spoilt), tmp_path / f"{name} out")
        for file in (multi_objective.HEADS, script.SPLIT):
            assert (tmp_path / f"{name} out" / file).read_bytes() == (out / file).read_bytes()
    run(write(tmp_path / "fit", spoil(data, split["validation"], ["labels"])), tmp_path / "fit out")
    assert (tmp_path / "fit out" / multi_objective.HEADS).read_bytes() != (
        out / multi_objective.HEADS
    ).read_bytes()


def test_finished_work_is_not_done_again(rated, tmp_path, capsys, monkeypatch):
    first = run(rated, tmp_path)
    before = content(tmp_path)
    assert "wrote attribute_heads.safetensors" in capsys.readouterr().out
    run(rated, tmp_path)
    output = capsys.readouterr().out
    assert "already done" in output and "rho with the verbosity score" in output
    monkeypatch.setenv("FORCE", "1")
    run(rated, tmp_path)
    assert "wrote" in capsys.readouterr().out and content(tmp_path) == before
    monkeypatch.delenv("FORCE")
    assert run(rated, tmp_path, "--penalty_search", "grid", "--allow_unreached") != first
    assert content(tmp_path)[multi_objective.HEADS] != before[multi_objective.HEADS]


def test_shards_and_another_order_of_rows_give_the_same(rated, finished, tmp_path):
    data, (out, record) = attribute_data.read(rated), finished
    order = np.random.default_rng(3).permutation(1200)
    for name, rows in (("same", np.arange(1200)), ("moved", order)):
        (tmp_path / name).mkdir()
        for idx, part in enumerate(np.array_split(rows, 3)):
            attribute_data.write(
                tmp_path / name / attribute_data.shard_name("rated", idx, 3),
                Rated(
                    [data.take(part)],
                    data.groups[part],
                    [data.ids[i] for i in part],
                    labels=data.labels[part],
                    attributes=NAMES,
                    source=data.source,
                ),
            )
        again = run(tmp_path / name / "rated-*.safetensors", tmp_path / f"{name} out")
        model, expected = multi_objective.load(tmp_path / f"{name} out"), multi_objective.load(out)
        np.testing.assert_allclose(model.heads, expected.heads, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(model.penalties, expected.penalties, rtol=1e-4)
        assert (tmp_path / f"{name} out" / script.SPLIT).read_bytes() == (
            out / script.SPLIT
        ).read_bytes()
        if name == "same":
            assert again["regression"] == record["regression"]


def test_without_debiasing_the_reference_prompts_are_fitted_on(rated, tmp_path):
    record = run(rated, tmp_path, "--verbosity_attribute", "none")
    assert record["debiasing"] is None and set(record["n_prompts"]) == {
        "fit",
        "validation",
        "held_out",
    }
    model = multi_objective.load(tmp_path)
    assert model.verbosity is None and not model.penalties.any()


def test_penalties_from_another_file_leave_its_known_prompts_out(rated, tmp_path, capsys):
    other = make(n_prompts=40, seed=1)
    known = attribute_data.read(rated).groups[:8]
    other = Rated(other.embeddings, np.concatenate([known, other.groups[8:]]), other.ids)
    record = run(rated, tmp_path / "out", "--reference", str(write(tmp_path / "other", other)))
    assert "8 of 320 rows of" in capsys.readouterr().out
    assert record["debiasing"]["reference"] | {"path": None} == {
        "path": None,
        "n": 312,
        "n_prompts": 39,
    }
    assert set(record["n_prompts"]) == {"fit", "validation", "held_out"}
    split = json.loads((tmp_path / "out" / script.SPLIT).read_text())
    assert split["reference"] == np.unique(other.groups[8:]).tolist()
    with pytest.raises(InputError, match="no prompts that are not in .*; take another reference"):
        run(rated, tmp_path / "out", "--reference", str(rated))


def test_an_intercept_is_fitted_when_asked_for(tmp_path, capsys):
    data = make()
    shifted = Rated(
        data.embeddings, data.groups, data.ids, labels=data.labels + 50, attributes=NAMES
    )
    path = write(tmp_path / "a", shifted)
    without = run(path, tmp_path / "without")
    assert (
        "warning: helpful is predicted worse than by a constant; --intercept 1 may help"
        in capsys.readouterr().out
    )
    with_one = run(path, tmp_path / "with", "--intercept", "1")
    assert (
        with_one["regression"]["helpful"]["held_out"]["r2"]
        > 0.5
        > without["regression"]["helpful"]["held_out"]["r2"]
    )


def test_concept_labels_of_pairs(tmp_path, capsys):
    record = run(write(tmp_path / "pairs", pairs=True), tmp_path / "out", "--labels", "pairwise")
    held = record["regression"]["helpful"]["held_out"]
    assert held["accuracy"] > 0.8 and held["log_loss"] < held["baseline"]["log_loss"]
    debiasing = record["debiasing"]
    assert debiasing["reference"]["n"] == 2 * record["n_rows"]["reference"]
    assert abs(debiasing["attributes"]["helpful"]["reference"]["after"]["spearman"]) <= 0.03
    assert "log_loss" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- refusals


def command(*flags):
    call = [sys.executable, str(ROOT / "studies" / "interpretable_regression.py"), *map(str, flags)]
    return subprocess.run(call, capture_output=True, text=True, cwd=ROOT)


def test_the_command_from_the_root_and_its_exit_status(rated, tmp_path):
    done = command("--data", rated, "--output_dir", tmp_path)
    assert (
        done.returncode == 0
        and "held-out prompts [95 % interval]" in done.stdout
        and done.stderr == ""
    )
    refused = command("--data", rated, "--output_dir", tmp_path, "--verbosity_attribute", "length")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "expected an attribute among helpful, verbosity, safe, found 'length'" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--verbosity_attribute", "Verbosity"],
            "expected an attribute among helpful, verbosity, safe, found 'Verb",
        ),
        (["--attributes", "helpful"], "expected an attribute among helpful, found 'verbosity'"),
        (["--attributes", "helpful", "polite"], "expected an attribute among .* found 'polite'"),
        (
            ["--labels", "pairwise"],
            r"expected embeddings \(n, 2, D\) pairs, .* found \(1200, 10\): rated responses",
        ),
        (["--held_out_share", "0.9"], "expected shares that leave rows to fit, found"),
        (
            ["--held_out_share", "1"],
            "--held_out_share: expected a number between 0 and 1, found '1'",
        ),
        (
            ["--reference", "x", "--verbosity_attribute", "none"],
            "--reference needs a --verbosity_attribute",
        ),
        (
            ["--labels", "pairwise", "--intercept", "1"],
            "--intercept needs --labels ratings",
        ),
        (
            ["--penalty_search", "grid"],
            r"safe: no penalty brings \|rho\| with verbosity to 0.03",
        ),
    ],
)
def test_what_cannot_be_done(rated, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        run(rated, tmp_path, *flags)
    assert not (tmp_path / script.RECORD).exists()


def test_an_attribute_without_any_label(tmp_path):
    data = make()
    data.labels[:, 2] = np.nan
    with pytest.raises(InputError, match="no labels for safe"):
        run(write(tmp_path / "a", data), tmp_path)
    record = run(tmp_path / "a", tmp_path / "out", "--attributes", "verbosity", "helpful")
    assert record["attributes"] == ["verbosity", "helpful"]


def test_a_single_held_out_label_is_no_measure_and_no_error(tmp_path, finished):
    data, out = make(), finished[0]
    held = np.flatnonzero(
        np.isin(data.groups, json.loads((out / script.SPLIT).read_text())["held_out"])
    )
    data.labels[held, 2] = np.nan
    data.labels[held[0], 2] = 1
    record = run(write(tmp_path / "a", data), tmp_path / "out")
    assert record["regression"]["safe"]["held_out"]["n"] == 1
    assert record["regression"]["safe"]["held_out"]["mse"] is None


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_real_attributes(tmp_path):
    x = np.load(SHARED / "EMBD_alpaca_minilm_mix55_train.npy").transpose(1, 0, 2)
    labels = np.load(SHARED / "ATTRIBUTES_alpaca_mix55_train.npy").transpose(1, 0, 2)
    names = json.loads((SHARED / "attributes.json").read_text())
    n, k = x.shape[:2]
    groups, ids = np.repeat(np.arange(n), k), [str(i) for i in range(n * k)]
    data = Rated(
        [x.reshape(n * k, -1)], groups, ids, labels=labels.reshape(n * k, -1), attributes=names
    )
    flags = ("--verbosity_attribute", "verbosity_log_chars", "--intercept", "1")
    record = run(write(tmp_path / "a", data), tmp_path / "out", *flags)
    assert record["regression"]["verbosity_log_chars"]["held_out"]["r2"] > 0.4
    for row in record["debiasing"]["attributes"].values():
        if row["tried"]:
            assert abs(row["reference"]["after"]["spearman"]) <= 0.03
