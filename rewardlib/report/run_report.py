"""One page about one finished run: report.html, made only from the files that steps 5 to 8 left in OUTPUT_DIR.

It reads and draws and measures nothing: every number on the page stands in one of the files, and
deleting this module changes no step. It refuses files that are not the ones the manifest records,
or that belong to different runs.

Reads   OUTPUT_DIR/{manifest,distillation_config,validation_results}.json, {orm,eval_results}_....json,
        {training,student}_log.jsonl, predictions_{held_out,test}.npy, golden_{held_out,test}.npy
Writes  OUTPUT_DIR/report.html   self-contained: nothing is loaded from elsewhere; the same bytes every time
Example python3 -m rewardlib.report distill_out
"""

import io
import json
import re
from html import escape
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.pipeline.variants import VARIANTS

STEPS = ("step5", "step6", "step7", "step8")
MAX_POINTS = 1500
TEACHER, _, STUDENT, FINAL = VARIANTS
INK, GREY = "#111213", "#828282"
# Okabe and Ito's colours, which stay apart for colour-blind readers; INK becomes the colour of the
# page's text.
COLOUR = dict(zip(VARIANTS, ("#0072B2", "#56B4E9", "#D55E00", "#E69F00"), strict=True))
COLOUR |= {
    "oracle": INK,
    "random": GREY,
    "mean_reward": "#CC79A7",
    "length": "#F0E442",
    "linear_probe": "#009E73",
}
# Line, marker and width: from thick to thin, so that a line hidden under another still shows at its
# edges.
LINE = dict(
    zip(VARIANTS, (("-", "o", 3.2), ("--", "s", 2.4), ("-", "^", 1.6), ("--", "D", 1)), strict=True)
)
LABEL = {"mean_reward": "mean reward", "linear_probe": "linear probe"}
METRIC = {"spearman": "Spearman", "pair_accuracy": "Pair accuracy"}
IDENTITY = {"color": INK, "linewidth": 0.8, "linestyle": ":", "label": "predicted = golden"}
WORDS = {
    "bt": "Bradley-Terry",
    "clf": "classification",
    "regression": "regression",
    "xprompt": "cross-prompt",
    "sameprompt": "same-prompt",
}
UNIT = {
    "none": "golden reward",
    "standardised": "standardised golden reward",
    "binary": "P(golden reward > threshold)",
}
HOW = {
    "Results": "Mean over prompts and its 95 % interval from resampling prompts. Higher is better, except MSE. "
    "Best of n: golden reward of the top-scored of n responses. Gain: its share of the oracle's gain over a random "
    "choice.",
    "Differences to the teacher": "Each variant minus Teacher ORM, paired by prompt; p from flipping signs. An "
    "interval that includes zero means that these prompts do not tell the two apart.",
    "Best of n": "Lines should climb towards the oracle; one that turns down is being over-optimised. Bands are "
    "95 % intervals; prompts are shared, so compare lines by the paired differences. Where rankings agree, lines "
    "coincide.",
    "Members and aggregations": "One dot per reward model; bars are 95 % intervals. An aggregation pays where it "
    "lies to the right of most dots.",
    "Reliability": "Bins of equally many predictions. On the dotted line they are right on average; a curve "
    "flatter than it means that they spread too far. The calibration error is the mean vertical distance.",
    "Golden against predicted": "Student + Isotonic, one dot per response; its vertical distance from the dotted "
    f"line is its error. Where there are more than {MAX_POINTS} responses, a fixed random choice of them is drawn.",
    "Scale check": "Single responses. Calibrated columns estimate the golden one, drawn towards the mean where the "
    "embeddings tell little; Teacher ORM has no unit.",
    "Training": "Measured on prompts that the model was not trained on: members on noisy labels, the student on "
    "calibrated targets. A best epoch that is the last one suggests more epochs.",
    "Label noise": "The realised error, the share of labels that contradict the golden rewards, should be near "
    "the expected one. A faultless ranker would reach a validation accuracy of about 1 minus it.",
    "No leakage": "Held-out prompts in any fit must be 0; step 8 writes no results otherwise.",
    "Settings": "The flags that name this run; the same values on the same inputs give the same results.",
    "Provenance": "Compare revision, code and inputs (SHA-256, first 12 digits) before comparing the results of "
    "two runs.",
}
RC = {
    "svg.fonttype": "none", "font.size": 9.5, "axes.labelsize": 9.5, "legend.fontsize": 9, "xtick.labelsize": 9,
    "ytick.labelsize": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "lines.linewidth": 1.2, "lines.markersize": 4.5, "legend.frameon": False, "legend.handlelength": 2.4,
}  # fmt: skip

# ------------------------------------------------------------------------------------------ reading


def read(folder):
    """Everything the page is made of, as a dict; InputError when a file is missing, changed or of another run."""
    folder = Path(folder)
    manifest = artifacts.read_manifest(folder)
    for step in STEPS:
        if step not in manifest:
            raise InputError(f"{folder}: {step} has not finished here; run it first")
    check_one_run(folder, manifest)

    def recorded(step, name):
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} not found; it is written by {step}: run that first")
        if artifacts.describe_file(path) != manifest[step]["outputs"].get(name):
            raise InputError(
                f"{path} is not the file that {step} recorded; run {step} again with FORCE=1"
            )
        return path

    evaluation = next(
        name for name in manifest["step6"]["outputs"] if name.startswith("eval_results_")
    )
    run = {
        "manifest": manifest,
        "record": json.loads(recorded("step5", manifest["step5"]["record"]).read_text()),
    }
    run["evaluation"] = json.loads(recorded("step6", evaluation).read_text())
    run["config"] = json.loads(recorded("step7", "distillation_config.json").read_text())
    run["validation"] = json.loads(recorded("step8", "validation_results.json").read_text())
    for step, name in (("step5", "training_log"), ("step7", "student_log")):
        run[name] = [
            json.loads(line) for line in recorded(step, f"{name}.jsonl").read_text().splitlines()
        ]
    blocks = {"held_out": run["validation"], "test": run["validation"]["test"]}
    run["sets"] = {name: block for name, block in blocks.items() if block is not None}
    for kind in ("predictions", "golden"):
        files = {name: recorded("step8", f"{kind}_{name}.npy") for name in run["sets"]}
        run[kind] = {name: np.load(path, allow_pickle=False) for name, path in files.items()}
    return run


def check_one_run(folder, manifest):
    """InputError when a step worked on a file that an earlier step has replaced since."""
    for i, later in enumerate(STEPS):
        for earlier in STEPS[:i]:
            for name, told in manifest[earlier]["outputs"].items():
                if manifest[later]["inputs"].get(name, told["sha256"]) != told["sha256"]:
                    raise InputError(
                        f"{folder}: {earlier} has replaced {name} since {later} ran; run {later} again"
                    )


# --------------------------------------------------------------------------------------------- text


def number(value, sign=""):
    """Three decimals with a true minus sign, an em dash for None; -0.000 is 0.000."""
    text = "—" if value is None else f"{value:{sign}.3f}"
    return (text.lstrip("+-") if text.strip("+-") == "0.000" else text).replace("-", "−")


def interval(ci, sign=""):
    return "" if ci is None or None in ci else f"[{number(ci[0], sign)}, {number(ci[1], sign)}]"


def p_value(p):
    return "" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def plain(value):
    """A setting in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def set_title(name, block):
    title = {"held_out": "Held-out", "test": "Test"}[name]
    return f"{title}: {block['n_prompts']} prompts × {block['n_responses']} responses"


def summary(block):
    """The result on held-out prompts in one sentence."""
    rows = [block[TEACHER], block[STUDENT], block["baselines"]["random"]]
    told = block["against_teacher"][STUDENT]["spearman"]
    if None in (told["difference"], *(row["spearman"] for row in rows)):
        return "On held-out prompts Spearman is undefined for the teacher, the student or a random scorer."
    teacher, student, chance = (
        f"{number(row['spearman'])} {interval(row['spearman_ci95'])}" for row in rows
    )
    low, high = told["ci95"]
    verdict = (
        "includes zero" if low <= 0 <= high else f"lies {'above' if low > 0 else 'below'} zero"
    )
    return (
        f"On {block['n_prompts']} held-out prompts the teacher ranks responses with a mean Spearman of {teacher} "
        f"and the student with {student}, against {chance} for a random scorer; student minus teacher is "
        f"{number(told['difference'], '+')} {interval(told['ci95'], '+')}, an interval that {verdict}."
    )


# --------------------------------------------------------------------------------------------- HTML


def anchor(title):
    return title.lower().replace(" ", "-")


def section(title, body, how=None):
    """A section of the page; how: what it shows, default HOW[title]."""
    how = f'<p class="how">{escape(how or HOW[title]).replace(" %", "&nbsp;%")}</p>'
    return f'<section id="{anchor(title)}">\n<h2>{title}</h2>\n{how}\n{body}</section>\n'


def table(head, groups, notes=()):
    """A table in its own scroll container. groups: lists of rows of HTML cells, the first of each a row header."""
    body = ""
    for rows in groups:
        lines = (
            f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{c}</td>" for c in row[1:])}</tr>\n'
            for row in rows
        )
        body += f"<tbody>\n{''.join(lines)}</tbody>\n"
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    foot = "".join(
        f'<p class="note"><sup>{i}</sup> {escape(note)}</p>\n' for i, note in enumerate(notes, 1)
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr>{top}</tr></thead>\n{body}</table></div>\n{foot}'
    )


def pairs_list(content):
    """Names and values side by side; both are escaped here."""
    items = "".join(
        f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>\n"
        for k, v in content.items()
    )
    return f"<dl>\n{items}</dl>\n"


def swatch(name):
    colour = COLOUR.get(name, GREY).replace(INK, "currentColor")
    return f'<i style="background:{colour}"></i>{escape(LABEL.get(name, name))}'


def small(text):
    return f"<small>{escape(text)}</small>" if text else ""


def per_set(sets, make):
    return "".join(
        f"<h3>{set_title(name, block)}</h3>\n{make(block)}" for name, block in sets.items()
    )


def figures(sets, paint):
    return grid((set_title(name, block), paint(name, block)) for name, block in sets.items())


def grid(drawn):
    """(caption, SVG or None) pairs side by side where there is room."""
    parts = (
        f"<figure><figcaption>{caption}</figcaption>\n{svg}</figure>\n"
        for caption, svg in drawn
        if svg
    )
    return f'<div class="figures">\n{"".join(parts)}</div>\n'


def metric_cell(row, name, n_prompts, size, notes):
    """Value and interval of a metric; a footnote, added to `notes`, tells why it is null or what was left out."""
    value, ci, note = row.get(name), row.get(f"{name}_ci95"), None
    if isinstance(value, dict):
        value, ci = value.get(size), ci.get(size)
    if left_out := row.get(f"n_prompts_without_{name}"):
        note = f"left out: {left_out} of {n_prompts} prompts, where scores or golden rewards are all equal"
    elif value is None:
        note = "undefined: golden rewards do not differ" if name in row else "scores without a unit"
        note = row.get("null_reason", note) if name in ("mse", "r2") else note
    if note and note not in notes:
        notes.append(note)
    mark = f"<sup>{notes.index(note) + 1}</sup>" if note else ""
    return number(value) + mark + (small(interval(ci)) if value is not None else "")


def result_table(block):
    """The four variants, the baselines and the oracle. Best-of-n at the largest n up to 10."""
    size, notes = max((n for n in block["golden_best_of_n"] if int(n) <= 10), key=int), []
    names = (f"Best of {size}", f"Gain, best of {size}", "MSE", "R²")
    columns = METRIC | dict(zip(("best_of_n", "best_of_n_gain", "mse", "r2"), names, strict=True))

    def line(name, row):
        return [
            swatch(name),
            *(metric_cell(row, metric, block["n_prompts"], size, notes) for metric in columns),
        ]

    variants = [line(name, block[name]) for name in VARIANTS]
    baselines = [line(name, row) for name, row in block["baselines"].items()]
    notes.append("picks by the golden reward itself; only its best of n is recorded")
    best = number(block["golden_best_of_n"][size])
    oracle = [
        f"{swatch('oracle')}<sup>{len(notes)}</sup>",
        *(best if name == "best_of_n" else "—" for name in columns),
    ]
    return table(["", *columns.values()], [variants, baselines, [oracle]], notes)


def difference_table(block):
    """Each variant minus the raw teacher."""

    def cell(told):
        return (
            number(told["difference"], "+")
            + small(interval(told["ci95"], "+"))
            + small(p_value(told["p_value"]))
        )

    against = block["against_teacher"]
    head = [
        METRIC.get(name, name.replace("_", " ").capitalize())
        for name in next(iter(against.values()))
    ]
    return table(
        ["", *head],
        [[[swatch(variant), *map(cell, row.values())] for variant, row in against.items()]],
    )


def scale_table(block):
    names = ["lowest", *[""] * (len(block["scale_check"]) - 2), "highest"]
    rows = [
        [name, *map(number, row.values())]
        for name, row in zip(names, block["scale_check"], strict=True)
    ]
    return table(
        ["", *(swatch(name) if name in VARIANTS else name for name in block["scale_check"][0])],
        [rows],
    )


# ------------------------------------------------------------------------------------------ figures


def draw(name, label, paint, height=3.5):
    """The SVG of paint(axes) with a legend below, for a page of HTML: its own ids, the page's font and text colour."""
    with style.context(["default", {**RC, "svg.hashsalt": name}]):
        figure, file = Figure(figsize=(4.4, height), layout="constrained"), io.StringIO()
        axes = figure.subplots()
        paint(axes)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            columns = 2 if max(map(len, labels)) < 20 else 1
            figure.legend(
                handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2
            )
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    view, svg = re.search(r'viewBox="([^"]*)".*?>(.*)', file.getvalue(), re.S).groups()
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;\"]*;? ?", "", svg, flags=re.S
    )
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    used = set(re.findall(r"#([\w.-]+)[\")]", svg))
    svg = re.sub(
        r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg
    )
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
    return f'<svg viewBox="{view}" role="img" aria-label="{escape(label)}">' + re.sub(
        r"\s*\n\s*", "\n", svg
    )


def plot_variant(axes, variant, x, y, label, width):
    line, marker, _ = LINE[variant]
    looks = {
        "color": COLOUR[variant],
        "mfc": "none" if line == "--" else COLOUR[variant],
        "linewidth": width,
    }
    axes.plot(x, y, line, marker=marker, label=label, **looks)


def best_of_n_figure(name, block):
    def paint(axes):
        sizes = [int(n) for n in block["golden_best_of_n"]]
        for variant in VARIANTS:
            low, high = zip(*block[variant]["best_of_n_ci95"].values(), strict=True)
            axes.fill_between(sizes, low, high, color=COLOUR[variant], alpha=0.08, linewidth=0)
        for variant in VARIANTS:
            plot_variant(
                axes,
                variant,
                sizes,
                block[variant]["best_of_n"].values(),
                variant,
                LINE[variant][2],
            )
        axes.plot(sizes, block["golden_best_of_n"].values(), "-", color=INK, label="oracle")
        axes.plot(
            sizes,
            block["baselines"]["random"]["best_of_n"].values(),
            ":",
            color=GREY,
            label="random",
        )
        axes.set(
            xscale="log",
            xlabel="n, responses to choose from (log scale)",
            ylabel="golden reward of the choice",
        )
        axes.set_xticks(sizes, map(str, sizes))
        axes.xaxis.set_minor_locator(NullLocator())

    return draw(
        f"best-of-n-{name}", "Golden reward of the best of n responses against n", paint, 3.9
    )


def reliability_figure(name, block, unit):
    def paint(axes):
        for variant in VARIANTS:
            if told := block[variant]["reliability"]:
                label = f"{variant} (calibration error {number(told['calibration_error'])})"
                plot_variant(axes, variant, told["predicted"], told["golden"], label, 1)
        limits = [pick(*axes.get_xlim(), *axes.get_ylim()) for pick in (min, max)]
        axes.plot(limits, limits, **IDENTITY)
        axes.set(
            xlim=limits,
            ylim=limits,
            xlabel=f"predicted {unit}, mean of bin",
            ylabel=f"{unit}, mean of bin",
        )

    return draw(
        f"reliability-{name}", "Mean golden against mean predicted reward in bins", paint, 4.2
    )


def scatter_figure(name, predicted, golden, unit):
    """One dot a response; golden and predicted are (n, K). A fixed random MAX_POINTS where there are more."""
    chosen = np.random.default_rng(0).permutation(golden.size)[:MAX_POINTS]
    x, y = predicted.ravel()[chosen], golden.ravel()[chosen]

    def paint(axes):
        axes.plot(x, y, "o", color=COLOUR[FINAL], markersize=3, alpha=0.5, markeredgewidth=0)
        axes.axline((x.mean(), x.mean()), slope=1, **IDENTITY)
        axes.set(xlabel=f"predicted {unit}", ylabel=unit)

    return draw(
        f"scatter-{name}", f"Golden against predicted reward of {len(x)} responses", paint, 3.7
    )


def curves_figure(name, logs, key, colour, ylabel):
    """One line per log (a list of epochs), the best epoch marked; None where nothing was validated."""
    logs = [log for log in logs if all(key in entry for entry in log)]

    def paint(axes):
        for log in logs:
            epochs = [entry["epoch"] for entry in log]
            axes.plot(
                epochs,
                [entry[key] for entry in log],
                "-o",
                color=colour,
                linewidth=1,
                markersize=2.5,
                alpha=0.7,
            )
        best = [[entry for entry in log if entry["best"]][-1] for log in logs]
        marks = {"color": INK, "mfc": "none", "markersize": 7, "label": "best epoch", "zorder": 3}
        axes.plot([entry["epoch"] for entry in best], [entry[key] for entry in best], "o", **marks)
        axes.set(xlabel="epoch", ylabel=ylabel, xlim=(0.7, max(len(log) for log in logs) + 0.3))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    return draw(name, f"{ylabel} by epoch", paint, 3.2) if logs else None


def members_figure(name, block):
    """Spearman of each member, and of the aggregations and the linear probe with intervals, one row each."""
    rows = {**block["aggregations"], "linear_probe": block["baselines"]["linear_probe"]}
    rows = {label: row for label, row in rows.items() if row["spearman"] is not None}
    members = [row["spearman"] for row in block["members"] if row["spearman"] is not None]

    def paint(axes):
        heights = (
            np.linspace(-0.25, 0.25, len(members)) if len(members) > 1 else np.zeros(len(members))
        )
        axes.plot(members, heights, "o", color=COLOUR[TEACHER], alpha=0.9, markeredgewidth=0)
        for at, (label, row) in enumerate(rows.items(), 1):
            axes.plot(row["spearman_ci95"], [at, at], "-", color=COLOUR.get(label, INK))
            axes.plot(row["spearman"], at, "D", color=COLOUR.get(label, INK))
        names = [f"members ({len(members)})", *(LABEL.get(label, label) for label in rows)]
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="Spearman", ylim=(len(names) - 0.5, -0.5))
        axes.axhline(0.5, color=GREY, linewidth=0.5)

    return draw(
        f"members-{name}",
        "Spearman of members, aggregations and linear probe",
        paint,
        1.3 + 0.3 * len(rows),
    )


# ----------------------------------------------------------------------------------------- sections


def ranking_sections(run):
    sets = run["sets"]
    yield section("Results", per_set(sets, result_table))
    yield section("Differences to the teacher", per_set(sets, difference_table))
    yield section("Best of n", figures(sets, best_of_n_figure))
    yield section(
        "Members and aggregations",
        figures({name: run["evaluation"][name] for name in sets}, members_figure),
    )


def scale_sections(run):
    unit, predicted, golden = (
        UNIT[run["validation"]["target"]["transform"]],
        run["predictions"],
        run["golden"],
    )
    final = VARIANTS.index(FINAL)

    def scatter(name, _):
        return scatter_figure(name, predicted[name][final], golden[name], unit)

    yield section(
        "Reliability",
        figures(run["sets"], lambda name, block: reliability_figure(name, block, unit)),
    )
    yield section("Golden against predicted", figures(run["sets"], scatter))
    yield section("Scale check", per_set(run["sets"], scale_table))


def training_sections(run):
    logs, noise, student = {}, run["record"]["pairs"], [run["student_log"]]
    for entry in run["training_log"]:
        logs.setdefault(entry["member"], []).append(entry)
    members, blue, red = list(logs.values()), COLOUR[TEACHER], COLOUR[STUDENT]
    of = f"{len(members)} member{'s' if len(members) > 1 else ''}"
    loss = curves_figure("loss", members, "validation_loss", blue, "validation loss")
    accuracy = curves_figure(
        "accuracy", members, "validation_accuracy", blue, "validation accuracy"
    )
    distilled = curves_figure(
        "student", student, "validation_loss", red, "validation MSE, standardised"
    )
    drawn = {f"Loss of {of}": loss, f"Accuracy of {of}": accuracy, "Loss of the student": distilled}
    yield section("Training", grid(drawn.items()))
    told = {
        "realised label error": number(noise["label_error"]),
        "expected label error": number(noise["expected_label_error"]),
        "annotation quality": plain(noise["annotation_quality"]),
        "reward scale": number(noise["reward_scale"]),
        "labelled pairs": noise["n"],
        "pairs of equal reward left out": noise["n_equal_rewards_left_out"],
    }
    if noise["annotation_quality"] < 0:
        told["annotation quality"] += ", perfect labels"
    yield section("Label noise", pairs_list(told))


def provenance_sections(run):
    results, entries = run["validation"], [run["manifest"][step] for step in STEPS]
    proof = results["no_leakage"]
    told = {"held-out prompts": results["n_heldout_prompts"]}
    told["held-out prompts in fits"] = proof["held_out_prompts_in_fits"]
    told |= {f"prompts in the fit of the {name}": n for name, n in proof["prompts_in_fits"].items()}
    told |= {
        "files checked": proof["files_checked"],
        "isotonic maps fitted on": results["calibrated_on"],
    }
    told["golden reward rises with the score"] = plain(run["config"]["calibration"]["increasing"])
    if external := [Path(name).name for name in proof["external_teacher_files"]]:
        told |= {"external teachers": ", ".join(external), "note": proof["note"]}
    yield section("No leakage", pairs_list(told))
    yield section(
        "Settings", pairs_list({name: plain(value) for name, value in results["settings"].items()})
    )
    rows, versions, inputs = [], {}, {}
    made = {name for entry in entries for name in entry["outputs"]}
    for step, entry in zip(STEPS, entries, strict=True):
        revision, seconds = entry["git_revision"] or "not known", f"{entry['wall_seconds']:.1f} s"
        cells = (
            revision,
            artifacts.hash_of(entry["code"])[:12],
            entry["python"],
            seconds,
            entry["finished_at"],
        )
        rows.append([step.replace("step", "Step "), *map(escape, cells)])
        packages = ", ".join(
            f"{name} {version or 'absent'}" for name, version in entry["packages"].items()
        )
        versions.setdefault(packages, []).append(step.removeprefix("step"))
        inputs |= {Path(name).name: digest[:12] for name, digest in entry["inputs"].items()}
    inputs = {name: digest for name, digest in inputs.items() if name not in made}
    steps = table(["", "Revision", "Code", "Python", "Wall time", "Finished"], [rows])
    for packages, of in versions.items():
        steps += f'<p class="note">Packages of step {", ".join(of)}: {escape(packages)}</p>\n'
    digests = f"<details><summary>Digests of {len(inputs)} input files</summary>\n{pairs_list(inputs)}</details>\n"
    yield section("Provenance", steps + digests)


# ----------------------------------------------------------------------------------------- the page

CSS = """
:root{color-scheme:light dark;--ink:#1b1d1f;--soft:#5c6166;--rule:#d5d8da;--page:#fff;--link:#00588a}
@media (prefers-color-scheme:dark){:root{--ink:#e4e6e7;--soft:#a0a6ab;--rule:#3a3e42;--page:#16181a;--link:#7cc4ee}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:64rem;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1,h2,h3{font-weight:650;line-height:1.25;margin:0 0 .3rem}
h1{font-size:1.6rem}h2{font-size:1.2rem}h3{font-size:.95rem;margin-top:1.2rem}
section{margin-top:2.4rem;padding-top:1rem;border-top:1px solid var(--rule)}
p{margin:.4rem 0;max-width:44rem}a{color:var(--link)}.lead{font-size:1.1rem;margin-top:.9rem}
nav{margin-top:1rem;font-size:.875rem;line-height:1.9}nav a{margin-right:.9rem;white-space:nowrap}
.sub,.how,.note,td small,dt{color:var(--soft)}.how,figcaption,dl,details,table{font-size:.875rem}
.note{font-size:.8rem;margin:.15rem 0}.scroll{overflow-x:auto;margin:.4rem 0}
table{border-collapse:separate;border-spacing:0;border-bottom:1px solid var(--rule);
font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:.3rem .45rem .3rem .9rem;text-align:right;vertical-align:top;font-weight:400}
thead th{font-weight:600;vertical-align:bottom}tbody tr:first-child>*{border-top:1px solid var(--rule)}
thead+tbody tr:first-child>*{border-top-color:var(--ink)}
tr>:first-child{text-align:left;padding-left:0;position:sticky;left:0;background:var(--page)}
td small{display:block;font-size:.857em;line-height:1.25}sup{font-size:.7em;line-height:0}
th i{display:inline-block;width:.65em;height:.65em;margin-right:.45em;border-radius:50%}
.figures{display:grid;gap:1.2rem 2rem;margin-top:.8rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr))}
figure{margin:0;max-width:32rem;break-inside:avoid}figcaption{font-weight:600;margin-bottom:.3rem}
svg{width:100%;height:auto;display:block;stroke-linejoin:round}svg text{fill:currentColor}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:0 2rem;margin:.6rem 0}
dl div{display:grid;grid-template-columns:minmax(0,1fr) fit-content(65%);gap:1rem;padding:.2rem 0}
dl div{border-bottom:1px solid var(--rule)}dt,dd{margin:0}dd{text-align:right;font-variant-numeric:tabular-nums}
@media print{body{padding:0;max-width:none;font-size:10pt}nav,details{display:none}.scroll{overflow:visible}
table{font-size:8pt}th,td{padding:.2rem .3rem}h2,h3,.how{break-after:avoid;break-inside:avoid}
tr,dl div{break-inside:avoid}tr>:first-child{position:static}}
"""


def page(title, heading, about, lead, links, sections):
    """A whole page as text, self-contained."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{heading}</h1>
<p class="sub">{escape(about)}</p>
<p class="lead">{escape(lead)}</p>
<nav>{links}</nav>
{sections}</body>
</html>
"""


def build(run):
    """The page as text. run: what `read` returns."""
    s, members = run["validation"]["settings"], run["evaluation"]["n_members"]
    task = escape(s["task"])
    about = (
        f"{WORDS[s['rm_objective']]} objective, {WORDS[s['pairing']]} pairs, {s['embed_model_name']} embeddings; \
{members} reward models, {len(run['record']['prompts'])} labelled prompts, seed {s['seed']}"
    )
    makers = (ranking_sections, scale_sections, training_sections, provenance_sections)
    sections = "".join(part for make in makers for part in make(run))
    links = " ".join(f'<a href="#{anchor(title)}">{title}</a>' for title in HOW)
    lead = summary(run["validation"])
    return page(
        f"{task}: reward model report", f"Reward models: {task}", about, lead, links, sections
    )


def write(folder):
    """Make folder/report.html of the OUTPUT_DIR `folder`; returns its path."""
    page = build(read(folder)).encode()
    with artifacts.atomic(folder / "report.html") as file:
        file.write(page)
    return folder / "report.html"
