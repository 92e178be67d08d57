"""Attribute rewards: a linear head per attribute on frozen embeddings, made uncorrelated with verbosity.

Stage 1 of ArmoRM (Wang et al., "Interpretable Preferences via Multi-Objective Reward Modeling and
Mixture-of-Experts", arXiv 2406.12845, section 3): multi-objective regression, then r_a - penalty_a
* r_verbosity with a penalty that brings Spearman's rho with r_verbosity near 0. Heads come from
ratings (ridge) or from preferences per concept (logistic).
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import scipy.linalg
from scipy.linalg import blas

from rewardlib.errors import InputError
from rewardlib.measures import ranking
from rewardlib.models import solvers
from studies.interpretable import attribute_data

STRENGTHS = tuple(10.0**exponent for exponent in range(-4, 5))
# The penalties that the authors' code tries in turn: RLHFlow/RLHF-Reward-Modeling,
# armo-rm/stage-2_train.py.
PENALTY_GRID = (
    0.0, 0.01, 0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75,
    0.8, 0.85, 0.9, 0.95,
)  # fmt: skip
THRESHOLD = 0.03
HEADS = "attribute_heads.safetensors"
MADE_BY = "studies/interpretable_regression.py"
GRAM_BYTES = 1 << 31  # of the Gram matrices that are summed in one pass


# -------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class AttributeModel:
    """heads (A, D) float32; penalties (A,) float64, 0 for verbosity itself; attributes: A names; verbosity: the name of
    the attribute that the others are debiased against, or None; offsets: (A,) float64, 0 unless intercepts were fitted.
    """

    heads: np.ndarray
    penalties: np.ndarray
    attributes: list
    verbosity: str | None
    offsets: np.ndarray | float = 0.0


def scores(model, x):
    """Raw attribute scores (..., A) float64 of embeddings (..., D)."""
    return np.asarray(x, np.float32) @ model.heads.T + np.asarray(model.offsets, float)


def debias(model, raw):
    """Raw scores (..., A) -> r_a - penalty_a * r_verbosity, (..., A). arXiv 2406.12845, section 3."""
    if model.verbosity is None:
        return np.asarray(raw, float)
    verbosity = list(model.attributes).index(model.verbosity)
    return raw - model.penalties * raw[..., [verbosity]]


def score_rows(model, data, rows):
    """Raw scores of rows of a prepared file: (m, A) of responses, (m, 2, A) of pairs."""
    found = np.empty((len(rows), *data.shape[1:-1], len(model.attributes)))
    for part, x in data.blocks(rows):
        found[part] = scores(model, x)
    return found


def score_responses(model, data, rows):
    """(raw scores (r, A), prompt numbers (r,)) of the responses of rows, of both sides where the data are pairs."""
    raw = score_rows(model, data, rows)
    return raw.reshape(-1, raw.shape[-1]), np.repeat(data.groups[rows], 2 if data.is_pairs else 1)


def save(output_dir, model, strengths, labels):
    """Write the model with the chosen ridge strengths (A,) and what it was fitted to, "ratings" or "pairwise"."""
    told = {
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
    metadata = {name: json.dumps(value) for name, value in told.items()}
    attribute_data.write_tensors(Path(output_dir) / HEADS, tensors, metadata)


def load(output_dir, data=None):
    """The model in a model folder; InputError where it is absent, or has not the dimensions of the prepared `data`."""
    path = Path(output_dir) / HEADS
    if not path.exists():
        raise InputError(f"{path} not found; it is written by {MADE_BY}: run that first")
    arrays, metadata = attribute_data.map_tensors(path)
    try:
        told = {name: json.loads(metadata[name]) for name in ("attributes", "verbosity")}
        tensors = {name: np.array(arrays[name]) for name in ("heads", "penalties", "offsets")}
        model = AttributeModel(**tensors, **told)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: expected heads, penalties, offsets and attributes, found no {error}; run {MADE_BY}"
        ) from None
    n = len(model.attributes)
    shapes = [tensor.shape for tensor in tensors.values()]
    if model.heads.ndim != 2 or len(model.heads) != n or shapes[1:] != [(n,), (n,)]:
        raise InputError(
            f"{path}: expected heads ({n}, D), penalties and offsets ({n},), found {shapes}; run {MADE_BY} again"
        )
    if data is not None and data.shape[-1] != model.heads.shape[1]:
        raise InputError(
            f"{data.path}: expected embeddings of {model.heads.shape[1]} dimensions as {path} was fitted to, "
            f"found {data.shape[-1]}; embed both with one model"
        )
    return model


# --------------------------------------------------------------------------------------- regression


@dataclass(frozen=True)
class Fit:
    """heads (A, D) float64; offsets (A,); strengths (A,) chosen; losses (S, A) of every strength on validation rows."""

    heads: np.ndarray
    offsets: np.ndarray
    strengths: np.ndarray
    losses: np.ndarray


def fit_ridge(data, fit, held, strengths=STRENGTHS, intercept=False):
    """A ridge regression per attribute: min |y - X w|^2 + strength |w|^2. arXiv 2406.12845, section 3.

    data: rated responses with labels; fit, held: row numbers that share no prompt. Rows without a
    label for an attribute are left out of that attribute alone. The strength with the lowest
    squared error on `held` is chosen per attribute, then both parts are fitted. Returns Fit, its
    losses being mean squared errors.

    Attributes that miss the same rows share one Gram matrix and one eigendecomposition, which gives
    all strengths: D x D, or n x n where fewer than D rows are labelled. All is float64: in float32
    the rounding errors of a Gram matrix exceed the small strengths. Gram matrices are summed in
    blocks of rows, as many in one pass as GRAM_BYTES holds.

    The paper fits no intercept; embeddings without a near-constant direction need one, fitted
    without penalty.
    """
    rows, labels, is_fit = _labelled(data, fit, held)
    strengths, found = np.asarray(strengths, float), _empty(data, len(strengths))
    for at, sums, basis in _parts(data, rows, labels, is_fit):
        weights, found.offsets[at], found.strengths[at], found.losses[:, at] = _ridge(
            *sums, strengths, intercept
        )
        found.heads[at] = (weights if basis is None else basis @ weights).T
    return found


def fit_pairwise(data, fit, held, strengths=STRENGTHS):
    """A logistic regression on score differences per concept: P(side 0 is preferred) = sigmoid(w (x_0 - x_1)).

    data: pairs with labels in [0, 1]. Minimises the summed log loss + strength / 2 |w|^2, as
    scikit-learn's LogisticRegression does with C = 1 / strength; see linear.py. Strengths are
    chosen by log loss; else as fit_ridge, but that the embeddings of the pairs labelled for a
    concept are held in memory, as float32.
    """
    rows, labels, is_fit = _labelled(data, fit, held)
    strengths, found = np.asarray(strengths, float), _empty(data, len(strengths))
    for attributes, known in missing_patterns(labels):
        x, sides = data.take(rows[known]).reshape(-1, data.shape[-1]), is_fit[known]
        pairs = np.arange(len(x)).reshape(-1, 2)
        for a in attributes:
            y, start = labels[known, a], None
            for i in np.argsort(-strengths):  # each from the solution of the next stronger one
                start = solvers.fit_bt(x, pairs[sides], y[sides], strengths[i], start=start)
                logits = np.subtract(*solvers.product(x, start[0])[pairs[~sides]].T)
                found.losses[i, a] = solvers.logistic_loss(logits, y[~sides]).mean()
            found.strengths[a] = strengths[np.argmin(found.losses[:, a])]
            found.heads[a] = solvers.fit_bt(x, pairs, y, found.strengths[a])[0]
    return found


def missing_patterns(labels):
    """Attributes that miss the same rows of `labels` (n, A): list of (attribute numbers, (n,) bool, where labelled)."""
    known, alike = ~np.isnan(labels), {}
    for a, column in enumerate(known.T):
        alike.setdefault(column.tobytes(), []).append(a)
    return [(attributes, known[:, attributes[0]]) for attributes in alike.values()]


@dataclass
class _Moments:
    """Sums over n rows in float64: X'X (lower triangle), X'Y, squares of Y, X, Y."""

    gram: np.ndarray
    cross: np.ndarray
    squares: np.ndarray
    x: np.ndarray
    y: np.ndarray
    n: int = 0

    @classmethod
    def zeros(cls, d, a):
        return cls(
            np.zeros((d, d), order="F"), np.zeros((d, a)), np.zeros(a), np.zeros(d), np.zeros(a)
        )

    def add(self, x, y):
        if len(x):
            # One triangle, in place: half the work of x.T @ x.
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
        moved = self.x - self.n * x
        gram = self.gram - np.outer(self.x, x) - np.outer(x, moved)
        cross = self.cross - np.outer(self.x, y) - np.outer(x, self.y - self.n * y)
        squares = self.squares - 2 * y * self.y + self.n * y * y
        return _Moments(gram, cross, squares, moved, self.y - self.n * y, self.n)


def _empty(data, n_strengths):
    """A Fit to be filled; its offsets are 0."""
    n = len(data.attributes)
    return Fit(np.empty((n, data.shape[-1])), np.zeros(n), np.empty(n), np.empty((n_strengths, n)))


def _labelled(data, fit, held):
    """(sorted row numbers of both parts, their labels (m, A) float64, (m,) bool, which are fitted), checked."""
    rows = np.sort(np.concatenate([fit, held]))
    labels, is_fit = data.labels[rows].astype(float), np.isin(rows, fit)
    _check_labelled(data, labels, is_fit)
    return rows, labels, is_fit


def _check_labelled(data, labels, is_fit):
    for what, side in (("fit", is_fit), ("validation", ~is_fit)):
        for name, n in zip(data.attributes, (~np.isnan(labels[side])).sum(0), strict=True):
            if not n:
                raise InputError(
                    f"{data.path}: {name}: expected labels on {what} prompts, found none; add labels, leave the "
                    "attribute out, or give that part a larger share"
                )


def _parts(data, rows, labels, is_fit):
    """Yield (attribute numbers, [_Moments of the fit rows, of the held rows], basis) for each pattern.

    basis: (D, n) where the moments are those of coordinates in the row space, else None.
    """
    n_dims, patterns = data.shape[-1], missing_patterns(labels)
    for attributes, known in patterns:
        if known.sum() < n_dims:
            x = np.concatenate([x for _, x in _features(data, rows[known])])
            # x = coordinates @ basis.T: in its row space the same problem has n instead of D
            # dimensions.
            basis, triangle = scipy.linalg.qr(x.T, mode="economic", check_finite=False)
            x = np.ascontiguousarray(triangle.T)
            y, sides = labels[known][:, attributes], is_fit[known]
            whole = [(np.arange(len(attributes)), np.ones(len(x), bool))]
            yield attributes, _sum([(slice(None), x)], y, sides, whole, len(x))[0], basis
    tall = [pattern for pattern in patterns if pattern[1].sum() >= n_dims]
    step = max(1, GRAM_BYTES // (2 * 8 * n_dims**2))
    for batch in (tall[start : start + step] for start in range(0, len(tall), step)):
        sums = _sum(_features(data, rows), labels, is_fit, batch, n_dims)
        for attributes, _ in batch:
            # Popped, so that a part's Gram matrices go when its heads are there.
            yield attributes, sums.pop(0), None


def _features(data, rows):
    """Yield (slice, embeddings (m, D) float64) over `rows`."""
    for part, x in data.blocks(rows):
        yield part, x.astype(float)


def _sum(blocks, labels, is_fit, patterns, n_dims):
    """[[_Moments of the fit rows, of the held rows]] of each pattern, in one pass over `blocks`."""
    sums = [
        [_Moments.zeros(n_dims, len(attributes)) for _ in range(2)] for attributes, _ in patterns
    ]
    for part, x in blocks:
        for (attributes, known), sides in zip(patterns, sums, strict=True):
            for moments, side in zip(sides, (is_fit[part], ~is_fit[part]), strict=True):
                use = known[part] & side
                moments.add(x[use], labels[part][use][:, attributes])
    return sums


def _eigh(gram):
    values, vectors = scipy.linalg.eigh(gram, lower=True, driver="evd", check_finite=False)
    return np.maximum(values, 0), vectors  # rounding can leave a zero below zero


def _ridge(fit, held, strengths, intercept):
    """(weights (D, a), offsets (a,), chosen strengths (a,), losses (S, a)) of one pattern."""
    train = fit + held
    x, y = np.zeros_like(fit.x), np.zeros_like(fit.y)
    if intercept:
        centre, (x, y) = fit.means(), train.means()
        fit, held, train = fit.about(*centre), held.about(*centre), train.about(x, y)
    values, vectors = _eigh(fit.gram)
    shrunk = (vectors.T @ fit.cross)[:, None] / np.add.outer(values, strengths)[:, :, None]
    weights = (vectors @ shrunk.reshape(len(values), -1)).reshape(shrunk.shape)  # (D, S, a)
    fitted = blas.dsymm(1.0, held.gram, weights.reshape(len(values), -1), lower=1).reshape(
        weights.shape
    )
    losses = np.einsum("dsa,dsa->sa", weights, fitted) - 2 * np.einsum(
        "dsa,da->sa", weights, held.cross
    )
    losses = (losses + held.squares) / held.n
    chosen = strengths[np.argmin(losses, 0)]
    heads = np.empty_like(train.cross)
    for strength in np.unique(chosen):
        heads[:, chosen == strength] = _solve(
            train.gram, train.cross[:, chosen == strength], strength
        )
    return heads, y - x @ heads, chosen, losses


def _solve(gram, cross, strength):
    """(gram + strength I)^-1 cross, of a Gram matrix's lower triangle."""
    system = gram.copy(order="F")
    system[np.diag_indices_from(system)] += strength
    try:
        factor = scipy.linalg.cho_factor(system, lower=True, overwrite_a=True, check_finite=False)
    except (
        scipy.linalg.LinAlgError
    ):  # a strength below the rounding errors of a singular Gram matrix
        values, vectors = _eigh(gram)
        return vectors @ ((vectors.T @ cross) / (values + strength)[:, None])
    return scipy.linalg.cho_solve(factor, cross, check_finite=False)


# ---------------------------------------------------------------------------------------- debiasing


@dataclass(frozen=True)
class Penalties:
    """penalties (A,); tried: for each attribute [(penalty, rho)] in the order of the penalties; unreached: names."""

    penalties: np.ndarray
    tried: list
    unreached: list


def find_penalties(
    raw, attributes, verbosity, threshold=THRESHOLD, search="root", allow_unreached=False
):
    """Penalties with |Spearman(r_a - penalty_a r_verbosity, r_verbosity)| <= threshold. arXiv 2406.12845, section 3.

    raw: (m, A) scores of the reference rows; verbosity: one of the A attributes, whose penalty is
    0. Attributes that do not reach the threshold are an InputError that names them, unless
    allow_unreached: then they get the penalty that came nearest. Returns Penalties.
    """
    v = list(attributes).index(verbosity)
    if np.ptp(raw[:, v]) == 0:
        raise InputError(
            f"{verbosity}: expected scores that differ between reference rows, found one; add data"
        )
    found = [
        (0.0, True, []) if a == v else find_penalty(raw[:, a], raw[:, v], threshold, search)
        for a in range(len(attributes))
    ]
    unreached = [
        name for name, (_, reached, _) in zip(attributes, found, strict=True) if not reached
    ]
    if unreached and not allow_unreached:
        raise InputError(
            f"{', '.join(unreached)}: expected a penalty that brings |rho| with {verbosity} to {threshold:g} on the "
            "reference rows, found none; allow it with --allow_unreached, raise --threshold, or leave the attribute out"
        )
    return Penalties(np.array([each[0] for each in found]), [each[2] for each in found], unreached)


def find_penalty(r, v, threshold, search="root"):
    """(penalty, reached, tried) for scores r and verbosity v, (m,): |Spearman(r - penalty v, v)| <= threshold.

    search "root": the zero of rho, of either sign, to a millionth; a penalty that barely reached
    the threshold here would miss it on every second set of other prompts. "grid": the first of
    PENALTY_GRID that reaches it, as the authors' code. Where none does, the one that comes nearest.
    tried: [(penalty, rho)].
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


def _bisect(rho, scale):
    """Try penalties around the zero of rho; scale: where to begin.

    rho falls, in steps, as the penalty rises: each swap of neighbours in the order of r - penalty v
    puts the one with the larger v lower.
    """
    sign = np.sign(rho(0.0))
    low, high = 0.0, float(scale)
    while sign * rho(sign * high) > 0:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if sign * rho(sign * middle) > 0 else (low, middle)
