"""What step 7 distils: the teacher, its targets, the responses, and points between responses."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.models import model_files
from rewardlib.pipeline import run_record

BLOCK = 1024


@dataclass(frozen=True)
class Teacher:
    """E checkpoints whose mean is the teacher.

    paths: their files; digests: {name: sha256}, in the same order; members: the number of each in
    step 5's record, None for a checkpoint from elsewhere; is_step5: they are its members, in order.
    """

    paths: list[Path]
    digests: dict[str, str]
    members: list[int | None]
    is_step5: bool

    @property
    def is_mlp(self) -> bool:
        """Whether every checkpoint is an MLP, from which a student can start."""
        return all(model_files.is_mlp(path) for path in self.paths)

    def seen(self, record: dict, prompts: np.ndarray) -> np.ndarray:
        """(E, n) True where a checkpoint is known to have been trained on the prompt."""
        by_member = run_record.seen_by_members(record, prompts)
        unknown = np.zeros(len(prompts), bool)
        return np.stack([unknown if i is None else by_member[i] for i in self.members])

    def describe(self) -> dict:
        """The teacher as distillation_config.json records it."""
        return {
            "members": [
                {"file": name, "sha256": digest, "origin": "external" if i is None else "step5"}
                for (name, digest), i in zip(self.digests.items(), self.members, strict=True)
            ],
            "aggregation": "mean of member scores, each with mean 0 and sd 1 over a sample of the "
            "fit prompts",
        }


def open_teacher(output_dir: Path, record: dict, patterns: list[str] | None) -> Teacher:
    """The checkpoints that `patterns` (paths or globs) name; None: the members of step 5."""
    home = Path(output_dir).resolve()
    members = {(home / member["file"]).resolve(): i for i, member in enumerate(record["members"])}
    paths = model_files.find_checkpoints(patterns) if patterns else list(members)
    paths = [path.resolve() for path in paths]
    digests = {
        str(path.relative_to(home) if home in path.parents else path): artifacts.sha256(path)
        for path in paths
    }
    return Teacher(paths, digests, [members.get(path) for path in paths], paths == list(members))


@dataclass(frozen=True)
class Sample:
    """What step 7 fits on: K responses to each of n prompts, then n_mixed rows of points between.

    prompts: (n,); numbers: (n, K) response numbers; rows: (n + n_mixed, K, D) tensor of embeddings;
    parts: (train, validation) index arrays into the first axis of rows.
    """

    prompts: np.ndarray
    numbers: np.ndarray
    rows: torch.Tensor
    parts: tuple[np.ndarray, np.ndarray]


def apply_map(fitted, scores: np.ndarray) -> np.ndarray:
    """Calibrated values of scores of any shape."""
    return fitted.predict(scores.ravel()).reshape(scores.shape)


def make_target(rewards: np.ndarray, chosen: dict) -> tuple[np.ndarray, dict]:
    """Golden rewards (n, K) in the unit that the maps calibrate to, and how they were transformed.

    As they are, standardised, or 0 / 1. InputError where one value is left.
    """
    if np.ptp(rewards) == 0:
        raise InputError("golden rewards: all values are equal; there is nothing to calibrate to")
    if chosen["normalize_rewards"]:
        centre, spread = float(rewards.mean()), float(rewards.std())
        target = {"transform": "standardised", "centre": centre, "spread": spread}
        return (rewards - centre) / spread, target
    if chosen["binarize_rewards"]:
        threshold = chosen["binarize_threshold"]
        is_good = (rewards > threshold).astype(float)
        if np.ptp(is_good) == 0:
            raise InputError(
                "binarize_threshold: expected a value between the golden rewards "
                f"({rewards.min():g} to {rewards.max():g}), found {threshold:g}"
            )
        return is_good, {"transform": "binary", "threshold": threshold}
    return rewards, {"transform": "none"}


def calibration_prompts(
    prompts: np.ndarray, split: dict, seen: np.ndarray, unseen: np.ndarray
) -> tuple[np.ndarray, str]:
    """(n,) mask of the prompts that isotonic maps are fitted on, and whose scores these are.

    seen: (E, n) as Teacher.seen; unseen: (n, K) mean over members that never saw the prompt, NaN
    where all did.
    """
    in_calibration = np.isin(prompts, split["calibration"]) & np.isfinite(unseen).all(1)
    fresh = in_calibration & ~seen.any(0)
    if fresh.sum() >= run_record.MIN_UNSEEN or not seen[:, in_calibration].any():
        return fresh, f"prompts that no member trained on ({fresh.sum()})"
    return (
        in_calibration,
        "out-of-bag scores, members that never trained on the prompt "
        f"({in_calibration.sum()} prompts)",
    )


def is_increasing(fitted) -> bool:
    """False where golden rewards do not rise with the scores: the teacher is a constant at best."""
    ends = fitted.predict(np.array([-1e3, 1e3]))
    return bool(np.ptp(ends) > 0) and getattr(fitted, "increasing_", True)


def sample(
    prompts: np.ndarray, n_responses: int, limit: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` responses, spread over the prompts: prompts (n,), response numbers (n, k).

    Every prompt has as many of its `n_responses` responses as fit; where not even two of each fit,
    as many prompts as fit have two.
    """
    if limit < 2 * len(prompts):
        prompts = np.sort(rng.permutation(prompts)[: max(1, limit // 2)])
    k = min(n_responses, max(2, limit // len(prompts)))
    numbers = np.argsort(rng.random((len(prompts), n_responses)), axis=1)[:, :k]
    return prompts, np.sort(numbers, axis=1)


def passes(limit: int, steps: int, n: int, batch_size: int) -> int:
    """Passes through n prompts: `limit`, or as many as make about `steps` batches; at least one."""
    return min(limit, max(1, round(steps / -(-n // batch_size))))


def interpolate(
    rows: torch.Tensor, fit: np.ndarray, n_mixed: int, rng: np.random.Generator
) -> None:
    """Fill the last n_mixed of `rows` (n + n_mixed, K, D) with points between responses.

    Each point mixes two random responses to the prompts `fit` in a share drawn uniformly. The
    teacher can score any point, so the points cost no label; they tie the student down between the
    data.
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
