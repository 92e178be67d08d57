"""Baselines: the linear probe against scikit-learn; metrics of a constant, chance and length."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from rewardlib.data import embeddings
from rewardlib.measures import intervals, ranking
from rewardlib.models import scoring
from rewardlib.pipeline import baselines

D = 5


def rng(seed=0):
    return np.random.default_rng(seed)


def pairs_of(noise, n=400, m=600, seed=0):
    """Rows (n, D), pairs, labels by a noisy linear reward, five folds, and the true weights."""
    rows = rng(seed).standard_normal((n, D)).astype(np.float32)
    weights = np.array([1.0, -2, 0.5, 0, 0])
    pairs = rng(seed + 1).integers(n, size=(m, 2))
    gap = (rows[pairs[:, 0]] - rows[pairs[:, 1]]) @ weights + noise * rng(seed + 2).logistic(size=m)
    return rows, pairs, (gap > 0).astype(float), np.arange(m) % 5, weights


def reference(rows, pairs, labels, strength):
    """Weights by scikit-learn, which adds w'w / 2C to the sum of the losses.

    The probe adds strength * variance * w'w / 2 to their mean.
    """
    penalty = strength * rows.var(axis=0).sum()
    model = LogisticRegression(
        C=1 / (penalty * len(pairs)), fit_intercept=False, tol=1e-10, max_iter=10_000
    )
    return model.fit((rows[pairs[:, 0]] - rows[pairs[:, 1]]).astype(float), labels).coef_[0]


def test_one_fold_gives_scikit_learns_ridge_at_strength_1():
    rows, pairs, labels, _, _ = pairs_of(noise=1)
    found = baselines.fit_linear_probe(rows, pairs, labels, np.zeros(len(pairs), int))
    np.testing.assert_allclose(found, reference(rows, pairs, labels, 1.0), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("strength", baselines.STRENGTHS)
def test_every_strength_is_scikit_learns(strength, monkeypatch):
    rows, pairs, labels, folds, _ = pairs_of(noise=1)
    monkeypatch.setattr(baselines, "STRENGTHS", (strength,))
    found = baselines.fit_linear_probe(rows, pairs, labels, folds)
    np.testing.assert_allclose(
        found, reference(rows, pairs, labels, strength), rtol=5e-3, atol=5e-4
    )


@pytest.mark.parametrize(
    ("noise", "least", "most"), [(0, 1e-4, 1e-3), (1e6, 0.01, 1)], ids=["clean", "coins"]
)
def test_the_strength_is_the_one_that_predicts_the_first_fold_best(noise, least, most):
    rows, pairs, labels, folds, _ = pairs_of(noise)
    held = folds == 0
    gap = rows[pairs[:, 0]] - rows[pairs[:, 1]]
    losses = {}
    for strength in baselines.STRENGTHS:
        logit = gap[held] @ reference(rows, pairs[~held], labels[~held], strength)
        losses[strength] = np.mean(np.logaddexp(0, logit) - labels[held] * logit)
    best = min(losses, key=losses.get)
    assert least <= best <= most
    found = baselines.fit_linear_probe(rows, pairs, labels, folds)
    np.testing.assert_allclose(found, reference(rows, pairs, labels, best), rtol=2e-2, atol=1e-3)


def test_the_probe_finds_the_direction_and_its_sign():
    rows, pairs, labels, folds, weights = pairs_of(noise=0.2, m=4000)
    found = baselines.fit_linear_probe(rows, pairs, labels, folds)
    assert found @ weights / np.linalg.norm(found) / np.linalg.norm(weights) > 0.99


def test_swapped_sides_and_an_offset_of_all_rows_change_nothing():
    rows, pairs, labels, folds, _ = pairs_of(noise=1)
    found = baselines.fit_linear_probe(rows, pairs, labels, folds)
    swapped = baselines.fit_linear_probe(rows, pairs[:, ::-1], 1 - labels, folds)
    moved = baselines.fit_linear_probe(rows + np.float32(3), pairs, labels, folds)
    np.testing.assert_allclose(swapped, found, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(moved, found, rtol=2e-2, atol=1e-3)


def test_rows_without_any_spread_give_weights_of_0():
    rows, pairs, labels, folds, _ = pairs_of(noise=1)
    assert (baselines.fit_linear_probe(np.ones_like(rows), pairs, labels, folds) == 0).all()


# ----------------------------------------------------------------------------------------- evaluate


def responses(lengths=None, n=6, k=4):
    arrays = list(rng(3).standard_normal((k, n, D)).astype(np.float32))
    return embeddings.Responses(arrays, rng(4).standard_normal((n, k)), lengths, np.arange(n), {})


PROMPTS = np.array([4, 0, 3])


def linear(data):
    return np.stack([array[PROMPTS] @ np.arange(D) for array in data.embeddings], 1)


def evaluated(data, seed=6, constant=0.25):
    weights = intervals.resample_weights(len(PROMPTS), rng(), 50)
    return baselines.evaluate(data, PROMPTS, linear(data), constant, seed, weights)


def test_a_constant_ranks_nothing():
    data = responses()
    found = evaluated(data)["mean_reward"]
    assert found["spearman"] is None and found["spearman_ci95"] == [None, None]
    assert found["n_prompts_without_spearman"] == 3
    assert found["pair_accuracy"] == found["cross_prompt_accuracy"] == 0.5
    assert found["mse"] == pytest.approx(((data.rewards[PROMPTS] - 0.25) ** 2).mean())
    means = {n: data.rewards[PROMPTS].mean() for n in ("1", "2")}
    assert found["best_of_n"] == pytest.approx(means)
    assert found["best_of_n_gain"]["2"] == pytest.approx(0, abs=1e-12)


def test_the_mean_reward_has_an_r2_of_0_on_its_own_data():
    data = responses()
    found = evaluated(data, constant=data.rewards[PROMPTS].mean())["mean_reward"]
    assert found["r2"] == pytest.approx(0, abs=1e-12)
    assert found["reliability"]["calibration_error"] > 0


def test_baselines_have_strict_json_and_only_the_constant_has_a_scale():
    found = json.loads(json.dumps(evaluated(responses()), allow_nan=False))
    assert list(found) == ["random", "mean_reward", "linear_probe"]
    assert [name for name, row in found.items() if "mse" in row] == ["mean_reward"]


def test_the_probes_scores_are_the_embeddings_along_its_weights():
    data = responses()
    raw = scoring.score_raw([np.arange(D, dtype=float)], data, PROMPTS)[0]
    np.testing.assert_allclose(raw, linear(data), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(baselines.scores(data, PROMPTS, raw, 0.0, 6)["linear_probe"], raw)
    weights = intervals.resample_weights(len(PROMPTS), rng(), 50)
    expected = ranking.ranking_metrics(linear(data), data.rewards[PROMPTS], weights)
    assert evaluated(data)["linear_probe"] == expected


def test_length_stands_beside_where_lengths_are_known():
    data = responses()
    assert "length" not in evaluated(data)
    longer = responses(lengths=np.argsort(np.argsort(data.rewards, axis=1), axis=1).astype(float))
    found = evaluated(longer)["length"]
    assert found["spearman"] == found["pair_accuracy"] == 1


def test_chance_is_seeded():
    first, again, other = (
        baselines.scores(responses(), PROMPTS, np.zeros((3, 4)), 0.0, seed)["random"]
        for seed in (6, 6, 7)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).all() and len(np.unique(first)) == first.size
