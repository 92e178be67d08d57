"""Names of a run's files, the prompts that are labelled, the record of step 5."""

import os
import re
import time

import numpy as np
import pytest
from scoring_data import responses, rng

from rewardlib import artifacts
from rewardlib.data import splits
from rewardlib.errors import InputError
from rewardlib.pipeline import run_record

# ----------------------------------------------------------------------------------- names of files


SETTINGS = {
    "rm_model": "mlp",
    "task": "helpful", "pairing": "xprompt", "rm_objective": "bt", "seed": 6, "consider_first_n": 2,
    "n_sample": 8, "n_pairs": 10, "replacement": False, "training_epochs": 2,
    "learning_rate": 0.001, "annotation_quality": 10.0,
}  # fmt: skip


def test_checkpoint_names_follow_the_documented_pattern():
    assert (
        run_record.stem({**SETTINGS, "n_sample": 8}, 3)
        == "XPrompt_mlp_bt_3_seed6_firstn_2_n_8_pair_10_replacement_false_epoch2_lr0.001"
    )
    other = {
        **SETTINGS,
        "pairing": "sameprompt",
        "rm_objective": "clf",
        "consider_first_n": -1,
        "replacement": True,
    }
    name = run_record.stem({**other, "n_sample": 100}, 12)
    assert (
        name
        == "SamePrompt_mlp_clf_12_seed6_firstn_-1_n_100_pair_10_replacement_true_epoch2_lr0.001"
    )
    assert "_bt_seed6_" in run_record.stem({**SETTINGS, "n_sample": 8})
    pattern = (
        r"(X|Same)Prompt_mlp_(bt|clf)_\d+_seed\d+_firstn_-?\d_n_\d+_pair_\d+"
        r"_replacement_(true|false)_epoch\d+_lr\S+"
    )
    assert re.fullmatch(pattern, name)


def test_a_number_has_one_spelling_in_names():
    names = {
        run_record.stem({**SETTINGS, "learning_rate": float(text)})
        for text in ("1e-3", "0.001", "0.0010", ".001")
    }
    assert len(names) == 1


# ------------------------------------------------------------------------------------ which prompts


def split_of(n=20):
    return splits.split_prompts(np.arange(n), 6)


def test_n_sample_is_bounded_by_what_may_be_fitted_on():
    split = split_of(20)
    assert run_record.resolve_n_sample(None, split) == run_record.resolve_n_sample(16, split) == 16
    assert run_record.resolve_n_sample(4, split) == 4
    for wrong in (3, 17):
        with pytest.raises(InputError, match=rf"n_sample: expected 4 to 16 .* found {wrong}"):
            run_record.resolve_n_sample(wrong, split)


def test_student_train_prompts_are_taken_first_and_held_out_ones_never():
    split = split_of(50)
    for n in (4, 10, 11, 40):
        chosen = run_record.choose_prompts(split, n, rng())
        assert len(set(chosen)) == n and (np.diff(chosen) > 0).all()
        assert not set(chosen) & set(split["held_out"])
        assert len(set(chosen) & set(split["student_train"])) == min(n, 10)
    draws = {tuple(run_record.choose_prompts(split, 4, rng(seed))) for seed in range(5)}
    assert len(draws) > 1
    np.testing.assert_array_equal(
        run_record.choose_prompts(split, 4, rng(1)), run_record.choose_prompts(split, 4, rng(1))
    )


def record_of(prompts, folds, validation_folds):
    members = [
        {"file": f"{i}.ckpt", "validation_fold": fold} for i, fold in enumerate(validation_folds)
    ]
    return {"prompts": np.array(prompts), "folds": np.array(folds), "members": members}


def test_a_member_saw_its_prompts_but_not_those_of_its_validation_fold():
    record = record_of([3, 7, 9], [0, 1, 0], [0, 1, 2])
    found = run_record.seen_by_members(record, np.array([9, 7, 5, 3]))
    assert found.tolist() == [
        [False, True, False, False],
        [True, False, False, True],
        [True, True, False, True],
    ]


def test_held_out_prompts_among_the_fitted_ones_are_a_leak():
    split = split_of(20)
    fitted = np.concatenate([split["student_train"], split["held_out"][1:3]])
    run_record.check_split(record_of(split["calibration"], np.zeros(12, int), [0]), split)
    with pytest.raises(
        InputError,
        match=rf"leakage: 2 held-out prompts \(first: {min(fitted[-2:])}\) entered the training",
    ):
        run_record.check_split(record_of(fitted, np.zeros(len(fitted), int), [0]), split)


# ----------------------------------------------------------------------------- the record of step 5


@pytest.fixture
def run(tmp_path):
    """OUTPUT_DIR as step 5 leaves it, and its data of 20 prompts."""
    data, split = (
        responses(n=20, digests={"EMBD-TRAIN-split_0.npy": "12ab", "rewards_split_0.json": "34cd"}),
        split_of(20),
    )
    splits.save(tmp_path, split, 6)
    record = record_of(run_record.choose_prompts(split, 8, rng()), np.arange(8) % 2, [0, 1])
    artifacts.write_json(tmp_path / "orm.json", record)
    work = artifacts.identity(run_record.__file__, SETTINGS, data.digests)
    artifacts.record(
        tmp_path, "step5", {**work, "record": "orm.json"}, ["orm.json", splits.FILE], time.time()
    )
    return tmp_path, data


def test_a_run_is_opened_with_its_split_and_record(run):
    out, data = run
    split, record = run_record.open_run(out, dict(SETTINGS), data)
    assert (
        set(record["prompts"]) >= set(split["student_train"])
        and record["folds"].tolist() == [0, 1] * 4
    )
    assert [member["validation_fold"] for member in record["members"]] == [0, 1]


def test_opening_resolves_n_sample_in_place(run):
    out, data = run
    settings = {**SETTINGS, "n_sample": None}
    with pytest.raises(InputError, match="n_sample 8, not 16"):
        run_record.open_run(out, settings, data)
    assert settings["n_sample"] == 16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 7}, "seed 6, not 7"),
        (
            {"learning_rate": 0.002, "task": "x"},
            "task 'helpful', not 'x'; learning_rate 0.001, not",
        ),
    ],
    ids=["seed", "two"],
)
def test_reward_models_of_other_settings_are_refused(run, changed, message):
    out, data = run
    with pytest.raises(
        InputError, match=f"expected reward models of these settings, found {message}"
    ):
        run_record.open_run(out, {**SETTINGS, **changed}, data)


def test_reward_models_of_other_data_are_refused(run):
    """As many prompts, but other files: prompt 3 of one data set is not prompt 3 of the other.

    So nothing is known of which member was trained on which prompt.
    """
    out, data = run
    other = responses(n=20, seed=1, digests={**data.digests, "rewards_split_0.json": "56ef"})
    with pytest.raises(InputError, match="data.*step 5"):
        run_record.open_run(out, dict(SETTINGS), other)


def test_data_with_another_number_of_prompts_are_refused(run):
    with pytest.raises(
        InputError, match="expected each of 21 prompts once; this split belongs to another data set"
    ):
        run_record.open_run(run[0], dict(SETTINGS), responses(n=21))


def test_without_a_finished_step_5(run):
    out, data = run
    os.remove(out / "manifest.json")
    with pytest.raises(
        InputError, match="no finished reward models; run step 5 with the same settings first"
    ):
        run_record.open_run(out, dict(SETTINGS), data)


def test_a_split_changed_after_step_5_is_a_leak(run):
    out, data = run
    split = split_of(20)
    split["student_train"], split["held_out"] = split["held_out"], split["student_train"]
    splits.save(out, split, 6)
    with pytest.raises(InputError, match="leakage: 4 held-out prompts"):
        run_record.open_run(out, dict(SETTINGS), data)
