"""Reward models: one interface for all of them, ensembles, and files that nothing unpickles."""

import io
import json
import subprocess
import sys

import joblib
import numpy as np
import pytest
from conftest import ROOT
from scipy.special import expit, logit
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator

import generate_demo_data
from benchmarks import reward_models as benchmark
from rewardlib.data import embeddings, pairs, splits
from rewardlib.errors import InputError
from rewardlib.models import base, checks, model_files, registry, solvers
from rewardlib.models.classifiers import CLF_LGBM, CLF_Any
from rewardlib.models.ensemble import Ensemble
from rewardlib.models.linear import (
    BT_Laplace,
    BT_Linear,
    CLF_Linear,
    Regression_Ridge,
    _evidence_alpha,
    _folds,
)
from rewardlib.models.mlp import BT_MLP, CLF_MLP
from rewardlib.models.names import OBJECTIVES, has_lightgbm

D = 6
WEIGHTS = np.array([2, -1, 0.5, 0, 0, 0])
SMALL = {"hidden": (16, 8), "epochs": 8, "learning_rate": 0.02, "precision": "fp32"}
PAIRWISE = {
    "BT_MLP": BT_MLP(**SMALL),
    "CLF_MLP": CLF_MLP(**SMALL),
    "BT_Linear": BT_Linear(),
    "CLF_Linear": CLF_Linear(),
    "CLF_LGBM": CLF_LGBM(),
    "CLF_Any": CLF_Any(LogisticRegression()),
    "BT_Laplace": BT_Laplace(),
    "BT_Laplace last layer": BT_Laplace(features=BT_MLP(**SMALL)),
    "Ensemble": Ensemble(BT_Linear(), n=3, bootstrap=True),
}
if not has_lightgbm():
    del PAIRWISE["CLF_LGBM"]
each = pytest.mark.parametrize("model", PAIRWISE.values(), ids=PAIRWISE)
trees = pytest.mark.skipif(not has_lightgbm(), reason="lightgbm is not installed")


def rng(seed=0):
    return np.random.default_rng(seed)


def make_problem(n=200, m=400, noise=0.0):
    """Rows (n, D), index pairs (m, 2), labels by a noisy linear reward, a prompt for each pair."""
    rows = rng().standard_normal((n, D)).astype(np.float32)
    index = rng(1).integers(n, size=(m, 2))
    index = index[index[:, 0] != index[:, 1]]
    gap = (rows[index[:, 0]] - rows[index[:, 1]]) @ WEIGHTS + noise * rng(2).logistic(
        size=len(index)
    )
    return rows, index, (gap > 0).astype(int), np.arange(len(index)) // 8


@pytest.fixture(scope="module")
def problem():
    return make_problem(noise=0.3)


# ------------------------------------------------------------------------------------ one interface


@each
def test_learns_the_order_and_keeps_the_axes(problem, model):
    rows, index, labels, groups = problem
    fitted = clone(model).fit(index, labels, embeddings=rows, groups=groups)
    assert fitted.n_features_in_ == D
    fresh = rng(3).standard_normal((30, 5, D))
    scores = fitted.predict(fresh)
    assert scores.shape == (30, 5, 1)
    assert spearmanr(scores.ravel(), (fresh @ WEIGHTS).ravel()).statistic > 0.85
    np.testing.assert_allclose(fitted.predict(fresh[3]), scores[3], rtol=1e-5, atol=1e-5)
    assert fitted.score(index, labels, embeddings=rows) > 0.85
    assert fitted.score(index, 1 - labels, embeddings=rows) < 0.15
    assert fitted.score(rows[index], labels) == fitted.score(index, labels, embeddings=rows)


@each
def test_index_pairs_are_the_pairs_themselves(problem, model):
    rows, index, labels, groups = problem
    by_index = clone(model).fit(index, labels, embeddings=rows, groups=groups).predict(rows)
    materialised = clone(model).fit(rows[index], labels, groups=groups).predict(rows)
    numbered = (
        clone(model)
        .fit(index, labels, embeddings=rows.reshape(20, 10, D), groups=groups)
        .predict(rows)
    )
    np.testing.assert_allclose(materialised, by_index, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(numbered, by_index)


@each
def test_swapped_sides_with_swapped_labels_are_the_same_data(problem, model):
    rows, index, labels, groups = problem
    turned = rng(5).random(len(labels)) < 0.5
    swapped = np.where(turned[:, None], index[:, ::-1], index)
    scores = clone(model).fit(index, labels, embeddings=rows, groups=groups).predict(rows)
    again = clone(model).fit(
        swapped, np.where(turned, 1 - labels, labels), embeddings=rows, groups=groups
    )
    np.testing.assert_allclose(again.predict(rows), scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "model", [BT_Linear(), BT_Laplace(), BT_Linear(alpha=2.0), BT_Laplace(alpha=2.0)]
)
def test_an_offset_of_all_embeddings_changes_no_difference(problem, model):
    rows, index, labels, groups = problem
    scores = clone(model).fit(index, labels, embeddings=rows, groups=groups).predict(rows)[:, 0]
    moved = clone(model).fit(index, labels, embeddings=rows + np.float32(4), groups=groups)
    np.testing.assert_allclose(
        np.ptp(moved.predict(rows + np.float32(4))[:, 0] - scores), 0, atol=1e-3
    )


@each
def test_random_state_decides_everything(problem, model):
    rows, index, labels, _ = problem
    first = clone(model).fit(index, labels, embeddings=rows).predict(rows)
    fitted = clone(model).fit(index, labels, embeddings=rows)
    assert np.array_equal(fitted.predict(rows), first)
    assert np.array_equal(fitted.fit(index, labels, embeddings=rows).predict(rows), first)


@each
def test_a_fitted_model_goes_through_joblib(problem, model):
    rows, index, labels, _ = problem
    fitted, buffer = clone(model).fit(index, labels, embeddings=rows), io.BytesIO()
    joblib.dump(fitted, buffer)
    buffer.seek(0)
    np.testing.assert_array_equal(joblib.load(buffer).predict(rows), fitted.predict(rows))


@each
def test_parameters_are_kept_as_they_were_given(model):
    params = model.get_params(deep=False)
    assert type(model)(**params).get_params(deep=False) == params
    assert clone(model).set_params(**params).get_params(deep=False).keys() == params.keys()
    assert not [name for name in vars(model) if name.endswith("_")]


@each
def test_memory_mapped_half_precision_is_read_where_it_lies(tmp_path, problem, model):
    rows, index, labels, groups = problem
    np.save(tmp_path / "a.npy", rows.astype(np.float16).reshape(20, 10, D).swapaxes(0, 1))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r").swapaxes(0, 1)
    found = clone(model).fit(index, labels, embeddings=mapped, groups=groups).predict(mapped)
    halves = rows.astype(np.float16)
    expected = clone(model).fit(index, labels, embeddings=halves, groups=groups).predict(halves)
    np.testing.assert_allclose(found, expected.reshape(20, 10, 1), rtol=1e-5, atol=1e-5)
    np.save(tmp_path / "b.npy", rows)
    mapped = np.load(tmp_path / "b.npy", mmap_mode="r")
    found = clone(model).fit(index, labels, embeddings=mapped, groups=groups).predict(mapped)
    np.testing.assert_array_equal(
        found, clone(model).fit(index, labels, embeddings=rows, groups=groups).predict(rows)
    )


def test_prediction_in_blocks_is_prediction(problem, monkeypatch):
    rows, index, labels, _ = problem
    model = BT_Laplace(alpha=1.0).fit(index, labels, embeddings=rows)
    expected = model.predict(rows.reshape(20, 10, D), return_std=True)
    monkeypatch.setattr(base, "BLOCK_BYTES", 3 * 10 * D * 4)
    for a, b in zip(model.predict(rows.reshape(20, 10, D), return_std=True), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_only_named_rows_are_read():
    rows = np.full((1000, D), np.nan)
    rows[[3, 700]] = [np.ones(D), np.zeros(D)]
    found, index = checks.check_index(np.array([[700, 3], [3, 700]]), rows)
    assert found.tolist() == [[1] * D, [0] * D] and index.tolist() == [[1, 0], [0, 1]]


def test_pairs_are_never_built_from_row_numbers():
    """The pairs are 128 times as large as the matrix; traced memory must stay below the pairs."""
    code = """
import tracemalloc, numpy as np
from rewardlib import BT_Laplace, CLF_Linear
rows = np.random.default_rng(0).standard_normal((500, 64)).astype(np.float32)
index = np.random.default_rng(1).integers(500, size=(32000, 2))
labels = (rows[index[:, 0], 0] > rows[index[:, 1], 0]).astype(int)
pairs_size = index.size * 64 * 4
for model in (BT_Laplace(alpha=1.0), CLF_Linear(alpha=1.0)):
    model.fit(index[:10], labels[:10], embeddings=rows)
    tracemalloc.start()
    model.fit(index, labels, embeddings=rows)
    memory = tracemalloc.get_traced_memory()
    assert memory[1] < 0.75 * pairs_size, (memory, pairs_size)
    tracemalloc.stop()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_lightgbm_is_loaded_by_those_who_fit_trees():
    code = "import sys; import rewardlib.models.registry; sys.exit('lightgbm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_scikit_learns_cross_validation_takes_pairs(problem):
    rows, index, labels, groups = problem
    found = cross_val_score(
        BT_Linear(alpha=1.0), rows[index], labels, groups=groups, cv=GroupKFold(3)
    )
    assert found.shape == (3,) and (found > 0.8).all()


# ------------------------------------------------------------------------ scikit-learn's own checks


class Rows:
    """Lets a reward model be fitted to rows (n, D) with targets: it learns from pairs of rows."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = True, False
        return tags

    def pairs(self, y):
        y = np.asarray(y)
        each = np.arange(len(y))
        index = np.concatenate(
            [np.column_stack([each, np.roll(each, s)]) for s in range(1, min(len(y), 6))]
        )
        index = index[y[index[:, 0]] != y[index[:, 1]]]
        return index, (y[index[:, 0]] > y[index[:, 1]]).astype(int)

    def fit(self, X, y):
        return super().fit(*self.pairs(y), embeddings=X)

    def predict(self, X):
        return super().predict(X)[:, 0]


class RowsBT_MLP(Rows, BT_MLP):
    pass


class RowsBT_Linear(Rows, BT_Linear):
    pass


class RowsCLF_Linear(Rows, CLF_Linear):
    pass


class RowsCLF_LGBM(Rows, CLF_LGBM):
    pass


class RowsCLF_Any(Rows, CLF_Any):
    pass


class RowsBT_Laplace(Rows, BT_Laplace):
    pass


class RowsEnsemble(Rows, Ensemble):
    pass


class RowsRidge(Rows, Regression_Ridge):
    def fit(self, X, y):
        return Regression_Ridge.fit(self, X, y)


# All other checks of check_estimator apply and pass, among them: construction, clone, get_params
# and set_params, repr, tags, nothing set in __init__, parameters untouched by fit, fit returns
# self, NotFittedError, dtypes, object and complex arrays, NaN and inf, sparse input, pickling,
# read-only memory maps, Fortran order, idempotent fit, unchanged estimators in predict, order and
# subsets of samples, one feature, one-dimensional input, n_features_in_.
NOT_FOR_PAIRS = {
    "check_fit_score_takes_y": "score takes pairs and labels, not rows and y",
    "check_pipeline_consistency": "calls score on rows",
    "check_n_features_in_after_fitting": "calls score on rows",
    "check_estimators_empty_data_messages": "no rows make no pairs: refused in other words",
    "check_fit2d_1sample": "one row makes no pair: refused in other words",
    "check_requires_y_none": "the labels of pairs are refused in other words",
}
CHECKED = {
    "BT_MLP": RowsBT_MLP(hidden=(8, 4)),
    "BT_Linear": RowsBT_Linear(),
    "CLF_Linear": RowsCLF_Linear(),
    "CLF_LGBM": RowsCLF_LGBM(n_estimators=3),
    "CLF_Any": RowsCLF_Any(LogisticRegression()),
    "BT_Laplace": RowsBT_Laplace(),
    "Regression_Ridge": RowsRidge(),
    "Ensemble": RowsEnsemble(BT_Linear(alpha=1.0), n=2, bootstrap=True),
}
if not has_lightgbm():
    del CHECKED["CLF_LGBM"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", CHECKED.values(), ids=CHECKED)
def test_scikit_learns_estimator_checks(model):
    found = check_estimator(model, expected_failed_checks=NOT_FOR_PAIRS, on_fail=None, on_skip=None)
    failed = {
        check["check_name"]: str(check["exception"])
        for check in found
        if check["status"] == "failed"
    }
    assert not failed
    assert sum(check["status"] == "passed" for check in found) >= 34


# ----------------------------------------------------------------------------------------- refusals


@each
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, y: (p[:, 0], y), r"should be \(M, 2, D\).*got \(\d+, 6\)"),
        (lambda p, y: (p[:, :1], y), r"should be \(M, 2, D\).*got \(\d+, 1, 6\)"),
        (lambda p, y: (p[:, [0, 1, 1]], y), r"should be \(M, 2, D\).*got \(\d+, 3, 6\)"),
        (lambda p, y: (p[..., :0], y), r"should be \(M, 2, D\).*got \(\d+, 2, 0\)"),
        (lambda p, y: (p[:0], y[:0]), r"at least one pair; got \(0, 2, 6\)"),
        (lambda p, y: (p, y[:-1]), r"labels should be \(\d+,\)"),
        (
            lambda p, y: (p, y * 2 - 1),
            r"labels should be \(\d+,\) of 0 and 1.*got -1 among the labels",
        ),
        (
            lambda p, y: (p, np.where(y, np.nan, 0)),
            r"labels should be \(\d+,\) of 0 and 1.*got nan",
        ),
        (
            lambda p, y: (p, np.ones_like(y)),
            "labels should hold both 0 and 1; got 1 only: put the preferred response",
        ),
        (lambda p, y: (p, np.zeros_like(y)), "labels should hold both 0 and 1; got 0 only"),
        (lambda p, y: (np.where(p == p[0, 0, 0], np.nan, p), y), "finite; got NaN or inf"),
        (lambda p, y: (np.where(p == p[0, 0, 0], 1e39, p), y), "finite; got NaN or inf"),
    ],
)
def test_refusals_of_pairs(problem, model, change, message):
    rows, index, labels, _ = problem
    with pytest.raises(ValueError, match=message) as refused:
        clone(model).fit(*change(rows[index].astype(float), labels))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "model", [BT_Linear(), BT_MLP(**SMALL), Ensemble(BT_Linear(), bootstrap=True)]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, x: (i.astype(float), x), r"row numbers as integers; got \(\d+, 2\) of float64"),
        (lambda i, x: (i[:, 0], x), r"expected \(M, 2\) row numbers"),
        (lambda i, x: (i, x[:, 0]), r"expected \(M, 2\) row numbers"),
        (lambda i, x: (i + 1, x), r"row numbers should be 0 to 199; got \d+ to 200"),
        (lambda i, x: (i - 1, x), r"row numbers should be 0 to 199; got -1"),
    ],
)
def test_refusals_of_row_numbers(problem, model, change, message):
    rows, index, labels, _ = problem
    index, matrix = change(index, rows)
    with pytest.raises(ValueError, match=message):
        clone(model).fit(index, labels, embeddings=matrix)


@each
def test_refusals_of_predict(problem, model):
    rows, index, labels, _ = problem
    model = clone(model)
    with pytest.raises(NotFittedError):
        model.predict(rows)
    with pytest.raises(
        ValueError,
        match=r"groups should be \(\d+,\), one for each pair or rated prompt; got \(3,\)",
    ):
        model.fit(index, labels, embeddings=rows, groups=np.arange(3))
    model.fit(index, labels, embeddings=rows)
    for wrong, message in (
        (
            rows[:, :5],
            r"X has 5 features, but \w+ is expecting 6 .*should have 6 dimensions; got \(200, 5\)",
        ),
        (rows[0], r"embeddings should be \(M, D\) or \(N, K, D\); got \(6,\)"),
        (rows[None, None], r"embeddings should be \(M, D\) or \(N, K, D\); got \(1, 1, 200, 6\)"),
        (rows[:0], r"at least one response; got \(0, 6\)"),
        (np.where(rows == rows[7, 0], np.nan, rows), "finite; got NaN or inf"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(wrong)


@pytest.mark.parametrize(
    "model", [BT_Linear(alpha=0.0), CLF_Linear(alpha=-1.0), BT_Laplace(alpha=np.nan)]
)
def test_refuses_a_penalty_that_is_none(problem, model):
    rows, index, labels, _ = problem
    with pytest.raises(ValueError, match="alpha should be above 0, or None"):
        model.fit(index, labels, embeddings=rows)


# ------------------------------------------------------------------------------------ linear models


def test_bt_linear_is_logistic_regression_on_differences(problem):
    rows, index, labels, _ = problem
    model = BT_Linear(alpha=2.0).fit(index, labels, embeddings=rows)
    reference = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-10, max_iter=10_000)
    reference.fit((rows[index[:, 0]] - rows[index[:, 1]]).astype(float), labels)
    np.testing.assert_allclose(model.coef_, reference.coef_[0], rtol=1e-5)
    np.testing.assert_allclose(
        model.predict(rows)[:, 0], rows @ reference.coef_[0], rtol=1e-4, atol=1e-5
    )


def test_clf_linear_is_logistic_regression_on_responses(problem):
    rows, index, labels, _ = problem
    model = CLF_Linear(alpha=2.0).fit(index, labels, embeddings=rows)
    reference = LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000)
    single = np.concatenate([rows[index[:, 0]], rows[index[:, 1]]]).astype(float)
    reference.fit(single, np.concatenate([labels, 1 - labels]))
    np.testing.assert_allclose(
        model.predict(rows)[:, 0], reference.decision_function(rows.astype(float)), rtol=1e-5
    )
    by_any = (
        CLF_Any(LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000))
        .fit(rows[index], labels)
        .predict(rows)
    )
    np.testing.assert_allclose(by_any, model.predict(rows), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [BT_Linear, CLF_Linear])
def test_the_penalty_is_the_strongest_within_an_error_of_the_best(kind):
    """Little noise asks for a weak penalty, random labels ask for the strongest."""
    for noise, check in ((0.05, lambda s: s <= 0.1), (1e6, lambda s: s == 1.0)):
        rows, index, labels, groups = make_problem(m=600, noise=noise)
        model = kind().fit(index, labels, embeddings=rows, groups=groups)
        spread = rows[index.ravel()].var(0).sum()
        assert check(round(model.alpha_ / len(labels) / spread, 6)), (noise, model.alpha_)
    assert kind().fit(
        index, labels, embeddings=rows, groups=np.zeros(len(labels))
    ).alpha_ == pytest.approx(len(labels) * spread, rel=1e-5)


def test_held_out_groups_are_whole(problem, monkeypatch):
    rows, index, labels, groups = problem
    seen = []

    def spy(fit, rows, pairs, labels, folds, held_folds, penalties):
        seen.append(folds)
        return np.zeros((len(penalties), len(pairs)))

    monkeypatch.setattr(solvers, "held_out_logits", spy)
    BT_Linear(cv=4).fit(index, labels, embeddings=rows, groups=groups)
    assert len(np.unique(seen[0])) == 4
    assert all(len(np.unique(seen[0][groups == g])) == 1 for g in np.unique(groups))


# ------------------------------------------------------------------------------------------ Laplace


def test_laplace_in_one_dimension_has_the_closed_form():
    """Eight pairs of x = 2 against x = 0, of which six prefer x = 2.

    The MAP estimate solves 2 (8 p - 6) + w / 2 = 0, where p = sigmoid(2 w).
    """
    rows, index = np.array([[0.0], [2.0]]), np.array([[1, 0]] * 8)
    model = BT_Laplace(alpha=0.5).fit(index, [1, 1, 1, 1, 1, 1, 0, 0], embeddings=rows)
    p = expit(2 * model.coef_[0])
    assert 2 * (8 * p - 6) + 0.5 * model.coef_[0] == pytest.approx(0, abs=1e-6)
    variance = 1 / (8 * p * (1 - p) * 2**2 + 0.5)
    assert model.covariance_[0, 0] == pytest.approx(variance, rel=1e-6)
    mean, std = model.predict(np.array([[3.0], [1.0]]), return_std=True)
    # The mean response is 1.
    np.testing.assert_allclose(mean[:, 0], [2 * model.coef_[0], 0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(std[:, 0], [2 * np.sqrt(variance), 0], rtol=1e-6, atol=1e-9)
    mean, std = model.predict_difference(np.array([[[3.0], [-1.0]]]))
    assert mean == pytest.approx(4 * model.coef_[0]) and std == pytest.approx(4 * np.sqrt(variance))


def test_laplace_means_are_those_of_the_linear_model(problem):
    rows, index, labels, _ = problem
    plain = BT_Linear(alpha=3.0).fit(index, labels, embeddings=rows).predict(rows)
    model = BT_Laplace(alpha=3.0).fit(index, labels, embeddings=rows)
    mean, std = model.predict(rows.reshape(20, 10, D), return_std=True)
    assert mean.shape == std.shape == (20, 10, 1) and (std > 0).all()
    np.testing.assert_allclose(np.ptp(mean.ravel() - plain[:, 0]), 0, atol=1e-5)
    np.testing.assert_allclose(model.predict(rows), mean.reshape(-1, 1), atol=1e-6)
    by_index, by_pairs = (
        model.predict_difference(index[:9], rows),
        model.predict_difference(rows[index[:9]]),
    )
    np.testing.assert_allclose(by_index, by_pairs, rtol=1e-6)
    np.testing.assert_allclose(
        by_index[0], plain[index[:9, 0], 0] - plain[index[:9, 1], 0], atol=1e-5
    )


def test_an_offset_of_all_embeddings_leaves_the_deviations():
    rows, index, labels, _ = make_problem(noise=1.0)
    near = BT_Laplace(alpha=1.0).fit(index, labels, embeddings=rows)
    far = BT_Laplace(alpha=1.0).fit(index, labels, embeddings=rows + np.float32(50))
    for a, b in zip(
        near.predict(rows, return_std=True),
        far.predict(rows + np.float32(50), return_std=True),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)


def test_laplace_covers_the_truth_it_was_drawn_from():
    """Weights from the prior, labels from the model: 95 % intervals hold about 95 % of the gaps."""
    inside = []
    for seed in range(30):
        draw = rng(100 + seed)
        rows, weights = draw.standard_normal((60, 4)), draw.standard_normal(4)
        index = draw.integers(60, size=(80, 2))
        gap = (rows[index[:, 0]] - rows[index[:, 1]]) @ weights
        labels = (draw.random(80) < expit(gap)).astype(int)
        mean, std = (
            BT_Laplace(alpha=1.0)
            .fit(index, labels, embeddings=rows)
            .predict_difference(index, rows)
        )
        inside.append((np.abs(mean - gap) <= 1.96 * std)[std > 0])
    assert 0.9 < np.concatenate(inside).mean() < 0.99


def test_more_pairs_leave_less_doubt():
    rows, index, labels, _ = make_problem(m=2000, noise=1.0)
    few, many = (
        BT_Laplace(alpha=1.0).fit(index[:m], labels[:m], embeddings=rows) for m in (50, 2000)
    )
    few, many = (model.predict_difference(index[:100], rows)[1] for model in (few, many))
    differs = index[:100, 0] != index[:100, 1]
    assert (many[differs] < few[differs]).all()


def test_the_prior_of_laplace_is_the_best_by_the_plain_loss():
    rows, index, labels, groups = make_problem(m=600, noise=3.0)
    model = BT_Laplace(cv=4).fit(index, labels, embeddings=rows, groups=groups)
    folds, spread = _folds(model, groups), rows[index.ravel()].var(0).sum()
    losses = []
    for strength in solvers.STRENGTHS:
        loss = 0.0
        for held in (folds == fold for fold in range(4)):
            fitted = BT_Linear(alpha=strength * spread * (~held).sum())
            fitted.fit(index[~held], labels[~held], embeddings=rows)
            first, second = fitted.predict(rows)[index[held], 0].T
            loss += solvers.logistic_loss(first - second, labels[held]).sum()
        losses.append(loss)
    assert model.alpha_ == pytest.approx(
        solvers.STRENGTHS[int(np.argmin(losses))] * spread * len(labels), rel=1e-5
    )
    assert np.argmin(losses) not in (0, len(losses) - 1)


def test_last_layer_laplace_scores_as_its_network(problem):
    rows, index, labels, _ = problem
    network = BT_MLP(**SMALL).fit(index, labels, embeddings=rows)
    network_to_fit = BT_MLP(**SMALL)
    fitted = BT_Laplace(features=network_to_fit).fit(index, labels, embeddings=rows)
    assert not hasattr(network_to_fit, "model_")
    frozen = BT_Laplace(features=FrozenEstimator(network)).fit(
        index[:50], labels[:50], embeddings=rows
    )
    for model in (fitted, frozen):
        mean, std = model.predict(rows, return_std=True)
        np.testing.assert_allclose(np.ptp(mean - network.predict(rows)), 0, atol=1e-4)
        assert std.shape == (200, 1) and (std > 0).all() and model.covariance_.shape == (8, 8)
    features = network.features(rows)
    assert features.shape == (200, 8) and network.features(rows.reshape(20, 10, D)).shape == (
        20,
        10,
        8,
    )
    bias = float(network.model_.fc3.bias.detach())
    np.testing.assert_allclose(
        features @ network.output_weights() + bias, network.predict(rows)[:, 0], atol=1e-5
    )


def test_the_prior_of_the_last_layer_has_the_highest_evidence():
    hessian, weights = np.diag([4.0, 1.0, 0.0]), np.array([1.0, -2.0, 0.5])
    alpha = _evidence_alpha(hessian, weights)

    def evidence(a):
        return (
            1.5 * np.log(a) - 0.5 * a * weights @ weights - 0.5 * np.log(np.diag(hessian) + a).sum()
        )

    grid = np.exp(np.linspace(-8, 6, 20001))
    assert alpha == pytest.approx(grid[np.argmax([evidence(a) for a in grid])], rel=1e-3)


# ----------------------------------------------------------------------------------- classification


def test_clf_any_takes_probabilities_where_there_is_no_decision(problem):
    rows, index, labels, _ = problem
    forest = RandomForestClassifier(20, random_state=0)
    scores = CLF_Any(forest).fit(rows[index], labels).predict(rows)
    single = rows[index].reshape(-1, D), np.stack([labels, 1 - labels], 1).ravel()
    chance = clone(forest).fit(*single).predict_proba(rows)[:, 1]
    np.testing.assert_allclose(scores[:, 0], logit(np.clip(chance, 1e-6, 1 - 1e-6)), rtol=1e-6)
    assert np.isfinite(scores).all() and (chance == 1).any()


def test_clf_any_takes_pipelines_and_margins(problem):
    rows, index, labels, _ = problem
    for estimator in (make_pipeline(StandardScaler(), LogisticRegression()), LinearSVC()):
        scores = CLF_Any(estimator).fit(rows[index], labels).predict(rows)
        assert spearmanr(scores[:, 0], rows @ WEIGHTS).statistic > 0.95


def test_clf_any_refuses_what_is_no_classifier(problem):
    rows, index, labels, _ = problem
    with pytest.raises(
        ValueError, match="decision_function or predict_proba; LinearRegression has neither"
    ):
        CLF_Any(LinearRegression()).fit(rows[index], labels)


@trees
def test_clf_lgbm_is_lightgbms_classifier_by_default():
    import lightgbm

    rows, index, labels, _ = make_problem(m=1000, noise=0.3)
    scores = CLF_LGBM().fit(index, labels, embeddings=rows).predict(rows)
    single = rows[index].reshape(-1, D).astype(float), np.stack([labels, 1 - labels], 1).ravel()
    reference = lightgbm.LGBMClassifier(verbose=-1, n_jobs=1, force_col_wise=True).fit(*single)
    np.testing.assert_allclose(
        scores[:, 0], reference.predict(rows.astype(float), raw_score=True), rtol=1e-6
    )


@trees
def test_trees_do_not_depend_on_the_number_of_threads(problem):
    rows, index, labels, _ = problem
    one, two = (
        CLF_LGBM(n_estimators=5, n_jobs=n).fit(index, labels, embeddings=rows).predict(rows)
        for n in (1, 2)
    )
    np.testing.assert_array_equal(one, two)


def test_lightgbm_is_named_where_it_is_missing(problem, monkeypatch):
    rows, index, labels, _ = problem
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    assert not has_lightgbm()
    with pytest.raises(
        ImportError,
        match=r'CLF_LGBM needs the package lightgbm; pip install -e "\.\[trees\]"',
    ):
        CLF_LGBM().fit(index, labels, embeddings=rows)


def test_the_order_error_of_a_classifier_is_within_its_bound(tmp_path):
    """The union bound of arXiv 2411.04991 holds at any threshold, on held-out demo prompts."""
    sizes = [
        "--n_prompts",
        "80",
        "--n_splits",
        "6",
        "--n_test_prompts",
        "2",
        "--n_test_splits",
        "2",
        "--emb_dim",
        "32",
    ]
    generate_demo_data.main([*sizes, "--output_dir", str(tmp_path)])
    data = embeddings.load(tmp_path)
    folds = splits.assign_folds(data.groups, 4, rng())
    options = {
        "pairing": "xprompt",
        "consider_first_n": 2,
        "quality": 5.0,
        "scale": data.rewards.std(),
    }
    drawn = pairs.build(data.rewards, folds, n_pairs=8, rng=rng(1), **options)
    index = drawn.prompts * 6 + drawn.responses
    matrix, fit = np.stack(data.embeddings, 1), drawn.folds > 0
    for model in (CLF_Linear(), CLF_MLP(**SMALL)):
        model.fit(index[fit], drawn.labels[fit], embeddings=matrix, groups=drawn.folds[fit])
        scores = model.predict(matrix).ravel()[index[~fit]]
        preferred, other = np.where(drawn.labels[~fit][:, None] == 1, scores, scores[:, ::-1]).T
        order_error = np.mean(preferred <= other)
        assert order_error < 0.35
        for threshold in (0.0, *np.quantile(scores, [0.1, 0.3, 0.5, 0.7])):
            assert order_error <= np.mean(preferred <= threshold) + np.mean(other > threshold)


# --------------------------------------------------------------------------------------- regression


def ratings(n=40, k=6, noise=0.1):
    rows = rng().standard_normal((n, k, D)) + 2 * rng(1).standard_normal((n, 1, D))
    offset = 3 * rng(2).standard_normal((n, 1))
    return rows, rows @ WEIGHTS + offset + noise * rng(3).standard_normal((n, k))


def test_ridge_is_scikit_learns():
    rows, golden = ratings()
    model = Regression_Ridge(alpha=5.0).fit(rows, golden[..., None])
    reference = Ridge(5.0).fit(rows.reshape(-1, D).astype(np.float32).astype(float), golden.ravel())
    np.testing.assert_allclose(
        model.predict(rows).ravel(), reference.predict(rows.reshape(-1, D)), rtol=1e-5, atol=1e-5
    )
    flat = Regression_Ridge(alpha=5.0).fit(rows.reshape(-1, D), golden.ravel())
    np.testing.assert_allclose(flat.coef_, model.coef_, rtol=1e-10)


def test_ridge_within_prompts_forgets_what_prompts_add():
    rows, golden = ratings()
    within, plain = (
        Regression_Ridge(within=True).fit(rows, golden),
        Regression_Ridge().fit(rows, golden),
    )
    assert np.abs(within.coef_ - WEIGHTS).max() < 0.05 < np.abs(plain.coef_ - WEIGHTS).max()
    moved = golden + 100 * rng(9).standard_normal((len(golden), 1))
    np.testing.assert_allclose(
        Regression_Ridge(within=True).fit(rows, moved).coef_, within.coef_, rtol=1e-6
    )


def test_ridge_in_blocks_and_its_folds_of_prompts(monkeypatch):
    rows, golden = ratings()
    model = Regression_Ridge().fit(rows, golden)
    monkeypatch.setattr(base, "BLOCK_BYTES", 8 * 6 * D * 3)
    blocks = Regression_Ridge().fit(rows, golden)
    np.testing.assert_allclose(blocks.coef_, model.coef_, rtol=1e-10)
    strength = model.alpha_ / golden.size / rows.reshape(-1, D).var(0).sum()
    assert min(abs(np.log(strength / s)) for s in solvers.STRENGTHS) < 1e-6


@pytest.mark.parametrize(
    ("rows", "golden", "options", "message"),
    [
        (np.zeros((4, 3)), np.zeros(5), {}, r"ratings should be \(4,\) or \(4, 1\); got \(5,\)"),
        (
            np.zeros((4, 3, 2)),
            np.zeros(4),
            {},
            r"ratings should be \(4, 3\) or \(4, 3, 1\); got \(4,\)",
        ),
        (np.zeros(4), np.zeros(4), {}, r"embeddings should be \(M, D\) or \(N, K, D\).*got \(4,\)"),
        (
            np.zeros((0, 3)),
            np.zeros(0),
            {},
            r"embeddings should be .* no axis of length 0; got \(0, 3\)",
        ),
        (
            np.zeros((4, 3)),
            np.zeros(4),
            {"within": True},
            r"embeddings should be \(N, K, D\), K .*got \(4, 3\)",
        ),
        (np.zeros((4, 3)), np.full(4, np.nan), {}, "ratings should be finite"),
        (np.full((4, 3), np.inf), np.zeros(4), {}, "embeddings should be finite"),
        (np.zeros((4, 3)), np.zeros(4), {"alpha": -1.0}, "alpha should be above 0"),
    ],
)
def test_refusals_of_ratings(rows, golden, options, message):
    with pytest.raises(ValueError, match=message):
        Regression_Ridge(**options).fit(rows, golden)


# ---------------------------------------------------------------------------------------- ensembles


def test_aggregations_of_an_ensemble(problem):
    rows, index, labels, groups = problem
    aggregated = {
        name: Ensemble(BT_Linear(alpha=1.0), n=4, bootstrap=True, aggregation=name, lcb_c=2.0)
        .fit(index, labels, embeddings=rows, groups=groups)
        .predict(rows)
        for name in ("mean", "min", "uwo", "lcb", "first")
    }
    members = Ensemble(BT_Linear(alpha=1.0), n=4, bootstrap=True).fit(
        index, labels, embeddings=rows, groups=groups
    )
    scores = members.predict_members(rows)
    assert scores.shape == (4, 200, 1) and members.predict_members(
        rows.reshape(20, 10, D)
    ).shape == (4, 20, 10, 1)
    np.testing.assert_allclose(aggregated["mean"], scores.mean(0))
    np.testing.assert_allclose(aggregated["min"], scores.min(0))
    np.testing.assert_allclose(aggregated["uwo"], scores.mean(0) - 0.5 * scores.var(0))
    np.testing.assert_allclose(aggregated["lcb"], scores.mean(0) - 2 * scores.std(0))
    np.testing.assert_allclose(aggregated["first"], scores[0])


def test_members_are_brought_to_one_scale_of_the_training_responses(problem):
    rows, index, labels, _ = problem
    model = Ensemble(BT_Linear(), n=3, bootstrap=True).fit(index, labels, embeddings=rows)
    scores = model.predict_members(rows[index.ravel()])
    np.testing.assert_allclose(scores.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(scores.std((1, 2)), 1, atol=1e-5)


def test_members_differ_by_seed_and_repeat_by_seed(problem):
    rows, index, labels, _ = problem
    model = Ensemble(BT_MLP(**SMALL), n=3).fit(index, labels, embeddings=rows)
    scores = model.predict_members(rows)
    assert len({member.random_state for member in model.estimators_}) == 3
    assert not np.allclose(scores[0], scores[1])
    np.testing.assert_array_equal(
        clone(model).fit(index, labels, embeddings=rows).predict_members(rows), scores
    )
    other = clone(model).set_params(random_state=1).fit(index, labels, embeddings=rows)
    assert not np.allclose(other.predict_members(rows), scores)


def test_nested_seeds_are_drawn_too(problem):
    rows, index, labels, _ = problem
    model = Ensemble(CLF_Any(RandomForestClassifier(5)), n=2).fit(index, labels, embeddings=rows)
    assert len({member.estimator.random_state for member in model.estimators_}) == 2


def test_a_model_without_chance_needs_a_bootstrap(problem):
    rows, index, labels, _ = problem
    with pytest.raises(ValueError, match="CLF_Linear draws nothing at random: set bootstrap=True"):
        Ensemble(CLF_Linear(alpha=1.0), n=3).fit(index, labels, embeddings=rows)


def test_a_bootstrap_draws_whole_groups(problem, monkeypatch):
    rows, index, labels, groups = problem
    seen, fit = [], BT_Linear._fit

    def remember(self, rows, index, labels, groups):
        seen.append(groups)
        fit(self, rows, index, labels, groups)

    monkeypatch.setattr(BT_Linear, "_fit", remember)
    groups = np.repeat([5, 6, 9, 12], 3)
    Ensemble(BT_Linear(), n=4, bootstrap=True).fit(
        index[:12], labels[:12], embeddings=rows, groups=groups
    )
    counts = np.concatenate([np.bincount(drawn) for drawn in seen])
    assert len(seen) == 4 and (counts % 3 == 0).all() and (counts > 3).any()


def test_a_bootstrap_holds_both_labels():
    for seed in range(20):
        assert 0 in Ensemble(BT_Linear())._draw(np.array([1, 0, 0, 0, 0]), np.arange(5), rng(seed))


def test_an_ensemble_of_ridges_draws_prompts():
    rows, golden = ratings(noise=1.0)
    model = Ensemble(Regression_Ridge(within=True), n=3, bootstrap=True).fit(
        rows, golden[..., None]
    )
    assert model.predict(rows).shape == (40, 6, 1)
    assert spearmanr(model.predict(rows).ravel(), (rows @ WEIGHTS).ravel()).statistic > 0.95


@pytest.mark.parametrize("change", [{"aggregation": "median"}, {"n": 0}])
def test_refuses_other_aggregations_and_no_members(problem, change):
    rows, index, labels, _ = problem
    with pytest.raises(
        ValueError, match="expected n of at least 1 and aggregation mean, min, uwo, lcb or first"
    ):
        Ensemble(BT_Linear(), bootstrap=True, **change).fit(index, labels, embeddings=rows)


# ------------------------------------------------------------------------------------- names, files


def test_names_of_models():
    assert registry.model_class("mlp", "clf") is CLF_MLP
    assert registry.model_class("laplace", "bt") is BT_Laplace
    for name in (("lgbm", "bt"), ("tree", "bt"), ("ridge", "clf")):
        with pytest.raises(
            InputError,
            match=f"expected one of mlp bt, mlp clf, linear bt, .* found {' '.join(name)}",
        ):
            registry.model_class(*name)


SAVED = {
    "BT_Linear": BT_Linear(alpha=1.0),
    "CLF_Linear": CLF_Linear(),
    "BT_Laplace": BT_Laplace(),
    "CLF_LGBM": CLF_LGBM(n_estimators=20),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_scores_the_same_and_in_the_same_bytes(tmp_path, problem, name):
    if name == "CLF_LGBM" and not has_lightgbm():
        pytest.skip("lightgbm is not installed")
    rows, index, labels, _ = problem
    model = clone(SAVED[name]).fit(index, labels, embeddings=rows)
    path = model_files.save(tmp_path / "a.seed6_lr0.1", model)
    assert path.name == "a.seed6_lr0.1" + (".txt" if name == "CLF_LGBM" else ".npz")
    loaded = model_files.load(path, D)
    assert type(loaded) is type(model)
    np.testing.assert_array_equal(loaded.predict(rows), model.predict(rows))
    assert model_files.save(tmp_path / "b", loaded).read_bytes() == path.read_bytes()
    if name == "BT_Laplace":
        for a, b in zip(
            loaded.predict_difference(index, rows),
            model.predict_difference(index, rows),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="expected a model of 5-dimensional embeddings, found 6"):
        model_files.load(path, 5)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"a\.seed6_lr0\.1\.\w+: expected a .*found"):
        model_files.load(path, D)


def test_ridge_is_saved_too(tmp_path):
    rows, golden = ratings()
    model = Regression_Ridge().fit(rows, golden)
    loaded = model_files.load(model_files.save(tmp_path / "a", model), D)
    np.testing.assert_array_equal(loaded.predict(rows), model.predict(rows))


@trees
def test_damaged_trees_are_never_given_to_lightgbm(tmp_path, problem, monkeypatch):
    rows, index, labels, _ = problem
    path = model_files.save(
        tmp_path / "a", CLF_LGBM(n_estimators=3).fit(index, labels, embeddings=rows)
    )
    content = path.read_bytes()
    monkeypatch.setattr("lightgbm.Booster", lambda **_: pytest.fail("parsed a damaged file"))
    for damaged in (
        content.replace(b"split_feature=", b"split_feature=9"),
        content[: len(content) // 2],
        b"",
        b"tree\n",
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="found a damaged or other file; save the model again"):
            model_files.load(path, D)


def test_models_without_a_portable_form_say_so(tmp_path, problem):
    rows, index, labels, _ = problem
    for model in (
        CLF_Any(LogisticRegression()),
        BT_MLP(**SMALL),
        BT_Laplace(features=BT_MLP(**SMALL)),
        Ensemble(BT_Linear(), n=2, bootstrap=True),
    ):
        with pytest.raises(
            ValueError, match=f"{type(model).__name__}: expected a linear model .*use joblib.dump"
        ):
            model_files.save(tmp_path / "a", model.fit(index, labels, embeddings=rows))
    with pytest.raises(NotFittedError):
        model_files.save(tmp_path / "a", BT_Linear())
    assert list(tmp_path.iterdir()) == []


def write(path, **arrays):
    content = {
        "model": "BT_Linear",
        "coef_": np.zeros(3),
        "intercept_": 0.0,
        "alpha_": 1.0,
    } | arrays
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"model": "Pipeline"}, "expected the arrays of one of BT_Linear, CLF_Linear"),
        ({"model": None}, "expected the arrays of one of"),
        ({"coef_": None}, "expected the arrays of one of"),
        ({"coef_": np.zeros((3, 1))}, r"expected the arrays of one of .*'coef_': \(3, 1\)"),
        ({"coef_": np.zeros(0)}, "expected the arrays of one of"),
        ({"center_": np.zeros(3)}, "expected the arrays of one of"),
        (
            {"model": "BT_Laplace", "center_": np.zeros(3), "covariance_": np.zeros((3, 2))},
            "expected the arrays",
        ),
        ({"coef_": np.array([0, 1, np.nan])}, "expected finite numbers"),
        ({"coef_": np.array(["a", "b", "c"])}, "expected finite numbers"),
    ],
)
def test_arrays_that_make_no_model(tmp_path, arrays, message):
    with pytest.raises(InputError, match=rf"a\.npz: {message}"):
        model_files.load(write(tmp_path / "a.npz", **arrays), 3)


def test_nothing_is_unpickled(tmp_path):
    """Loading an object array could run any code that the file holds."""

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    path = write(tmp_path / "a.npz", coef_=np.array([Trap()], dtype=object))
    with pytest.raises(InputError, match="expected a saved reward model, found an unreadable file"):
        model_files.load(path, 3)
    joblib.dump(Trap(), tmp_path / "b.npz")
    with pytest.raises(InputError, match="expected a saved reward model, found an unreadable file"):
        model_files.load(tmp_path / "b.npz", 3)
    assert not (tmp_path / "trapped").exists()


def test_a_file_that_is_not_there(tmp_path):
    for name in ("a.npz", "a.txt") if has_lightgbm() else ("a.npz",):
        with pytest.raises(InputError, match=f"{name} not found; step 5 writes reward models"):
            model_files.load(tmp_path / name, 3)


# ---------------------------------------------------------------------------------------- benchmark


def test_the_benchmark_measures_every_setting_beside_the_baselines(tmp_path, capsys):
    for split, n, k in (("train", 24, 4), ("test", 10, 5)):
        rows = rng(n).standard_normal((k, n, D)).astype(np.float32)
        np.save(tmp_path / f"EMBD_toy_mini_mix_{split}.npy", rows)
        np.save(tmp_path / f"REWARD_toy_judge_mix_{split}.npy", (rows @ WEIGHTS).astype(np.float32))
    np.save(tmp_path / "lengths.npy", np.arange(50.0).reshape(5, 10))
    names = [
        "--task",
        "toy",
        "--gen_model",
        "mix",
        "--embed_model",
        "mini",
        "--lengths",
        str(tmp_path / "lengths.npy"),
    ]
    chosen = ["--models", "BT_Linear", "BT_MLP", "ridge", "--qualities", "5", "-1", "--seeds", "2"]
    benchmark.main(
        ["--data", str(tmp_path), *names, *chosen, "--output", str(tmp_path / "out.json")]
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["baselines"]) == ["random", "length", "oracle"]
    assert found["baselines"]["oracle"]["spearman"] == pytest.approx(1)
    assert [(s["pairing"], s["quality"]) for s in found["settings"]] == [
        (pairing, quality) for pairing in ("xprompt", "sameprompt") for quality in (5, -1)
    ]
    for setting in found["settings"]:
        assert list(setting["models"]) == ["BT_Linear", "BT_MLP", "ridge"]
        assert (setting["label_error"] == 0) == (setting["quality"] < 0)
        assert setting["models"]["BT_Linear"]["spearman"] > 0.7
        assert setting["models"]["ridge"]["spearman_ci95"][0] > 0.95
    assert (
        "sameprompt, annotation quality -1: label error 0.000, mean of 2 seeds"
        in capsys.readouterr().out
    )


def test_the_names_that_the_command_line_checks_are_those_of_the_classes():
    assert {name: tuple(kinds) for name, kinds in registry.MODELS.items()} == OBJECTIVES
