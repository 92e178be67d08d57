"""Preference pairs: which responses are compared, and what a noisy annotator says of them.

A response is named by its (prompt, response) indices; a pair by two of those. Nothing here touches
embeddings.
"""

from dataclasses import dataclass

import numpy as np

from rewardlib.errors import InputError

REDRAWS = 100


@dataclass(frozen=True)
class Pairs:
    """M annotated pairs.

    prompts: (M, 2) prompt of either side; responses: (M, 2) response of either side; labels: (M,)
    1.0 where side 0 was preferred, else 0.0; probability: (M,) chance that side 0 is preferred;
    reward_diff: (M,) golden reward of side 0 minus side 1; folds: (M,) fold of the pair's prompts;
    n_equal: pairs left out because of equal golden rewards.
    """

    prompts: np.ndarray
    responses: np.ndarray
    labels: np.ndarray
    probability: np.ndarray
    reward_diff: np.ndarray
    folds: np.ndarray
    n_equal: int

    @property
    def label_error(self):
        """Share of labels that contradict the golden order."""
        return float(np.mean((self.labels == 1) != (self.reward_diff > 0)))


def between_prompt_share(rewards):
    """Share of the variance of (n, K) rewards that lies between prompts (analysis of variance, random effects)."""
    within = rewards.var(axis=1, ddof=1).mean()
    between = max(0.0, rewards.mean(1).var(ddof=1) - within / rewards.shape[1])
    return float(between / (between + within)) if between + within > 0 else 0.0


def candidates(rewards, consider_first_n):
    """Responses of each prompt that may be paired, (n, C): 2 = all K; -1 = lowest and highest; -2 = the middle two.

    Ranks are computed from the (n, K) rewards; the file order of responses means nothing.
    """
    n, n_responses = rewards.shape
    if consider_first_n == 2:
        return np.tile(np.arange(n_responses), (n, 1))
    order = np.argsort(rewards, axis=1, kind="stable")
    middle = n_responses // 2
    chosen = [0, n_responses - 1] if consider_first_n == -1 else [middle - 1, middle]
    return order[:, chosen]


def same_prompt(pool, n_pairs, rng):
    """n_pairs different unordered pairs of each prompt's pool (n, C): prompts (M, 2) positions, responses (M, 2)."""
    n, size = pool.shape
    first, second = np.triu_indices(size, 1)
    if n_pairs > len(first):
        raise InputError(
            f"n_pairs: expected at most {len(first)} same-prompt pairs from {size} responses, found {n_pairs}; lower it"
        )
    chosen = np.argsort(rng.random((n, len(first))), axis=1)[:, :n_pairs]
    responses = np.stack(
        [np.take_along_axis(pool, side[chosen], 1) for side in (first, second)], -1
    ).reshape(-1, 2)
    prompts = np.repeat(np.arange(n), n_pairs)
    return np.stack([prompts, prompts], 1), responses


def cross_prompt(pool, folds, n_pairs, rng):
    """n_pairs rounds that pair every prompt with another of its fold.

    pool: (n, C) responses that may be paired; folds: (n,). Prompts of a pair share a fold, so
    holding a fold out leaves no pair across the border. No pair comes twice, in either order: a
    repeated one gets another partner. Returns prompts (M, 2) positions and responses (M, 2), M = n
    * n_pairs.
    """
    n, size = pool.shape
    prompts = np.empty((n_pairs, n, 2), int)
    for fold in np.unique(folds):
        at = np.flatnonzero(folds == fold)
        if len(at) < 2:
            raise InputError(
                f"cross-prompt pairs: expected at least 2 prompts in a fold, found {len(at)}; add prompts"
            )
        for turn in range(n_pairs):
            ring = rng.permutation(at)
            prompts[turn, at] = np.stack([ring, np.roll(ring, 1 + turn % (len(at) - 1))], 1)
    prompts = prompts.reshape(-1, 2)
    responses = pool[prompts, rng.integers(size, size=prompts.shape)]
    for _ in range(REDRAWS):
        again = _repeated(prompts, responses)
        if not len(again):
            return prompts, responses
        for i in again:
            others = np.flatnonzero(folds == folds[prompts[i, 0]])
            prompts[i, 1] = rng.choice(others[others != prompts[i, 0]])
        responses[again] = pool[prompts[again], rng.integers(size, size=(len(again), 2))]
    raise InputError(
        f"n_pairs: expected few enough to be all different on {n} prompts, found {n_pairs}; lower it"
    )


def _repeated(prompts, responses):
    """Rows whose two responses, in either order, form an earlier pair as well."""
    response = prompts * (responses.max() + 1) + responses
    _, first = np.unique(np.sort(response, axis=1), axis=0, return_index=True)
    return np.setdiff1d(np.arange(len(prompts)), first)


def bootstrap(prompts, rng):
    """Positions of pairs when their prompts are drawn with replacement, all pairs of a drawn prompt together.

    prompts: (m,) prompt of side 0 of each pair.
    """
    order = np.argsort(prompts, kind="stable")
    by_prompt = np.split(order, np.flatnonzero(np.diff(prompts[order])) + 1)
    return np.concatenate([by_prompt[i] for i in rng.integers(len(by_prompt), size=len(by_prompt))])


def annotate(reward_diff, quality, scale, rng):
    """Labels of a noisy annotator: P(side 0 preferred) = sigmoid(quality * reward_diff / scale).

    quality < 0 gives the golden order. Returns labels (M,) and probabilities (M,).
    """
    if quality < 0:
        probability = (reward_diff > 0).astype(float)
    else:
        probability = np.exp(-np.logaddexp(0, -quality * reward_diff / scale))
    return (rng.random(len(probability)) < probability).astype(float), probability


def build(rewards, folds, *, pairing, consider_first_n, n_pairs, quality, scale, rng):
    """Pairs of n prompts with (n, K) golden rewards and (n,) folds, annotated; sides in random order.

    pairing: "xprompt" or "sameprompt"; n_pairs per prompt. Prompt numbers are positions in
    `rewards`. Pairs of equal golden reward carry no information on the order: they are left out and
    counted.
    """
    pool = candidates(rewards, consider_first_n)
    if pairing == "xprompt":
        prompts, responses = cross_prompt(pool, folds, n_pairs, rng)
    else:
        prompts, responses = same_prompt(pool, n_pairs, rng)
    turned = rng.random(len(prompts)) < 0.5
    prompts[turned], responses[turned] = prompts[turned, ::-1], responses[turned, ::-1]
    difference = rewards[prompts[:, 0], responses[:, 0]] - rewards[prompts[:, 1], responses[:, 1]]
    keep = difference != 0
    if not keep.any():
        raise InputError(
            f"golden rewards: expected pairs that differ, found {len(keep)} pairs of equal reward; "
            "no preference can be learned and no ranking metric is defined"
        )
    prompts, responses, difference = prompts[keep], responses[keep], difference[keep]
    labels, probability = annotate(difference, quality, scale, rng)
    return Pairs(
        prompts,
        responses,
        labels,
        probability,
        difference,
        folds[prompts[:, 0]],
        int((~keep).sum()),
    )


def rows_of(
    pairs_M4: np.ndarray, n_responses: int
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """The distinct responses that pairs compare, and which two of them each pair compares.

    pairs_M4: prompt and response of side 0, prompt and response of side 1. Returns ((R,) prompts,
    (R,) response numbers) in ascending order, and (M, 2) positions in these.
    """
    flat_M2 = pairs_M4[:, [0, 2]] * n_responses + pairs_M4[:, [1, 3]]
    flat_R, index = np.unique(flat_M2, return_inverse=True)
    return np.divmod(flat_R, n_responses), index.reshape(-1, 2)
