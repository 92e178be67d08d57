"""The four variants side by side on prompts that entered no fit: metrics and paired differences."""

import copy

import numpy as np

from rewardlib.measures import intervals, ranking
from rewardlib.measures.scale import scale_metrics

VARIANTS = ("Teacher ORM", "Teacher + Isotonic", "Student", "Student + Isotonic")
RAW_TEACHER = "Teacher ORM"


def apply_target(golden: np.ndarray, target: dict) -> np.ndarray:
    """Golden rewards (n, K) in the unit that step 7 calibrated to."""
    if target["transform"] == "standardised":
        return (golden - target["centre"]) / target["spread"]
    if target["transform"] == "binary":
        return (golden > target["threshold"]).astype(float)
    return golden


def validate(
    predictions: dict, golden: np.ndarray, on_target_scale: np.ndarray, weights: np.ndarray
) -> dict:
    """{variant: ranking and scale metrics}; those of scale are null for the raw teacher.

    predictions: {variant: (n, K)}; golden: (n, K) rewards, for ranking and best-of-n;
    on_target_scale: the same in calibrated units, for MSE, R2 and reliability; weights: resampled
    prompts.
    """
    without_unit = dict.fromkeys(("mse", "mse_ci95", "r2", "r2_ci95", "reliability"))
    without_unit["null_reason"] = (
        "raw scores have no unit; mse, r2 and reliability need a calibrated variant"
    )
    result = {}
    for variant, scores_NK in predictions.items():
        result[variant] = ranking.ranking_metrics(scores_NK, golden, weights)
        if variant == RAW_TEACHER:
            result[variant] |= without_unit
        else:
            result[variant] |= scale_metrics(scores_NK, on_target_scale, weights)
    return result


def compare_with_teacher(
    predictions: dict, golden: np.ndarray, weights: np.ndarray, rng: np.random.Generator
) -> dict:
    """{variant: {metric: difference to the raw teacher, its interval, p-value}}, by prompt."""
    n_best = min(10, golden.shape[1])

    def best_of_n(scores, golden):
        return ranking.best_of_n(scores, golden, [n_best])[:, 0]

    per_prompt = {
        "spearman": ranking.spearman,
        "pair_accuracy": ranking.pair_accuracy,
        f"best_of_{n_best}": best_of_n,
    }
    result = {variant: {} for variant in VARIANTS if variant != RAW_TEACHER}
    for name, measure in per_prompt.items():
        teacher_N = measure(predictions[RAW_TEACHER], golden)
        for variant in result:
            variant_N = measure(predictions[variant], golden)
            # The sign flips are the same for all, so that variants that rank alike get one p-value.
            result[variant][name] = intervals.paired_difference(
                variant_N, teacher_N, weights, copy.deepcopy(rng)
            )
    return result


def scale_check(predictions: dict, on_target_scale: np.ndarray, n: int = 5) -> list[dict]:
    """What every variant predicts for n responses, from the lowest golden reward to the highest."""
    order = np.argsort(on_target_scale, axis=None, kind="stable")
    responses = order[np.linspace(0, len(order) - 1, n).round().astype(int)]
    scores = {"golden": on_target_scale, **predictions}
    return [
        {name: float(scores_NK.ravel()[response]) for name, scores_NK in scores.items()}
        for response in responses
    ]
