"""multi_objective.py and attribute_metrics.py against scikit-learn and scipy."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score

from rewardlib.errors import InputError
from rewardlib.measures import intervals, ranking
from studies.interpretable import (
    attribute_data,
    attribute_metrics,
    multi_objective,
    tensor_files,
)
from studies.interpretable.attribute_data import Rated
from studies.interpretable.multi_objective import STRENGTHS, AttributeModel

NAMES = ["full", "few", "as few", "holes"]


def rng(seed=0):
    return np.random.default_rng(seed)


def rated(n=300, d=40, seed=0, noise=0.3, dtype=np.float32):
    """Embeddings whose spread falls with the dimension, and four attributes.

    Of two attributes the same 70 % of the labels are missing, of another 20 % at random.
    """
    x = rng(seed).standard_normal((n, d)) * np.logspace(0, -2, d)
    x = x.astype(dtype)
    labels = x.astype(float) @ rng(seed + 1).standard_normal((d, 4)) + 1
    labels += noise * rng(seed + 2).standard_normal(labels.shape)
    labels[rng(seed + 3).random(n) < 0.7, 1:3] = np.nan
    labels[rng(seed + 4).random(n) < 0.2, 3] = np.nan
    return rated_of(x, labels, NAMES)


def rated_of(x, labels, attributes):
    n = len(x)
    return Rated(
        [x],
        np.arange(n),
        [str(i) for i in range(n)],
        labels=labels.astype(np.float32),
        attributes=attributes,
    )


def split(n):
    return np.arange(n * 3 // 4), np.arange(n * 3 // 4, n * 7 // 8)


def ridge_loop(data, fit, held, intercept):
    """Heads, intercepts, chosen strengths and losses by scikit-learn, in one fit for each."""
    x, heads, offsets, chosen, losses = (
        data.take(np.arange(len(data.ids))).astype(float),
        [],
        [],
        [],
        [],
    )
    for y in data.labels.T.astype(float):
        parts = [rows[~np.isnan(y[rows])] for rows in (fit, held)]
        models = [
            Ridge(alpha=s, fit_intercept=intercept).fit(x[parts[0]], y[parts[0]]) for s in STRENGTHS
        ]
        losses.append(
            [np.mean((model.predict(x[parts[1]]) - y[parts[1]]) ** 2) for model in models]
        )
        chosen.append(STRENGTHS[int(np.argmin(losses[-1]))])
        both = np.concatenate(parts)
        model = Ridge(alpha=chosen[-1], fit_intercept=intercept).fit(x[both], y[both])
        heads.append(model.coef_)
        offsets.append(model.intercept_)
    return np.array(heads), np.array(offsets), chosen, np.array(losses).T


# -------------------------------------------------------------------------------------------- ridge


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(
    ("n", "d"), [(300, 40), (64, 60), (60, 200)], ids=["tall", "both forms", "wide"]
)
def test_all_strengths_are_scikit_learns_ridge(n, d, intercept):
    data, (fit, held) = rated(n, d), split(n)
    heads, offsets, chosen, losses = ridge_loop(data, fit, held, intercept)
    fitted = multi_objective.fit_ridge(data, fit, held, intercept=intercept)
    np.testing.assert_allclose(fitted.losses, losses, rtol=1e-6)
    assert fitted.strengths.tolist() == chosen and len(set(chosen)) > 1
    np.testing.assert_allclose(fitted.heads, heads, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(fitted.offsets, offsets, rtol=1e-6, atol=1e-8)


def test_ridge_by_hand():
    """Fitted on (x, y) = (1, 2), (2, 3): w = 8 / (5 + s). With (1, 2) as well: w = 10 / (6 + s)."""
    data = rated_of(np.float32([[1], [2], [1]]), np.array([[2], [3], [2]]), ["a"])
    fitted = multi_objective.fit_ridge(data, np.array([0, 1]), np.array([2]), strengths=(1.0, 3.0))
    np.testing.assert_allclose(fitted.losses[:, 0], [(8 / 6 - 2) ** 2, (8 / 8 - 2) ** 2])
    assert fitted.strengths == [1] and fitted.heads == pytest.approx(10 / 7) and fitted.offsets == 0


def test_large_dimensions_and_float16_keep_the_small_strengths():
    """Rows far from the origin: a Gram matrix in float32 would be off by more than the strength."""
    data = rated(400, 30, dtype=np.float16)
    data = replace(data, embeddings=[(data.embeddings[0] + np.float16(60))])
    fit, held = split(400)
    heads, _, _, losses = ridge_loop(data, fit, held, False)
    fitted = multi_objective.fit_ridge(data, fit, held)
    np.testing.assert_allclose(fitted.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(fitted.heads, heads, rtol=1e-4, atol=1e-4 * np.abs(heads).max())


def test_the_row_space_gives_what_all_dimensions_give():
    data, (fit, held) = rated(120, 30), split(120)
    wide = replace(
        data, embeddings=[np.hstack([data.embeddings[0], np.zeros((120, 200), np.float32)])]
    )
    tall, wide = (
        multi_objective.fit_ridge(each, fit, held, intercept=True) for each in (data, wide)
    )
    np.testing.assert_allclose(wide.losses, tall.losses, rtol=1e-8)
    np.testing.assert_allclose(wide.heads[:, :30], tall.heads, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(wide.heads[:, 30:], 0, atol=1e-10)


def test_order_blocks_and_passes_change_nothing(monkeypatch):
    data, (fit, held) = rated(), split(300)
    fitted = multi_objective.fit_ridge(data, fit, held)
    order = rng(5).permutation(300)
    place = np.argsort(order)
    moved = replace(
        data, embeddings=np.split(data.embeddings[0][order], [7, 7, 100]), labels=data.labels[order]
    )
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", 11 * 4 * 40)
    monkeypatch.setattr(multi_objective, "GRAM_BYTES", 1)
    again = multi_objective.fit_ridge(moved, place[fit], place[held])
    np.testing.assert_allclose(again.heads, fitted.heads, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(again.losses, fitted.losses, rtol=1e-6)
    np.testing.assert_array_equal(again.strengths, fitted.strengths)


def test_one_decomposition_per_pattern_and_one_pass_for_all(monkeypatch):
    data, (fit, held) = rated(), split(300)
    calls = []
    monkeypatch.setattr(
        multi_objective, "_eigh", lambda gram, f=multi_objective._eigh: calls.append(0) or f(gram)
    )
    read, take = [], Rated.take
    monkeypatch.setattr(Rated, "take", lambda self, rows: read.extend(rows) or take(self, rows))
    multi_objective.fit_ridge(data, fit, held)
    assert len(calls) == 3
    assert sorted(read) == sorted([*fit, *held])


def test_patterns_of_missing_labels():
    labels = np.array([[1, np.nan, 2, np.nan], [3, 4, 5, 6], [np.nan, 7, np.nan, 8]])
    patterns = multi_objective.missing_patterns(labels)
    assert [attributes for attributes, _ in patterns] == [[0, 2], [1, 3]]
    np.testing.assert_array_equal(
        np.array([known for _, known in patterns]), [[1, 1, 0], [0, 1, 1]]
    )


def test_a_missing_label_leaves_the_row_out_of_that_attribute_alone():
    data, (fit, held) = rated(), split(300)
    full = multi_objective.fit_ridge(data, fit, held)
    labels = data.labels.copy()
    labels[fit[::2], 3] = np.nan
    fewer = multi_objective.fit_ridge(replace(data, labels=labels), fit, held)
    np.testing.assert_array_equal(fewer.heads[:3], full.heads[:3])
    assert np.abs(fewer.heads[3] - full.heads[3]).max() > 1e-4


def test_rows_outside_both_parts_are_never_looked_at():
    data, (fit, held) = rated(), split(300)
    other = np.setdiff1d(np.arange(300), np.concatenate([fit, held]))
    changed, labels = data.embeddings[0].copy(), data.labels.copy()
    changed[other], labels[other] = 1e6, 1e6
    expected, fitted = (
        multi_objective.fit_ridge(each, fit, held)
        for each in (data, replace(data, embeddings=[changed], labels=labels))
    )
    np.testing.assert_array_equal(fitted.heads, expected.heads)


def test_the_choice_is_by_the_rows_of_other_prompts():
    """Ten responses to each prompt share one embedding and one noisy label.

    Rows of the fitted prompts would choose the weakest strength; other prompts choose a strong one.
    """
    x = np.repeat(rng().standard_normal((60, 50)), 10, axis=0).astype(np.float32)
    labels = np.repeat(0.2 * x[::10, :1] + rng(1).standard_normal((60, 1)), 10, axis=0)
    data = replace(rated_of(x, labels, ["a"]), groups=np.repeat(np.arange(60), 10))
    parts = attribute_data.split_prompts(data.groups, {"fit": 0.7, "validation": 0.3}, rng(2))
    by_prompt = multi_objective.fit_ridge(data, parts["fit"], parts["validation"])
    order = rng(3).permutation(600)
    by_row = multi_objective.fit_ridge(data, np.sort(order[:420]), np.sort(order[420:]))
    assert by_row.strengths[0] < 1 < 100 <= by_prompt.strengths[0]


@pytest.mark.parametrize(
    ("rows", "part"), [(slice(0, 225), "fit"), (slice(225, 262), "validation")]
)
def test_an_attribute_without_labels_in_a_part_is_named(rows, part):
    data, (fit, held) = rated(), split(300)
    data.labels[rows, 3] = np.nan
    with pytest.raises(InputError, match=f"holes: no labels on {part} prompts; add labels"):
        multi_objective.fit_ridge(data, fit, held)


def test_a_singular_gram_matrix_of_any_size():
    """The rounding errors of this Gram matrix exceed the strength: it has no Cholesky factor."""
    x = np.outer(rng().standard_normal(50), np.ones(6)).astype(np.float32) * np.float32(1e9)
    data = rated_of(x, (x[:, :1] / 1e9).astype(float), ["a"])
    fitted = multi_objective.fit_ridge(data, *split(50), strengths=(1e-4,))
    np.testing.assert_allclose(x.astype(float) @ fitted.heads[0], data.labels[:, 0], atol=1e-3)
    gram = x.T.astype(float) @ x
    assert np.linalg.eigvalsh(gram).min() < 0 <= multi_objective._eigh(gram)[0].min()


# -------------------------------------------------------------------------------------------- pairs


def pairs_data(n=400, d=30, seed=0):
    """Concept labels of pairs: drawn, drawn with a third missing, and the probabilities."""
    x = rng(seed).standard_normal((n, 2, d)).astype(np.float32)
    chance = expit((x[:, 0] - x[:, 1]) @ rng(seed + 1).standard_normal((d, 3)) / 2)
    labels = (rng(seed + 2).random((n, 3)) < chance).astype(float)
    labels[::3, 1], labels[:, 2] = np.nan, chance[:, 2]
    return rated_of(x, labels, ["drawn", "holes", "soft"])


def logistic(z, y, strength):
    """The solution of scikit-learn, where a label between 0 and 1 becomes two weighted rows."""
    model = LogisticRegression(C=1 / strength, fit_intercept=False, tol=1e-10, max_iter=20_000)
    rows, weights = np.vstack([z, z]), np.concatenate([y, 1 - y])
    return model.fit(rows, np.repeat([1, 0], len(z)), sample_weight=weights).coef_[0]


@pytest.mark.parametrize(("n", "d"), [(400, 30), (60, 80)], ids=["tall", "wide"])
def test_concepts_are_scikit_learns_logistic_regression(n, d):
    data, (fit, held) = pairs_data(n, d), split(n)
    fitted = multi_objective.fit_pairwise(data, fit, held)
    z = np.subtract(*np.moveaxis(data.embeddings[0].astype(float), 1, 0))
    for a in range(3):
        y = data.labels[:, a].astype(float)
        first, second = (rows[~np.isnan(y[rows])] for rows in (fit, held))
        for i in (3, 4, 8):
            s = z[second] @ logistic(z[first], y[first], STRENGTHS[i])
            np.testing.assert_allclose(
                fitted.losses[i, a], np.mean(np.logaddexp(0, s) - y[second] * s), rtol=1e-4
            )
        both = np.concatenate([first, second])
        assert fitted.strengths[a] == STRENGTHS[int(np.argmin(fitted.losses[:, a]))]
        expected = logistic(z[both], y[both], fitted.strengths[a])
        np.testing.assert_allclose(fitted.heads[a], expected, atol=1e-4 * np.abs(expected).max())


def test_swapped_sides_change_nothing():
    data, (fit, held) = pairs_data(), split(400)
    swapped = replace(data, embeddings=[data.embeddings[0][:, ::-1].copy()], labels=1 - data.labels)
    fitted, again = (multi_objective.fit_pairwise(each, fit, held) for each in (data, swapped))
    np.testing.assert_allclose(again.heads, fitted.heads, rtol=1e-5, atol=1e-6)


def test_few_pairs_of_many_dimensions_that_any_strength_separates():
    data, (fit, held) = pairs_data(60, 80), split(60)
    fitted = multi_objective.fit_pairwise(data, fit, held, strengths=(1e-4,))
    z = np.subtract(*np.moveaxis(data.embeddings[0].astype(float), 1, 0))
    both = np.concatenate([fit, held])
    known = both[~np.isnan(data.labels[both, 1])]
    y, logits = data.labels[known, 1].astype(float), z[known] @ fitted.heads[1]
    assert ((logits > 0) == (y == 1)).all()
    np.testing.assert_allclose(
        z[known].T @ (expit(logits) - y) + 1e-4 * fitted.heads[1], 0, atol=1e-6
    )


# ------------------------------------------------------------------------------------------- debias


def test_scores_and_debiasing_by_hand():
    model = AttributeModel(
        np.float32([[1, 0], [0, 1]]), np.array([0.5, 0.0]), ["a", "v"], "v", np.array([10.0, 0.0])
    )
    raw = multi_objective.scores(model, [[[1, 2], [3, 4]]])
    np.testing.assert_array_equal(raw, [[[11, 2], [13, 4]]])
    np.testing.assert_array_equal(multi_objective.debias(model, raw), [[[10, 2], [11, 4]]])
    np.testing.assert_array_equal(multi_objective.debias(replace(model, verbosity=None), raw), raw)


def test_scores_of_rows_of_both_sides():
    data = pairs_data(6, 4)
    model = AttributeModel(
        rng().standard_normal((3, 4)).astype(np.float32), np.zeros(3), data.attributes, None
    )
    raw = multi_objective.score_rows(model, data, np.array([4, 1]))
    np.testing.assert_allclose(raw, data.embeddings[0][[4, 1]] @ model.heads.T, rtol=1e-6)
    flat, groups = multi_objective.score_responses(model, data, np.array([4, 1]))
    np.testing.assert_array_equal(flat, raw.reshape(4, 3))
    np.testing.assert_array_equal(groups, [4, 4, 1, 1])


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=20), st.data()
)
def test_rho_never_rises_with_the_penalty(rows, data):
    r, v = np.array(rows, float).T
    penalties = sorted(data.draw(st.lists(st.floats(-3, 3), min_size=2, max_size=5)))
    rho = np.array([ranking.global_spearman(r - penalty * v, v) for penalty in penalties])
    ties = [len(np.unique(r - penalty * v)) < len(rows) for penalty in penalties]
    if np.isfinite(rho).all() and not any(ties):
        assert (np.diff(rho) <= 1e-12).all()


def responses(n, slope, seed=0):
    """Twice (scores r, verbosity v), each (n,); the spread of r grows with v."""
    v = rng(seed).standard_normal(2 * n)
    r = slope * v + np.exp(0.3 * v) * rng(seed + 1).standard_normal(2 * n)
    return (r[:n], v[:n]), (r[n:], v[n:])


@pytest.mark.parametrize("slope", [1.0, 0.2, -0.4, -40.0, 1e-6])
def test_debiasing_holds_on_other_responses(slope):
    (r, v), (others, other_v) = responses(20_000, slope)
    penalty, reached, tried = multi_objective.find_penalty(r, v, 0.03)
    assert reached and abs(ranking.global_spearman(r - penalty * v, v)) < 1e-3
    assert abs(ranking.global_spearman(others - penalty * other_v, other_v)) <= 0.03
    assert penalty == pytest.approx(slope, abs=0.05) and len(tried) < 60
    assert tried == sorted(tried)


def test_the_grid_takes_the_first_that_reaches_the_threshold_on_either_side():
    (r, v), _ = responses(2000, 0.32)
    penalty, reached, tried = multi_objective.find_penalty(r, v, 0.03, "grid")
    rho = [stats.spearmanr(r - p * v, v).statistic for p in multi_objective.PENALTY_GRID]
    first = next(i for i, value in enumerate(rho) if abs(value) <= 0.03)
    assert reached and penalty == multi_objective.PENALTY_GRID[first]
    np.testing.assert_allclose([value for _, value in tried], rho[: first + 1], rtol=1e-12)


def test_the_grid_does_not_call_a_negative_correlation_solved():
    """Without a penalty rho <= threshold holds; |rho| <= threshold holds for no penalty."""
    (r, v), _ = responses(2000, -0.5)
    penalty, reached, tried = multi_objective.find_penalty(r, v, 0.03, "grid")
    assert not reached and penalty == 0 and len(tried) == 24


def test_penalties_of_a_table_and_the_verbosity_itself():
    (r, v), _ = responses(5000, 0.5)
    result = multi_objective.find_penalties(
        np.stack([r, v, -r, np.ones(5000)], 1), ["a", "v", "b", "c"], "v"
    )
    assert result.penalties[1] == result.penalties[3] == 0 and result.unreached == []
    assert result.penalties[0] == pytest.approx(-result.penalties[2], rel=1e-5)
    assert result.tried[1] == result.tried[3] == []


def test_attributes_that_cannot_be_debiased_are_named():
    (r, v), _ = responses(500, 0.5)
    raw = np.stack([r, v, 3 * v, -2 * v], 1)
    names = ["a", "v", "copy", "mirror"]
    with pytest.raises(
        InputError, match=r"^copy, mirror: no penalty brings \|rho\| with v to 0.03 on"
    ):
        multi_objective.find_penalties(raw, names, "v")
    result = multi_objective.find_penalties(raw, names, "v", allow_unreached=True)
    assert result.unreached == ["copy", "mirror"] and np.isfinite(result.penalties).all()
    with pytest.raises(InputError, match="v: all reference rows have the same score"):
        multi_objective.find_penalties(np.stack([r, np.ones(500)], 1), ["a", "v"], "v")


# --------------------------------------------------------------------------------------------- file


def model_of(d=3):
    heads = np.arange(2 * d, dtype=np.float32).reshape(2, d)
    return AttributeModel(heads, np.array([0.25, 0.0]), ["a", "v"], "v", np.array([1.0, 2.0]))


def test_a_model_is_read_as_it_was_written(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        multi_objective.save(tmp_path / name, model_of(), [1.0, 10.0], "ratings")
    assert (tmp_path / "x" / multi_objective.HEADS).read_bytes() == (
        tmp_path / "y" / multi_objective.HEADS
    ).read_bytes()
    loaded = multi_objective.load(tmp_path / "x", rated(5, 3))
    for name, value in vars(model_of()).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
    assert loaded.heads.dtype == np.float32 and loaded.penalties.dtype == float
    metadata = tensor_files.map_tensors(tmp_path / "x" / multi_objective.HEADS)[1]
    assert metadata["strengths"] == "[1.0, 10.0]" and metadata["labels"] == '"ratings"'


def test_models_that_do_not_fit(tmp_path):
    with pytest.raises(
        InputError, match=r"attribute_heads\.safetensors not found; it is written by studies/"
    ):
        multi_objective.load(tmp_path)
    multi_objective.save(tmp_path, model_of(), [1.0, 1.0], "ratings")
    with pytest.raises(
        InputError, match="expected embeddings of 3 dimensions, to which .* was fitted, found 4"
    ):
        multi_objective.load(tmp_path, rated(5, 4))
    multi_objective.save(
        tmp_path, replace(model_of(), heads=np.zeros((3, 3))), [1.0, 1.0], "ratings"
    )
    with pytest.raises(
        InputError, match=r"expected heads \(2, D\), penalties and offsets \(2,\), found"
    ):
        multi_objective.load(tmp_path)
    tensor_files.write_tensors(
        tmp_path / multi_objective.HEADS, {"heads": [np.zeros((2, 3))]}, {"attributes": "[]"}
    )
    with pytest.raises(
        InputError, match="expected heads, penalties, offsets and attributes, found no 'verbosity'"
    ):
        multi_objective.load(tmp_path)


# ------------------------------------------------------------------------------------------ metrics


def test_rating_metrics_by_hand_and_scikit_learn():
    labels = np.array([1.0, 2, 4, np.nan, 5])
    predicted = np.array([1.5, 2, 3, 99, 6])
    metrics = attribute_metrics.of_ratings(predicted, labels, np.array([0, 0, 1, 1, 2]), 3.0, rng())
    known = ~np.isnan(labels)
    assert metrics["n"] == 4 and metrics["mse"] == pytest.approx((0.25 + 0 + 1 + 1) / 4)
    assert metrics["r2"] == pytest.approx(r2_score(labels[known], predicted[known]))
    assert metrics["spearman"] == 1 and metrics["baseline"]["mse"] == pytest.approx(
        (4 + 1 + 1 + 4) / 4
    )
    assert metrics["baseline"]["r2"] == pytest.approx(r2_score(labels[known], np.full(4, 3)))
    assert metrics["mse_ci95"][0] <= metrics["mse"] <= metrics["mse_ci95"][1]


def test_preference_metrics_by_hand():
    labels, logits = np.array([1, 0, 0.5, 1, np.nan]), np.array([2.0, 1, 3, 0, 9])
    metrics = attribute_metrics.of_preferences(logits, labels, np.arange(5), 0.5, rng())
    assert metrics["n"] == 4 and metrics["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert metrics["log_loss"] == pytest.approx(
        np.mean(np.logaddexp(0, logits[:4]) - labels[:4] * logits[:4])
    )
    assert metrics["baseline"]["accuracy"] == pytest.approx((1 + 0 + 1) / 3)
    assert metrics["baseline"]["log_loss"] == pytest.approx(
        np.logaddexp(0, 0.5) - 0.5 * labels[:4].mean()
    )


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_measure_on_is_null(n):
    labels = np.full(3, np.nan)
    labels[:n] = 1
    metrics = attribute_metrics.of_ratings(np.ones(3), labels, np.arange(3), 0.0, rng())
    assert (
        metrics["n"] == n
        and metrics["mse"] is metrics["spearman"] is metrics["baseline"]["r2"] is None
    )
    assert metrics["r2_ci95"] == [None, None]
    if not n:
        assert (
            attribute_metrics.of_preferences(np.ones(3), labels, np.arange(3), 0.0, rng())[
                "accuracy"
            ]
            is None
        )


def test_equal_labels_have_an_error_and_no_r2():
    metrics = attribute_metrics.of_ratings(
        np.array([1.0, 2]), np.array([1.0, 1]), np.arange(2), 1.0, rng()
    )
    assert (
        metrics["mse"] == 0.5
        and metrics["r2"] is metrics["spearman"] is None
        and metrics["r2_ci95"] == [None, None]
    )


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), min_size=2, max_size=12
    ),
    st.data(),
)
@settings(deadline=None)
def test_ranks_of_drawn_rows_are_those_of_repeated_rows(rows, data):
    a, _, _ = np.array(rows, float).T
    counts = np.array(
        data.draw(st.lists(st.integers(0, 3), min_size=len(a), max_size=len(a)).filter(any))
    )
    ranks = attribute_metrics._weighted_ranks(
        counts[None].astype(float), *attribute_metrics._tie_blocks(a)
    )[0]
    repeated = stats.rankdata(np.repeat(a, counts)) - 0.5
    np.testing.assert_allclose(np.repeat(ranks, counts), repeated)


def test_the_interval_of_rho_is_that_of_drawn_prompts(monkeypatch):
    """A prompt is drawn with all of its rows; ten rows of a prompt tell little more than one."""
    a = np.repeat(rng().standard_normal(80), 10) + 0.1 * rng(1).standard_normal(800)
    b = a + np.repeat(rng(2).standard_normal(80), 10)
    groups = np.repeat(np.arange(80), 10)
    metrics = attribute_metrics.spearman(a, b, groups, rng(3))
    assert metrics["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
    resampled = []
    for counts in intervals.resample_weights(80, rng(3), attribute_metrics.RANK_RESAMPLES).astype(
        int
    ):
        rows = np.repeat(np.arange(800), counts[groups])
        resampled.append(stats.spearmanr(a[rows], b[rows]).statistic)
    np.testing.assert_allclose(
        metrics["spearman_ci95"], np.percentile(resampled, [2.5, 97.5]), rtol=1e-9
    )
    independent = attribute_metrics.spearman(a, b, np.arange(800), rng(3))["spearman_ci95"]
    assert np.ptp(independent) < 0.6 * np.ptp(metrics["spearman_ci95"])
    monkeypatch.setattr(attribute_metrics, "CELLS", 3000)
    assert attribute_metrics.spearman(a, b, groups, rng(3))["spearman_ci95"] == pytest.approx(
        metrics["spearman_ci95"]
    )


def test_rho_of_a_constant_is_null():
    assert (
        attribute_metrics.spearman(np.ones(5), np.arange(5), np.arange(5), rng())["spearman"]
        is None
    )
