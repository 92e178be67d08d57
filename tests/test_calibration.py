"""calibration.py: centred isotonic regression by hand and by definition, ranking, out of fold."""

import json

import joblib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from rewardlib import calibration
from rewardlib.calibration import CenteredIsotonicMap
from rewardlib.errors import InputError
from rewardlib.measures import ranking

# Pooling adjacent violators: 1 | 3, 2, 2 -> 7/3 | 5, 4 -> 9/2. Mean x of the blocks: 0 | 2 | 4.5.
X = np.arange(6.0)
Y = np.array([1.0, 3, 2, 2, 5, 4])


def fit(x=X, y=Y, weight=None):
    return CenteredIsotonicMap().fit(x, y, weight)


cases = st.lists(
    st.tuples(st.integers(-8, 8), st.integers(-4, 4), st.integers(1, 3)), min_size=1, max_size=14
)


def columns(case):
    return (np.array(column, float) for column in zip(*case, strict=True))


# ------------------------------------------------------------------------------------------ the map


def test_points_of_the_hand_case():
    fitted = fit()
    np.testing.assert_allclose(fitted.x_points_, [0, 2, 4.5])
    np.testing.assert_allclose(fitted.y_points_, [1, 7 / 3, 4.5])
    assert fitted.increasing_ is True
    np.testing.assert_allclose(
        fitted.predict([0, 1, 2, 3.25, 4.5]), [1, 5 / 3, 7 / 3, 41 / 12, 4.5]
    )


def test_outside_the_data_the_hand_case_goes_on_with_the_smaller_of_end_slope_and_mean_slope():
    """Segments 2/3 and 13/15, mean slope 3.5 / 4.5 = 7/9: below with 2/3, above with 7/9."""
    np.testing.assert_allclose(fit().predict([-3, 9]), [1 - 3 * 2 / 3, 4.5 + 4.5 * 7 / 9])


def test_weights_move_the_centre_of_a_block():
    """With weight 2 on the point (1, 3) the block is 3, 3, 2, 2 -> 5/2 at (1 + 1 + 2 + 3) / 4."""
    fitted = fit(weight=[1, 2, 1, 1, 1, 1])
    np.testing.assert_allclose(fitted.x_points_, [0, 1.75, 4.5])
    np.testing.assert_allclose(fitted.y_points_, [1, 2.5, 4.5])


@given(cases)
@settings(deadline=None)
def test_points_are_the_centres_of_the_blocks_of_the_isotonic_fit(case):
    x, y, weight = columns(case)
    fitted = fit(x, y, weight)
    plain = IsotonicRegression().fit(x, y, sample_weight=weight)
    values = plain.predict(x)
    block = np.round(values, 9)
    levels = np.unique(block)
    centres = [np.average(x[block == level], weights=weight[block == level]) for level in levels]
    np.testing.assert_allclose(fitted.x_points_, centres, atol=1e-9)
    np.testing.assert_allclose(fitted.y_points_, levels, atol=1e-8)
    np.testing.assert_allclose(fitted.predict(np.array(centres)), levels, atol=1e-8)
    assert fitted.increasing_ == (len(levels) > 1)


@given(cases)
@settings(deadline=None)
def test_weights_are_repeated_rows(case):
    x, y, weight = columns(case)
    times = weight.astype(int)
    weighted, repeated = fit(x, y, weight), fit(np.repeat(x, times), np.repeat(y, times))
    grid = np.linspace(-10, 10, 41)
    np.testing.assert_allclose(weighted.predict(grid), repeated.predict(grid), rtol=1e-9, atol=1e-9)


def test_ties_in_x_count_as_their_mean():
    fitted = fit([0, 0, 1, 1, 1], [0, 4, 9, 3, 6])
    np.testing.assert_allclose(fitted.x_points_, [0, 1])
    np.testing.assert_allclose(fitted.y_points_, [2, 6])


@given(cases)
@settings(deadline=None)
def test_the_order_of_the_rows_does_not_matter(case):
    x, y, weight = columns(case)
    grid = np.linspace(-10, 10, 41)
    turned = fit(x[::-1], y[::-1], weight[::-1])
    np.testing.assert_allclose(
        turned.predict(grid), fit(x, y, weight).predict(grid), rtol=1e-9, atol=1e-9
    )


@given(st.integers(0, 10**6), st.sampled_from([-2.0, 0.0, 0.02, 1.0, 30.0]))
@settings(deadline=None)
def test_strictly_increasing_inside_and_outside_the_data(seed, strength):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=200)
    fitted = fit(x, strength * x + rng.normal(size=200))
    steps = np.diff(fitted.predict(np.linspace(-40, 40, 20_001)))
    assert (steps > 0).all()


@pytest.mark.parametrize(
    "y", [[5, 4, 3, 2, 1, 0], [0.1] * 6, [7] * 6], ids=["falling", "one value", "one integer"]
)
def test_without_any_increase_the_map_is_the_mean_with_a_negligible_slope(y):
    fitted = fit(X, y)
    assert fitted.increasing_ is False
    values = fitted.predict(np.linspace(-10, 15, 1001))
    np.testing.assert_allclose(values, np.mean(y), atol=1e-4)
    assert (np.diff(values) > 0).all()


def test_one_value_of_x_gives_the_mean_of_y():
    fitted = fit([2, 2, 2], [1, 2, 6])
    assert fitted.increasing_ is False
    assert fitted.predict([2])[0] == 3
    below, above = fitted.predict([1, 3])
    assert below < 3 < above and above - below < 1e-4


@given(st.integers(0, 10**6), st.sampled_from([-0.5, 0.0, 0.3, 2.0]))
@settings(deadline=None, max_examples=50)
def test_the_ranking_of_every_prompt_survives_calibration(seed, strength):
    """Plain isotonic regression makes ties of float32 scores; the centred map must not."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(30, 8)).astype(np.float32)
    golden = strength * scores + rng.normal(size=(30, 8))
    fresh = (2 * rng.normal(size=(30, 8))).astype(np.float32)
    fitted = calibration.make("centred").fit(scores.ravel(), golden.ravel())
    for values in (scores, fresh):
        mapped = fitted.predict(values)
        assert (
            np.abs(ranking.spearman(mapped, golden) - ranking.spearman(values, golden)).max()
            <= 1e-12
        )
        np.testing.assert_array_equal(
            ranking.pair_accuracy(mapped, golden), ranking.pair_accuracy(values, golden)
        )
        np.testing.assert_array_equal(
            ranking.best_of_n(mapped, golden, [4]), ranking.best_of_n(values, golden, [4])
        )


def test_plain_isotonic_makes_the_ties_that_the_centred_map_avoids():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(30, 8))
    golden = scores + rng.normal(size=(30, 8))
    maps = {
        kind: calibration.make(kind).fit(scores.ravel(), golden.ravel())
        for kind in ("centred", "plain")
    }
    distinct = {
        kind: len(np.unique(fitted.predict(scores.ravel()))) for kind, fitted in maps.items()
    }
    assert distinct["centred"] == scores.size and distinct["plain"] < scores.size / 4


def test_nearly_flat_segments_are_pooled_so_that_float64_can_tell_scores_apart():
    """From x = 1 to 2 the isotonic fit rises by 1e-9 of a total of 2: one point at (1.5, 1)."""
    fitted = fit([0, 1, 2, 3], [0, 1, 1 + 1e-9, 2])
    np.testing.assert_allclose(fitted.x_points_, [0, 1.5, 3])
    np.testing.assert_allclose(fitted.y_points_, [0, 1, 2], atol=1e-9)


def test_the_scale_and_origin_of_scores_and_targets_do_not_matter():
    grid = np.linspace(-2, 8, 31)
    expected = fit().predict(grid)
    np.testing.assert_allclose(fit(100 * X + 7).predict(100 * grid + 7), expected, rtol=1e-12)
    np.testing.assert_allclose(fit(y=1e-3 * Y - 2).predict(grid), 1e-3 * expected - 2, rtol=1e-12)


def test_scores_may_come_as_a_column():
    fitted = fit(X[:, None])
    np.testing.assert_array_equal(fitted.predict(X), fit().predict(X))
    np.testing.assert_array_equal(fitted.predict(X[:, None]), fit().predict(X))
    np.testing.assert_array_equal(fitted.transform(X), fitted.predict(X))


@pytest.mark.parametrize(
    ("x", "y", "weight", "message"),
    [
        ([1, 2], [1, 2, 3], None, "should have the same length; got 2, 3 and 2"),
        ([1, 2], [1, 2], [1], "should have the same length; got 2, 2 and 1"),
        ([], [], None, "got 0, 0 and 0"),
        ([1, np.nan], [1, 2], None, "must be finite"),
        ([1, 2], [1, np.inf], None, "must be finite"),
        ([1, 2], [1, 2], [1, 0], "weights positive"),
        ([[1, 2], [3, 4]], [1, 2], None, r"should be \(m,\) or \(m, 1\) scores; got \(2, 2\)"),
    ],
)
def test_bad_input_is_refused(x, y, weight, message):
    with pytest.raises(ValueError, match=message):
        fit(x, y, weight)


# -------------------------------------------------------------------------------------- out of fold


def fold_case(seed=0, n=12, k=4, sets=3):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n, k))
    targets = scores + rng.normal(size=(n, k))
    return scores, targets, [rng.permutation(np.arange(n) % 3) for _ in range(sets)]


@pytest.mark.parametrize("kind", ["centred", "plain"])
def test_out_of_fold_is_the_mean_of_maps_fitted_without_the_prompt(kind):
    scores, targets, fold_sets = fold_case()
    scores_to_map = scores + 0.5
    expected = np.zeros(scores.shape)
    for folds in fold_sets:
        for n in range(len(scores)):
            others = folds != folds[n]
            fitted = calibration.make(kind).fit(scores[others].ravel(), targets[others].ravel())
            expected[n] += fitted.predict(scores_to_map[n]) / len(fold_sets)
    found = calibration.out_of_fold(kind, scores, targets, fold_sets, scores_to_map)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["centred", "plain"])
def test_a_prompts_own_targets_never_reach_its_own_values(kind):
    scores, targets, fold_sets = fold_case(sets=1)
    changed = targets.copy()
    changed[5] += 100
    before, after = (
        calibration.out_of_fold(kind, scores, part, fold_sets) for part in (targets, changed)
    )
    same_fold = fold_sets[0] == fold_sets[0][5]
    assert before[same_fold].tobytes() == after[same_fold].tobytes()
    assert (before[~same_fold] != after[~same_fold]).any(axis=1).all()


@pytest.mark.parametrize("kind", ["centred", "plain"])
def test_integer_targets_are_not_truncated(kind):
    scores, targets, fold_sets = fold_case()
    binary = (targets > 0).astype(int)
    found = calibration.out_of_fold(kind, scores, binary, fold_sets)
    np.testing.assert_array_equal(
        found, calibration.out_of_fold(kind, scores, binary.astype(float), fold_sets)
    )
    assert ((found > 0.01) & (found < 0.99)).mean() > 0.5


# -------------------------------------------------------------------------------------------- files

GRID = np.concatenate([np.linspace(-3, 9, 1001), X, np.float32([0.1, 4.7])])


@pytest.mark.parametrize("kind", ["centred", "plain"])
def test_a_map_as_plain_numbers_gives_the_same_values_bit_for_bit(kind):
    fitted = calibration.make(kind).fit(X, Y)
    numbers = json.loads(json.dumps(calibration.to_numbers(fitted), allow_nan=False))
    assert numbers["kind"] == kind
    np.testing.assert_array_equal(calibration.from_numbers(numbers)(GRID), fitted.predict(GRID))


def test_the_plain_map_as_numbers_is_scikit_learns_flat_outside():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50), rng.normal(size=50)
    reference = IsotonicRegression(out_of_bounds="clip").fit(x, y)
    found = calibration.from_numbers(calibration.to_numbers(calibration.make("plain").fit(x, y)))
    grid = np.linspace(-5, 5, 301)
    np.testing.assert_array_equal(found(grid), reference.predict(grid))
    assert found(np.array([-50.0])) == found(np.array([x.min()]))


def test_saved_maps_are_read_from_their_numbers_never_from_the_pickle(tmp_path):
    fitted = fit()
    names = calibration.save(tmp_path, "teacher_map", fitted, aliases=["map"])
    assert sorted(names) == ["map.joblib", "map.json", "teacher_map.joblib", "teacher_map.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    np.testing.assert_array_equal(
        joblib.load(tmp_path / "map.joblib").predict(GRID), fitted.predict(GRID)
    )
    for name in ("teacher_map", "map"):
        (tmp_path / f"{name}.joblib").write_bytes(b"not a pickle")
        np.testing.assert_array_equal(calibration.load(tmp_path, name)(GRID), fitted.predict(GRID))


def test_a_map_that_is_not_there_is_refused_with_the_step_that_writes_it(tmp_path):
    with pytest.raises(
        InputError, match=r"isotonic_teacher_map\.json not found; it is written by step 7"
    ):
        calibration.load(tmp_path, "isotonic_teacher_map")
