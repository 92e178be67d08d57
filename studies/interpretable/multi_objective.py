"""Attribute rewards: a linear head for each attribute, made uncorrelated with verbosity.

Stage 1 of ArmoRM (Wang et al., "Interpretable Preferences via Multi-Objective Reward Modeling and
Mixture-of-Experts", arXiv 2406.12845, section 3): multi-objective regression on frozen embeddings,
then r_a - penalty_a * r_verbosity with a penalty that brings Spearman's rho with r_verbosity near
0. Heads are fitted to ratings (ridge) or to preferences about a concept (logistic).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import scipy.linalg
from scipy.linalg import blas

from rewardlib.errors import InputError
from rewardlib.measures import ranking
from rewardlib.models import solvers
from studies.interpretable import tensor_files
from studies.interpretable.attribute_data import Rated

STRENGTHS = tuple(10.0**exponent for exponent in range(-4, 5))
# The penalties that the code of the authors tries in turn: RLHFlow/RLHF-Reward-Modeling,
# armo-rm/stage-2_train.py.
PENALTY_GRID = (
    0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55,
    0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95,
)  # fmt: skip
THRESHOLD = 0.03
HEADS = "attribute_heads.safetensors"
MADE_BY = "studies/interpretable_regression.py"
GRAM_BYTES = 1 << 31  # size of the Gram matrices that are summed in one pass over the data


# -------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class AttributeModel:
    """Linear attribute heads with their penalties against verbosity.

    heads: (A, D) float32; penalties: (A,) float64, 0 for verbosity itself; attributes: A names;
    verbosity: name of the attribute that the others are debiased against, or None; offsets: (A,)
    float64, 0 unless intercepts were fitted.
    """

    heads: np.ndarray
    penalties: np.ndarray
    attributes: list[str]
    verbosity: str | None
    offsets: np.ndarray | float = 0.0


def scores(model: AttributeModel, embeddings: np.ndarray) -> np.ndarray:
    """Raw attribute scores (..., A) float64 of embeddings (..., D)."""
    return np.asarray(embeddings, np.float32) @ model.heads.T + np.asarray(model.offsets, float)


def debias(model: AttributeModel, raw: np.ndarray) -> np.ndarray:
    """Debiased scores r_a - penalty_a * r_verbosity (..., A) of raw scores (..., A).

    arXiv 2406.12845, section 3.
    """
    if model.verbosity is None:
        return np.asarray(raw, float)
    verbosity = list(model.attributes).index(model.verbosity)
    return raw - model.penalties * raw[..., [verbosity]]


def score_rows(model: AttributeModel, data: Rated, rows: np.ndarray) -> np.ndarray:
    """Raw scores of m rows of a prepared file: (m, A) of responses, (m, 2, A) of pairs."""
    raw = np.empty((len(rows), *data.shape[1:-1], len(model.attributes)))
    for block, embeddings in data.blocks(rows):
        raw[block] = scores(model, embeddings)
    return raw


def score_responses(
    model: AttributeModel, data: Rated, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(raw scores (r, A), prompt numbers (r,)) of the r responses of rows; a pair has two."""
    raw = score_rows(model, data, rows)
    return raw.reshape(-1, raw.shape[-1]), np.repeat(data.groups[rows], 2 if data.is_pairs else 1)


def save(output_dir: Path, model: AttributeModel, strengths: np.ndarray, labels: str) -> None:
    """Write the model, its ridge strengths (A,) and the kind of its labels: ratings or pairwise."""
    description = {
        "attributes": list(model.attributes),
        "verbosity": model.verbosity,
        "strengths": [float(strength) for strength in strengths],
        "labels": labels,
    }
    tensors = {
        "penalties": [np.asarray(model.penalties, float)],
        "offsets": [np.broadcast_to(np.asarray(model.offsets, float), len(model.attributes))],
        "heads": [np.asarray(model.heads, np.float32)],
    }
    metadata = {name: json.dumps(value) for name, value in description.items()}
    tensor_files.write_tensors(Path(output_dir) / HEADS, tensors, metadata)


def load(output_dir: Path, data: Rated | None = None) -> AttributeModel:
    """The model in a model folder.

    InputError where the model is absent, or expects another number of dimensions than `data` has.
    """
    path = Path(output_dir) / HEADS
    if not path.exists():
        raise InputError(f"{path} not found; it is written by {MADE_BY}: run that first")
    arrays, metadata = tensor_files.map_tensors(path)
    try:
        names = {name: json.loads(metadata[name]) for name in ("attributes", "verbosity")}
        tensors = {name: np.array(arrays[name]) for name in ("heads", "penalties", "offsets")}
        model = AttributeModel(**tensors, **names)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: expected heads, penalties, offsets and attributes, found no {error}; "
            f"run {MADE_BY}"
        ) from None
    n = len(model.attributes)
    shapes = [tensor.shape for tensor in tensors.values()]
    if model.heads.ndim != 2 or len(model.heads) != n or shapes[1:] != [(n,), (n,)]:
        raise InputError(
            f"{path}: expected heads ({n}, D), penalties and offsets ({n},), found {shapes}; "
            f"run {MADE_BY} again"
        )
    if data is not None and data.shape[-1] != model.heads.shape[1]:
        raise InputError(
            f"{data.path}: expected embeddings of {model.heads.shape[1]} dimensions, to which "
            f"{path} was fitted, found {data.shape[-1]}; embed both with one model"
        )
    return model


# --------------------------------------------------------------------------------------- regression


@dataclass(frozen=True)
class Fit:
    """Fitted heads of A attributes, chosen among S strengths.

    heads: (A, D) float64; offsets: (A,); strengths: (A,) the chosen ones; losses: (S, A) of each
    strength on the validation rows.
    """

    heads: np.ndarray
    offsets: np.ndarray
    strengths: np.ndarray
    losses: np.ndarray


def fit_ridge(
    data: Rated,
    fit: np.ndarray,
    held: np.ndarray,
    strengths: tuple[float, ...] = STRENGTHS,
    intercept: bool = False,
) -> Fit:
    """A ridge regression for each attribute: min |y - X w|^2 + strength |w|^2.

    arXiv 2406.12845, section 3. data: rated responses with labels; fit, held: row numbers of fit
    and validation prompts. A row without a label for an attribute is left out of that attribute
    alone. For each attribute the strength with the lowest squared error on `held` is chosen, then
    both parts are fitted. The losses of the result are mean squared errors.

    Attributes whose labels are missing in the same rows share one Gram matrix and one
    eigendecomposition, which gives all strengths: D x D, or n x n where fewer than D rows are
    labelled. All arithmetic is float64: in float32 the rounding errors of a Gram matrix exceed the
    small strengths. Gram matrices are summed in blocks of rows, as many of them in one pass over
    the data as GRAM_BYTES holds.

    The paper fits no intercept. Embeddings without a nearly constant direction need an intercept,
    which is fitted without penalty.
    """
    rows, labels, is_fit = _labelled(data, fit, held)
    strengths, result = np.asarray(strengths, float), _empty(data, len(strengths))
    for columns, sums, basis in _parts(data, rows, labels, is_fit):
        weights, result.offsets[columns], result.strengths[columns], result.losses[:, columns] = (
            _ridge(*sums, strengths, intercept)
        )
        result.heads[columns] = (weights if basis is None else basis @ weights).T
    return result


def fit_pairwise(
    data: Rated, fit: np.ndarray, held: np.ndarray, strengths: tuple[float, ...] = STRENGTHS
) -> Fit:
    """A logistic regression for each concept: P(response 0 is preferred) = sigmoid(w (x_0 - x_1)).

    data: pairs with labels in [0, 1]; fit, held: as in fit_ridge. Minimises the summed log loss +
    strength / 2 |w|^2, as scikit-learn's LogisticRegression does with C = 1 / strength; see
    rewardlib/models/linear.py. The strength is chosen by log loss, and the losses of the result are
    log losses. The embeddings of all pairs with a label for a concept are held in memory, as
    float32.
    """
    rows, labels, is_fit = _labelled(data, fit, held)
    strengths, result = np.asarray(strengths, float), _empty(data, len(strengths))
    for attributes, known in missing_patterns(labels):
        x, sides = data.take(rows[known]).reshape(-1, data.shape[-1]), is_fit[known]
        pairs = np.arange(len(x)).reshape(-1, 2)
        for a in attributes:
            y, start = labels[known, a], None
            # Each fit starts at the solution of the next stronger penalty, which is near.
            for i in np.argsort(-strengths):
                start = solvers.fit_bt(x, pairs[sides], y[sides], strengths[i], start=start)
                logits = np.subtract(*solvers.product(x, start[0])[pairs[~sides]].T)
                result.losses[i, a] = solvers.logistic_loss(logits, y[~sides]).mean()
            result.strengths[a] = strengths[np.argmin(result.losses[:, a])]
            result.heads[a] = solvers.fit_bt(x, pairs, y, result.strengths[a])[0]
    return result


def missing_patterns(labels: np.ndarray) -> list[tuple[list[int], np.ndarray]]:
    """[(numbers of the attributes whose labels are missing in the same rows, labelled rows)].

    labels: (n, A) with NaN where missing; labelled rows: (n,) bool.
    """
    known, columns_by_pattern = ~np.isnan(labels), {}
    for a, column in enumerate(known.T):
        columns_by_pattern.setdefault(column.tobytes(), []).append(a)
    return [(columns, known[:, columns[0]]) for columns in columns_by_pattern.values()]


@dataclass
class _Moments:
    """Sums over n rows of embeddings X (n, D) and labels Y (n, a), in float64.

    gram: X'X (D, D), lower triangle; cross: X'Y (D, a); squares: sums of Y^2 (a,); x: sums of X
    (D,); y: sums of Y (a,).
    """

    gram: np.ndarray
    cross: np.ndarray
    squares: np.ndarray
    x: np.ndarray
    y: np.ndarray
    n: int = 0

    @classmethod
    def zeros(cls, n_dims, n_labels):
        gram = np.zeros((n_dims, n_dims), order="F")  # the order in which BLAS updates in place
        cross = np.zeros((n_dims, n_labels))
        return cls(gram, cross, np.zeros(n_labels), np.zeros(n_dims), np.zeros(n_labels))

    def add(self, x, y):
        if len(x):
            # One triangle and in place: half the work of x.T @ x.
            self.gram = blas.dsyrk(1.0, x.T, beta=1.0, c=self.gram, overwrite_c=1, lower=1)
            self.cross += x.T @ y
            self.squares += (y * y).sum(0)
            self.x += x.sum(0)
            self.y += y.sum(0)
            self.n += len(x)

    def __add__(self, other):
        return _Moments(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )

    def means(self):
        return self.x / self.n, self.y / self.n

    def about(self, x, y):
        """The sums of X - x and Y - y, for points x (D,) and y (a,)."""
        centred_x, centred_y = self.x - self.n * x, self.y - self.n * y
        gram = self.gram - np.outer(self.x, x) - np.outer(x, centred_x)
        cross = self.cross - np.outer(self.x, y) - np.outer(x, centred_y)
        squares = self.squares - 2 * y * self.y + self.n * y * y
        return _Moments(gram, cross, squares, centred_x, centred_y, self.n)


def _empty(data, n_strengths):
    """A Fit to be filled, with offsets of 0."""
    n = len(data.attributes)
    return Fit(np.empty((n, data.shape[-1])), np.zeros(n), np.empty(n), np.empty((n_strengths, n)))


def _labelled(data, fit, held):
    """(sorted row numbers (m,) of both parts, labels (m, A) float64, is_fit (m,) bool), checked."""
    rows = np.sort(np.concatenate([fit, held]))
    labels, is_fit = data.labels[rows].astype(float), np.isin(rows, fit)
    _check_labelled(data, labels, is_fit)
    return rows, labels, is_fit


def _check_labelled(data, labels, is_fit):
    for part, rows in (("fit", is_fit), ("validation", ~is_fit)):
        for name, n in zip(data.attributes, (~np.isnan(labels[rows])).sum(0), strict=True):
            if not n:
                raise InputError(
                    f"{data.path}: {name}: no labels on {part} prompts; add labels, leave the "
                    "attribute out, or give that part a larger share"
                )


def _parts(data, rows, labels, is_fit):
    """Yield (attribute numbers, (_Moments of the fit rows, of the held rows), basis).

    There is one part for each pattern of missing labels. basis: (D, n) of the row space where the
    moments are those of coordinates in this space, else None.
    """
    n_dims, patterns = data.shape[-1], missing_patterns(labels)
    for attributes, known in patterns:
        if known.sum() < n_dims:
            x_nD = np.concatenate([x for _, x in _features(data, rows[known])])
            # x = coordinates @ basis.T: in the row space of x the same problem has n dimensions
            # instead of D.
            basis_Dn, triangle = scipy.linalg.qr(x_nD.T, mode="economic", check_finite=False)
            x_nn = np.ascontiguousarray(triangle.T)
            y, sides = labels[known][:, attributes], is_fit[known]
            full = [(np.arange(len(attributes)), np.ones(len(x_nn), bool))]
            yield attributes, _sum([(slice(None), x_nn)], y, sides, full, len(x_nn))[0], basis_Dn
    tall = [pattern for pattern in patterns if pattern[1].sum() >= n_dims]
    step = max(1, GRAM_BYTES // (2 * 8 * n_dims**2))
    for batch in (tall[start : start + step] for start in range(0, len(tall), step)):
        sums = _sum(_features(data, rows), labels, is_fit, batch, n_dims)
        for attributes, _ in batch:
            # Popped, so that the Gram matrices of a part are freed once its heads are fitted.
            yield attributes, sums.pop(0), None


def _features(data, rows):
    """Yield (slice of `rows`, embeddings (m, D) float64)."""
    for block, embeddings in data.blocks(rows):
        yield block, embeddings.astype(float)


def _sum(blocks, labels, is_fit, patterns, n_dims):
    """[[_Moments of the fit rows, of the held rows]] of each pattern, in one pass over `blocks`."""
    sums = [
        [_Moments.zeros(n_dims, len(attributes)) for _ in range(2)] for attributes, _ in patterns
    ]
    for block, x in blocks:
        for (attributes, known), sides in zip(patterns, sums, strict=True):
            for moments, side in zip(sides, (is_fit[block], ~is_fit[block]), strict=True):
                use = known[block] & side
                moments.add(x[use], labels[block][use][:, attributes])
    return sums


def _eigh(gram):
    """Eigenvalues, at least 0, and eigenvectors of a Gram matrix given by its lower triangle."""
    values, vectors = scipy.linalg.eigh(gram, lower=True, driver="evd", check_finite=False)
    return np.maximum(values, 0), vectors  # rounding can put an eigenvalue of 0 below 0


def _ridge(fit, held, strengths, intercept):
    """(weights (D, a), offsets (a,), chosen strengths (a,), losses (S, a)) of one pattern.

    fit, held: _Moments of the fit and of the validation rows. With gram = V diag(v) V', the weights
    of every strength s are V (V' cross / (v + s)); their squared errors on the validation rows
    follow from the moments of these rows.
    """
    train = fit + held
    x, y = np.zeros_like(fit.x), np.zeros_like(fit.y)
    if intercept:
        centre, (x, y) = fit.means(), train.means()
        fit, held, train = fit.about(*centre), held.about(*centre), train.about(x, y)
    values, vectors = _eigh(fit.gram)
    shrunk_DSA = (vectors.T @ fit.cross)[:, None] / np.add.outer(values, strengths)[:, :, None]
    shape, flat = shrunk_DSA.shape, (len(values), -1)
    weights_DSA = (vectors @ shrunk_DSA.reshape(flat)).reshape(shape)
    fitted_DSA = blas.dsymm(1.0, held.gram, weights_DSA.reshape(flat), lower=1).reshape(shape)
    quadratic_SA = np.einsum("dsa,dsa->sa", weights_DSA, fitted_DSA)
    losses_SA = quadratic_SA - 2 * np.einsum("dsa,da->sa", weights_DSA, held.cross)
    losses_SA = (losses_SA + held.squares) / held.n
    chosen = strengths[np.argmin(losses_SA, 0)]
    heads_DA = np.empty_like(train.cross)
    for strength in np.unique(chosen):
        columns = chosen == strength
        heads_DA[:, columns] = _solve(train.gram, train.cross[:, columns], strength)
    return heads_DA, y - x @ heads_DA, chosen, losses_SA


def _solve(gram, cross, strength):
    """(gram + strength I)^-1 cross, of a Gram matrix given by its lower triangle."""
    system = gram.copy(order="F")
    system[np.diag_indices_from(system)] += strength
    try:
        factor = scipy.linalg.cho_factor(system, lower=True, overwrite_a=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        # The strength is below the rounding errors of a singular Gram matrix.
        values, vectors = _eigh(gram)
        return vectors @ ((vectors.T @ cross) / (values + strength)[:, None])
    return scipy.linalg.cho_solve(factor, cross, check_finite=False)


# ---------------------------------------------------------------------------------------- debiasing


@dataclass(frozen=True)
class Penalties:
    """Penalties of A attributes, and how they were found.

    penalties: (A,); tried: for each attribute [(penalty, rho)], by ascending penalty; unreached:
    names of attributes whose |rho| stays above the threshold.
    """

    penalties: np.ndarray
    tried: list[list[tuple[float, float]]]
    unreached: list[str]


def find_penalties(
    raw: np.ndarray,
    attributes: list[str],
    verbosity: str,
    threshold: float = THRESHOLD,
    search: str = "root",
    allow_unreached: bool = False,
) -> Penalties:
    """Penalties with |Spearman(r_a - penalty_a r_verbosity, r_verbosity)| <= threshold.

    arXiv 2406.12845, section 3. raw: (m, A) scores of the reference rows; verbosity: one of the A
    attributes, whose penalty is 0; search: as in find_penalty. InputError that names the attributes
    that do not reach the threshold, unless allow_unreached: these attributes then get the penalty
    with the smallest |rho|.
    """
    v = list(attributes).index(verbosity)
    if np.ptp(raw[:, v]) == 0:
        raise InputError(f"{verbosity}: all reference rows have the same score; add data")
    searches = [
        (0.0, True, []) if a == v else find_penalty(raw[:, a], raw[:, v], threshold, search)
        for a in range(len(attributes))
    ]
    penalties, reached, tried = zip(*searches, strict=True)
    unreached = [
        name for name, is_reached in zip(attributes, reached, strict=True) if not is_reached
    ]
    if unreached and not allow_unreached:
        raise InputError(
            f"{', '.join(unreached)}: no penalty brings |rho| with {verbosity} to {threshold:g} on "
            "the reference rows; give --allow_unreached, raise --threshold, or leave the attribute "
            "out"
        )
    return Penalties(np.array(penalties), list(tried), unreached)


def find_penalty(
    r: np.ndarray, v: np.ndarray, threshold: float, search: str = "root"
) -> tuple[float, bool, list[tuple[float, float]]]:
    """(penalty, whether |Spearman(r - penalty v, v)| <= threshold, [(penalty, rho)] of all tried).

    r, v: (m,) scores of the attribute and of verbosity. search "root": the zero of rho, of either
    sign, to a relative precision of 1e-6; a penalty that barely reached the threshold on these rows
    would miss it on every second set of other prompts. "grid": the first of PENALTY_GRID that
    reaches the threshold, as in the code of the authors. Where no penalty reaches the threshold,
    the one with the smallest |rho| is returned.
    """
    if np.ptp(r) == 0:
        return 0.0, True, []  # a constant correlates with nothing
    tried = {}

    def rho(penalty):
        tried[penalty] = ranking.global_spearman(r - penalty * v, v)
        return tried[penalty]

    if search == "grid":
        for penalty in PENALTY_GRID:
            if abs(rho(penalty)) <= threshold:
                break
    else:
        _bisect(rho, np.std(r) / np.std(v))
    distance = {
        penalty: abs(value) if np.isfinite(value) else np.inf for penalty, value in tried.items()
    }
    penalty = min(tried, key=lambda penalty: (distance[penalty], abs(penalty)))
    return penalty, distance[penalty] <= threshold, sorted(tried.items())


def _bisect(rho: Callable[[float], float], scale: float) -> None:
    """Try penalties around the zero of rho, first doubling from `scale`, then by bisection.

    As the penalty rises, rho falls in steps: each swap of neighbours in the order of r - penalty v
    lowers the one with the larger v.
    """
    sign = np.sign(rho(0.0))
    low, high = 0.0, float(scale)
    while sign * rho(sign * high) > 0:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if sign * rho(sign * middle) > 0 else (low, middle)
