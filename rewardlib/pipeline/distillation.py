"""What is distilled, and on which responses: targets, calibration prompts, points between embeddings."""

import numpy as np
import torch

from rewardlib.errors import InputError
from rewardlib.pipeline import run_record

BLOCK = 1024


def make_target(rewards, chosen):
    """Golden rewards (n, K) as the maps see them, and how they were made: as they are, standardised, or 0 / 1."""
    if np.ptp(rewards) == 0:
        raise InputError(
            "golden rewards: expected values that differ, found one value; nothing to calibrate to"
        )
    if chosen["normalize_rewards"]:
        centre, spread = float(rewards.mean()), float(rewards.std())
        return (rewards - centre) / spread, {
            "transform": "standardised",
            "centre": centre,
            "spread": spread,
        }
    if chosen["binarize_rewards"]:
        threshold = chosen["binarize_threshold"]
        made = (rewards > threshold).astype(float)
        if np.ptp(made) == 0:
            raise InputError(
                f"binarize_threshold: expected a value between the golden rewards ({rewards.min():g} to "
                f"{rewards.max():g}), found {threshold:g}"
            )
        return made, {"transform": "binary", "threshold": threshold}
    return rewards, {"transform": "none"}


def calibration_prompts(prompts, split, seen, unseen):
    """(n,) mask of the prompts the isotonic maps are fitted on, and in words whose scores these are."""
    role = np.isin(prompts, split["calibration"]) & np.isfinite(unseen).all(1)
    fresh = role & ~seen.any(0)
    if fresh.sum() >= run_record.MIN_UNSEEN or not seen[:, role].any():
        return fresh, f"prompts that no member trained on ({fresh.sum()})"
    return (
        role,
        f"out-of-bag scores, members that never trained on the prompt ({role.sum()} prompts)",
    )


def is_increasing(fitted):
    """False when the golden rewards do not rise with the scores at all: the teacher is no better than a constant."""
    return bool(np.ptp(fitted.predict(np.array([-1e3, 1e3]))) > 0) and getattr(
        fitted, "increasing_", True
    )


def sample(prompts, n_responses, limit, rng):
    """At most `limit` of the `n_responses` responses to each of `prompts`: prompts (n,), response numbers (n, k).

    Every prompt with as many responses as fit; where not even two of each fit, two responses of as
    many prompts as fit.
    """
    if limit < 2 * len(prompts):
        prompts = np.sort(rng.permutation(prompts)[: max(1, limit // 2)])
    k = min(n_responses, max(2, limit // len(prompts)))
    numbers = np.argsort(rng.random((len(prompts), n_responses)), axis=1)[:, :k]
    return prompts, np.sort(numbers, axis=1)


def passes(most, steps, n, batch_size):
    """Passes through n prompts: `most`, or fewer where about `steps` batches are enough, but at least one."""
    return min(most, max(1, round(steps / -(-n // batch_size))))


def interpolate(rows, fit, n_mixed, rng):
    """Fill the last n_mixed prompts of `rows` (n + n_mixed, K, D), a tensor, with points between responses.

    Each is one of the responses to the prompts `fit` and another one, mixed in a share drawn
    uniformly. The teacher can score any point, so these cost no label; they tie the student down
    between the data.
    """
    n_responses = rows.shape[1]
    ends = fit[:, None] * n_responses + np.arange(n_responses)
    first = torch.from_numpy(rng.permutation(ends.ravel())[: n_mixed * n_responses])
    other = torch.from_numpy(rng.permutation(ends.ravel())[: n_mixed * n_responses])
    share = torch.from_numpy(rng.random((len(first), 1), np.float32))
    flat = rows.flatten(0, 1)
    mixed = flat[len(flat) - len(first) :]
    for part in torch.arange(len(first)).split(BLOCK):
        mixed[part] = torch.lerp(
            flat[other[part]].float(), flat[first[part]].float(), share[part]
        ).to(rows.dtype)
