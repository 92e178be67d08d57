"""Logistic and ridge solvers against scikit-learn and by hand, on any scale of the rows."""

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge

from rewardlib.models import solvers


def rng(seed=0):
    return np.random.default_rng(seed)


def problem(n=300, d=6, m=500, mean=0.0, dtype=np.float32):
    rows = (rng().standard_normal((n, d)) + mean).astype(dtype)
    pairs = rng(1).integers(n, size=(m, 2))
    gap = (rows[pairs[:, 0]].astype(float) - rows[pairs[:, 1]]) @ np.arange(d) / d
    return rows, pairs, (gap + rng(2).logistic(size=m) > 0).astype(float)


def by_scikit_learn(rows, labels, alpha, intercept):
    model = LogisticRegression(
        C=1 / alpha, fit_intercept=intercept, solver="newton-cholesky", tol=1e-12, max_iter=1000
    )
    return model.fit(rows, labels)


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_bradley_terry_is_logistic_regression_on_differences(alpha, mean):
    rows, pairs, labels = problem(mean=mean)
    found, intercept = solvers.fit_bt(rows, pairs, labels, alpha)
    expected = by_scikit_learn(
        rows[pairs[:, 0]].astype(float) - rows[pairs[:, 1]], labels, alpha, False
    ).coef_[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())
    assert intercept == 0


@pytest.mark.parametrize("alpha", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_classification_is_logistic_regression_on_responses(alpha, mean):
    rows, pairs, labels = problem(mean=mean)
    found, intercept = solvers.fit_clf(rows, pairs, labels, alpha)
    single = rows[pairs.ravel()].astype(float), solvers.one_by_one(labels)
    expected = by_scikit_learn(*single, alpha, True)
    np.testing.assert_allclose(
        found, expected.coef_[0], rtol=1e-5, atol=1e-7 * np.abs(expected.coef_).max()
    )
    assert intercept == pytest.approx(expected.intercept_[0], abs=1e-5)


def test_the_optimum_by_hand():
    """Three of four judges prefer x = 1 to x = 0; without a penalty sigmoid(w) = 3 / 4."""
    rows, pairs = np.array([[0.0], [1.0]], np.float32), np.array([[1, 0]] * 4)
    weights, _ = solvers.fit_bt(rows, pairs, np.array([1.0, 1, 1, 0]), 1e-9)
    assert weights[0] == pytest.approx(np.log(3), rel=1e-6)
    assert solvers.logistic_hessian(rows, pairs, weights)[0, 0] == pytest.approx(
        4 * 3 / 16, rel=1e-6
    )


def test_more_dimensions_than_pairs_and_scales_far_apart():
    rows, pairs, labels = problem(n=60, d=200, m=40)
    scale = np.exp(rng(3).uniform(-3, 3, 200)).astype(np.float32)
    found, _ = solvers.fit_bt(rows * scale, pairs, labels, 0.1)
    scaled = (rows * scale).astype(float)
    expected = by_scikit_learn(scaled[pairs[:, 0]] - scaled[pairs[:, 1]], labels, 0.1, False).coef_[
        0
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_a_start_changes_the_way_and_not_the_end():
    rows, pairs, labels = problem(mean=5.0)
    found = solvers.fit_clf(rows, pairs, labels, 1.0)
    again = solvers.fit_clf(rows, pairs, labels, 1.0, start=(np.full(6, 0.3), -2.0))
    np.testing.assert_allclose(again[0], found[0], rtol=1e-6)
    assert again[1] == pytest.approx(found[1], rel=1e-6)


def test_no_optimum_is_said(monkeypatch):
    monkeypatch.setattr(solvers, "NEWTON_STEPS", 2)
    with pytest.warns(ConvergenceWarning, match="no optimum within 2 Newton steps; raise alpha"):
        solvers.fit_bt(*problem(), 1e-6)


def test_moments_count_a_row_as_often_as_it_is_taken(monkeypatch):
    monkeypatch.setattr(solvers, "BLOCK_ROWS", 7)
    rows = rng().standard_normal((40, 3)).astype(np.float32)
    counts = rng(1).integers(0, 4, 40)
    mean, spread = solvers.moments(rows, counts.astype(float))
    repeated = np.repeat(rows, counts, axis=0).astype(float)
    np.testing.assert_allclose(mean, repeated.mean(0), rtol=1e-6)
    assert spread == pytest.approx(repeated.var(0).sum(), rel=1e-6)


def test_the_hessian_is_the_derivative_of_the_gradient(monkeypatch):
    monkeypatch.setattr(solvers, "BLOCK_ROWS", 64)
    rows, pairs, _ = problem(d=3)
    z, w, eps = (
        rows[pairs[:, 0]].astype(float) - rows[pairs[:, 1]],
        np.array([0.3, -0.2, 0.1]),
        1e-6,
    )

    def gradient(w):
        return z.T @ (1 / (1 + np.exp(-z @ w)))

    numeric = np.stack(
        [(gradient(w + eps * e) - gradient(w - eps * e)) / (2 * eps) for e in np.eye(3)]
    )
    np.testing.assert_allclose(solvers.logistic_hessian(rows, pairs, w), numeric, rtol=1e-6)


def test_float32_gradients_serve_a_rough_tolerance():
    rows, pairs, labels = problem()
    exact, _ = solvers.fit_bt(rows, pairs, labels, 1.0)
    for data in (rows.astype(np.float32), rows.astype(np.float16)):
        known = solvers.moments(data)
        rough, _ = solvers.fit_bt(
            data, pairs, labels, 1.0, tolerance=solvers.ROUGH, known_moments=known
        )
        np.testing.assert_allclose(rough, exact, atol=2e-3 * np.abs(exact).max())


def test_held_out_logits_are_of_models_that_did_not_see_the_pair():
    rows, pairs, labels = problem()
    folds = np.arange(len(pairs)) % 3
    found = solvers.held_out_logits(solvers.fit_bt, rows, pairs, labels, folds, [0, 2], [0.1, 0.01])
    assert np.isnan(found[:, folds == 1]).all()
    seen = folds != 2
    weights, _ = solvers.fit_bt(rows, pairs[seen], labels[seen], 0.01 * seen.sum())
    scores = rows @ weights
    np.testing.assert_allclose(
        found[1, ~seen], scores[pairs[~seen, 0]] - scores[pairs[~seen, 1]], rtol=1e-2, atol=1e-3
    )


def test_the_rescaled_loss_knows_no_scale():
    logits, labels = rng().standard_normal(200), (rng(1).random(200) < 0.6).astype(float)
    logits += 2 * labels
    found = solvers.rescaled_loss(logits, labels)
    np.testing.assert_allclose(solvers.rescaled_loss(1000 * logits, labels), found, rtol=1e-4)
    slope = LogisticRegression(C=1e10, fit_intercept=False).fit(logits[:, None], labels).coef_[0, 0]
    assert found.sum() == pytest.approx(
        solvers.logistic_loss(slope * logits, labels).sum(), rel=1e-6
    )
    assert solvers.rescaled_loss(-logits, labels).sum() == pytest.approx(200 * np.log(2), rel=1e-3)
    assert solvers.rescaled_loss(0 * logits, labels).sum() == pytest.approx(200 * np.log(2))


def test_the_first_row_within_one_standard_error_wins():
    """Two groups. Row 1 is best; row 0 is worse by 6 +- 4 in sum, row 2 by 2 +- 10."""
    losses = np.array([[5.0, 1.0], [0.0, 0.0], [6.0, -4.0]])
    assert solvers.within_one_error(losses, np.array([0, 1])) == 1
    assert solvers.within_one_error(losses[[2, 0, 1]], np.array([0, 1])) == 0
    assert solvers.within_one_error(losses[[0, 2, 1]], np.array([0, 1])) == 1


@pytest.mark.parametrize("alpha", [1e-3, 10.0])
def test_ridge_is_scikit_learns(alpha):
    rows, targets = rng().standard_normal((80, 4)) + 3, rng(1).standard_normal(80)
    sums = solvers.second_moments(rows, targets)
    weights, intercept = solvers.fit_ridge(sums, alpha)
    expected = Ridge(alpha).fit(rows, targets)
    np.testing.assert_allclose(weights, expected.coef_, rtol=1e-8)
    assert intercept == pytest.approx(expected.intercept_, rel=1e-8)
    error = ((targets - expected.predict(rows)) ** 2).sum()
    assert solvers.squared_error(sums, weights, intercept) == pytest.approx(error, rel=1e-8)
    assert solvers.variance(sums) == pytest.approx(rows.var(0).sum(), rel=1e-10)


def test_the_ridge_strength_is_the_best_on_held_out_folds():
    rows, folds = rng().standard_normal((120, 30)), np.arange(120) % 4
    for noise, check in ((0.01, lambda s: s == 1e-4), (30.0, lambda s: s >= 0.1)):
        targets = rows @ rng(1).standard_normal(30) + noise * rng(2).standard_normal(120)
        sums = [solvers.second_moments(rows[folds == f], targets[folds == f]) for f in range(4)]
        losses = []
        for strength in solvers.STRENGTHS:
            error = 0.0
            for f in range(4):
                fit, held = folds != f, folds == f
                model = Ridge(strength * fit.sum() * rows[fit].var(0).sum()).fit(
                    rows[fit], targets[fit]
                )
                error += ((targets[held] - model.predict(rows[held])) ** 2).sum()
            losses.append(error)
        chosen = solvers.choose_ridge_strength(sums)
        assert chosen == solvers.STRENGTHS[int(np.argmin(losses))] and check(chosen)
