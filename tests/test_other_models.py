"""Steps 5 to 8 with other reward models and with recorded pairs, as a user types them."""

import hashlib
import importlib
import json

import numpy as np
import pytest
import torch

import step5_train_rms
from rewardlib.cli import report
from rewardlib.errors import InputError
from rewardlib.models import model_files
from rewardlib.models.names import has_lightgbm
from rewardlib.nets.training import train_ensemble

SMALL = ["--ensemble_number", "2", "--training_epochs", "1"]


def recorded(path, n=60, seed=0):
    rng = np.random.default_rng(seed)
    emb = rng.standard_normal((n, 2, 6)).astype(np.float16)
    wrong = emb[:, 0, 0] < emb[:, 1, 0]
    emb[wrong] = emb[wrong, ::-1]
    np.savez(
        path,
        embeddings=emb,
        prompt_ids=np.arange(n) // 2,
        ties=np.arange(n) % 6 == 0,
        subset=np.arange(n) % 2,
    )
    return path


def run(number, path, out, *flags):
    name = {5: "step5_train_rms", 6: "step6_eval_rms"}[number]
    importlib.import_module(name).main(
        [*SMALL, "--pairs", str(path), "--output_dir", str(out), *flags]
    )


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("[!m.]*")}


def test_recorded_pairs_go_through_steps_5_and_6(tmp_path, capsys):
    path = recorded(tmp_path / "pairs.npz")
    for out in (tmp_path / "a", tmp_path / "b"):
        run(5, path, out)
        run(6, path, out)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    stem = "HumanPairs_mlp_bt_seed6_n_60_replacement_false_epoch1_lr0.001"
    results = json.loads((tmp_path / "a" / f"eval_results_{stem}.json").read_text())
    assert results["held_out"]["n_pairs"] + results["held_out"]["n_ties"] == 12
    assert set(results["held_out"]["aggregations"]["mean"]["by_subset"]) == {"0", "1"}
    maps = json.loads((tmp_path / "a" / f"preference_maps_{stem}.json").read_text())
    assert set(maps) == {"maps", "members"} and maps["members"]["files"][1].startswith(
        "HumanPairs_mlp_bt_1_seed6"
    )
    assert "36 train, 12 calibration, 12 held_out pairs" in capsys.readouterr().out
    run(5, path, tmp_path / "a")
    run(6, path, tmp_path / "a")
    assert capsys.readouterr().out.count("already done") == 2


def test_step_6_refuses_other_pairs(tmp_path):
    run(5, recorded(tmp_path / "pairs.npz"), tmp_path / "out")
    with pytest.raises(
        InputError,
        match="expected the pairs that its reward models were trained on, found other pairs",
    ):
        run(6, recorded(tmp_path / "pairs.npz", seed=1), tmp_path / "out")


STEPS = {
    5: "step5_train_rms",
    6: "step6_eval_rms",
    7: "step7_isotonic_distillation",
    8: "step8_validate_distillation",
}
NEEDS_TREES = pytest.mark.skipif(not has_lightgbm(), reason="LightGBM is not installed")


def run_steps(data, out, *flags):
    for number, name in STEPS.items():
        few = ["--ensemble_number", "3", "--n_sample", "24", "--n_pairs", "4"]
        few += ["--distill_epochs", "2"] if number >= 7 else []
        importlib.import_module(name).main(
            [*few, "--data_dir", str(data), "--output_dir", str(out), *flags]
        )


@pytest.mark.parametrize(
    ("model", "objective", "suffix"),
    [
        ("linear", "bt", "npz"),
        ("linear", "clf", "npz"),
        ("laplace", "bt", "npz"),
        ("ridge", "regression", "npz"),
        pytest.param("lgbm", "clf", "txt", marks=NEEDS_TREES),
    ],
)
def test_other_reward_models_go_through_all_steps(data, tmp_path, model, objective, suffix):
    flags = "--rm_model", model, "--rm_objective", objective
    run_steps(data, tmp_path / "a", *flags)
    run_steps(data, tmp_path / "b", *flags)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    members = sorted((tmp_path / "a").glob(f"XPrompt_{model}_{objective}_*.{suffix}"))
    assert len(members) == 3 and not list((tmp_path / "a").glob("XPrompt*.ckpt"))
    results = json.loads((tmp_path / "a" / "validation_results.json").read_text())
    assert results["Teacher ORM"]["spearman"] > 0.1
    [record] = (json.loads(path.read_text()) for path in (tmp_path / "a").glob("orm_*.json"))
    rows = np.load(data / "EMBD-TRAIN-split_0.npy")
    scores = [
        model_files.load(path, rows.shape[1]).predict(rows.astype(np.float32)) for path in members
    ]
    assert not np.allclose(scores[0], scores[1])  # each member has its own bootstrap
    assert record["settings"]["replacement"] is True and len(record["scale"]["centre"]) == 3
    report.main([str(tmp_path / "a")])
    about = {"bt": "Bradley-Terry", "clf": "classification", "regression": "regression"}[objective]
    assert f"{about} objective, cross-prompt pairs" in (tmp_path / "a" / "report.html").read_text()


@pytest.mark.parametrize("seed", ["6", "7", "8"])
def test_few_labels_that_are_all_alike_by_chance_are_enough(data, tmp_path, capsys, seed):
    flags = "--rm_model", "linear", "--n_sample", "6", "--seed", seed
    importlib.import_module(STEPS[5]).main(
        [*flags, "--data_dir", str(data), "--output_dir", str(tmp_path)]
    )
    assert len(list(tmp_path.glob("*.npz"))) == 10 and "computing in" not in capsys.readouterr().out


def test_recorded_pairs_are_trained_on_in_the_precision_that_is_recorded(
    tmp_path, monkeypatch, capsys
):
    path, types, train = recorded(tmp_path / "pairs.npz"), [], train_ensemble

    def remember(rows, *rest):
        types.append(rows.dtype)
        return train(rows, *rest)

    monkeypatch.setattr(step5_train_rms, "train_ensemble", remember)
    for precision in ("fp32", "bf16"):
        run(5, path, tmp_path / precision, "--precision", precision)
        run(6, path, tmp_path / precision, "--precision", precision)
        assert f"computing in {precision} on " in capsys.readouterr().out
    assert types == [torch.float32, torch.bfloat16]


def test_members_on_recorded_pairs_validate_on_their_own_fold(tmp_path, monkeypatch):
    path, jobs, train = recorded(tmp_path / "pairs.npz"), [], train_ensemble

    def remember(rows, pairs, labels, members, *rest):
        jobs.extend(members)
        return train(rows, pairs, labels, members, *rest)

    monkeypatch.setattr(step5_train_rms, "train_ensemble", remember)
    run(5, path, tmp_path / "out", "--ensemble_number", "7")
    [record] = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("orm_*.json"))
    folds = np.array(record["folds"])
    assert len({seed for _, _, seed in jobs}) == 7 and set(folds) == set(range(4))
    for member, (fit, held, _) in enumerate(jobs):
        assert set(folds[held]) == {member % 4}
        assert sorted([*fit, *held]) == list(range(len(folds)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rm_model", "laplace", "--rm_objective", "clf"], "found laplace clf"),
        (["--rm_model", "mlp", "--rm_objective", "regression"], "found mlp regression"),
        (["--rm_model", "ridge", "--rm_objective", "bt"], "found ridge bt"),
    ],
)
def test_models_and_objectives_that_do_not_go_together(data, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        importlib.import_module(STEPS[5]).main(
            [*flags, "--data_dir", str(data), "--output_dir", str(tmp_path / "out")]
        )


def test_recorded_pairs_have_no_golden_rewards(tmp_path):
    with pytest.raises(InputError, match="expected golden rewards, found --pairs"):
        flags = "--rm_model", "ridge", "--rm_objective", "regression"
        run(5, recorded(tmp_path / "pairs.npz"), tmp_path / "out", *flags)


def test_recorded_pairs_with_a_linear_model(tmp_path):
    path = recorded(tmp_path / "pairs.npz", n=200)
    for number in (5, 6):
        run(number, path, tmp_path / "out", "--rm_model", "linear")
    [results] = (
        json.loads(path.read_text()) for path in (tmp_path / "out").glob("eval_results_*.json")
    )
    assert results["held_out"]["aggregations"]["mean"]["accuracy"] > 0.8
