"""Targets, calibration prompts, points between embeddings; the proof of no leakage."""

import itertools
import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardlib import artifacts, calibration
from rewardlib.data import splits
from rewardlib.errors import InputError
from rewardlib.measures import intervals, ranking
from rewardlib.pipeline import distillation, leakage, run_record, variants

PLAIN = {"normalize_rewards": False, "binarize_rewards": False, "binarize_threshold": 0.0}
REWARDS = np.array([[1.0, 2], [3, 6]])


def rng(seed=0):
    return np.random.default_rng(seed)


# ------------------------------------------------------------------------------------------ targets


def test_targets_as_they_are():
    made, told = distillation.make_target(REWARDS, PLAIN)
    assert made.tolist() == REWARDS.tolist() and told == {"transform": "none"}


def test_standardised_targets_by_hand():
    """Mean 3; squares 4, 1, 0, 9, so variance 3.5."""
    made, told = distillation.make_target(REWARDS, {**PLAIN, "normalize_rewards": True})
    np.testing.assert_allclose(made, np.array([[-2, -1], [0, 3]]) / np.sqrt(3.5))
    assert told == {
        "transform": "standardised",
        "centre": 3.0,
        "spread": pytest.approx(np.sqrt(3.5)),
    }


@pytest.mark.parametrize(
    ("threshold", "expected"), [(1.5, [[0, 1], [1, 1]]), (3.0, [[0, 0], [0, 1]])]
)
def test_binary_targets_lie_above_the_threshold(threshold, expected):
    chosen = {**PLAIN, "binarize_rewards": True, "binarize_threshold": threshold}
    made, told = distillation.make_target(REWARDS, chosen)
    assert made.tolist() == expected and made.dtype == float
    assert told == {"transform": "binary", "threshold": threshold}


@pytest.mark.parametrize(
    "changed",
    [{}, {"normalize_rewards": True}, {"binarize_rewards": True, "binarize_threshold": 3.0}],
)
def test_validation_applies_the_same_transform_to_other_rewards(changed):
    made, told = distillation.make_target(REWARDS, {**PLAIN, **changed})
    told = json.loads(json.dumps(told))
    np.testing.assert_array_equal(variants.apply_target(REWARDS, told), made)
    np.testing.assert_array_equal(variants.apply_target(REWARDS[1:, ::-1], told), made[1:, ::-1])


@pytest.mark.parametrize("threshold", [0.5, 6.0])
def test_a_threshold_outside_the_rewards_is_refused(threshold):
    chosen = {**PLAIN, "binarize_rewards": True, "binarize_threshold": threshold}
    with pytest.raises(
        InputError, match=rf"between the golden rewards \(1 to 6\), found {threshold:g}"
    ):
        distillation.make_target(REWARDS, chosen)


@pytest.mark.parametrize("value", [2.0, 0.1])
@pytest.mark.parametrize("changed", [{}, {"normalize_rewards": True}])
def test_rewards_of_one_value_are_refused(value, changed):
    with pytest.raises(InputError, match="all values are equal; there is nothing to calibrate to"):
        distillation.make_target(np.full((50, 7), value), {**PLAIN, **changed})


# ------------------------------------------------------------------------------ calibration prompts


def case(n_calibration, n_seen, members=3):
    """The first n_calibration prompts are for calibration; member 0 alone saw n_seen of these."""
    n = n_calibration + 20
    split = {"calibration": np.arange(n_calibration), "student_train": np.arange(n_calibration, n)}
    seen = np.zeros((members, n), bool)
    seen[0, :n_seen] = True
    seen[:, n_calibration:] = True
    unseen = np.where(seen.all(0)[:, None], np.nan, 1.0) * np.ones((n, 2))
    return np.arange(n), split, seen, unseen


def test_fifty_unseen_prompts_are_enough():
    assert run_record.MIN_UNSEEN == 50
    mask, words = distillation.calibration_prompts(*case(n_calibration=60, n_seen=10))
    assert np.flatnonzero(mask).tolist() == list(range(10, 60))
    assert words == "prompts that no member trained on (50)"


def test_forty_nine_are_not_and_out_of_bag_scores_take_their_place():
    mask, words = distillation.calibration_prompts(*case(n_calibration=60, n_seen=11))
    assert np.flatnonzero(mask).tolist() == list(range(60))
    assert words == "out-of-bag scores, members that never trained on the prompt (60 prompts)"


def test_few_prompts_are_used_as_they_are_when_none_was_seen():
    mask, words = distillation.calibration_prompts(*case(n_calibration=12, n_seen=0))
    assert np.flatnonzero(mask).tolist() == list(range(12))
    assert words == "prompts that no member trained on (12)"


def test_prompts_that_every_member_saw_never_calibrate():
    prompts, split, seen, unseen = case(n_calibration=30, n_seen=20)
    seen[:, :5] = True
    unseen[:5] = np.nan
    mask, words = distillation.calibration_prompts(prompts, split, seen, unseen)
    assert np.flatnonzero(mask).tolist() == list(range(5, 30)) and "(25 prompts)" in words


def test_student_train_prompts_never_calibrate_whoever_saw_them():
    prompts, split, seen, unseen = case(n_calibration=60, n_seen=0)
    seen[:], unseen[:] = False, 1.0
    mask, _ = distillation.calibration_prompts(prompts, split, seen, unseen)
    assert np.flatnonzero(mask).tolist() == list(range(60))


def test_prompts_are_named_not_counted():
    """The prompts of the masks are any numbers, in any part of the data."""
    prompts, split, seen, unseen = case(n_calibration=60, n_seen=10)
    moved = {role: part * 3 + 7 for role, part in split.items()}
    mask, _ = distillation.calibration_prompts(prompts * 3 + 7, moved, seen, unseen)
    assert np.flatnonzero(mask).tolist() == list(range(10, 60))


@pytest.mark.parametrize("kind", ["centred", "plain"])
def test_a_map_of_rising_rewards_is_increasing_and_one_of_falling_rewards_is_not(kind):
    x = np.arange(20.0)
    assert distillation.is_increasing(calibration.make(kind).fit(x, x)) is True
    assert distillation.is_increasing(calibration.make(kind).fit(x, -x)) is False


# ----------------------------------------------------------------------------------- sample, passes


@pytest.mark.parametrize(
    ("limit", "n", "k"),
    [
        (1000, 20, 7),
        (140, 20, 7),
        (139, 20, 6),
        (100, 20, 5),
        (41, 20, 2),
        (40, 20, 2),
        (39, 19, 2),
        (20, 10, 2),
    ],
)
def test_responses_are_sampled_up_to_a_limit(limit, n, k):
    """All 7 of 20 prompts where they fit, else as many of each as fit, else 2 of fewer prompts."""
    prompts = np.arange(20) * 3 + 5
    found, numbers = distillation.sample(prompts, 7, limit, rng())
    assert found.shape == (n,) and numbers.shape == (n, k) and numbers.size <= limit
    assert set(found) <= set(prompts) and (np.diff(found) > 0).all()
    assert (np.diff(numbers, axis=1) > 0).all() and numbers.min() >= 0 and numbers.max() < 7
    if k == 7:
        assert numbers.tolist() == [list(range(7))] * n
    again = distillation.sample(prompts, 7, limit, rng())
    assert [x.tolist() for x in again] == [found.tolist(), numbers.tolist()]


@given(st.integers(1, 40), st.integers(2, 12), st.integers(2, 600))
@settings(deadline=None)
def test_a_sample_is_never_larger_than_its_limit_and_names_no_response_twice(n, n_responses, limit):
    prompts, numbers = distillation.sample(np.arange(n) + 100, n_responses, limit, rng())
    assert len(prompts) == len(numbers) == min(n, limit // 2) and set(prompts) <= set(
        range(100, 100 + n)
    )
    assert len(set(prompts)) == len(prompts) and numbers.size <= max(limit, 2)
    assert all(
        len(set(row)) == len(row) >= 2 and set(row) <= set(range(n_responses))
        for row in numbers.tolist()
    )


def test_every_response_and_prompt_may_be_sampled():
    prompts, numbers = distillation.sample(np.arange(400), 10, 1200, rng())
    assert len({tuple(row) for row in numbers.tolist()}) > 50
    np.testing.assert_allclose(np.bincount(numbers.ravel()) / 120, 1, atol=0.35)
    assert (distillation.sample(prompts, 10, 1200, rng(1))[1] != numbers).any()
    few = distillation.sample(np.arange(400), 10, 100, rng())[0]
    assert len(few) == 50 and few.min() < 60 and few.max() > 340


@pytest.mark.parametrize(
    ("n", "batch_size", "expected"),
    [
        (16, 16, 20),
        (400, 16, 20),
        (401, 16, 19),
        (3600, 16, 2),
        (8000, 16, 1),
        (10**6, 16, 1),
        (3600, 64, 9),
    ],
)
def test_passes_are_fewer_where_the_steps_are_enough(n, batch_size, expected):
    """At most 20 passes, about 500 steps: 25 batches make 20 passes, 26 make 19.2, 500 make 1."""
    assert distillation.passes(20, 500, n, batch_size) == expected


# -------------------------------------------------------------------------------------- interpolate


def interpolated(n, k, d, n_mixed, fit, seed=1, dtype=torch.float32):
    """(rows before, rows after) with the last n_mixed of n + n_mixed prompts NaN before."""
    values = rng().standard_normal((n + n_mixed, k, d))
    values[n:] = np.nan
    before = torch.from_numpy(values).to(dtype)
    after = before.clone()
    distillation.interpolate(after, np.array(fit), n_mixed, rng(seed))
    return before, after


@pytest.mark.parametrize("block", [1, 4, 1024])
def test_points_lie_on_segments_between_responses_of_the_given_prompts(monkeypatch, block):
    """In 4 dimensions no point lies on a segment by chance; prompts 1 and 4 stay untouched."""
    monkeypatch.setattr(distillation, "BLOCK", block)
    fit = [0, 2, 3, 5]
    before, after = interpolated(6, 3, 4, 4, fit)
    assert torch.equal(after[:6], before[:6]) and torch.isfinite(after).all()
    ends, shares = before[fit].flatten(0, 1).double().numpy(), []
    for point in after[6:].flatten(0, 1).double().numpy():
        found = [(1.0, end) for end in ends if np.abs(end - point).max() < 1e-6]
        for own, other in itertools.combinations(ends, 2):
            direction = own - other
            share = (point - other) @ direction / (direction @ direction)
            if (
                np.abs(other + share * direction - point).max() < 1e-5
                and -1e-5 <= share <= 1 + 1e-5
            ):
                found.append((share, own))
        assert found, "this point lies between no two responses"
        shares.append(found[0][0])
    assert np.ptp(shares) > 0.3


def test_every_response_is_either_end_of_one_segment():
    """On a line 0, 1, 2, ... the sum of both ends is fixed: the points have the responses' mean."""
    rows = torch.arange(600, dtype=torch.float32).reshape(200, 3, 1)
    rows = torch.cat([rows, torch.full_like(rows, np.nan)])
    distillation.interpolate(rows, np.arange(200), 200, rng())
    assert rows[200:].mean().item() == pytest.approx(299.5, rel=0.05)
    assert rows[200:].min() >= 0 and rows[200:].max() <= 599


def test_points_are_seeded():
    found = [interpolated(6, 3, 4, 4, range(6), seed)[1] for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0][6:], found[2][6:])


def test_fewer_points_than_responses_and_none_at_all():
    assert torch.isfinite(interpolated(6, 3, 4, 1, [1, 2])[1]).all()
    before, after = interpolated(6, 3, 4, 0, range(6))
    assert torch.equal(before, after)


def test_points_of_bf16_rows_are_mixed_in_float32():
    exact, rounded = (
        interpolated(40, 5, 8, 40, range(40), dtype=dtype)[1]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.03)


# ------------------------------------------------------------------------------------- the variants

GOLDEN = rng(1).standard_normal((12, 4))


def predictions(**changed):
    raw = GOLDEN + rng(2).standard_normal(GOLDEN.shape)
    made = dict.fromkeys(variants.VARIANTS, raw)
    return {**made, **{name.replace("_", " "): values for name, values in changed.items()}}


def weights():
    return intervals.resample_weights(12, rng(), 100)


def test_the_raw_teacher_has_no_scale_and_says_why():
    found = json.loads(
        json.dumps(variants.validate(predictions(), GOLDEN, GOLDEN, weights()), allow_nan=False)
    )
    assert list(found) == ["Teacher ORM", "Teacher + Isotonic", "Student", "Student + Isotonic"]
    teacher = found.pop("Teacher ORM")
    assert [teacher[name] for name in ("mse", "mse_ci95", "r2", "r2_ci95", "reliability")] == [
        None
    ] * 5
    assert "no unit" in teacher["null_reason"]
    for row in found.values():
        assert row["mse"] > 0 and row["r2"] is not None and len(row["mse_ci95"]) == 2
        assert row["spearman"] == teacher["spearman"] and "null_reason" not in row


def test_ranking_is_measured_on_golden_rewards_and_scale_in_calibrated_units():
    binary = (GOLDEN > 0).astype(float)
    found = variants.validate(predictions(Student=binary), GOLDEN, binary, weights())["Student"]
    assert found["mse"] == 0 and found["r2"] == 1
    assert found["best_of_n"]["1"] == pytest.approx(GOLDEN.mean())
    assert found["spearman"] == pytest.approx(np.nanmean(ranking.spearman(binary, GOLDEN)))


def test_differences_to_the_teacher_are_paired_by_prompt():
    made = predictions(Student=GOLDEN)
    found = variants.compare_with_teacher(made, GOLDEN, weights(), rng())
    assert list(found) == ["Teacher + Isotonic", "Student", "Student + Isotonic"]
    same, better = found["Teacher + Isotonic"], found["Student"]
    assert list(same) == ["spearman", "pair_accuracy", "best_of_4"]
    for row in same.values():
        assert row == {"difference": 0, "ci95": (0, 0), "p_value": 1}
    teacher = ranking.spearman(made["Teacher ORM"], GOLDEN)
    assert better["spearman"]["difference"] == pytest.approx((1 - teacher).mean())
    assert better["pair_accuracy"]["p_value"] < 0.02 and better["pair_accuracy"]["ci95"][0] > 0


def test_best_of_ten_is_compared_where_there_are_more_responses():
    golden = rng().standard_normal((5, 12))
    made = dict.fromkeys(variants.VARIANTS, golden)
    found = variants.compare_with_teacher(
        made, golden, intervals.resample_weights(5, rng(), 50), rng()
    )
    assert "best_of_10" in found["Student"]


def test_examples_run_from_the_lowest_to_the_highest_golden_reward():
    made = predictions()
    rows = variants.scale_check(made, GOLDEN, n=5)
    golden = [row["golden"] for row in rows]
    assert golden == sorted(golden) and golden[0] == GOLDEN.min() and golden[-1] == GOLDEN.max()
    for row in rows:
        at = np.flatnonzero(GOLDEN.ravel() == row["golden"])[0]
        assert row["Student"] == made["Student"].ravel()[at]
    assert json.dumps(rows, allow_nan=False)


# -------------------------------------------------------------------------------------------- proof


@pytest.fixture
def run(tmp_path):
    """(OUTPUT_DIR of steps 5 and 7, split, record, config); no held-out prompt is in a fit."""
    split = splits.split_prompts(np.arange(20), 6)
    splits.save(tmp_path, split, 6)
    record = {"prompts": split["student_train"]}
    fitted = np.concatenate([split["calibration"], split["student_train"]])
    config = {
        "calibration": {"prompts": split["calibration"]},
        "student": {"prompts": fitted},
        "teacher": {
            "members": [
                {"file": "m0.ckpt", "origin": "step5"},
                {"file": "m1.ckpt", "origin": "step5"},
            ]
        },
    }
    for name in ("m0.ckpt", "m1.ckpt", "student.ckpt"):
        (tmp_path / name).write_text(name)
    work = artifacts.identity(run_record.__file__, {}, {})
    artifacts.record(tmp_path, "step5", work, [splits.FILE, "m0.ckpt", "m1.ckpt"], time.time())
    artifacts.record(tmp_path, "step7", work, ["student.ckpt"], time.time())
    return tmp_path, split, record, config


def test_the_proof_says_what_was_checked(run):
    assert json.loads(json.dumps(leakage.prove_no_leakage(*run))) == {
        "held_out_prompts_in_fits": 0,
        "prompts_in_fits": {"reward models": 4, "isotonic maps": 12, "student": 16},
        "files_checked": 4,
        "external_teacher_files": [],
        "note": None,
    }


@pytest.mark.parametrize("fit", ["reward models", "isotonic maps", "student"])
def test_one_held_out_prompt_in_any_fit_is_a_leak(run, fit):
    out, split, record, config = run
    place = {
        "reward models": record,
        "isotonic maps": config["calibration"],
        "student": config["student"],
    }[fit]
    place["prompts"] = np.append(place["prompts"], split["held_out"][2]).tolist()
    first = split["held_out"][2]
    message = rf"leakage: 1 held-out prompts \(first: {first}\) entered the fit of the {fit};"
    with pytest.raises(InputError, match=message):
        leakage.prove_no_leakage(out, split, record, config)


@pytest.mark.parametrize(
    ("name", "step"),
    [("m1.ckpt", "step5"), ("prompt_split.json", "step5"), ("student.ckpt", "step7")],
)
@pytest.mark.parametrize("change", ["changed", "missing"])
def test_files_that_are_not_the_recorded_ones_prove_nothing(run, name, step, change):
    path = run[0] / name
    content = path.read_bytes()
    path.unlink()
    if change == "changed":
        path.write_bytes(content[:-2] + b"x" + content[-1:])
    with pytest.raises(
        InputError,
        match=rf"{name} is not the file that {step} wrote \(missing or changed\); run {step} again",
    ):
        leakage.prove_no_leakage(*run)


def test_a_student_of_other_data_than_the_reward_models_proves_nothing(run):
    work = artifacts.identity(run_record.__file__, {}, {"rewards_split_0.json": "12ab"})
    artifacts.record(run[0], "step5", work, [splits.FILE, "m0.ckpt", "m1.ckpt"], time.time())
    with pytest.raises(InputError, match="step7 .* other data than step5.*run step 7 again"):
        leakage.prove_no_leakage(*run)


@pytest.mark.parametrize("step", ["step5", "step7"])
def test_steps_that_have_not_finished_prove_nothing(run, step):
    manifest = artifacts.read_manifest(run[0])
    del manifest[step]
    artifacts.write_json(run[0] / "manifest.json", manifest)
    with pytest.raises(InputError, match=f"{step} has not finished here; run it first"):
        leakage.prove_no_leakage(*run)


def test_teachers_from_elsewhere_are_named(run):
    run[3]["teacher"]["members"][1] = {"file": "/else/where.ckpt", "origin": "external"}
    proof = leakage.prove_no_leakage(*run)
    assert proof["external_teacher_files"] == ["/else/where.ckpt"]
    assert "whether external teachers saw held-out prompts cannot be told" in proof["note"]
