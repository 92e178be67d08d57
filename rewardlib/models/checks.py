"""Checks of what reward models are given: pairs, labels, ratings, embeddings, groups."""

import numbers

import numpy as np
from scipy import sparse
from sklearn.utils import check_array, check_random_state

from rewardlib import seeds


def check_pairs(pairs, labels, embeddings=None, groups=None):
    """Check what `fit` was given and bring it to one form: rows (R, D) float32, index (M, 2), labels (M,), groups (M,).

    pairs, embeddings: as in `check_index`. labels: (M,) in {0, 1}, 1 where side 0 was preferred,
    both present; returned as float32. groups: (M,) prompt of each pair, None: each pair its own;
    returned as numbers from 0. ValueError in one line otherwise.
    """
    rows, index = check_index(pairs, embeddings)
    labels = check_labels(labels, len(index))
    if labels.min() == labels.max():
        raise ValueError(
            f"labels should hold both 0 and 1; got {labels[0]:.0f} only: put the preferred response on a random side "
            "and let the label say which"
        )
    return rows, index, labels, number_groups(groups, len(index))


def check_index(pairs, embeddings=None):
    """Rows (R, D) float32 and index (M, 2) into them; ValueError on other shapes or values that are not finite.

    pairs: (M, 2, D) embeddings, or (M, 2) integers into the rows of `embeddings` (R, D); of
    embeddings (N, K, D) response k to prompt n is row n * K + k. Only rows that a pair names are
    read and returned.
    """
    pairs = np.asarray(as_dense(pairs))
    if pairs.ndim and not len(pairs):
        raise ValueError(f"expected at least one pair; got {tuple(pairs.shape)}")
    if embeddings is None:
        if len(pairs.shape) != 3 or pairs.shape[1] != 2 or not pairs.shape[2]:
            raise ValueError(
                f"pairs should be (M, 2, D), or (M, 2) row numbers with embeddings (R, D); got {tuple(pairs.shape)}"
            )
        rows = finite_rows(pairs).reshape(-1, pairs.shape[2])
        index = np.arange(len(rows)).reshape(-1, 2)
    else:
        embeddings = as_dense(embeddings)
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
        index = index.reshape(-1, 2)
    return rows, index


def check_labels(labels, n):
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise ValueError(f"labels should be ({n},) of 0 and 1; got {labels.shape}")
    if not np.isin(labels, (0, 1)).all():
        other = labels[~np.isin(labels, (0, 1))][0]
        raise ValueError(
            f"labels should be ({n},) of 0 and 1, 1 where side 0 was preferred; got {other} among them"
        )
    return labels.astype(np.float32)


def check_ratings(embeddings, ratings, groups=None):
    """Check what `fit` of absolute ratings was given: embeddings, ratings (N, K) or (M,), groups from 0 of axis 0."""
    embeddings, ratings = as_dense(embeddings), np.asarray(ratings, float)
    shape = tuple(embeddings.shape)
    if len(shape) not in (2, 3) or not np.prod(shape):
        raise ValueError(f"embeddings should be (M, D) or (N, K, D), none of them 0; got {shape}")
    if ratings.shape not in (shape[:-1], (*shape[:-1], 1)):
        raise ValueError(
            f"ratings should be {shape[:-1]} or {(*shape[:-1], 1)}; got {ratings.shape}"
        )
    if not np.isfinite(ratings).all():
        raise ValueError("ratings should be finite; got NaN or inf")
    return embeddings, ratings.reshape(shape[:-1]), number_groups(groups, shape[0])


def as_dense(values):
    """`values` as it is where it has a shape, memory-mapped ones too, else as an array."""
    if sparse.issparse(values):
        raise TypeError("expected a dense array; got a sparse one")
    return values if hasattr(values, "shape") else np.asarray(values)


def finite_rows(values):
    """`values` as a C-ordered float32 array; ValueError where one is NaN or too large."""
    with np.errstate(over="ignore"):
        options = {"ensure_2d": False, "allow_nd": True, "ensure_all_finite": False}
        values = check_array(values, dtype=np.float32, order="C", **options)
    if not np.isfinite(values).all():
        raise ValueError("embeddings should be finite; got NaN or inf")
    return values


def take_rows(embeddings, flat):
    """Rows (m, D) of embeddings (R, D) or (N, K, D), the latter numbered n * K + k."""
    return embeddings[np.unravel_index(flat, embeddings.shape[:-1])]


def number_groups(groups, n):
    if groups is None:
        return np.arange(n)
    groups = np.asarray(groups)
    if groups.shape != (n,):
        raise ValueError(f"groups should be ({n},), one for each; got {groups.shape}")
    return np.unique(groups, return_inverse=True)[1]


def random_generator(random_state, *names):
    """A numpy Generator for one purpose under `random_state`: an integer, None (fresh) or a numpy RandomState."""
    if not isinstance(random_state, numbers.Integral):
        random_state = check_random_state(random_state).randint(2**31)
    return seeds.rng(int(random_state), *names)
