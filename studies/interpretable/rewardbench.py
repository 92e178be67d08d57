"""Accuracy on preference benchmarks: RewardBench 1 and its sections, best-of-4 groups, 3 x 3 styles, other domains.

A pair counts as right when the chosen response scores strictly higher: as in RewardBench (arXiv
2403.13787), a tie is wrong, so that a constant scorer gets 0 and not one half. Intervals resample
the prompts of each subset (which are its examples, where no prompt comes twice); what is compared
is scored on the same draws.
"""

import numpy as np

from rewardlib import seeds
from rewardlib.artifacts import null_if_nan
from rewardlib.errors import InputError
from rewardlib.measures import intervals

# Weight of each subset in its section: its number of examples, but for math-prm, whose 447 weigh as
# much as the code.
EXAMPLE_COUNTS = {
    "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46, "refusals-dangerous": 100, "refusals-offensive": 100,
    "xstest-should-refuse": 154, "xstest-should-respond": 250, "donotanswer": 136, "math-prm": 984, "hep-cpp": 164,
    "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164, "hep-rust": 164,
}  # fmt: skip
N_EXAMPLES = EXAMPLE_COUNTS | {"math-prm": 447}
SECTIONS = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}  # fmt: skip
PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
PRIOR_WEIGHT = 0.5
STYLES = ("concise", "detailed", "detailed with markdown")
LEVELS = ("easy", "normal", "hard")


# ------------------------------------------------------------------------------------ what is right


def pair_correct(scores):
    """(...,) 1.0 where the chosen response scores strictly higher, else 0.0. scores: (..., 2), chosen then rejected."""
    return (scores[..., 0] > scores[..., 1]).astype(float)


def group_correct(scores, right, groups):
    """(G,) 1.0 where every top-scored response of a group is a right one, by ascending group number.

    scores, groups: (n,); right: (n,) bool. With one right response of four this is best-of-4
    accuracy, a tie with a wrong response counting as wrong; with several, a tie among right ones is
    right. RewardBench 2 (arXiv 2506.01937) gives a tie its share instead, and scores its Ties
    domain by margins as well: the two differ where scores tie.
    """
    _, group = np.unique(groups, return_inverse=True)
    best = np.full((2, group.max() + 1), -np.inf)
    for side, part in enumerate((right, ~right)):
        np.maximum.at(best[side], group[part], scores[part])
    return (best[0] > best[1]).astype(float)


def style_accuracy(scores):
    """(P, 3, 3) 1.0 where chosen style i scores above rejected style j. scores: (P, 3, 2), styles as in STYLES.

    Style grows from row to row, so that below the diagonal the chosen response has the richer one:
    see `levels`.
    """
    return (scores[:, :, None, 0] > scores[:, None, :, 1]).astype(float)


def levels(accuracy):
    """(P, 3) easy, normal and hard accuracy of (P, 3, 3): means below, on and above the diagonal (arXiv 2410.16184)."""
    sides = np.tril_indices(3, -1), np.diag_indices(3), np.triu_indices(3, 1)
    return np.stack([accuracy[:, i, j].mean(1) for i, j in sides], 1)


# -------------------------------------------------------------------------------------- aggregation


def section_scores(accuracy):
    """{section: score} from {subset: accuracy}: the mean of its subsets weighted by EXAMPLE_COUNTS.

    None for a section of which a subset is missing: the mean of the rest would be another quantity.
    """
    scores = {}
    for section, subsets in SECTIONS.items():
        whole = all(subset in accuracy for subset in subsets)
        total = sum(EXAMPLE_COUNTS[subset] for subset in subsets)
        scores[section] = (
            sum(accuracy[s] * EXAMPLE_COUNTS[s] for s in subsets) / total if whole else None
        )
    return scores


def overall_score(sections, prior=None):
    """Mean of the four section scores; with the score of the prior sets as a fifth of weight 0.5, where it is given.

    The second form is the published leaderboard's. None where a section is.
    """
    values = list(sections.values())
    if any(value is None for value in values):
        return None
    total = sum(values)
    return (
        total / len(values)
        if prior is None
        else (total + PRIOR_WEIGHT * prior) / (len(values) + PRIOR_WEIGHT)
    )


def resample(values, groups, rng):
    """(1 + RESAMPLES, ...) mean of `values` (n, ...) over examples; after the first row, of resampled prompts.

    groups: (n,) integers, equal for examples of one prompt, which are drawn together.
    """
    _, group = np.unique(groups, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))
    totals = np.add.reduceat(values[order].reshape(len(values), -1), starts, axis=0)
    sizes = np.bincount(group).astype(float)
    weights = np.concatenate(
        [np.ones((1, len(sizes))), intervals.resample_weights(len(sizes), rng)]
    )
    return ((weights @ totals) / (weights @ sizes)[:, None]).reshape(-1, *values.shape[1:])


def by_subset(values, subsets, groups, seed, name):
    """{subset: (1 + RESAMPLES, ...)} of `resample`, subsets in order of appearance, each on its own random stream."""
    subsets = np.asarray(subsets)
    parts = {str(subset): subsets == subset for subset in dict.fromkeys(subsets.tolist())}
    return {
        s: resample(values[at], groups[at], seeds.rng(seed, "resample", name, s))
        for s, at in parts.items()
    }


def entry(draws, name="accuracy"):
    """{name, name_ci95} of draws (1 + RESAMPLES,); None, with no interval, where there are none."""
    if draws is None:
        return {name: None, f"{name}_ci95": [None, None]}
    return {
        name: null_if_nan(draws[0]),
        f"{name}_ci95": [float(v) for v in np.percentile(draws[1:], [2.5, 97.5])],
    }


# --------------------------------------------------------------------------------------- benchmarks


def rewardbench(scores, subsets, groups, seed, prior=None):
    """{method: {"subsets", "sections", "overall", ...}} of RewardBench 1, JSON-able, with intervals.

    scores: {method: (n, 2)}; subsets: n names; groups: (n,). prior: (scores, subsets, groups) of
    the prior sets, which add "prior_sets" and "overall_with_prior_sets". InputError for other
    subset names, or where a prior set is absent.
    """
    unknown = sorted(set(subsets) - set(EXAMPLE_COUNTS))
    if unknown:
        raise InputError(
            f"RewardBench: expected the subsets {', '.join(EXAMPLE_COUNTS)}, found {', '.join(unknown[:5])}; "
            "give other benchmarks with --domains"
        )
    draws = by_subset(_stack(scores), subsets, groups, seed, "rewardbench")
    counts = {subset: int(np.sum(np.asarray(subsets) == subset)) for subset in draws}
    prior_draws = {}
    if prior is not None:
        missing = [name for name in PRIOR_SETS if name not in prior[1]]
        if missing:
            raise InputError(
                f"prior sets: expected {', '.join(PRIOR_SETS)}, found no {', '.join(missing)}; add it"
            )
        prior_draws = by_subset(_stack(prior[0]), prior[1], prior[2], seed, "prior sets")
    result = {}
    for i, method in enumerate(scores):
        of = {subset: drawn[:, i] for subset, drawn in draws.items()}
        sections = section_scores(of)
        result[method] = {
            "subsets": {
                s: {"n": counts[s], "n_official": N_EXAMPLES[s], **entry(drawn)}
                for s, drawn in of.items()
            },
            "sections": {section: entry(drawn) for section, drawn in sections.items()},
            **entry(overall_score(sections), "overall"),
        }
        if prior_draws:
            of = {subset: drawn[:, i] for subset, drawn in prior_draws.items()}
            score = sum(of[subset] for subset in PRIOR_SETS) / len(PRIOR_SETS)
            result[method]["prior_sets"] = {
                "subsets": {s: entry(drawn) for s, drawn in of.items()},
                **entry(score),
            }
            result[method] |= entry(overall_score(sections, score), "overall_with_prior_sets")
    return result


def missing_subsets(subsets):
    """{section: [subset, ...]} that RewardBench has and `subsets` lacks; only sections that lack one."""
    lacking = {
        section: [s for s in names if s not in set(subsets)] for section, names in SECTIONS.items()
    }
    return {section: names for section, names in lacking.items() if names}


def domains(scores, subsets, groups, seed, name):
    """{method: {"domains": {subset: ...}, mean_of_domains, all}} of another pair benchmark, with intervals.

    scores: {method: (n, 2)}; subsets: n names; groups: (n,). `all` is the accuracy over all
    examples.
    """
    return _tables(_stack(scores), scores, subsets, groups, seed, name)


def best_of_groups(scores, right, subsets, groups, seed, name):
    """{method: table as of `domains`} of best-of-n groups, with "chance", a random order, beside the methods.

    scores: {method: (n,)}; right: (n,) bool; subsets: n names; groups: (n,) the responses of one
    prompt share a number. InputError for a group without a right or without a wrong response, or
    with responses in two subsets.
    """
    numbers, first, group = np.unique(groups, return_index=True, return_inverse=True)
    share = np.bincount(group, right) / np.bincount(group)
    if not ((share > 0) & (share < 1)).all():
        at = int(np.argmax((share <= 0) | (share >= 1)))
        raise InputError(
            f"{name}: expected a right and a wrong response in every group, found none that is "
            f"{'wrong' if share[at] else 'right'} in the group of row {first[at]}; leave that group out"
        )
    subsets = np.asarray(subsets)
    if (subsets != subsets[first][group]).any():
        row = int(np.argmax(subsets != subsets[first][group]))
        raise InputError(
            f"{name} row {row}: expected its group within one subset, found {subsets[row]}; renumber it"
        )
    values = {method: group_correct(each, right, groups) for method, each in scores.items()} | {
        "chance": share
    }
    return _tables(np.stack(list(values.values()), 1), values, subsets[first], numbers, seed, name)


def style_table(scores, subsets, groups, seed, name):
    """{method: table} of a benchmark of three styles a side, RM-Bench's 3 x 3 design (arXiv 2410.16184, section 3).

    scores: {method: (n, 2)}, rows prompt-major, three a prompt in the order of STYLES; subsets: n
    names; groups: (n,). For each subset and their mean: accuracy (of the nine comparisons), easy,
    normal, hard, and the 3 x 3 "matrix" (chosen style by rejected style). InputError unless rows
    come in threes of one prompt.
    """
    subsets, groups = np.asarray(subsets), np.asarray(groups)
    whole = len(groups) - len(groups) % 3
    threes, names = groups[:whole].reshape(-1, 3), subsets[:whole].reshape(-1, 3)
    mixed = np.flatnonzero((threes != threes[:, :1]).any(1) | (names != names[:, :1]).any(1))
    if len(mixed) or whole < len(groups):
        row = 3 * int(mixed[0]) if len(mixed) else whole
        raise InputError(
            f"{name}: expected three rows a prompt ({', '.join(STYLES)}), found another prompt or an end "
            f"in rows {row} to {row + 2}; a row that was left out takes its prompt's other two with it"
        )
    matrices = np.stack([style_accuracy(each.reshape(-1, 3, 2)) for each in scores.values()], 1)
    per_prompt = np.stack([levels(matrices[:, i]) for i in range(len(scores))], 1)
    values = np.concatenate(
        [matrices.mean((2, 3))[..., None], per_prompt, matrices.reshape(*matrices.shape[:2], 9)], 2
    )
    draws = by_subset(values, names[:, 0], threes[:, 0], seed, name)
    draws["mean of domains"] = sum(draws.values()) / len(draws)
    keys = ("accuracy", *LEVELS)
    return {
        method: {
            subset: {
                key: value
                for k, name in enumerate(keys)
                for key, value in entry(drawn[:, i, k], name).items()
            }
            | {"n_prompts": int((names[:, 0] == subset).sum()) or len(threes)}
            | {"matrix": drawn[0, i, len(keys) :].reshape(3, 3).tolist()}
            for subset, drawn in draws.items()
        }
        for i, method in enumerate(scores)
    }


def _stack(scores):
    return np.stack([pair_correct(np.asarray(each)) for each in scores.values()], 1)


def _tables(values, methods, subsets, groups, seed, name):
    draws = by_subset(values, subsets, groups, seed, name)
    counts = {subset: int(np.sum(np.asarray(subsets) == subset)) for subset in draws}
    total = sum(counts.values())
    return {
        method: {
            "domains": {s: {"n": counts[s], **entry(drawn[:, i])} for s, drawn in draws.items()},
            **entry(sum(drawn[:, i] for drawn in draws.values()) / len(draws), "mean_of_domains"),
            **entry(sum(counts[s] / total * drawn[:, i] for s, drawn in draws.items()), "all"),
        }
        for i, method in enumerate(methods)
    }
