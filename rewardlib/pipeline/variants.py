"""The four variants side by side on prompts that entered no fit: metrics and paired differences."""

import copy

import numpy as np

from rewardlib.measures import intervals, ranking
from rewardlib.measures.scale import scale_metrics

VARIANTS = ("Teacher ORM", "Teacher + Isotonic", "Student", "Student + Isotonic")
RAW_TEACHER = "Teacher ORM"


def apply_target(golden, target):
    """Golden rewards (n, K) in the unit that step 7 calibrated to."""
    if target["transform"] == "standardised":
        return (golden - target["centre"]) / target["spread"]
    if target["transform"] == "binary":
        return (golden > target["threshold"]).astype(float)
    return golden


def validate(predictions, golden, on_target_scale, weights):
    """Metrics of every variant: {variant: ranking and scale metrics} (the raw teacher has no scale: null, with
    the reason).

    predictions: {variant: (n, K)}; golden: (n, K) rewards, which ranking and best-of-n are measured
    on; on_target_scale: the same in calibrated units, which MSE, R2 and reliability are measured
    on; weights: resampled prompts.
    """
    result = {}
    for variant, values in predictions.items():
        result[variant] = ranking.ranking_metrics(values, golden, weights)
        if variant == RAW_TEACHER:
            empty = dict.fromkeys(("mse", "mse_ci95", "r2", "r2_ci95", "reliability"))
            result[variant] |= empty | {
                "null_reason": "raw scores have no unit; mse, r2 and reliability need a calibrated variant"
            }
        else:
            result[variant] |= scale_metrics(values, on_target_scale, weights)
    return result


def compare_with_teacher(predictions, golden, weights, rng):
    """{variant: {metric: difference to the raw teacher, its interval and p-value}}, paired by prompt."""
    best_of = min(10, golden.shape[1])
    per_prompt = {
        "spearman": ranking.spearman,
        "pair_accuracy": ranking.pair_accuracy,
        f"best_of_{best_of}": lambda scores, golden: ranking.best_of_n(scores, golden, [best_of])[
            :, 0
        ],
    }
    result = {variant: {} for variant in VARIANTS if variant != RAW_TEACHER}
    for name, measure in per_prompt.items():
        teacher = measure(predictions[RAW_TEACHER], golden)
        for variant in result:
            # One set of flips for all: variants that rank alike get one p-value.
            result[variant][name] = intervals.paired_difference(
                measure(predictions[variant], golden), teacher, weights, copy.deepcopy(rng)
            )
    return result


def scale_check(predictions, on_target_scale, n=5):
    """A few responses from the lowest to the highest golden reward: what every variant says of them."""
    order = np.argsort(on_target_scale, axis=None, kind="stable")
    rows = []
    for at in order[np.linspace(0, len(order) - 1, n).round().astype(int)]:
        row = {"golden": float(on_target_scale.ravel()[at])}
        rows.append(
            row | {variant: float(values.ravel()[at]) for variant, values in predictions.items()}
        )
    return rows
