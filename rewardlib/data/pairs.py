"""Preference pairs: which responses are compared, and which of the two a noisy annotator prefers.

A response is given by its (prompt, response) indices, a pair by the indices of its two sides. This
module reads no embeddings.
"""

from dataclasses import dataclass

import numpy as np

from rewardlib.errors import InputError

REDRAWS = 100


@dataclass(frozen=True)
class Pairs:
    """M annotated pairs.

    prompts: (M, 2) prompt of each side; responses: (M, 2) response of each side; labels: (M,) 1.0
    where side 0 was preferred, else 0.0; probability: (M,) probability that side 0 is preferred;
    reward_diff: (M,) golden reward of side 0 minus that of side 1; folds: (M,) fold of the prompts
    of the pair; n_equal: number of pairs left out because their golden rewards are equal.
    """

    prompts: np.ndarray
    responses: np.ndarray
    labels: np.ndarray
    probability: np.ndarray
    reward_diff: np.ndarray
    folds: np.ndarray
    n_equal: int

    @property
    def label_error(self) -> float:
        """Share of the labels that contradict the order of the golden rewards."""
        return float(np.mean((self.labels == 1) != (self.reward_diff > 0)))


def between_prompt_share(rewards: np.ndarray) -> float:
    """Share of the variance of the rewards (n, K) that lies between prompts.

    One-way analysis of variance with random effects; negative estimates count as 0.
    """
    within = rewards.var(axis=1, ddof=1).mean()
    between = max(0.0, rewards.mean(1).var(ddof=1) - within / rewards.shape[1])
    return float(between / (between + within)) if between + within > 0 else 0.0


def candidates(rewards: np.ndarray, consider_first_n: int) -> np.ndarray:
    """Responses of each prompt that may be paired, (n, C).

    consider_first_n: 2 takes all K responses, -1 those of the lowest and the highest reward, -2
    those of the two middle ranks. Ranks are computed from the rewards (n, K); the order of the
    responses in the files means nothing.
    """
    n, n_responses = rewards.shape
    if consider_first_n == 2:
        return np.tile(np.arange(n_responses), (n, 1))
    order = np.argsort(rewards, axis=1, kind="stable")
    middle = n_responses // 2
    chosen = [0, n_responses - 1] if consider_first_n == -1 else [middle - 1, middle]
    return order[:, chosen]


def same_prompt(
    pool: np.ndarray, n_pairs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """n_pairs different unordered pairs of responses to each prompt.

    pool: (n, C) responses that may be paired. Returns prompts (M, 2), as positions in `pool`, and
    responses (M, 2), M = n * n_pairs. Raises InputError if the pool holds fewer pairs.
    """
    n, size = pool.shape
    first, second = np.triu_indices(size, 1)
    if n_pairs > len(first):
        raise InputError(
            f"n_pairs: expected at most {len(first)} same-prompt pairs from {size} responses, "
            f"found {n_pairs}; lower n_pairs"
        )
    # sorting random numbers draws pairs without replacement, for all prompts at once
    chosen = np.argsort(rng.random((n, len(first))), axis=1)[:, :n_pairs]
    sides = [np.take_along_axis(pool, side[chosen], 1) for side in (first, second)]
    responses = np.stack(sides, -1).reshape(-1, 2)
    prompts = np.repeat(np.arange(n), n_pairs)
    return np.stack([prompts, prompts], 1), responses


def cross_prompt(
    pool: np.ndarray, folds: np.ndarray, n_pairs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of responses to different prompts: n_pairs rounds, each prompt once per side and round.

    pool: (n, C) responses that may be paired; folds: (n,). The two prompts of a pair share a fold,
    so a held-out fold shares no pair with the others. No pair comes twice, in either order: a
    repeated pair gets another second prompt. Returns prompts (M, 2), as positions in `pool`, and
    responses (M, 2), M = n * n_pairs. Raises InputError for a fold of one prompt, or if repeated
    pairs remain after REDRAWS attempts.
    """
    n, size = pool.shape
    prompts = np.empty((n_pairs, n, 2), int)
    for fold in np.unique(folds):
        members = np.flatnonzero(folds == fold)
        if len(members) < 2:
            raise InputError(
                f"cross-prompt pairs: expected at least 2 prompts in a fold, found {len(members)}; "
                "add prompts"
            )
        for turn in range(n_pairs):
            ring = rng.permutation(members)
            # a shift of 1 ... len - 1 never pairs a prompt with itself
            partners = np.roll(ring, 1 + turn % (len(members) - 1))
            prompts[turn, members] = np.stack([ring, partners], 1)
    prompts = prompts.reshape(-1, 2)
    responses = pool[prompts, rng.integers(size, size=prompts.shape)]
    for _ in range(REDRAWS):
        repeated = _repeated(prompts, responses)
        if not len(repeated):
            return prompts, responses
        for row in repeated:
            members = np.flatnonzero(folds == folds[prompts[row, 0]])
            prompts[row, 1] = rng.choice(members[members != prompts[row, 0]])
        drawn_responses = rng.integers(size, size=(len(repeated), 2))
        responses[repeated] = pool[prompts[repeated], drawn_responses]
    raise InputError(
        f"n_pairs: {n_pairs} pairs for each of {n} prompts could not all be made different; "
        "lower n_pairs"
    )


def _repeated(prompts, responses):
    """Rows whose two responses, in either order, are the pair of an earlier row."""
    response_ids_M2 = prompts * (responses.max() + 1) + responses
    _, first = np.unique(np.sort(response_ids_M2, axis=1), axis=0, return_index=True)
    return np.setdiff1d(np.arange(len(prompts)), first)


def bootstrap(prompts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positions of the pairs in a bootstrap sample of the prompts.

    Prompts are drawn with replacement, each with all its pairs. prompts: (m,) prompt of side 0 of
    each pair.
    """
    order = np.argsort(prompts, kind="stable")
    by_prompt = np.split(order, np.flatnonzero(np.diff(prompts[order])) + 1)
    n = len(by_prompt)
    return np.concatenate([by_prompt[i] for i in rng.integers(n, size=n)])


def annotate(
    reward_diff: np.ndarray, quality: float, scale: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Labels (M,) of a noisy annotator, and the probabilities (M,) that side 0 is preferred.

    P(side 0 preferred) = sigmoid(quality * reward_diff / scale), arXiv 2411.04991, section 4.
    reward_diff: (M,) golden reward of side 0 minus that of side 1; scale in the same unit. A
    quality below 0 stands for a perfect annotator.
    """
    if quality < 0:
        probability = (reward_diff > 0).astype(float)
    else:
        probability = np.exp(-np.logaddexp(0, -quality * reward_diff / scale))  # does not overflow
    return (rng.random(len(probability)) < probability).astype(float), probability


def build(
    rewards: np.ndarray,
    folds: np.ndarray,
    *,
    pairing: str,
    consider_first_n: int,
    n_pairs: int,
    quality: float,
    scale: float,
    rng: np.random.Generator,
) -> Pairs:
    """Annotated pairs of responses to n prompts, with the two sides in random order.

    rewards: (n, K) golden rewards; folds: (n,); pairing: "xprompt" for `cross_prompt`, "sameprompt"
    for `same_prompt`; n_pairs: pairs per prompt; consider_first_n: see `candidates`; quality and
    scale: see `annotate`. Prompt numbers are positions in `rewards`. Pairs of equal golden reward
    carry no information on the order: they are left out and counted. Raises InputError where no
    pair is left.
    """
    pool = candidates(rewards, consider_first_n)
    if pairing == "xprompt":
        prompts, responses = cross_prompt(pool, folds, n_pairs, rng)
    else:
        prompts, responses = same_prompt(pool, n_pairs, rng)
    swapped = rng.random(len(prompts)) < 0.5
    prompts[swapped], responses[swapped] = prompts[swapped, ::-1], responses[swapped, ::-1]
    difference = rewards[prompts[:, 0], responses[:, 0]] - rewards[prompts[:, 1], responses[:, 1]]
    keep = difference != 0  # True where the two rewards differ
    if not keep.any():
        raise InputError(
            f"golden rewards: both sides of all {len(keep)} pairs have the same reward: no "
            "preference can be learned and no ranking metric is defined; check the reward files"
        )
    prompts, responses, difference = prompts[keep], responses[keep], difference[keep]
    labels, probability = annotate(difference, quality, scale, rng)
    return Pairs(
        prompts=prompts,
        responses=responses,
        labels=labels,
        probability=probability,
        reward_diff=difference,
        folds=folds[prompts[:, 0]],
        n_equal=int((~keep).sum()),
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
