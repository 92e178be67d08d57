"""One page about one finished run: report.html, made from the files that steps 5 to 8 wrote.

Every number on the page stands in one of these files: the report reads and draws, and measures
nothing. Deleting this module changes no step. Files that are not the ones that the manifest
records, or that belong to different runs, are refused.

Reads   OUTPUT_DIR/{manifest,distillation_config,validation_results}.json, training_log.jsonl,
        {orm,eval_results}_....json, student_log.jsonl, {predictions,golden}_{held_out,test}.npy
Writes  OUTPUT_DIR/report.html
Example python3 -m rewardlib.cli.report distill_out
"""

import json
from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.pipeline.variants import VARIANTS
from rewardlib.report import page
from rewardlib.report.page import BLUE, GREY, INK, ORANGE, RED, SKY, number

TEMPLATE = page.TEMPLATES / "run.html"
STEPS = ("step5", "step6", "step7", "step8")
MAX_POINTS = 1500
TEACHER, _, STUDENT, FINAL = VARIANTS
COLOUR = dict(zip(VARIANTS, (BLUE, SKY, RED, ORANGE), strict=True))
COLOUR |= {"oracle": INK, "random": GREY, "linear_probe": page.GREEN}
COLOUR |= {"mean_reward": page.PINK, "length": page.YELLOW}
# Line, marker and width: from thick to thin, so that the edges of a line under another still show.
LOOKS = (("-", "o", 3.2), ("--", "s", 2.4), ("-", "^", 1.6), ("--", "D", 1))
LINE = dict(zip(VARIANTS, LOOKS, strict=True))
LABEL = {"mean_reward": "mean reward", "linear_probe": "linear probe"}
METRIC = {"spearman": "Spearman", "pair_accuracy": "Pair accuracy"}
IDENTITY = {"color": INK, "linewidth": 0.8, "linestyle": ":", "label": "predicted = golden"}
UNIT = {
    "none": "golden reward",
    "standardised": "standardised golden reward",
    "binary": "P(golden reward > threshold)",
}

# ------------------------------------------------------------------------------------------ reading


def read(folder: Path) -> dict:
    """Content of the run's files; InputError if one is missing, changed or of another run."""
    folder = Path(folder)
    manifest = artifacts.read_manifest(folder)
    for step in STEPS:
        if step not in manifest:
            raise InputError(f"{folder}: {step} has not finished here; run it first")
    check_one_run(folder, manifest)

    def lines(step, name):
        return page.recorded(folder, manifest, step, name).read_text().splitlines()

    def parsed(step, name):
        return json.loads("\n".join(lines(step, name)))

    def arrays(kind):
        files = {name: f"{kind}_{name}.npy" for name in sets}
        paths = {n: page.recorded(folder, manifest, "step8", file) for n, file in files.items()}
        return {name: np.load(path, allow_pickle=False) for name, path in paths.items()}

    step6_files = manifest["step6"]["outputs"]
    evaluation = next(name for name in step6_files if name.startswith("eval_results_"))
    validation = parsed("step8", "validation_results.json")
    sets = {"held_out": validation, "test": validation["test"]}
    sets = {name: results for name, results in sets.items() if results is not None}
    return {
        "manifest": manifest,
        "record": parsed("step5", manifest["step5"]["record"]),
        "training_log": [*map(json.loads, lines("step5", "training_log.jsonl"))],
        "evaluation": parsed("step6", evaluation),
        "config": parsed("step7", "distillation_config.json"),
        "student_log": [*map(json.loads, lines("step7", "student_log.jsonl"))],
        "validation": validation,
        "sets": sets,
        "predictions": arrays("predictions"),
        "golden": arrays("golden"),
    }


def check_one_run(folder: Path, manifest: dict) -> None:
    """InputError when a step worked on a file that an earlier step has replaced since."""
    for i, later in enumerate(STEPS):
        for earlier in STEPS[:i]:
            for name, output in manifest[earlier]["outputs"].items():
                if manifest[later]["inputs"].get(name, output["sha256"]) != output["sha256"]:
                    raise InputError(
                        f"{folder}: {earlier} has replaced {name} since {later} ran; "
                        f"run {later} again"
                    )


# ------------------------------------------------------------------------------------ text and rows


def summary(held_out: dict) -> str:
    """The result on held-out prompts in one sentence."""
    rows = [held_out[TEACHER], held_out[STUDENT], held_out["baselines"]["random"]]
    gap = held_out["against_teacher"][STUDENT]["spearman"]
    if None in (gap["difference"], *(row["spearman"] for row in rows)):
        scorers = "the teacher, the student or a random scorer"
        return f"On held-out prompts Spearman is undefined for {scorers}."
    teacher, student, chance = (page.in_text(row, "spearman") for row in rows)
    return (
        f"On {held_out['n_prompts']} held-out prompts the teacher ranks responses with a mean "
        f"Spearman of {teacher} and the student with {student}, against {chance} for a random "
        f"scorer; student minus teacher is {page.gap_in_text(gap)}."
    )


def result_rows(results: dict) -> dict:
    """Rows of the variants, the baselines and the oracle. Best-of-n at the largest n up to 10."""
    size = max((n for n in results["golden_best_of_n"] if int(n) <= 10), key=int)
    at_n = {"best_of_n": f"Best of {size}", "best_of_n_gain": f"Gain, best of {size}"}
    columns = {**METRIC, **at_n, "mse": "MSE", "r2": "R²"}
    footnotes = []

    def cell(row, metric):
        value, ci = row.get(metric), row.get(f"{metric}_ci95")
        if isinstance(value, dict):  # one value per n
            value, ci = value.get(size), ci.get(size)
        footnote = footnote_of(row, metric, value, results["n_prompts"])
        if footnote and footnote not in footnotes:
            footnotes.append(footnote)
        mark = footnotes.index(footnote) + 1 if footnote else None
        return number(value), mark, page.interval(ci) if value is not None else ""

    groups = [
        {name: [cell(row, metric) for metric in columns] for name, row in rows.items()}
        for rows in ({name: results[name] for name in VARIANTS}, results["baselines"])
    ]
    footnotes.append("picks by the golden reward itself; only its best of n is recorded")
    best = number(results["golden_best_of_n"][size])
    oracle = [best if metric == "best_of_n" else "—" for metric in columns]
    return {"columns": columns, "groups": groups, "oracle": oracle, "footnotes": footnotes}


def footnote_of(row: dict, metric: str, value: float | None, n_prompts: int) -> str | None:
    """Why a metric is null, or which prompts it leaves out; None where there is nothing to say."""
    if left_out := row.get(f"n_prompts_without_{metric}"):
        prompts = f"{left_out} of {n_prompts} prompts"
        return f"left out: {prompts}, where scores or golden rewards are all equal"
    if value is not None:
        return None
    if metric in ("mse", "r2") and "null_reason" in row:
        return row["null_reason"]
    return "undefined: golden rewards do not differ" if metric in row else "scores without a unit"


# ------------------------------------------------------------------------------------------ figures


def plot_variant(axes, variant, x, y, label, width):
    line, marker, _ = LINE[variant]
    face = "none" if line == "--" else COLOUR[variant]
    looks = {"color": COLOUR[variant], "mfc": face, "linewidth": width}
    axes.plot(x, y, line, marker=marker, label=label, **looks)


def best_of_n_figure(name: str, results: dict) -> page.Drawing:
    """Golden reward of the choice against n: the variants, the oracle, a random choice."""
    oracle, random = results["golden_best_of_n"], results["baselines"]["random"]["best_of_n"]
    sizes = [int(n) for n in oracle]

    def paint(axes):
        for variant in VARIANTS:
            low, high = zip(*results[variant]["best_of_n_ci95"].values(), strict=True)
            axes.fill_between(sizes, low, high, color=COLOUR[variant], alpha=0.08, linewidth=0)
        for variant in VARIANTS:
            means = results[variant]["best_of_n"].values()
            plot_variant(axes, variant, sizes, means, variant, LINE[variant][2])
        axes.plot(sizes, oracle.values(), "-", color=INK, label="oracle")
        axes.plot(sizes, random.values(), ":", color=GREY, label="random")
        axes.set(xscale="log", xlabel="n, responses to choose from (log scale)")
        axes.set_ylabel("golden reward of the choice")
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()

    label = "Golden reward of the best of n responses against n"
    return page.draw(f"best-of-n-{name}", label, paint, 3.9)


def reliability_figure(name: str, results: dict, unit: str) -> page.Drawing:
    """Mean golden against mean predicted reward in bins, one curve per calibrated variant."""

    def paint(axes):
        for variant in VARIANTS:
            if bins := results[variant]["reliability"]:
                label = f"{variant} (calibration error {number(bins['calibration_error'])})"
                plot_variant(axes, variant, bins["predicted"], bins["golden"], label, 1)
        limits = [pick(*axes.get_xlim(), *axes.get_ylim()) for pick in (min, max)]
        axes.plot(limits, limits, **IDENTITY)
        axes.set(xlim=limits, xlabel=f"predicted {unit}, mean of bin")
        axes.set(ylim=limits, ylabel=f"{unit}, mean of bin")

    label = "Mean golden against mean predicted reward in bins"
    return page.draw(f"reliability-{name}", label, paint, 4.2)


def scatter_figure(
    name: str, predicted_NK: np.ndarray, golden_NK: np.ndarray, unit: str
) -> page.Drawing:
    """One dot per response; a fixed random choice of MAX_POINTS where there are more."""
    chosen = np.random.default_rng(0).permutation(golden_NK.size)[:MAX_POINTS]
    predicted, golden = predicted_NK.ravel()[chosen], golden_NK.ravel()[chosen]

    def paint(axes):
        looks = {"color": COLOUR[FINAL], "markersize": 3, "alpha": 0.5, "markeredgewidth": 0}
        axes.plot(predicted, golden, "o", **looks)
        axes.axline((predicted.mean(), predicted.mean()), slope=1, **IDENTITY)
        axes.set(xlabel=f"predicted {unit}", ylabel=unit)

    label = f"Golden against predicted reward of {len(golden)} responses"
    return page.draw(f"scatter-{name}", label, paint, 3.7)


def members_figure(name: str, evaluation: dict) -> page.Drawing:
    """Spearman of every member; with intervals, of each aggregation and the linear probe."""
    rows = {**evaluation["aggregations"], "linear_probe": evaluation["baselines"]["linear_probe"]}
    rows = {label: row for label, row in rows.items() if row["spearman"] is not None}
    members = [row["spearman"] for row in evaluation["members"] if row["spearman"] is not None]

    def paint(axes):
        spread = 0.25 if len(members) > 1 else 0
        heights = np.linspace(-spread, spread, len(members))
        axes.plot(members, heights, "o", color=BLUE, alpha=0.9, markeredgewidth=0)
        for height, (label, row) in enumerate(rows.items(), 1):
            colour = COLOUR.get(label, INK)
            axes.plot(row["spearman_ci95"], [height, height], "-", color=colour)
            axes.plot(row["spearman"], height, "D", color=colour)
        names = [f"members ({len(members)})", *(LABEL.get(label, label) for label in rows)]
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="Spearman", ylim=(len(names) - 0.5, -0.5))
        axes.axhline(0.5, color=GREY, linewidth=0.5)

    label = "Spearman of members, aggregations and linear probe"
    return page.draw(f"members-{name}", label, paint, 1.3 + 0.3 * len(rows))


def training_figures(run: dict) -> dict:
    """{caption: curves} of the members and of the student."""
    members = {}
    for entry in run["training_log"]:
        members.setdefault(entry["member"], []).append(entry)
    logs, curves = list(members.values()), page.training_curves
    ensemble = f"{len(logs)} member{'s' if len(logs) > 1 else ''}"
    loss = curves("loss", logs, "validation_loss", BLUE, "validation loss")
    accuracy = curves("accuracy", logs, "validation_accuracy", BLUE, "validation accuracy")
    unit = "validation MSE, standardised"
    student = curves("student", [run["student_log"]], "validation_loss", RED, unit)
    figures = {f"Loss of {ensemble}": loss, f"Accuracy of {ensemble}": accuracy}
    return {**figures, "Loss of the student": student}


# ----------------------------------------------------------------------------------------- the page


def set_content(run: dict, name: str, results: dict) -> dict:
    """Rows and figures of one set of prompts."""
    unit = UNIT[run["validation"]["target"]["transform"]]
    predicted_NK, golden_NK = run["predictions"][name][VARIANTS.index(FINAL)], run["golden"][name]
    return {
        "name": {"held_out": "Held-out", "test": "Test"}[name],
        "results": results,
        "rows": result_rows(results),
        "best_of_n": best_of_n_figure(name, results),
        "members": members_figure(name, run["evaluation"][name]),
        "reliability": reliability_figure(name, results, unit),
        "scatter": scatter_figure(name, predicted_NK, golden_NK, unit),
    }


def content(run: dict) -> dict:
    """What the template shows of a run. run: what `read` returns."""
    external = run["validation"]["no_leakage"]["external_teacher_files"]
    entries = {step.replace("step", "Step "): run["manifest"][step] for step in STEPS}
    return {
        **{name: run[name] for name in ("record", "evaluation", "config", "validation")},
        "summary": summary(run["validation"]),
        "sets": [set_content(run, name, results) for name, results in run["sets"].items()],
        "training": training_figures(run),
        "external_teachers": [Path(name).name for name in external],
        "provenance": page.provenance(entries),
        "colour": COLOUR,
        "label": LABEL,
        "metric": METRIC,
        "max_points": MAX_POINTS,
    }


def write(folder: Path) -> Path:
    """Make folder/report.html of the OUTPUT_DIR `folder`; returns its path."""
    return page.write(folder / "report.html", TEMPLATE, content(read(folder)))
