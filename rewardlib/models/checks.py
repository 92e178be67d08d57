"""Checks of the arguments of reward models: pairs, labels, ratings, embeddings, groups, seeds.

Each check returns its argument in the one form that the models work on, or raises a ValueError of
one line.
"""

import numbers

import numpy as np
from scipy import sparse
from sklearn.utils import check_array, check_random_state

from rewardlib import seeds


def check_pairs(
    pairs: np.ndarray,
    labels: np.ndarray,
    embeddings: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows (R, D) float32, index (M, 2), labels (M,) float32 and groups (M,) of preference pairs.

    pairs, embeddings: as in `check_index`. labels: (M,) 1 where side 0 was preferred, else 0; both
    must occur. groups: (M,) prompt of each pair, returned as numbers from 0; None: each pair is a
    group of its own.
    """
    rows, index = check_index(pairs, embeddings)
    labels = check_labels(labels, len(index))
    if labels.min() == labels.max():
        raise ValueError(
            f"labels should hold both 0 and 1; got {labels[0]:.0f} only: put the preferred "
            "response on a random side and let the label say which"
        )
    return rows, index, labels, number_groups(groups, len(index))


def check_index(
    pairs: np.ndarray, embeddings: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (R, D) float32 and the index (M, 2) of pairs into them.

    pairs: embeddings (M, 2, D), or integers (M, 2) that number the rows of `embeddings` (R, D); in
    embeddings (N, K, D), response k to prompt n is row n * K + k. Only rows that a pair names are
    read and returned.
    """
    pairs = np.asarray(as_dense(pairs))
    if pairs.ndim and not len(pairs):
        raise ValueError(f"expected at least one pair; got {tuple(pairs.shape)}")
    if embeddings is None:
        return _rows_of_pairs(pairs)
    return _rows_of_numbers(pairs, as_dense(embeddings))


def _rows_of_pairs(pairs):
    """check_index of embeddings (M, 2, D)."""
    if len(pairs.shape) != 3 or pairs.shape[1] != 2 or not pairs.shape[2]:
        raise ValueError(
            "pairs should be (M, 2, D), or (M, 2) row numbers with embeddings (R, D); "
            f"got {tuple(pairs.shape)}"
        )
    rows = finite_rows(pairs).reshape(-1, pairs.shape[2])
    return rows, np.arange(len(rows)).reshape(-1, 2)


def _rows_of_numbers(pairs, embeddings):
    """check_index of row numbers (M, 2) into embeddings (R, D) or (N, K, D)."""
    if len(embeddings.shape) not in (2, 3) or pairs.shape[1:] != (2,):
        raise ValueError(
            "expected (M, 2) row numbers and embeddings (R, D) or (N, K, D); "
            f"got {tuple(pairs.shape)} and {tuple(embeddings.shape)}"
        )
    if pairs.dtype.kind not in "iu":
        raise ValueError(
            f"expected (M, 2) row numbers as integers; got {tuple(pairs.shape)} of {pairs.dtype}"
        )
    touched, index = np.unique(pairs, return_inverse=True)
    n_rows = int(np.prod(embeddings.shape[:-1]))
    if not 0 <= touched[0] <= touched[-1] < n_rows:
        raise ValueError(
            f"row numbers should be 0 to {n_rows - 1}; got {touched[0]} to {touched[-1]}"
        )
    every_row = len(embeddings.shape) == 2 and len(touched) == n_rows
    rows = finite_rows(embeddings if every_row else take_rows(embeddings, touched))
    return rows, index.reshape(-1, 2)


def check_labels(labels: np.ndarray, n: int) -> np.ndarray:
    """Labels (n,) of 0 and 1 as float32."""
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise ValueError(f"labels should be ({n},) of 0 and 1; got {labels.shape}")
    valid = np.isin(labels, (0, 1))
    if not valid.all():
        raise ValueError(
            f"labels should be ({n},) of 0 and 1, 1 where side 0 was preferred; "
            f"got {labels[~valid][0]} among the labels"
        )
    return labels.astype(np.float32)


def check_ratings(
    embeddings: np.ndarray, ratings: np.ndarray, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings as given, absolute ratings (N, K) or (M,), and group numbers of axis 0.

    embeddings: (N, K, D) or (M, D); ratings: (N, K), (N, K, 1), (M,) or (M, 1); groups: (N,) or
    (M,) prompt of each entry of axis 0; None: each entry is a group of its own.
    """
    embeddings, ratings = as_dense(embeddings), np.asarray(ratings, float)
    shape = tuple(embeddings.shape)
    if len(shape) not in (2, 3) or not np.prod(shape):
        raise ValueError(
            f"embeddings should be (M, D) or (N, K, D), with no axis of length 0; got {shape}"
        )
    if ratings.shape not in (shape[:-1], (*shape[:-1], 1)):
        raise ValueError(
            f"ratings should be {shape[:-1]} or {(*shape[:-1], 1)}; got {ratings.shape}"
        )
    if not np.isfinite(ratings).all():
        raise ValueError("ratings should be finite; got NaN or inf")
    return embeddings, ratings.reshape(shape[:-1]), number_groups(groups, shape[0])


def as_dense(values: np.ndarray) -> np.ndarray:
    """`values` itself where it has a shape, also when memory-mapped; otherwise as an array.

    TypeError for sparse arrays.
    """
    if sparse.issparse(values):
        raise TypeError("expected a dense array; got a sparse one")
    return values if hasattr(values, "shape") else np.asarray(values)


def finite_rows(values: np.ndarray) -> np.ndarray:
    """`values` as a C-ordered float32 array; ValueError where a value is NaN or too large."""
    with np.errstate(over="ignore"):
        options = {"ensure_2d": False, "allow_nd": True, "ensure_all_finite": False}
        values = check_array(values, dtype=np.float32, order="C", **options)
    # Checked after the conversion: values beyond the range of float32 have become inf by now.
    if not np.isfinite(values).all():
        raise ValueError("embeddings should be finite; got NaN or inf")
    return values


def take_rows(embeddings: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Rows (m, D) of embeddings (R, D), or of (N, K, D) with row n * K + k for response k to n."""
    return embeddings[np.unravel_index(flat, embeddings.shape[:-1])]


def number_groups(groups: np.ndarray | None, n: int) -> np.ndarray:
    """Groups (n,) of any type as numbers from 0; None: 0 ... n - 1."""
    if groups is None:
        return np.arange(n)
    groups = np.asarray(groups)
    if groups.shape != (n,):
        raise ValueError(
            f"groups should be ({n},), one for each pair or rated prompt; got {groups.shape}"
        )
    return np.unique(groups, return_inverse=True)[1]


def random_generator(
    random_state: int | np.random.RandomState | None, *names: str | int
) -> np.random.Generator:
    """Generator for the purpose `names` under scikit-learn's `random_state`.

    random_state: an integer, or a RandomState from which a seed is drawn; None: numpy's global one.
    """
    if not isinstance(random_state, numbers.Integral):
        random_state = check_random_state(random_state).randint(2**31)
    return seeds.rng(int(random_state), *names)
