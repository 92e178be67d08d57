"""Ranking and scale metrics: values by hand, parity with references, invariances, JSON."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from measure_data import weights_for
from scipy import stats
from sklearn.metrics import mean_squared_error, r2_score

from rewardlib.measures import ranking
from rewardlib.measures.scale import reliability, scale_metrics

# Prompt 0 is ranked correctly, prompt 1 half wrongly; prompt 2 has a tie in scores and rewards; the
# golden rewards of prompt 3 are equal, so it has no ranking.
GOLDEN = np.array([[1.0, 2, 3], [3, 1, 2], [1, 1, 2], [5, 5, 5]])


SCORES = np.array([[0.1, 0.5, 0.9], [0.1, 0.5, 0.9], [0.2, 0.2, 0.9], [0.3, 0.1, 0.2]])


@st.composite
def scored(draw, least=2, most=8):
    """Scores and golden rewards (N, K) with many ties."""
    shape = draw(st.integers(1, 4)), draw(st.integers(least, most))
    values = st.integers(-2, 2).map(lambda v: v / 4)
    return draw(arrays(float, shape, elements=values)), draw(arrays(float, shape, elements=values))


def strict_json(content):
    return json.loads(json.dumps(content, allow_nan=False))


# --------------------------------------------------------------------------------------- per prompt


def test_values_worked_by_hand():
    np.testing.assert_allclose(ranking.spearman(SCORES, GOLDEN), [1, -0.5, 1, np.nan])
    np.testing.assert_allclose(ranking.pair_accuracy(SCORES, GOLDEN), [1, 1 / 3, 1, np.nan])
    np.testing.assert_allclose(ranking.selected_quantile(SCORES, GOLDEN), [1, 0.5, 1, 0.5])
    expected = [[2, 8 / 3, 3], [2, 5 / 3, 2], [4 / 3, 5 / 3, 2], [5, 5, 5]]
    np.testing.assert_allclose(ranking.best_of_n(SCORES, GOLDEN, [1, 2, 3]), expected)


@given(scored())
@settings(deadline=None)
def test_spearman_is_scipys(case):
    for rho, s, g in zip(ranking.spearman(*case), *case, strict=True):
        if np.ptp(s) == 0 or np.ptp(g) == 0:
            assert math.isnan(rho)
        else:
            assert rho == pytest.approx(stats.spearmanr(s, g).statistic, abs=1e-12)


@given(scored())
@settings(deadline=None)
def test_pair_accuracy_is_brute_force(case):
    for accuracy, s, g in zip(ranking.pair_accuracy(*case), *case, strict=True):
        signs = [
            np.sign((s[i] - s[j]) * (g[i] - g[j]))
            for i, j in combinations(range(len(s)), 2)
            if g[i] != g[j]
        ]
        if signs:
            assert accuracy == pytest.approx(
                np.mean([0.5 + 0.5 * sign for sign in signs]), abs=1e-15
            )
        else:
            assert math.isnan(accuracy)


@given(scored(most=20))
@settings(deadline=None)
def test_agreement_within_is_brute_force(case):
    """Ties in the scores, in the golden rewards and in both at once."""
    found = ranking.agreement_within(*case)
    assert all(counts.dtype == np.int64 for counts in found)
    for agree, pairs, s, g in zip(*found, *case, strict=True):
        signs = [
            np.sign((s[i] - s[j]) * (g[i] - g[j]))
            for i, j in combinations(range(len(s)), 2)
            if g[i] != g[j]
        ]
        assert (agree, pairs) == (sum(signs), len(signs))


@given(scored(most=20))
@settings(deadline=None)
def test_ranks_are_scipys_ties_on_their_mean(case):
    np.testing.assert_array_equal(ranking.average_ranks(case[0]), stats.rankdata(case[0], axis=1))


def test_a_row_with_nan_has_no_ranks():
    x = np.array([[2.0, np.nan, 1], [3, 1, 3]])
    np.testing.assert_array_equal(ranking.average_ranks(x), stats.rankdata(x, axis=1))
    np.testing.assert_array_equal(ranking.average_ranks(x), [[np.nan] * 3, [2.5, 1, 2.5]])


def test_cross_prompt_accuracy_of_many_responses_is_kendalls_but_for_the_pairs_within():
    """3,000 responses, not a power of two, with ties in scores and golden rewards."""
    rng = np.random.default_rng(1)
    golden = rng.normal(size=(300, 10)).round(1)
    scores = (golden + rng.normal(size=golden.shape)).round(1)
    concordant, discordant = 0, 0
    flat_scores, flat_golden, prompt = scores.ravel(), golden.ravel(), np.repeat(np.arange(300), 10)
    for i in range(len(prompt)):
        other = prompt[i + 1 :] != prompt[i]
        sign = np.sign(flat_golden[i + 1 :] - flat_golden[i])[other]
        score_sign = np.sign(flat_scores[i + 1 :] - flat_scores[i])[other]
        concordant += (sign != 0).sum() + (sign * score_sign).sum()
        discordant += (sign != 0).sum() - (sign * score_sign).sum()
    expected = concordant / (concordant + discordant)
    assert ranking.cross_prompt_accuracy(scores, golden) == pytest.approx(expected, abs=1e-12)


def test_agreement_of_many_responses_is_kendalls():
    """K = 500, where a pair count exceeds 16 bits; in a reversed order all pairs are discordant."""
    rng = np.random.default_rng(0)
    golden = rng.normal(size=(3, 500))
    scores = np.stack([rng.normal(size=500), -golden[1], golden[2].round(1)])
    agree, pairs = ranking.agreement_within(scores, golden)
    total = 500 * 499 // 2
    assert pairs.tolist() == [total] * 3
    assert agree[0] == round(stats.kendalltau(scores[0], golden[0]).statistic * total)
    assert agree[1] == -total and 0.9 * total < agree[2] < total


def test_a_constant_scorer_has_accuracy_one_half_and_picks_no_favourite():
    golden = np.array([[5.0, 4, 3, 2, 1], [0, 0, 0, 1, 1]])
    constant = np.full(golden.shape, 0.7)
    assert ranking.pair_accuracy(constant, golden).tolist() == [0.5, 0.5]
    assert np.isnan(ranking.spearman(constant, golden)).all()
    np.testing.assert_allclose(
        ranking.best_of_n(constant, golden, [1, 3, 5]), golden.mean(1)[:, None] * np.ones(3)
    )
    np.testing.assert_allclose(ranking.selected_quantile(constant, golden), [0.5, 0.5])
    assert ranking.cross_prompt_accuracy(constant, golden) == 0.5


@given(scored())
@settings(deadline=None)
def test_best_of_n_is_the_mean_over_all_subsets(case):
    scores, golden = case
    sizes = list(range(1, scores.shape[1] + 1))
    found = ranking.best_of_n(scores, golden, sizes)
    for row, s, g in zip(found, scores, golden, strict=True):
        for value, n in zip(row, sizes, strict=True):
            subsets = [list(subset) for subset in combinations(range(len(s)), n)]
            tops = [g[subset][s[subset] == s[subset].max()].mean() for subset in subsets]
            assert value == pytest.approx(np.mean(tops), abs=1e-12)


def test_best_of_one_is_the_mean_and_best_of_all_the_top():
    rng = np.random.default_rng(0)
    scores, golden = rng.normal(size=(2, 5, 7))
    found = ranking.best_of_n(scores, golden, [1, 7])
    np.testing.assert_allclose(found[:, 0], golden.mean(1), rtol=0, atol=1e-14)
    np.testing.assert_array_equal(found[:, 1], golden[np.arange(5), scores.argmax(1)])


@given(st.integers(1, 60), st.data())
@settings(deadline=None)
def test_best_of_n_weights_are_the_published_probabilities(k, data):
    n = data.draw(st.integers(1, k))
    weights = ranking.best_of_n_weights(k, [n])[:, 0]
    expected = [math.comb(k - rank, n - 1) / math.comb(k, n) for rank in range(1, k + 1)]
    np.testing.assert_allclose(weights, expected, rtol=1e-11, atol=0)
    assert weights.sum() == pytest.approx(1, abs=1e-14)


def test_best_of_300_of_500_responses():
    weights = ranking.best_of_n_weights(500, ranking.BEST_OF_N)
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-14)
    np.testing.assert_allclose(
        weights[:3, 7], [0.6, 0.6 * 200 / 499, 0.6 * 200 * 199 / (499 * 498)]
    )
    assert weights[201:, 7].tolist() == [0] * 299


@pytest.mark.parametrize("sizes", [[4], [1, 9], [0]])
def test_best_of_n_outside_the_responses_is_refused(sizes):
    with pytest.raises(ValueError, match=r"expected 1 <= n <= 3 responses, found \[\d"):
        ranking.best_of_n(SCORES, GOLDEN, sizes)


# ------------------------------------------------------------------------------------ all responses


@given(scored(most=6))
@settings(deadline=None)
def test_cross_prompt_accuracy_is_brute_force(case):
    scores, golden = case
    places = [(n, k) for n in range(len(scores)) for k in range(scores.shape[1])]
    signs = [
        np.sign((scores[a] - scores[b]) * (golden[a] - golden[b]))
        for a, b in combinations(places, 2)
        if a[0] != b[0] and golden[a] != golden[b]
    ]
    found = ranking.cross_prompt_accuracy(scores, golden)
    within = ranking.agreement_within(scores, golden)
    assert ranking.cross_prompt_accuracy(scores, golden, within) == pytest.approx(
        found, abs=0, nan_ok=True
    )
    if signs:
        assert found == pytest.approx(np.mean([0.5 + 0.5 * sign for sign in signs]), abs=1e-15)
    else:
        assert math.isnan(found)


def test_cross_prompt_accuracy_ignores_pairs_within_a_prompt():
    golden = np.array([[0.0, 1], [10, 11]])
    assert ranking.cross_prompt_accuracy(np.array([[1.0, 0], [3, 2]]), golden) == 1
    assert ranking.cross_prompt_accuracy(np.array([[2.0, 3], [0, 1]]), golden) == 0


def test_global_spearman_is_scipys_over_all_responses():
    rng = np.random.default_rng(0)
    scores, golden = rng.integers(0, 5, (2, 6, 4)).astype(float)
    expected = stats.spearmanr(scores.ravel(), golden.ravel()).statistic
    assert ranking.global_spearman(scores, golden) == pytest.approx(expected, abs=1e-12)


# -------------------------------------------------------------------------------------- invariances


PER_PROMPT = {
    "spearman": ranking.spearman,
    "pair_accuracy": ranking.pair_accuracy,
    "selected_quantile": ranking.selected_quantile,
    "best_of_2": lambda scores, golden: ranking.best_of_n(scores, golden, [2])[:, 0],
}


OVERALL = {
    "global_spearman": ranking.global_spearman,
    "cross_prompt_accuracy": ranking.cross_prompt_accuracy,
}


@given(scored(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_permuting_prompts_or_responses_changes_nothing(case, random):
    prompts, responses = (list(range(size)) for size in case[0].shape)
    random.shuffle(prompts)
    random.shuffle(responses)
    moved = [values[prompts][:, responses] for values in case]
    for measure in PER_PROMPT.values():
        np.testing.assert_allclose(measure(*moved), measure(*case)[prompts], atol=1e-12)
    for measure in OVERALL.values():
        assert measure(*moved) == pytest.approx(measure(*case), abs=1e-12, nan_ok=True)


@given(scored())
@settings(deadline=None)
def test_only_the_order_of_the_scores_counts(case):
    scores, golden = case
    for measure in [*PER_PROMPT.values(), *OVERALL.values()]:
        np.testing.assert_array_equal(
            measure(np.exp(3 * scores) - 7, golden), measure(scores, golden)
        )


@given(scored())
@settings(deadline=None)
def test_turning_the_scores_round_turns_the_ranking_round(case):
    scores, golden = case
    np.testing.assert_allclose(
        ranking.spearman(-scores, golden), -ranking.spearman(scores, golden), atol=1e-12
    )
    np.testing.assert_allclose(
        ranking.pair_accuracy(-scores, golden), 1 - ranking.pair_accuracy(scores, golden)
    )


# ------------------------------------------------------------------------------------------- tables


def test_the_table_of_the_worked_case():
    """The gain of best-of-2 is 2/3 of a possible 5/3.

    By score 8/3, 5/3, 5/3, 5; by golden reward 8/3, 8/3, 5/3, 5; at random 2, 2, 4/3, 5.
    """
    table = strict_json(ranking.ranking_metrics(SCORES, GOLDEN, weights_for(4)))
    assert table["spearman"] == pytest.approx(0.5)
    assert table["pair_accuracy"] == pytest.approx(7 / 9)
    assert table["selected_quantile"] == pytest.approx(0.75)
    missing = [
        table[f"n_prompts_without_{name}"]
        for name in ("spearman", "pair_accuracy", "selected_quantile")
    ]
    assert missing == [1, 1, 0]
    assert table["best_of_n"] == pytest.approx({"1": 31 / 12, "2": 2.75})
    assert table["best_of_n_gain"] == pytest.approx({"2": 0.4})
    assert table["global_spearman"] == pytest.approx(
        stats.spearmanr(SCORES.ravel(), GOLDEN.ravel()).statistic
    )
    for name in ("spearman", "pair_accuracy", "selected_quantile"):
        low, high = table[f"{name}_ci95"]
        assert low <= table[name] <= high
    for name in ("best_of_n", "best_of_n_gain"):
        for n, (low, high) in table[f"{name}_ci95"].items():
            assert low <= table[name][n] <= high


def test_the_oracle_has_all_of_the_gain():
    golden = np.random.default_rng(0).normal(size=(20, 12))
    table = ranking.ranking_metrics(golden, golden, weights_for(20))
    assert list(table["best_of_n"]) == ["1", "2", "5", "10"]
    assert table["best_of_n_gain"] == pytest.approx({"2": 1, "5": 1, "10": 1})
    assert table["spearman"] == table["pair_accuracy"] == table["selected_quantile"] == 1


@pytest.mark.parametrize("value", [0.0, 0.1, -2.5, 1e6 / 3])
def test_golden_rewards_of_one_value_make_nulls_not_numbers(value):
    golden = np.full((5, 3), value)
    scores = np.random.default_rng(0).random((5, 3))
    table = strict_json(ranking.ranking_metrics(scores, golden, weights_for(5)))
    for name in ("spearman", "pair_accuracy", "global_spearman", "cross_prompt_accuracy"):
        assert table[name] is None
    assert table["spearman_ci95"] == [None, None] and table["n_prompts_without_spearman"] == 5
    assert table["best_of_n"] == pytest.approx({"1": value, "2": value})
    assert table["best_of_n_gain"] == {"2": None} and table["best_of_n_gain_ci95"] == {
        "2": [None, None]
    }
    scale = strict_json(scale_metrics(scores, golden, weights_for(5)))
    assert scale["mse"] == pytest.approx(((scores - value) ** 2).mean())
    assert scale["r2"] is None and scale["r2_ci95"] == [None, None]


def test_scale_metrics_are_scikit_learns():
    rng = np.random.default_rng(0)
    golden = rng.normal(size=(40, 5))
    predicted = 0.7 * golden + 0.4 * rng.normal(size=(40, 5))
    found = scale_metrics(predicted, golden, weights_for(40))
    assert found["mse"] == pytest.approx(mean_squared_error(golden.ravel(), predicted.ravel()))
    assert found["r2"] == pytest.approx(r2_score(golden.ravel(), predicted.ravel()))
    assert found["mse_ci95"][0] < found["mse"] < found["mse_ci95"][1]
    assert found["r2_ci95"][0] < found["r2"] < found["r2_ci95"][1]


def test_the_interval_of_r2_is_over_resampled_prompts():
    rng = np.random.default_rng(0)
    golden, predicted = rng.normal(size=(2, 3, 4))
    weights = np.array([[2, 1, 0], [0, 1, 2], [1, 1, 1]], np.float32)
    resamples = [np.repeat(np.arange(3), row.astype(int)) for row in weights]
    expected = np.percentile(
        [r2_score(golden[rows].ravel(), predicted[rows].ravel()) for rows in resamples],
        [2.5, 97.5],
    )
    np.testing.assert_allclose(
        scale_metrics(predicted, golden, weights)["r2_ci95"], expected, rtol=1e-5
    )


def test_scale_metrics_do_not_depend_on_where_zero_is():
    rng = np.random.default_rng(0)
    golden = rng.normal(size=(40, 5))
    predicted = golden + 0.5 * rng.normal(size=(40, 5))
    near, far = (scale_metrics(predicted + at, golden + at, weights_for(40)) for at in (0, 1e4))
    for name in ("mse", "mse_ci95", "r2", "r2_ci95"):
        assert far[name] == pytest.approx(near[name], rel=1e-5), name


def test_reliability_by_hand():
    """Two bins of the predictions: {0, 1} with golden 0, 2 and {2, 3} with golden 2, 5."""
    found = reliability(np.array([[3.0, 0], [2, 1]]), np.array([[5.0, 0], [2, 2]]), bins=2)
    assert found == {
        "predicted": [0.5, 2.5],
        "golden": [1, 3.5],
        "count": [2, 2],
        "calibration_error": 0.75,
    }


def test_reliability_weighs_bins_by_their_responses_and_never_makes_an_empty_one():
    values = np.array([[0.0, 1, 2, 3, 4]])
    found = reliability(values, values + np.array([[0, 0, 0, 1, 1]]), bins=2)
    assert found["count"] == [3, 2] and found["calibration_error"] == pytest.approx(2 / 5)
    assert reliability(values, values)["count"] == [1] * 5
    assert reliability(values, values)["calibration_error"] == 0
