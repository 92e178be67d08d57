"""Runs on recorded preferences: linked pairs on one side, training pairs, the whole line."""

import json
import math

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_data import rng, strict_json, write
from scipy.special import expit
from sklearn.metrics import brier_score_loss, log_loss

from rewardlib import artifacts, seeds
from rewardlib.data import embeddings, pair_files
from rewardlib.errors import InputError
from rewardlib.models import scoring
from rewardlib.models.mlp import BT_MLP
from rewardlib.nets import mlp
from rewardlib.nets.training import Training, train_ensemble
from rewardlib.pipeline import preference_maps, recorded

REAL = ROOT.parent / "shared" / "data" / "pairs"


SETTINGS = Training(epochs=6, learning_rate=3e-3, batch_size=16)


def in_memory(emb, groups=None, ties=None, subset=None, lengths=None):
    """HumanPairs that come from no file."""
    n = len(emb)
    groups = np.arange(n) if groups is None else np.asarray(groups)
    ties = np.zeros(n, bool) if ties is None else np.asarray(ties)
    rewards = np.where(ties[:, None], 0.5, [1.0, 0.0])
    responses = embeddings.Responses(
        [emb[:, 0], emb[:, 1]], rewards, lengths, groups, {"pairs.npz": "digest"}
    )
    return pair_files.HumanPairs(responses, subset, ties, {"n": n})


def made_preferences(n=300, d=6, noise=0.3, seed=0, **more):
    """Pairs that a linear utility with logistic noise chose, all of different prompts."""
    emb = rng(seed).standard_normal((n, 2, d)).astype(np.float32)
    gap = (emb[:, 0] - emb[:, 1]) @ np.linspace(-1, 1.5, d) + noise * rng(seed + 1).logistic(size=n)
    wrong = gap < 0
    emb[wrong] = emb[wrong, ::-1]
    return in_memory(emb, **more)


# -------------------------------------------------------------------------------------------- links


def test_links_worked_by_hand():
    """Shared: a prompt by rows 0 and 2, an answer by 2 and 5, a prompt embedding by 1 and 4.

    The answer is on different sides of rows 2 and 5. Row 3 shares nothing.
    """
    ids = np.array([7, 8, 7, 9, 6, 5])
    other = np.array([0, 1, 2, 3, 1, 4])
    answers = np.array(list("abcdef") + list("ghijkc"))
    assert pair_files.link(6, [ids, other, answers]).tolist() == [0, 1, 0, 2, 1, 0]
    assert pair_files.link(6, [ids]).tolist() == [0, 1, 0, 2, 3, 4]
    assert pair_files.link(3, []).tolist() == [0, 1, 2]


@given(st.integers(1, 12), st.integers(0, 10**6))
@settings(deadline=None)
def test_links_are_the_closure_of_shared_keys(n, seed):
    keys = [rng(seed + i).integers(0, 2 * n, size=(1 + i) * n) for i in range(2)]
    near = np.eye(n, dtype=bool)
    for column in keys:
        for i in range(len(column)):
            near[i % n, np.flatnonzero(column == column[i]) % n] = True
    for k in range(n):
        near |= near[:, [k]] & near[[k]]
    groups = pair_files.link(n, keys)
    np.testing.assert_array_equal(groups[:, None] == groups, near)
    np.testing.assert_array_equal(np.unique(groups), np.arange(groups.max() + 1))


def planted(tmp_path, duplicate):
    """40 pairs, where row 39 shares the named part with row 0."""
    emb, ids = rng().standard_normal((40, 2, 4)).astype(np.float16), np.arange(40)
    prompt_emb = rng(1).standard_normal((40, 3)).astype(np.float16)
    emb[0, 0, 0] = 0.0
    if duplicate == "prompt id":
        ids[39] = 0
    elif duplicate == "prompt embedding":
        prompt_emb[39] = prompt_emb[0]
    elif duplicate == "answer":
        emb[39, 0] = emb[0, 0]
    elif duplicate == "answer on the other side":
        emb[39, 1] = emb[0, 0]
    else:
        emb[39, 1] = np.where(emb[0, 0] == 0, -0.0, emb[0, 0])
    return pair_files.load(
        write(
            tmp_path, "npz", {"embeddings": emb, "prompt_ids": ids, "prompt_embeddings": prompt_emb}
        )
    )


@pytest.mark.parametrize(
    "duplicate",
    ["prompt id", "prompt embedding", "answer", "answer on the other side", "answer with -0"],
)
def test_duplicates_stay_on_one_side_of_every_split(tmp_path, duplicate):
    data = planted(tmp_path, duplicate)
    assert data.about["n_linked"] == 2 and data.about[
        "n_linked_by_prompt"
    ] == 2 * duplicate.startswith("prompt")
    splits = [recorded.split(data, seed) for seed in range(30)]
    assert {np.isin([0, 39], roles["held_out"]).sum() for roles in splits} == {0, 2}
    for roles in splits:
        assert all(np.isin([0, 39], rows).sum() in (0, 2) for rows in roles.values())
        assert np.sort(np.concatenate(list(roles.values()))).tolist() == list(range(40))


def test_roles_have_60_20_20_percent():
    data = made_preferences(100)
    assert [len(rows) for rows in recorded.split(data, 6).values()] == [60, 20, 20]


def test_a_saved_split_comes_back_and_a_changed_one_is_refused(tmp_path):
    data = made_preferences(20, groups=np.arange(20) // 2)
    roles = recorded.split(data, 6)
    recorded.save_split(tmp_path, roles, 6)
    found = recorded.load_split(tmp_path, data)
    assert list(found) == ["train", "calibration", "held_out"]
    for role in found:
        np.testing.assert_array_equal(found[role], roles[role])
    with pytest.raises(InputError, match="expected each of 22 pairs once, found other pairs"):
        recorded.load_split(tmp_path, made_preferences(22))
    for role in ("held_out", "calibration"):
        swapped = {name: rows.copy() for name, rows in roles.items()}
        swapped["train"][0], swapped[role][0] = roles[role][0], roles["train"][0]
        recorded.save_split(tmp_path, swapped, 6)
        with pytest.raises(
            InputError, match="leakage: .* has 2 groups of linked pairs on two sides"
        ):
            recorded.load_split(tmp_path, data)


def test_a_run_of_other_pairs_or_settings_is_refused(tmp_path):
    data = made_preferences(20)
    run = recorded.run_settings({"seed": 6, "n_sample": 100, "annotation_quality": 10.0}, data)
    assert run["n_sample"] == 20 and run["pairing"] == "human" and run["annotation_quality"] is None
    with pytest.raises(InputError, match="no finished reward models; run step 5"):
        recorded.open_run(tmp_path, run, data)
    recorded.save_split(tmp_path, recorded.split(data, 6), 6)
    artifacts.write_json(tmp_path / "orm.json", {"prompts": [0], "folds": [0], "members": []})
    entry = {"arguments": run, "inputs": {"pairs.npz": "digest"}, "record": "orm.json"}
    artifacts.write_json(tmp_path / "manifest.json", {"step5": entry})
    roles, record = recorded.open_run(tmp_path, run, data)
    assert len(roles["held_out"]) == 4 and record["members"] == []
    with pytest.raises(InputError, match="found seed 6, not 7"):
        recorded.open_run(tmp_path, run | {"seed": 7}, data)
    artifacts.write_json(
        tmp_path / "manifest.json", {"step5": entry | {"inputs": {"pairs.npz": "other"}}}
    )
    with pytest.raises(
        InputError,
        match="expected the pairs that its reward models were trained on, found other pairs",
    ):
        recorded.open_run(tmp_path, run, data)


# ----------------------------------------------------------------------------------- training pairs


def test_labels_say_where_the_preferred_response_went():
    data = made_preferences(200, groups=np.arange(200) // 2)
    positions = np.arange(20, 180)
    pairs = recorded.draw(data, positions, 6)
    preferred = pairs.index[np.arange(160), np.where(pairs.labels == 1, 0, 1)]
    np.testing.assert_array_equal(pairs.rows[preferred], data.responses.embeddings[0][positions])
    np.testing.assert_array_equal(
        pairs.rows[pairs.index.sum(1) - preferred], data.responses.embeddings[1][positions]
    )
    assert 60 < pairs.labels.sum() < 100
    assert all(len(set(pairs.folds[pairs.prompts[:, 0] == g])) == 1 for g in pairs.prompts[:, 0])
    assert np.bincount(pairs.folds).tolist() == [32] * 5 and pairs.n_folds == 5


def test_ties_are_trained_on_never():
    ties = np.arange(60) % 3 == 0
    data = made_preferences(60, ties=ties)
    pairs = recorded.draw(data, np.arange(60), 6)
    assert len(pairs.labels) == 40 and len(pairs.rows) == 80
    assert not np.isin(data.responses.groups[ties], pairs.prompts).any()
    with pytest.raises(
        InputError, match="at least 2 prompts with a preference to train on, found 0"
    ):
        recorded.draw(data, np.flatnonzero(ties), 6)
    with pytest.raises(
        InputError, match="at least 2 prompts with a preference to evaluate on, found 1"
    ):
        recorded.part(data, np.array([0, 1]), rng())


def test_one_seed_one_draw():
    data = made_preferences(50)
    a, b, other = (recorded.draw(data, np.arange(50), seed) for seed in (6, 6, 7))
    for name in ("rows", "index", "labels", "prompts", "folds"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.labels != other.labels).any() and (a.folds != other.folds).any()


def test_estimators_take_the_drawn_pairs():
    data = made_preferences()
    pairs = recorded.draw(data, np.arange(200), 6)
    model = BT_MLP(hidden=(16, 8), epochs=10, learning_rate=0.01)
    model.fit(pairs.index, pairs.labels, embeddings=pairs.rows, groups=pairs.prompts[:, 0])
    positions = np.arange(200, 300)
    difference = recorded.model_differences(model.predict, data, positions)
    sides = [model.predict(data.responses.embeddings[side][positions])[:, 0] for side in (0, 1)]
    np.testing.assert_allclose(difference, sides[0] - sides[1], rtol=1e-5, atol=1e-6)
    assert (difference > 0).mean() > 0.85


# ----------------------------------------------------------------------------------- the whole line


def train(data, pairs, rows, objective="bt", n_members=3, seed=6):
    """Members trained as step 5 trains them, on the scale that step 6 measures, and their logs."""
    jobs = []
    for member in range(n_members):
        held = pairs.folds == member % pairs.n_folds
        torch_seed = seeds.torch_seed(seed, "member", member)
        jobs.append((np.flatnonzero(~held), np.flatnonzero(held), torch_seed))
    trained = train_ensemble(pairs.rows, pairs.index, pairs.labels, jobs, objective, SETTINGS)
    models, logs = zip(*trained, strict=True)
    scale = scoring.scale(models, data.responses, rows)
    return scoring.ScaledEnsemble(models, *scale), logs


def run(data, seed=6, objective="bt"):
    roles = recorded.split(data, seed)
    pairs = recorded.draw(data, roles["train"], seed)
    ensemble, logs = train(data, pairs, roles["train"], objective, seed=seed)
    return recorded.evaluate(ensemble, pairs, data, roles, seed), logs, ensemble


@pytest.mark.parametrize("objective", ["bt", "clf"])
def test_a_learnable_preference_is_learned(objective):
    subset = np.array(["first", "second"])[np.arange(300) % 2]
    ties = np.arange(300) % 10 == 0
    lengths = rng(3).integers(1, 99, size=(300, 2)).astype(float)
    results, logs, _ = run(
        made_preferences(subset=subset, ties=ties, lengths=lengths), objective=objective
    )
    results = strict_json(results)
    held, mean = results["held_out"], results["held_out"]["aggregations"]["mean"]
    assert (
        held["n_pairs"] + held["n_ties"] == 60
        and results["calibration"]["n_pairs"] == 60 - results["calibration"]["n_ties"]
    )
    assert (
        mean["accuracy"] > 0.8
        and mean["accuracy_ci95"][0] < mean["accuracy"] < mean["accuracy_ci95"][1]
    )
    assert (
        sum(row["n_pairs"] for row in mean["by_subset"].values()) == held["n_pairs"]
        and len(mean["by_subset"]) == 2
    )
    assert list(held["baselines"]) == ["linear_probe", "random", "longer", "shorter"]
    assert held["baselines"]["linear_probe"]["accuracy"] > 0.85
    assert held["baselines"]["longer"]["accuracy"] + held["baselines"]["shorter"][
        "accuracy"
    ] == pytest.approx(1)
    assert len(held["members"]) == len(logs) == 3 and all(
        "validation_loss" in log[0] for log in logs
    )
    assert set(results["maps"]) == {*held["aggregations"], "linear_probe"}
    for variant in ("uncalibrated", "temperature_scaled", "isotonic"):
        assert mean[variant]["nll"] < math.log(2) and mean[variant]["brier"] < 0.25
    lines = recorded.summary(results)
    assert f"held out: {held['n_pairs']} pairs" in lines[
        0
    ] and f"mean          {mean['accuracy']:.3f} [" in "".join(lines)


def test_held_out_pairs_are_calibrated_by_calibration_pairs_alone():
    """The saved temperature and map, applied to held-out differences, give the held-out table."""
    data = made_preferences()
    results, _, ensemble = run(data)
    roles = recorded.split(data, 6)
    held, fitted = (
        recorded.differences(ensemble, np.zeros(6), data, roles[role], 6)["aggregations"]["mean"]
        for role in ("held_out", "calibration")
    )
    maps, found = results["maps"]["mean"], results["held_out"]["aggregations"]["mean"]
    assert maps == {
        "temperature": preference_maps.fit_temperature(fitted),
        "isotonic": preference_maps.fit_map(fitted),
    }
    assert found["accuracy"] == np.mean(held > 0)
    assert found["uncalibrated"]["nll"] == pytest.approx(
        log_loss(np.ones(60), expit(held), labels=[0, 1])
    )
    scaled = expit(held / maps["temperature"])
    assert found["temperature_scaled"]["nll"] == pytest.approx(
        log_loss(np.ones(60), scaled, labels=[0, 1])
    )
    mapped = preference_maps.probability(maps["isotonic"], held)
    assert found["isotonic"]["brier"] == pytest.approx(
        brier_score_loss(np.ones(60), mapped, labels=[0, 1])
    )


def test_differences_of_an_ensemble_are_in_the_logits_of_its_members():
    data, positions = made_preferences(60), np.arange(40, 60)
    pairs = recorded.draw(data, np.arange(40), 6)
    ensemble, _ = train(data, pairs, np.arange(40))
    logits = np.array(
        [
            recorded.model_differences(lambda x, m=m: mlp.predict(m, x), data, positions)
            for m in ensemble.models
        ]
    )
    found = recorded.differences(ensemble, np.arange(6.0), data, positions, 6)
    np.testing.assert_allclose(found["members"], logits, rtol=1e-4, atol=1e-5)
    expected = (logits / ensemble.spread[:, None]).mean(0) * ensemble.spread.mean()
    np.testing.assert_allclose(found["aggregations"]["mean"], expected, rtol=1e-4, atol=1e-5)
    chosen, rejected = (
        data.responses.embeddings[side][positions] @ np.arange(6.0) for side in (0, 1)
    )
    np.testing.assert_allclose(
        found["baselines"]["linear_probe"], chosen - rejected, rtol=1e-4, atol=1e-4
    )


def test_coin_flips_are_not_learned():
    emb = rng(5).standard_normal((400, 2, 6)).astype(np.float32)
    results, _, _ = run(in_memory(emb))
    low, high = results["held_out"]["aggregations"]["mean"]["accuracy_ci95"]
    assert low < 0.5 < high and "longer" not in results["held_out"]["baselines"]


def test_one_seed_one_result_to_the_byte():
    first, second, other = (json.dumps(run(made_preferences(100), seed)[0]) for seed in (6, 6, 7))
    assert first == second != other


# --------------------------------------------------------------------------------------------- data


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real pairs in {REAL}")
@pytest.mark.parametrize(
    ("name", "shape", "n_groups", "n_linked"),
    [
        ("hh_harmless", (1800, 2, 384), 1798, 4),
        ("llmbar", (885, 2, 384), 756, 194),
        ("rmbench", (2394, 2, 384), 796, 2394),
    ],
)
def test_real_pairs_are_read_and_linked(name, shape, n_groups, n_linked):
    data = pair_files.load(REAL / f"{name}.npz")
    assert data.responses.shape == shape and (data.about["n_groups"], data.about["n_linked"]) == (
        n_groups,
        n_linked,
    )
    assert (data.subset is None) == (name == "hh_harmless")
