"""Ranking metrics over prompts: Spearman, pairwise accuracy, best-of-n, order consistency.

Scores and golden rewards are (N, K): K responses to each of N prompts. A metric per prompt is (N,)
with NaN where it is undefined: where all golden rewards of the prompt are equal or, for Spearman,
all scores. Means leave these prompts out, and results count them.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln

from rewardlib.artifacts import null_if_nan
from rewardlib.errors import InputError
from rewardlib.measures import intervals

BEST_OF_N = (1, 2, 5, 10, 30, 50, 100, 300, 500)


def spearman(scores: np.ndarray, golden: np.ndarray) -> np.ndarray:
    """Spearman's rho of each prompt, (N,), with average ranks for ties."""
    # ranks 1 ... K have mean (K + 1) / 2, ties or not; rho is Pearson's correlation of the ranks
    a, b = (average_ranks(x) - (x.shape[1] + 1) / 2 for x in (scores, golden))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def pair_accuracy(scores: np.ndarray, golden: np.ndarray) -> np.ndarray:
    """Pairwise accuracy of each prompt, (N,): share of its pairs that the scores order correctly.

    Pairs with equal golden rewards are left out; pairs with equal scores count one half.
    """
    return _accuracy(*agreement_within(scores, golden))


def _accuracy(agree, pairs):
    """Pairwise accuracy from what `agreement_within` returns; NaN without pairs."""
    with np.errstate(invalid="ignore"):
        return 0.5 + 0.5 * agree / pairs


def agreement_within(scores: np.ndarray, golden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two counts of pairs within each prompt, (N,) each.

    The first is the number of concordant minus discordant pairs; the second is the number of pairs
    whose golden rewards differ. Counted in O(K log K) per prompt by Knight's identity (Journal of
    the American Statistical Association 61, 1966): with the responses sorted by score, then by
    golden reward, the discordant pairs are the inversions of the golden rewards.
    """
    score_ranks, golden_ranks = _dense_ranks(scores), _dense_ranks(golden)
    base = int(golden_ranks.max()) + 1
    # one integer holds both ranks, so that one sort orders by score, then by golden reward
    both = np.sort(score_ranks * base + golden_ranks, axis=1)
    score_ranks, golden_by_score = np.divmod(both, base)
    tied_score = _tied_pairs(_equals_next(score_ranks))
    tied_both = _tied_pairs(_equals_next(both))
    tied_golden = _tied_pairs(_equals_next(np.sort(golden_ranks, axis=1)))
    pairs = scores.shape[1] * (scores.shape[1] - 1) // 2 - tied_golden
    return pairs - tied_score + tied_both - 2 * _inversions(golden_by_score), pairs


def average_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks 1 ... K within each row (N, K); equal values share the mean of their ranks.

    A row with a NaN has NaN ranks throughout. As scipy.stats.rankdata, without the half second that
    importing scipy.stats takes.
    """
    order, tied = _sort_rows(x)
    first, last = _run_starts(tied), x.shape[1] - 1 - _run_starts(tied[:, ::-1])[:, ::-1]
    ranks = _in_row_order(order, (first + last) / 2 + 1)
    return np.where(np.isnan(x).any(1, keepdims=True), np.nan, ranks)


def _dense_ranks(x):
    """Dense ranks 0, 1, ... within each row (N, K): equal values share a rank, without gaps."""
    order, tied = _sort_rows(x)
    ranks = np.zeros(x.shape, np.int64)
    np.cumsum(~tied, axis=1, out=ranks[:, 1:])
    return _in_row_order(order, ranks)


def _sort_rows(x):
    """The permutation (N, K) that sorts each row, and `_equals_next` of the sorted rows."""
    order = np.argsort(x, axis=1)
    return order, _equals_next(np.take_along_axis(x, order, 1))


def _equals_next(rows):
    """True at each position whose value equals the next value in the row, (N, K - 1)."""
    return rows[:, 1:] == rows[:, :-1]


def _run_starts(tied):
    """For each position, the index at which its run of equal values starts, (N, K).

    tied: (N, K - 1), what `_equals_next` returns for the rows.
    """
    starts = np.tile(np.arange(tied.shape[1] + 1), (len(tied), 1))
    starts[:, 1:][tied] = 0
    return np.maximum.accumulate(starts, axis=1, out=starts)


def _in_row_order(order, sorted_values):
    """The values (N, K) of sorted rows, back in the order before sorting; undoes `order`."""
    values = np.empty_like(sorted_values)
    np.put_along_axis(values, order, sorted_values, 1)
    return values


def _tied_pairs(tied):
    """Number of pairs of equal values in each row, (N,); tied: `_equals_next` of sorted rows."""
    return (np.arange(tied.shape[1] + 1) - _run_starts(tied)).sum(1)


def _inversions(ranks):
    """Inversions of each row, (N,): pairs of positions whose first value is the larger one.

    ranks: (N, K) non-negative integers. Merge sort: at every width, sorted blocks of all rows merge
    with their right neighbours at once, and each value of a right block counts the larger values of
    its left block.
    """
    n, n_responses = ranks.shape
    width, padded_width, base = 1, 1 << (n_responses - 1).bit_length(), int(ranks.max()) + 2
    # rows are padded on the right with a value above all ranks, which makes no inversion
    blocks = np.full((n, padded_width), base - 1)
    blocks[:, :n_responses] = ranks
    inversions = np.zeros(n, np.int64)
    while width < padded_width:
        blocks = blocks.reshape(-1, 2, width)
        # a separate range of values for each pair of blocks lets one search serve all of them
        offset = np.arange(len(blocks))[:, None] * base
        left, right = ((blocks[:, side] + offset).ravel() for side in (0, 1))
        not_larger = np.searchsorted(left, right, side="right").reshape(-1, width)
        left_ends = np.arange(1, len(blocks) + 1)[:, None] * width
        inversions += (left_ends - not_larger).reshape(n, -1).sum(1)
        width *= 2
        # the stable sort of NumPy merges runs that are sorted already
        blocks = np.sort(blocks.reshape(-1, width), axis=1, kind="stable")
    return inversions


def best_of_n(scores: np.ndarray, golden: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Expected golden reward of best-of-n selection by score, exact, (N, len(sizes)).

    For each n in sizes, the selected response is the best-scored one of a random n-subset of the K.
    The response of rank i (1 = best) is selected with probability C(K - i, n - 1) / C(K, n); tied
    scores share the probability of their ranks.
    """
    return sorted_by(scores, golden) @ best_of_n_weights(scores.shape[1], sizes)


def best_of_n_weights(n_responses: int, sizes: Sequence[int]) -> np.ndarray:
    """Probability that rank i + 1 of K is the best of a random n-subset, (K, len(sizes)).

    Column j is for n = sizes[j]. Raises ValueError for an n below 1 or above K.
    """
    if max(sizes) > n_responses or min(sizes) < 1:
        raise ValueError(
            f"best-of-n: expected 1 <= n <= {n_responses} responses, found {list(sizes)}"
        )
    rank, n = np.arange(1, n_responses + 1)[:, None], np.asarray(sizes)[None, :]
    # factorials above 170! overflow float64: divide the binomials as logarithms
    n_below = n_responses - rank - n + 1
    log_subsets = _log_choose(n_responses, n, n_responses - n)
    log_weights = _log_choose(n_responses - rank, n - 1, n_below) - log_subsets
    weights = np.where(n_below >= 0, np.exp(log_weights), 0.0)
    return weights / weights.sum(0)


def _log_choose(total, part, rest):
    """log of the binomial total! / (part! rest!); a negative rest counts as 0."""
    return gammaln(total + 1) - gammaln(part + 1) - gammaln(np.maximum(rest, 0) + 1)


def sorted_by(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values of each row in descending order of its scores, averaged over tied scores, (N, K)."""
    order = np.argsort(-scores, axis=1, kind="stable")
    scores, values = np.take_along_axis(scores, order, 1), np.take_along_axis(values, order, 1)
    starts_run = np.ones(scores.shape, bool)
    starts_run[:, 1:] = scores[:, 1:] != scores[:, :-1]
    run = np.cumsum(starts_run) - 1  # number of the run of equal scores, over all rows
    mean = np.bincount(run, values.ravel()) / np.bincount(run)
    return mean[run].reshape(values.shape)


def selected_quantile(scores: np.ndarray, golden: np.ndarray) -> np.ndarray:
    """Golden quantile of the best-scored of all K responses, (N,): 0 worst, 1 best.

    A random choice has 0.5 on average.
    """
    quantile = (average_ranks(golden) - 1) / (golden.shape[1] - 1)
    return sorted_by(scores, quantile)[:, 0]


def global_spearman(scores: np.ndarray, golden: np.ndarray) -> float:
    """Spearman's rho over all N * K responses at once."""
    return float(spearman(scores.reshape(1, -1), golden.reshape(1, -1))[0])


def cross_prompt_accuracy(
    scores: np.ndarray,
    golden: np.ndarray,
    within: tuple[np.ndarray, np.ndarray] | None = None,
) -> float:
    """Pairwise accuracy over the pairs of responses to *different* prompts; NaN without such pairs.

    within: what `agreement_within` returns for the same arrays, if known already: the pairs within
    prompts are subtracted from all pairs.
    """
    agree_within, pairs_within = within or agreement_within(scores, golden)
    all_agree, all_pairs = agreement_within(scores.reshape(1, -1), golden.reshape(1, -1))
    agree = int(all_agree[0]) - int(agree_within.sum())
    pairs = int(all_pairs[0]) - int(pairs_within.sum())
    return float(_accuracy(agree, pairs)) if pairs else np.nan


def order_consistency(
    scores: np.ndarray, labels: np.ndarray, threshold: float = 0.0
) -> dict[str, float]:
    """Share of M pairs that the scores order wrongly, and its bound from classifying responses.

    scores: (M, 2), one column per side; labels: (M,) 1 where side 0 is the better response, else 0;
    threshold: a response with a score above it is classified as better (0 for a logit). Equal
    scores count as half an error of order. Raises InputError for other shapes or labels, or for
    scores that are not finite.

    If both responses of a pair are classified correctly, their scores lie on the two sides of the
    threshold, in the right order. A wrongly ordered pair therefore holds a wrongly classified
    response, so that for any pairs, any scores and any threshold,

        order_error <= bound = better_error + worse_error,

    where better_error is the share of better responses classified as worse, and worse_error the
    share of worse responses classified as better: the union bound of classification reward models,
    arXiv 2411.04991. least_bound is the bound at the threshold that makes the bound smallest.

    The bound is relative to `labels`; for the golden order, add the share of wrong labels. The
    bound is no estimate of order_error: a pair with both scores on one side of the threshold holds
    one wrongly classified response, whatever its order. This holds for half or more of all pairs of
    independent draws, and for (K - 2) / (2 K - 2) or more of all pairs of K responses, however good
    the order is.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    has_shape = scores.ndim == 2 and scores.shape == (len(labels), 2) and len(labels)
    if not has_shape or not np.isin(labels, (0, 1)).all():
        raise InputError(
            "order_consistency: expected scores (M, 2) and M labels of 0 and 1, "
            f"found {scores.shape} and {labels.shape}; give the predictions for both sides of each "
            "pair"
        )
    if not np.isfinite(scores).all():
        raise InputError(
            "order_consistency: expected finite scores, found NaN or inf; score those responses "
            "again"
        )
    better, worse = np.where(labels == 1, scores.T, scores.T[::-1])
    better_error, worse_error = np.mean(better <= threshold), np.mean(worse > threshold)
    # the bound changes only where the threshold passes a score
    thresholds = np.unique(scores)
    better_below, worse_below = (
        np.searchsorted(np.sort(side), thresholds, side="right") / len(labels)
        for side in (better, worse)
    )
    return {
        "order_error": float(np.mean(0.5 - 0.5 * np.sign(better - worse))),
        "better_error": float(better_error),
        "worse_error": float(worse_error),
        "bound": float(better_error + worse_error),
        "least_bound": float(np.min(better_below + 1 - worse_below)),
    }


def ranking_metrics(scores: np.ndarray, golden: np.ndarray, weights: np.ndarray) -> dict:
    """All ranking metrics of the scores (N, K), with 95 % intervals, as a JSON-able dict.

    weights: (B, N) resamples of the prompts, see `intervals.resample_weights`. best_of_n_gain is
    the share of the oracle's gain over a random choice: (best of n by score - mean) / (best of n by
    golden reward - mean).
    """
    sizes = [n for n in BEST_OF_N if n <= scores.shape[1]]
    within = agreement_within(scores, golden)
    per_prompt = {
        "spearman": spearman(scores, golden),
        "pair_accuracy": _accuracy(*within),
        "selected_quantile": selected_quantile(scores, golden),
    }
    # {(metric, n or None): (numerator, denominator)}, (N,) each: one pass over the resamples
    ratios = {(name, None): (np.nan_to_num(v), np.isfinite(v)) for name, v in per_prompt.items()}
    ratios |= _best_of_n_ratios(scores, golden, sizes)
    numerators, denominators = zip(*ratios.values(), strict=True)
    estimates = intervals.ratios_with_ci(numerators, denominators, weights)
    estimates = dict(zip(ratios, estimates, strict=True))
    result = {}
    for name, values in per_prompt.items():
        result |= intervals.entry(name, *estimates[name, None])
        result[f"n_prompts_without_{name}"] = int(np.isnan(values).sum())
    for name in ("best_of_n", "best_of_n_gain"):
        by_size = {n: estimate for (metric, n), estimate in estimates.items() if metric == name}
        result[name] = {n: null_if_nan(value) for n, (value, _) in by_size.items()}
        result[f"{name}_ci95"] = {n: [null_if_nan(v) for v in ci] for n, (_, ci) in by_size.items()}
    result["global_spearman"] = null_if_nan(global_spearman(scores, golden))
    result["cross_prompt_accuracy"] = null_if_nan(cross_prompt_accuracy(scores, golden, within))
    return result


def _best_of_n_ratios(scores, golden, sizes):
    """{(metric, n): (numerator, denominator)} of best-of-n and its gain, (N,) each."""
    selected, oracle = best_of_n(scores, golden, sizes), best_of_n(golden, golden, sizes)
    mean = golden.mean(1)
    # where all golden rewards of a prompt are equal, a gain could only be a rounding error
    differs = np.ptp(golden, axis=1) > 0
    ratios = {}
    for i, n in enumerate(sizes):
        ratios["best_of_n", str(n)] = selected[:, i], np.ones(len(selected))
        if n > 1:
            gain, oracle_gain = selected[:, i] - mean, oracle[:, i] - mean
            ratios["best_of_n_gain", str(n)] = differs * gain, differs * oracle_gain
    return ratios
