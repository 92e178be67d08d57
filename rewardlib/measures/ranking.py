"""Ranking metrics over prompts: Spearman, pairwise accuracy, best-of-n, order consistency.

Scores and golden rewards are (N, K): K responses to each of N prompts. A per-prompt metric is (N,)
with NaN where it is undefined (all golden rewards of the prompt equal, or, for Spearman, all scores
equal); such prompts are left out of the mean and counted.
"""

import numpy as np
from scipy.special import gammaln

from rewardlib.artifacts import null_if_nan
from rewardlib.errors import InputError
from rewardlib.measures import intervals

BEST_OF_N = (1, 2, 5, 10, 30, 50, 100, 300, 500)


def spearman(scores, golden):
    """(N,) Spearman rho of each prompt, ties on average ranks."""
    a, b = (average_ranks(x) - (x.shape[1] + 1) / 2 for x in (scores, golden))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def pair_accuracy(scores, golden):
    """(N,) share of a prompt's pairs that the scores order as the golden rewards do.

    Golden ties are left out, tied scores count one half.
    """
    return _accuracy(*agreement_within(scores, golden))


def _accuracy(agree, pairs):
    with np.errstate(invalid="ignore"):
        return 0.5 + 0.5 * agree / pairs


def agreement_within(scores, golden):
    """Of the pairs of each prompt (N,): concordant minus discordant ones, and those whose golden rewards differ.

    Knight's identity (Journal of the American Statistical Association 61, 1966): with the responses
    in order of score, then of golden reward, only golden rewards that fall are discordant.
    """
    by_score, ranks = _dense_ranks(scores), _dense_ranks(golden)
    top = int(ranks.max()) + 1
    both = np.sort(by_score * top + ranks, axis=1)
    by_score, by_golden = np.divmod(both, top)
    same_score, tied_both = _tied_pairs(_same(by_score)), _tied_pairs(_same(both))
    tied_golden = _tied_pairs(_same(np.sort(ranks, axis=1)))
    pairs = scores.shape[1] * (scores.shape[1] - 1) // 2 - tied_golden
    return pairs - same_score + tied_both - 2 * _inversions(by_golden), pairs


def average_ranks(x):
    """Ranks 1 ... K of each row (N, K), equal values on the mean of theirs; NaN all along a row that has one.

    What scipy.stats.rankdata gives, without the half second that scipy.stats takes to load.
    """
    order, same = _ordered(x)
    first, last = _run_starts(same), x.shape[1] - 1 - _run_starts(same[:, ::-1])[:, ::-1]
    return np.where(np.isnan(x).any(1, keepdims=True), np.nan, _put(order, (first + last) / 2 + 1))


def _dense_ranks(x):
    """Ranks 0, 1, ... of the different values of each row (N, K)."""
    order, same = _ordered(x)
    ranks = np.zeros(x.shape, np.int64)
    np.cumsum(~same, axis=1, out=ranks[:, 1:])
    return _put(order, ranks)


def _ordered(x):
    """The order (N, K) that sorts each row, and `_same` of the row in that order."""
    order = np.argsort(x, axis=1)
    return order, _same(np.take_along_axis(x, order, 1))


def _same(ordered):
    """(N, K - 1) True where the value that follows is the same."""
    return ordered[:, 1:] == ordered[:, :-1]


def _run_starts(same):
    """(N, K) where the run of equal values starts that each place is in, from what `_same` gives."""
    starts = np.tile(np.arange(same.shape[1] + 1), (len(same), 1))
    starts[:, 1:][same] = 0
    return np.maximum.accumulate(starts, axis=1, out=starts)


def _put(order, values):
    placed = np.empty_like(values)
    np.put_along_axis(placed, order, values, 1)
    return placed


def _tied_pairs(same):
    """(N,) pairs inside the runs of equal values, from what `_same` gives."""
    return (np.arange(same.shape[1] + 1) - _run_starts(same)).sum(1)


def _inversions(ranks):
    """(N,) pairs of each row of non-negative integers (N, K) of which the first is the larger: merge sort, all rows and
    all merges of one width at once."""
    n, n_responses = ranks.shape
    width, size, top = 1, 1 << (n_responses - 1).bit_length(), int(ranks.max()) + 2
    halves = np.full((n, size), top - 1)
    halves[:, :n_responses] = ranks
    found = np.zeros(n, np.int64)
    while width < size:
        halves = halves.reshape(-1, 2, width)
        apart = np.arange(len(halves))[:, None] * top  # so that one search serves all merges
        ends = np.arange(1, len(halves) + 1)[:, None] * width
        below = np.searchsorted(
            (halves[:, 0] + apart).ravel(), (halves[:, 1] + apart).ravel(), side="right"
        )
        found += (ends - below.reshape(-1, width)).reshape(n, -1).sum(1)
        width *= 2
        halves = np.sort(
            halves.reshape(-1, width), axis=1, kind="stable"
        )  # which merges what is sorted already
    return found


def best_of_n(scores, golden, sizes):
    """(N, len(sizes)) expected golden reward of the top-scored response of a random n-subset of the K, exactly.

    The response of rank i (1 = best) tops an n-subset with probability C(K - i, n - 1) / C(K, n);
    tied scores share the probability of their ranks.
    """
    return sorted_by(scores, golden) @ best_of_n_weights(scores.shape[1], sizes)


def best_of_n_weights(n_responses, sizes):
    """(K, len(sizes)) probability that rank i + 1 of K is the best of a random n-subset, for n in sizes."""
    if max(sizes) > n_responses or min(sizes) < 1:
        raise ValueError(
            f"best-of-n: expected 1 <= n <= {n_responses} responses, found {list(sizes)}"
        )
    rank, n = np.arange(1, n_responses + 1)[:, None], np.asarray(sizes)[None, :]
    left = n_responses - rank - n + 1
    log_chance = _log_choose(n_responses - rank, n - 1, left) - _log_choose(
        n_responses, n, n_responses - n
    )
    weights = np.where(left >= 0, np.exp(log_chance), 0.0)
    return weights / weights.sum(0)


def _log_choose(total, part, rest):
    return gammaln(total + 1) - gammaln(part + 1) - gammaln(np.maximum(rest, 0) + 1)


def sorted_by(scores, values):
    """(N, K) values in descending order of scores, averaged over tied scores."""
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked, values = np.take_along_axis(scores, order, 1), np.take_along_axis(values, order, 1)
    new = np.ones(ranked.shape, bool)
    new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    block = np.cumsum(new) - 1
    mean = np.bincount(block, values.ravel()) / np.bincount(block)
    return mean[block].reshape(values.shape)


def selected_quantile(scores, golden):
    """(N,) golden quantile of the top-scored of all K responses: 0 the worst, 1 the best, 0.5 expected at random."""
    quantile = (average_ranks(golden) - 1) / (golden.shape[1] - 1)
    return sorted_by(scores, quantile)[:, 0]


def global_spearman(scores, golden):
    """Spearman rho over all N * K responses at once."""
    return float(spearman(scores.reshape(1, -1), golden.reshape(1, -1))[0])


def cross_prompt_accuracy(scores, golden, within=None):
    """Share of the pairs of responses to *different* prompts that the scores order as the golden rewards do.

    within: what `agreement_within` gives for them, where it is known already; it is taken away from
    all pairs.
    """
    within = within or agreement_within(scores, golden)
    agree, pairs = (
        int(found[0]) for found in agreement_within(scores.reshape(1, -1), golden.reshape(1, -1))
    )
    agree, pairs = agree - int(within[0].sum()), pairs - int(within[1].sum())
    return float(_accuracy(agree, pairs)) if pairs else np.nan


def order_consistency(scores, labels, threshold=0.0):
    """How often M pairs are ordered wrongly, beside the bound from classifying their responses one by one.

    scores: (M, 2) of either side; labels: (M,) 1 where side 0 is the better one, else 0; threshold:
    a response with a score above it is classed as a better one (0 for a logit). Where both
    responses of a pair are classed right, their scores lie on either side of the threshold, in the
    right order. So a pair ordered wrongly holds a response classed wrongly, and on any pairs, for
    any scores and any threshold,

        order_error <= bound = better_error + worse_error,

    the share of better responses classed as worse ones plus that of worse ones classed as better:
    the union bound of classification reward models, arXiv 2411.04991. least_bound is the bound at
    the threshold where it is lowest. It holds for these labels: against the golden order, add the
    share of wrong labels. And it is no estimate: a pair whose two scores lie on one side of the
    threshold has one error of class whatever its order. Of independent draws that is half of all
    pairs or more, of all pairs of K responses (K - 2) / (2 K - 2) or more, however good the order
    is.

    Tied scores count as half an error of the order. Returns a dict of floats; InputError for other
    shapes or labels.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if (
        scores.ndim != 2
        or scores.shape != (len(labels), 2)
        or not len(labels)
        or not np.isin(labels, (0, 1)).all()
    ):
        raise InputError(
            f"order_consistency: expected scores (M, 2) and M labels of 0 and 1, found {scores.shape} and "
            f"{labels.shape}; take the predictions of either side of each pair"
        )
    if not np.isfinite(scores).all():
        raise InputError(
            "order_consistency: expected finite scores, found NaN or inf; score those responses again"
        )
    better, worse = np.where(labels == 1, scores.T, scores.T[::-1])
    better_error, worse_error = np.mean(better <= threshold), np.mean(worse > threshold)
    levels = np.unique(scores)
    below = [
        np.searchsorted(np.sort(side), levels, side="right") / len(labels)
        for side in (better, worse)
    ]
    return {
        "order_error": float(np.mean(0.5 - 0.5 * np.sign(better - worse))),
        "better_error": float(better_error),
        "worse_error": float(worse_error),
        "bound": float(better_error + worse_error),
        "least_bound": float(np.min(below[0] + 1 - below[1])),
    }


def ranking_metrics(scores, golden, weights):
    """All ranking metrics of (N, K) scores as one JSON-able dict, intervals under resample `weights` (B, N).

    best_of_n_gain is the share of the oracle's gain over a random choice: (BoN - mean) / (oracle
    BoN - mean).
    """
    sizes = [n for n in BEST_OF_N if n <= scores.shape[1]]
    within = agreement_within(scores, golden)
    per_prompt = {"spearman": spearman(scores, golden), "pair_accuracy": _accuracy(*within)}
    per_prompt["selected_quantile"] = selected_quantile(scores, golden)
    picked, oracle = best_of_n(scores, golden, sizes), best_of_n(golden, golden, sizes)
    chance = golden.mean(1)
    differs = np.ptp(golden, axis=1) > 0  # where not, a gain could only be a rounding error
    ratios = {(name, None): (np.nan_to_num(v), np.isfinite(v)) for name, v in per_prompt.items()}
    for i, n in enumerate(sizes):
        ratios["best_of_n", str(n)] = picked[:, i], np.ones(len(picked))
        if n > 1:
            ratios["best_of_n_gain", str(n)] = (
                differs * (picked[:, i] - chance),
                differs * (oracle[:, i] - chance),
            )
    found = dict(
        zip(
            ratios,
            intervals.ratios_with_ci(*zip(*ratios.values(), strict=True), weights),
            strict=True,
        )
    )
    result = {}
    for name, values in per_prompt.items():
        result |= intervals.entry(name, *found[name, None])
        result[f"n_prompts_without_{name}"] = int(np.isnan(values).sum())
    for name in ("best_of_n", "best_of_n_gain"):
        table = {n: entry for (kind, n), entry in found.items() if kind == name}
        result[name] = {n: null_if_nan(value) for n, (value, _) in table.items()}
        result[f"{name}_ci95"] = {n: [null_if_nan(v) for v in ci] for n, (_, ci) in table.items()}
    result["global_spearman"] = null_if_nan(global_spearman(scores, golden))
    result["cross_prompt_accuracy"] = null_if_nan(cross_prompt_accuracy(scores, golden, within))
    return result
