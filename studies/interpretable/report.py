"""One page about an interpretable reward: report.html, made from the files of the stages.

Every number on the page stands in one of these files: the report reads and draws, and measures
nothing. Files that are not the ones that the manifest records are refused; benchmarks and examples
of an earlier gate are left out, and named.

Reads   OUTPUT_DIR/{manifest,attribute_heads,gate}.json; where there are any,
        rewardbench_results.json and explanation_*.json
Writes  OUTPUT_DIR/report.html
Example python3 studies/interpretable_report.py interpretable_out
"""

from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.report import page
from rewardlib.report.page import BLUE, GREEN, GREY, INK, ORANGE, SKY, number

TEMPLATE = Path(__file__).parent / "templates" / "report.html"
STEPS = {"regression": "attribute_heads.json", "gating": "gate.json"}
METHODS = {  # name on the page, colour
    "gate": ("gate", BLUE),
    "uniform": ("uniform weights", GREY),
    "best_single": ("best single", ORANGE),
    "global_weights": ("one weighting", SKY),
    "linear_head": ("linear head", GREEN),
    "chance": ("chance", INK),
}
ATTRIBUTE = "attribute "
MEASURES = {"score": "score", "debiased": "debiased", "standardised": "in sd"}
MEASURES |= {"contribution": "contribution"}
LEVELS = ("accuracy", "easy", "normal", "hard")

# ------------------------------------------------------------------------------------------ reading


def read(folder: Path) -> dict:
    """Content of the stages' files; InputError if one is missing, changed or of another run."""
    folder = Path(folder)
    manifest = artifacts.read_manifest(folder)
    for step in STEPS:
        if step not in manifest:
            raise InputError(
                f"{folder}: {step} has not finished here; run studies/interpretable_{step}.py first"
            )

    def recorded(step, name):
        return artifacts.read_json(page.recorded(folder, manifest, step, name), step)

    run = {step: recorded(step, name) for step, name in STEPS.items()}
    if not is_current(manifest, "gating"):
        raise InputError(
            f"{folder}: the attribute heads were fitted anew since gating ran; run it again"
        )
    run |= {"manifest": {step: manifest[step] for step in STEPS}, "rewardbench": None}
    run |= {"examples": [], "left_out": []}
    for step in sorted(manifest):
        if step != "rewardbench" and not step.startswith("explain "):
            continue
        name = next(name for name in manifest[step]["outputs"] if name.endswith(".json"))
        if not is_current(manifest, step):
            run["left_out"].append(name)
        elif step == "rewardbench":
            run["rewardbench"] = recorded(step, name)
            run["manifest"][step] = manifest[step]
        else:
            run["examples"].append(recorded(step, name))
    return run


def is_current(manifest: dict, step: str) -> bool:
    """Whether the files of the two stages that `step` read are those that are there now."""
    outputs = [output for stage in STEPS for output in manifest[stage]["outputs"].items()]
    current = {name: output["sha256"] for name, output in outputs}
    inputs = manifest[step]["inputs"].items()
    return all(current.get(name, digest) == digest for name, digest in inputs)


# ------------------------------------------------------------------------------------ text and rows


def named(method: str) -> tuple[str, str | None]:
    """Name on the page and colour of a method; an attribute by itself has no colour."""
    return METHODS.get(method, (method.removeprefix(ATTRIBUTE), None))


def summary(gating: dict) -> str:
    """The result in one sentence."""
    held_out = gating["held_out"]
    if held_out is None:
        return f"No pairs were held out: {gating['null_reason']}."
    methods, gap = held_out["methods"], held_out["gate_minus"]["uniform"]
    gate, uniform, head = (
        page.in_text(methods[method], "accuracy") for method in ("gate", "uniform", "linear_head")
    )
    return (
        f"On pairs of {held_out['n_prompts']} held-out prompts the gate prefers the chosen "
        f"response with accuracy {gate}, uniform weights with {uniform}, a linear head without "
        f"attributes with {head}; gate minus uniform is {page.gap_in_text(gap)}."
    )


def describe_source(source: dict) -> str:
    """Where a prepared file came from, in a line."""
    settings = source.get("settings", {})
    parts = [Path(source.get("dataset") or "unknown").name]
    if settings.get("prompts") in ("first", "second"):
        parts.append(f"{settings['prompts']} part of its prompts")
    if settings.get("pairs_from"):
        parts.append(f"pairs by {settings['pairs_from']}")
    parts.append(f"embedded with {source.get('embedding_model') or 'an unnamed model'}")
    return ", ".join(parts)


def table_lines(kind: str, results: dict) -> list[dict]:
    """Lines of one method's results, in groups: [{title: (row, key of the value in it)}]."""
    if kind == "styles":
        domains = {"mean of domains": results["mean of domains"], **results}
        return [
            {name if level == "accuracy" else f"{name}, {level}": (row, level) for level in LEVELS}
            for name, row in domains.items()
        ]
    if kind == "rewardbench":
        sections = {name: (row, "accuracy") for name, row in results["sections"].items()}
        sections["Overall"] = results, "overall"
        if "prior_sets" in results:
            sections["Prior sets"] = results["prior_sets"], "accuracy"
            sections["Overall with prior sets"] = results, "overall_with_prior_sets"
        return [sections, counted(results["subsets"])]
    domains = counted(results["domains"])
    means = {"Mean of subsets": (results, "mean_of_domains"), "All examples": (results, "all")}
    return [domains, means] if len(domains) > 1 else [domains]


def counted(rows: dict) -> dict:
    """Lines of subsets, with the number of their examples in the title."""
    return {f"{name} ({row['n']})": (row, "accuracy") for name, row in rows.items()}


def method_table(kind: str, methods: dict) -> dict:
    """One column per method; groups of lines {title: [(row, key) of every method]}."""
    columns = [table_lines(kind, results) for results in methods.values()]
    groups = [
        {title: [column[i][title] for column in columns] for title in group}
        for i, group in enumerate(columns[0])
    ]
    return {"methods": list(methods), "groups": groups}


def example_rows(example: dict) -> dict:
    """Head and rows: weight and, for each response, every measure of each attribute; the reward."""
    sides, rows = example["responses"], []
    for name, weight in example["weights"].items():
        values = [row[measure][name] for row in sides.values() for measure in MEASURES]
        rows.append([name, *map(number, (weight, *values))])
    total = ["reward", ""]
    for row in sides.values():
        total += [*[""] * (len(MEASURES) - 1), number(row["reward"], "+")]
    head = ["", "Weight", *(f"{side}: {word}" for side in sides for word in MEASURES.values())]
    return {"head": head, "rows": rows, "total": total}


# ------------------------------------------------------------------------------------------ figures


def label_rows(axes, names):
    """One row per name, the first on top."""
    # matplotlib would read a dollar sign as the beginning of a formula
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)


def dots(
    name: str,
    label: str,
    rows: dict,
    xlabel: str,
    band: float | None = None,
    line: float | None = None,
) -> page.Drawing:
    """One line per row, with a dot and a bar for each value and its interval.

    rows: {name: [(label in the legend, colour, value, interval)]}; band: half the width of a grey
    band around 0; line: where a dotted line stands.
    """
    most = max(map(len, rows.values()))

    def paint(axes):
        if band is not None:
            axes.axvspan(-band, band, color=GREY, alpha=0.25, linewidth=0, label="threshold")
        if line is not None:
            axes.axvline(line, color=GREY, linewidth=0.8, linestyle=":")
        for i, points in enumerate(rows.values()):
            for k, (legend, colour, x, ci) in enumerate(points):
                height = i + (k - (len(points) - 1) / 2) * 0.6 / most
                if ci and None not in ci:
                    axes.plot(ci, [height, height], "-", color=colour, linewidth=1)
                if x is not None:
                    looks = {"color": colour, "label": None if i else legend}
                    axes.plot(x, height, "D" if k == 0 else "o", **looks)
        label_rows(axes, rows)
        axes.set_xlabel(xlabel)

    return page.draw(name, label, paint, 1.1 + (0.12 + 0.13 * most) * len(rows))


def strengths_figure(heads: dict) -> page.Drawing:
    """Validation error of every head against ridge strength, relative to the lowest."""

    def paint(axes):
        for head in heads.values():
            losses = {float(strength): loss for strength, loss in head["validation_loss"].items()}
            lowest, chosen = min(losses.values()), head["strength"]
            relative = [loss / lowest for loss in losses.values()]
            axes.plot(list(losses), relative, "-", color=BLUE, alpha=0.7)
            axes.plot(chosen, losses[chosen] / lowest, "o", color=INK, mfc="none")
        axes.set(xscale="log", xlabel="ridge strength")
        axes.set(yscale="log", ylabel="validation error / lowest")

    return page.draw("strengths", "Validation error by ridge strength", paint, 3)


def debiasing_figure(debiasing: dict, verbosity: str) -> page.Drawing:
    """Rho of every attribute with verbosity on held-out prompts, before and after."""
    rows = {}
    for name, attribute in debiasing["attributes"].items():
        if name != verbosity:
            rows[name] = [
                (when, colour, part["spearman"], part["spearman_ci95"])
                for when, colour in (("after", BLUE), ("before", ORANGE))
                for part in [attribute["held_out"][when]]
            ]
    label, xlabel = "Rho with verbosity before and after", "Spearman's rho with verbosity"
    return dots("debiasing", label, rows, xlabel, band=debiasing["threshold"])


def accuracy_figure(gating: dict, part: str) -> page.Drawing:
    """Accuracy of every method on one part of the pairs."""
    rows = {}
    for method, row in gating[part]["methods"].items():
        title, colour = named(method)
        rows[title] = [(None, colour or GREY, row["accuracy"], row["accuracy_ci95"])]
    return dots(f"gate-{part}", "Accuracy of every method", rows, "accuracy", line=0.5)


def weights_figure(weights: dict) -> page.Drawing:
    """Mean weight of every attribute, and its standard deviation between prompts."""
    mean, spread = weights["mean"], list(weights["sd_between_prompts"].values())

    def paint(axes):
        label_rows(axes, mean)
        axes.barh(range(len(mean)), mean.values(), 0.6, xerr=spread, color=BLUE, ecolor=INK)
        axes.axvline(1 / len(mean), color=GREY, linewidth=0.8, linestyle=":")
        axes.set(xlabel="mean weight ± sd between prompts", xlim=(0, None))

    height = 1 + 0.28 * len(mean)
    return page.draw("weights", "Mean gate weight of each attribute", paint, height)


def benchmark_figure(name: str, kind: str, methods: dict) -> page.Drawing | None:
    """The first group of lines of three methods; None where the group has one line only."""
    shown = [method for method in ("gate", "uniform", "linear_head") if method in methods]
    lines = method_table(kind, {method: methods[method] for method in shown})["groups"][0]
    if len(lines) == 1:
        return None
    rows = {
        title: [
            (*named(method), row[key], row.get(f"{key}_ci95"))
            for method, (row, key) in zip(shown, values, strict=True)
        ]
        for title, values in lines.items()
    }
    # the level of chance in a group depends on its size
    chance = None if kind == "groups" else 0.5
    return dots(name, "Accuracy by subset", rows, "accuracy", line=chance)


def example_figure(name: str, example: dict) -> page.Drawing:
    """Contribution of every attribute to the reward of each response."""
    attributes, sides = list(example["weights"]), example["responses"]
    width = 0.8 / len(sides)

    def paint(axes):
        label_rows(axes, attributes)
        for k, (side, row) in enumerate(sides.items()):
            heights = np.arange(len(attributes)) + (k + 0.5) * width - 0.4
            label = f"{side}, reward {number(row['reward'], '+')}"
            bars = row["contribution"].values()
            axes.barh(heights, bars, width, color=(BLUE, ORANGE)[k], label=label)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="contribution to the reward")

    height = 1.4 + 0.3 * len(attributes)
    return page.draw(name, "Contribution of each attribute", paint, height)


# ----------------------------------------------------------------------------------------- the page


def benchmarks(rewardbench: dict) -> list[dict]:
    """Results, number of rows, tables and figure of every benchmark."""
    parts = []
    for i, (name, result) in enumerate(rewardbench["benchmarks"].items()):
        kind, methods = result["kind"], result["methods"]
        attributes = {m: table for m, table in methods.items() if m.startswith(ATTRIBUTE)}
        methods = {m: table for m, table in methods.items() if m not in attributes}
        parts.append(
            {
                "name": name,
                "result": result,
                "rows": rewardbench["rows"]["pairs" if kind == "rewardbench" else name],
                "figure": benchmark_figure(f"benchmark-{i}", kind, methods),
                "table": method_table(kind, methods),
                "attributes": method_table(kind, attributes) if attributes else None,
            }
        )
    return parts


def examples(explained: list[dict]) -> list[dict]:
    return [
        {
            **example,
            "title": f"{example['what']}, "
            + (Path(example["data"]).stem if example["data"] else "a text"),
            "table": example_rows(example),
            "figure": example_figure(f"example-{i}", example),
        }
        for i, example in enumerate(explained)
    ]


def content(run: dict) -> dict:
    """What the template shows of a run. run: what `read` returns."""
    regression, gating, rewardbench = run["regression"], run["gating"], run["rewardbench"]
    debiasing, logs = regression["debiasing"], [gating["log"]]
    figures = {
        "strengths": strengths_figure(regression["regression"]),
        "weights": weights_figure(gating["weights"]),
    }
    if debiasing:
        figures["debiasing"] = debiasing_figure(debiasing, regression["verbosity"])
    for part in ("held_out", "validation"):
        figures[part] = accuracy_figure(gating, part) if gating[part] else None
    for key in ("loss", "accuracy"):
        name, label = f"validation_{key}", f"validation {key}"
        figures[key] = page.training_curves(f"gate-{name}", logs, name, BLUE, label)
    prepared = {"Ratings": regression["data"], "Pairs": gating["pairs"]}
    return {
        **run,
        "stages": {step: run[step] for step in STEPS},
        "summary": summary(gating),
        "figures": figures,
        "benchmarks": benchmarks(rewardbench) if rewardbench else [],
        "examples": examples(run["examples"]),
        "sources": {name: describe_source(data["source"]) for name, data in prepared.items()},
        "provenance": page.provenance(
            {step.capitalize(): entry for step, entry in run["manifest"].items()}
        ),
        "named": named,
    }


def write(folder: Path) -> tuple[Path, list[str]]:
    """Make folder/report.html; returns its path and the files of an earlier gate, left out."""
    run = read(folder)
    return page.write(folder / "report.html", TEMPLATE, content(run)), run["left_out"]
