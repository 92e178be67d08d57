"""One page about an interpretable reward: report.html, made only from the files that the studies left in OUTPUT_DIR.

It reads and draws and measures nothing: every number on the page stands in one of the files. It
refuses files that are not the ones the manifest records; benchmarks and examples of an earlier gate
are left out, and named.

Reads   OUTPUT_DIR/{manifest,attribute_heads,gate}.json; rewardbench_results.json and explanation_*.json where they are
Writes  OUTPUT_DIR/report.html   self-contained: nothing is loaded from elsewhere; the same bytes every time
Example python3 -m rewardlib.interpretable_report interpretable_out
"""

from html import escape
from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.report import run_report
from rewardlib.report.run_report import GREY, INK, interval, number, p_value, plain, small

STEPS = {"regression": "attribute_heads.json", "gating": "gate.json"}
BLUE, YELLOW = "#0072B2", "#E69F00"
COLOUR = {
    "gate": BLUE,
    "uniform": GREY,
    "best_single": YELLOW,
    "global_weights": "#56B4E9",
    "linear_head": "#009E73",
}
COLOUR |= {"chance": INK}
LABEL = {
    "uniform": "uniform weights",
    "best_single": "best single",
    "global_weights": "one weighting",
}
LABEL |= {"linear_head": "linear head"}
ATTRIBUTE = "attribute "
ERRORS = {
    "ratings": {"mse": "MSE", "r2": "R²", "spearman": "Spearman"},
    "pairwise": {"log_loss": "Log loss", "accuracy": "Accuracy"},
}
MEASURES = {
    "score": "score",
    "debiased": "debiased",
    "standardised": "in sd",
    "contribution": "contribution",
}
LEVELS = ("accuracy", "easy", "normal", "hard")
HOW = {
    "Attributes": "One linear head per attribute, measured on held-out prompts, with 95 % intervals from resampling "
    "prompts. Constant: the error of the mean training label. A head that is no better than it says nothing, and its "
    "weight below means nothing.",
    "Ridge strengths": "Error on validation prompts, one line per attribute, relative to its best; circles are the "
    "strengths that were taken. One at an end of the range asks for a wider range.",
    "Debiasing": "Spearman's rho of each attribute's score with the verbosity score, before and after subtracting "
    "penalty × verbosity. Penalties were found on reference prompts; held-out prompts tell whether they carry over.",
    "Gate against baselines": "Accuracy on preference pairs, mean over prompts with 95 % intervals; differences are "
    "paired by prompt, p from flipping signs. A gate that does not beat uniform weights has not learned from prompts; "
    "one that loses to the linear head, which sees the embeddings without attributes, pays for being readable.",
    "Gate weights": "What a prompt's weights are in the mean, and how much they differ between prompts. Weights are of "
    "attributes in standard deviations, and sum to 1 over attributes for every prompt.",
    "Benchmarks": "Share of pairs whose chosen response scores strictly higher; ties are wrong. 95 % intervals from "
    "resampling the prompts of each subset. Rows of prompts that were trained on are left out.",
    "Examples": "Contribution = weight × debiased score in standard deviations; contributions add up to the reward. "
    "Of several rows, means.",
    "Training of the gate": "Measured on validation prompts. The best epoch is kept.",
    "Prompts": "Parts share no prompt. What was fitted on one part is measured on another.",
    "Settings": "The flags of the two stages; the same values on the same inputs give the same results.",
    "Provenance": "Compare revision, code and inputs (SHA-256, first 12 digits) before comparing two runs.",
}

# ------------------------------------------------------------------------------------------ reading


def read(folder):
    """Everything the page is made of, as a dict; InputError when a file is missing, changed or of another run."""
    folder = Path(folder)
    manifest = artifacts.read_manifest(folder)
    for step in STEPS:
        if step not in manifest:
            raise InputError(
                f"{folder}: {step} has not finished here; run studies/interpretable_{step}.py first"
            )
    run = {step: recorded(folder, manifest, step, name) for step, name in STEPS.items()}
    if not is_current(manifest, "gating"):
        raise InputError(
            f"{folder}: the attribute heads were fitted anew since gating ran; run it again"
        )
    run |= {
        "manifest": {step: manifest[step] for step in STEPS},
        "rewardbench": None,
        "examples": [],
        "left_out": [],
    }
    for step in sorted(manifest):
        if step != "rewardbench" and not step.startswith("explain "):
            continue
        name = next(name for name in manifest[step]["outputs"] if name.endswith(".json"))
        if not is_current(manifest, step):
            run["left_out"].append(name)
        elif step == "rewardbench":
            run["rewardbench"] = recorded(folder, manifest, step, name)
            run["manifest"][step] = manifest[step]
        else:
            run["examples"].append(recorded(folder, manifest, step, name))
    return run


def recorded(folder, manifest, step, name):
    """The content of a JSON file that `step` wrote, unchanged since."""
    content = artifacts.read_json(folder / name, step)
    if artifacts.describe_file(folder / name) != manifest[step]["outputs"].get(name):
        raise InputError(
            f"{folder / name} is not the file that {step} recorded; run {step} again with FORCE=1"
        )
    return content


def is_current(manifest, step):
    """Whether the files of the two stages that `step` read are those that are there now."""
    made = {
        name: told["sha256"] for stage in STEPS for name, told in manifest[stage]["outputs"].items()
    }
    return all(
        made.get(name, digest) == digest for name, digest in manifest[step]["inputs"].items()
    )


# --------------------------------------------------------------------------------------------- text


def words(method):
    return LABEL.get(method, method.removeprefix(ATTRIBUTE))


def swatch(method):
    dot = (
        f'<i style="background:{COLOUR[method].replace(INK, "currentColor")}"></i>'
        if method in COLOUR
        else ""
    )
    return dot + escape(words(method))


def value(row, key, sign=""):
    """A number with its interval below it."""
    ci = row.get(f"{key}_ci95")
    return number(row[key], sign) + (
        small(interval(ci, sign)) if row[key] is not None and ci else ""
    )


def plotted(text):
    """`text` for matplotlib, to which a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def section(title, body):
    return run_report.section(title, body, HOW[title])


def note(text):
    return f'<p class="note">{escape(text)}</p>\n'


def folded(title, body):
    return f"<details><summary>{escape(title)}</summary>\n{body}</details>\n"


def summary(run):
    """The result in one sentence."""
    told = run["gating"]["held_out"]
    if told is None:
        return f"No pairs were held out: {run['gating']['null_reason']}."
    rows = [told["methods"][method] for method in ("gate", "uniform", "linear_head")]
    gate, uniform, head = (
        f"{number(row['accuracy'])} {interval(row['accuracy_ci95'])}" for row in rows
    )
    gap = told["gate_minus"]["uniform"]
    low, high = gap["ci95"]
    verdict = (
        "includes zero" if low <= 0 <= high else f"lies {'above' if low > 0 else 'below'} zero"
    )
    return (
        f"On pairs of {told['n_prompts']} held-out prompts the gate prefers the chosen response with accuracy {gate}, "
        f"uniform weights with {uniform}, a linear head without attributes with {head}; gate minus uniform is "
        f"{number(gap['difference'], '+')} {interval(gap['ci95'], '+')}, an interval that {verdict}."
    )


# ------------------------------------------------------------------------------------------ figures


def dots(name, title, rows, xlabel, band=None, line=None):
    """One line per row of {its name: [(label, colour, value, interval)]}, intervals as bars.

    band: half the width of a grey band around 0; line: where a dotted line stands.
    """
    most = max(map(len, rows.values()))

    def paint(axes):
        if band is not None:
            axes.axvspan(-band, band, color=GREY, alpha=0.25, linewidth=0, label="threshold")
        if line is not None:
            axes.axvline(line, color=GREY, linewidth=0.8, linestyle=":")
        for at, points in enumerate(rows.values()):
            for k, (label, colour, x, ci) in enumerate(points):
                height = at + (k - (len(points) - 1) / 2) * 0.6 / most
                if ci and None not in ci:
                    axes.plot(ci, [height, height], "-", color=colour, linewidth=1)
                if x is not None:
                    axes.plot(
                        x, height, "D" if k == 0 else "o", color=colour, label=None if at else label
                    )
        axes.set_yticks(range(len(rows)), map(plotted, rows))
        axes.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))

    return run_report.draw(name, title, paint, 1.1 + (0.12 + 0.13 * most) * len(rows))


def bars(axes, names):
    """Prepare `axes` for one horizontal bar per name, the first on top."""
    axes.set_yticks(range(len(names)), map(plotted, names))
    axes.set_ylim(len(names) - 0.5, -0.5)


def strengths_figure(run):
    def paint(axes):
        for told in run["regression"]["regression"].values():
            strengths = [float(strength) for strength in told["validation_loss"]]
            losses = np.array(list(told["validation_loss"].values())) / min(
                told["validation_loss"].values()
            )
            axes.plot(strengths, losses, "-", color=BLUE, alpha=0.7)
            axes.plot(
                told["strength"],
                losses[strengths.index(told["strength"])],
                "o",
                color=INK,
                mfc="none",
            )
        axes.set(
            xscale="log", yscale="log", xlabel="ridge strength", ylabel="validation error / lowest"
        )

    return run_report.draw("strengths", "Validation error by ridge strength", paint, 3)


def weights_figure(run):
    told = run["gating"]["weights"]

    def paint(axes):
        bars(axes, told["mean"])
        spread = list(told["sd_between_prompts"].values())
        axes.barh(
            range(len(spread)), told["mean"].values(), 0.6, xerr=spread, color=BLUE, ecolor=INK
        )
        axes.axvline(1 / len(spread), color=GREY, linewidth=0.8, linestyle=":")
        axes.set(xlabel="mean weight ± sd between prompts", xlim=(0, None))

    return run_report.draw(
        "weights", "Mean gate weight of each attribute", paint, 1 + 0.28 * len(told["mean"])
    )


def example_figure(at, told):
    sides = told["responses"]

    def paint(axes):
        bars(axes, told["weights"])
        for k, (side, row) in enumerate(sides.items()):
            heights = np.arange(len(told["weights"])) + (k + 0.5) * 0.8 / len(sides) - 0.4
            label = f"{side}, reward {number(row['reward'], '+')}"
            axes.barh(
                heights,
                row["contribution"].values(),
                0.8 / len(sides),
                color=(BLUE, YELLOW)[k],
                label=label,
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="contribution to the reward")

    return run_report.draw(
        f"example-{at}", "Contribution of each attribute", paint, 1.4 + 0.3 * len(told["weights"])
    )


# ----------------------------------------------------------------------------------------- sections


def attribute_sections(run):
    stage, rows = run["regression"], []
    columns = ERRORS[stage["settings"]["labels"]]
    error = next(iter(columns))
    for name, told in stage["regression"].items():
        held, n = told["held_out"], told["n"]["fit"] + told["n"]["validation"]
        cells = [value(held, column) for column in columns]
        rows.append(
            [
                escape(name),
                n,
                f"{told['strength']:g}",
                held["n"],
                *cells,
                value(held["baseline"], error),
            ]
        )
    head = [
        "",
        "Labels",
        "Strength",
        "Held-out labels",
        *columns.values(),
        f"Constant: {columns[error]}",
    ]
    yield section("Attributes", run_report.table(head, [rows]))
    yield section("Ridge strengths", run_report.grid([("Validation error", strengths_figure(run))]))
    if stage["debiasing"]:
        yield section("Debiasing", debiasing_body(stage["debiasing"], stage["verbosity"]))


def debiasing_body(debiasing, verbosity):
    told, rows, lines = debiasing["reference"], [], {}
    for name, row in debiasing["attributes"].items():
        if name == verbosity:
            continue
        parts = [
            row[part][when] for part in ("reference", "held_out") for when in ("before", "after")
        ]
        missed = "<sup>1</sup>" if name in debiasing["unreached"] else ""
        penalty = f"{row['penalty']:.4g}".replace("-", "−")
        rows.append([escape(name) + missed, penalty, *(value(part, "spearman") for part in parts)])
        marks = (("after", BLUE, parts[3]), ("before", YELLOW, parts[2]))
        lines[name] = [
            (word, colour, part["spearman"], part["spearman_ci95"]) for word, colour, part in marks
        ]
    threshold = debiasing["threshold"]
    missed = [f"no penalty brings |rho| to {threshold:g} on the reference prompts"] * bool(
        debiasing["unreached"]
    )
    about = (
        f"Verbosity is {verbosity}. Penalties by {debiasing['search']} search for |rho| of at most {threshold:g} on "
        f"{told['n']} responses to {told['n_prompts']} reference prompts."
    )
    head = ["", "Penalty", "Reference: before", "after", "Held-out: before", "after"]
    figure = dots(
        "debiasing",
        "Rho with verbosity before and after",
        lines,
        "Spearman's rho with verbosity",
        threshold,
    )
    return (
        note(about)
        + run_report.table(head, [rows], missed)
        + run_report.grid([("On held-out prompts", figure)])
    )


def gate_sections(run):
    stage, body = run["gating"], ""
    if stage["null_reason"]:
        body += note(f"No held-out pairs: {stage['null_reason']}.")
    body += note(
        f"Best single attribute on the pairs to fit and to validate: {stage['baselines']['best_single']}."
    )
    for name in ("held_out", "validation"):
        if told := stage[name]:
            title = f"{name.replace('_', '-').capitalize()}: {told['n_pairs']} pairs of {told['n_prompts']} prompts"
            seen = "Not a comparison: one weighting and the linear head were fitted on these pairs, the gate's epoch "
            seen += "and the best single attribute chosen on them."
            made = (note(seen) if name == "validation" else "") + accuracy_body(name, told)
            body += (
                f"<h3>{title}</h3>\n{made}"
                if name == "held_out" or not stage["held_out"]
                else folded(title, made)
            )
    yield section("Gate against baselines", body)
    yield section("Gate weights", weights_body(run))


def accuracy_body(name, told):
    """Table and figure of the accuracies of every method on one part of the pairs."""
    groups, lines = [[], []], {}
    for method, row in told["methods"].items():
        gap, minus = told["gate_minus"].get(method), ""
        if gap:
            told_of = interval(gap["ci95"], "+"), p_value(gap["p_value"])
            minus = number(gap["difference"], "+") + "".join(map(small, told_of))
        groups[method.startswith(ATTRIBUTE)].append([swatch(method), value(row, "accuracy"), minus])
        lines[words(method)] = [
            (None, COLOUR.get(method, GREY), row["accuracy"], row["accuracy_ci95"])
        ]
    figure = dots(f"gate-{name}", "Accuracy of every method", lines, "accuracy", line=0.5)
    return run_report.grid([("Accuracy", figure)]) + run_report.table(
        ["", "Accuracy", "Gate minus it"], groups
    )


def weights_body(run):
    stage = run["gating"]
    told, rows = stage["weights"], []
    for name, mean in told["mean"].items():
        frozen = " (frozen)" if name in stage["frozen"] else ""
        one = number(stage["baselines"]["global_weights"][name], "+")
        rows.append(
            [escape(name + frozen), number(mean), number(told["sd_between_prompts"][name]), one]
        )
    facts = {
        "prompts": f"{told['n_prompts']} {told['of'].replace('_', '-')}",
        "entropy of a prompt's weights (equal: 1)": number(told["relative_entropy"]),
        "entropy of the mean weights (equal: 1)": number(told["entropy_of_mean"]),
        "temperature": plain(stage["temperature"]),
        "scale": number(stage["scale"]),
    }
    table = run_report.table(["", "Mean", "Sd between prompts", "One weighting"], [rows])
    body = (
        run_report.grid([("Mean weights", weights_figure(run))])
        + table
        + run_report.pairs_list(facts)
    )
    if run["rewardbench"]:
        names, groups = list(told["mean"]), []
        for benchmark, subsets in run["rewardbench"]["weights"].items():
            titles = {f"{benchmark}: {subset}": row for subset, row in subsets.items()}
            groups.append(
                [
                    [escape(title), *(number(row[name]) for name in names)]
                    for title, row in titles.items()
                ]
            )
        body += f"<h3>Mean weights by subset</h3>\n{run_report.table(['', *map(escape, names)], groups)}"
    return body


def benchmark_sections(run):
    if results := run["rewardbench"]:
        body = ""
        for at, (name, told) in enumerate(results["benchmarks"].items()):
            rows = results["rows"]["pairs" if told["kind"] == "rewardbench" else name]
            body += f"<h3>{escape(name)}</h3>\n{benchmark_body(f'benchmark-{at}', told, rows)}"
        yield section("Benchmarks", body)


def benchmark_body(name, told, rows):
    kind = told["kind"]
    of_attributes = {m: table for m, table in told["methods"].items() if m.startswith(ATTRIBUTE)}
    methods = {m: table for m, table in told["methods"].items() if m not in of_attributes}
    trained_on = f"{rows['of_prompts_trained_on']} of prompts that were trained on left out"
    known = (
        trained_on
        if rows["overlap_is_known"]
        else "whether their prompts were trained on cannot be told"
    )
    body = note(
        f"{rows['scored']} rows scored; {known}; {rows['too_long']} were too long to embed."
    )
    for title, missing in told.get("missing_subsets", {}).items():
        body += note(f"No score for {title}: {', '.join(missing)} missing.")
    first = {method: lines_of(kind, table)[0] for method, table in methods.items()}
    if len(first["gate"]) > 1:
        shown = [method for method in ("gate", "uniform", "linear_head") if method in methods]
        lines = {
            title: [point(method, *first[method][title]) for method in shown]
            for title in first["gate"]
        }
        line = None if kind == "groups" else 0.5
        body += run_report.grid(
            [("Accuracy", dots(name, "Accuracy by subset", lines, "accuracy", line=line))]
        )
    body += method_table(kind, methods)
    if kind == "styles":
        styles, matrix = told["styles"], methods["gate"]["mean of domains"]["matrix"]
        cells = [
            [f"chosen {escape(s)}", *map(number, row)]
            for s, row in zip(styles, matrix, strict=True)
        ]
        head = ["Gate, mean of domains", *(f"rejected {escape(style)}" for style in styles)]
        body += run_report.table(head, [cells])
    return body + (
        folded("Each attribute by itself", method_table(kind, of_attributes))
        if of_attributes
        else ""
    )


def point(method, row, key):
    return words(method), COLOUR[method], row[key], row.get(f"{key}_ci95")


def method_table(kind, methods):
    """One row per subset, section or level, one column per method."""
    columns = [lines_of(kind, table) for table in methods.values()]
    groups = [
        [[escape(title), *(value(*column[at][title]) for column in columns)] for title in group]
        for at, group in enumerate(columns[0])
    ]
    return run_report.table(["", *map(swatch, methods)], groups)


def lines_of(kind, table):
    """[{title: (row, key of the value in it)}] of one method's table, in groups; the first is what is drawn."""
    if kind == "styles":
        names = {"mean of domains": table["mean of domains"], **table}
        return [
            {
                (name if level == "accuracy" else f"{name}, {level}"): (row, level)
                for level in LEVELS
            }
            for name, row in names.items()
        ]
    if kind == "rewardbench":
        top = {name: (row, "accuracy") for name, row in table["sections"].items()} | {
            "Overall": (table, "overall")
        }
        if "prior_sets" in table:
            top |= {"Prior sets": (table["prior_sets"], "accuracy")}
            top |= {"Overall with prior sets": (table, "overall_with_prior_sets")}
        return [
            top,
            {f"{name} ({row['n']})": (row, "accuracy") for name, row in table["subsets"].items()},
        ]
    rows = {f"{name} ({row['n']})": (row, "accuracy") for name, row in table["domains"].items()}
    means = {"Mean of subsets": (table, "mean_of_domains"), "All examples": (table, "all")}
    return [rows, means] if len(rows) > 1 else [rows]


def example_sections(run):
    figures, body = [], ""
    for at, told in enumerate(run["examples"]):
        title = f"{told['what']}, {Path(told['data']).stem if told['data'] else 'a text'}"
        figures.append((escape(title), example_figure(at, told)))
        sides = told["responses"]
        rows = [
            [
                escape(name),
                number(weight),
                *(number(row[m][name]) for row in sides.values() for m in MEASURES),
            ]
            for name, weight in told["weights"].items()
        ]
        gap = [""] * (len(MEASURES) - 1)
        total = [
            "reward",
            "",
            *(cell for row in sides.values() for cell in (*gap, number(row["reward"], "+"))),
        ]
        head = ["", "Weight", *(f"{side}: {word}" for side in sides for word in MEASURES.values())]
        made = run_report.table(head, [rows, [total]])
        if told["n_rows_trained_on"]:
            made += note(
                f"{told['n_rows_trained_on']} of {told['n_rows']} rows have prompts that were trained on."
            )
        if told["n_rows"] > 1 and told["share_of_pairs_right"] is not None:
            made += note(
                f"The chosen response has the higher reward in {told['share_of_pairs_right']:.1%} of the pairs."
            )
        body += folded(title, made)
    if figures:
        yield section("Examples", run_report.grid(figures) + body)


def training_sections(run):
    log, looks = (
        [run["gating"]["log"]],
        {"Loss": "validation_loss", "Accuracy": "validation_accuracy"},
    )
    figures = [
        (title, run_report.curves_figure(f"gate-{key}", log, key, BLUE, key.replace("_", " ")))
        for title, key in looks.items()
    ]
    yield section("Training of the gate", run_report.grid(figures))


def provenance_sections(run):
    data, pairs = run["regression"]["data"], run["gating"]["pairs"]
    told = {
        f"{step}: {part.replace('_', '-')}": f"{n} prompts"
        for step in STEPS
        for part, n in run[step]["n_prompts"].items()
    }
    told |= {
        "ratings: rows too long to embed": data["left_out"],
        "pairs: rows too long to embed": pairs["left_out"],
    }
    body = note(run["gating"]["prompts_of_heads"]["told"] + ".") + run_report.pairs_list(told)
    if run["left_out"]:
        body += note(f"Of an earlier gate and not on this page: {', '.join(run['left_out'])}.")
    yield section("Prompts", body)
    settings = {
        f"{step}: {k}": listed(v) for step in STEPS for k, v in run[step]["settings"].items()
    }
    yield section("Settings", run_report.pairs_list(settings))
    rows, inputs = [], {}
    made = {name for entry in run["manifest"].values() for name in entry["outputs"]}
    for step, entry in run["manifest"].items():
        revision, seconds = entry["git_revision"] or "not known", f"{entry['wall_seconds']:.1f} s"
        cells = (
            revision,
            artifacts.hash_of(entry["code"])[:12],
            entry["python"],
            seconds,
            entry["finished_at"],
        )
        rows.append([step.capitalize(), *map(escape, cells)])
        inputs |= {
            name: digest[:12] for name, digest in entry["inputs"].items() if name not in made
        }
    steps = run_report.table(["", "Revision", "Code", "Python", "Wall time", "Finished"], [rows])
    sources = note(f"Ratings: {describe_source(data['source'])}.") + note(
        f"Pairs: {describe_source(pairs['source'])}."
    )
    digests = folded(f"Digests of {len(inputs)} input files", run_report.pairs_list(inputs))
    yield section("Provenance", steps + sources + digests)


def listed(setting):
    return " ".join(map(plain, setting)) or "none" if isinstance(setting, list) else plain(setting)


def describe_source(source):
    """Where a prepared file came from, in a line."""
    settings = source.get("settings", {})
    words = [Path(source.get("dataset") or "unknown").name]
    if settings.get("prompts") in ("first", "second"):
        words.append(f"{settings['prompts']} part of its prompts")
    if settings.get("pairs_from"):
        words.append(f"pairs by {settings['pairs_from']}")
    return ", ".join(
        [*words, f"embedded with {source.get('embedding_model') or 'an unnamed model'}"]
    )


# ----------------------------------------------------------------------------------------- the page


def build(run):
    """The page as text. run: what `read` returns."""
    makers = (
        attribute_sections,
        gate_sections,
        benchmark_sections,
        example_sections,
        training_sections,
    )
    sections = "".join(part for make in (*makers, provenance_sections) for part in make(run))
    titles = [title for title in HOW if f'id="{run_report.anchor(title)}"' in sections]
    links = " ".join(f'<a href="#{run_report.anchor(title)}">{title}</a>' for title in titles)
    names, debiased = run["gating"]["attributes"], run["gating"]["verbosity"]
    about = f"{len(names)} attributes: {', '.join(names)}" + (
        f"; debiased against {debiased}" if debiased else ""
    )
    return run_report.page(
        "Interpretable reward: report", "Interpretable reward", about, summary(run), links, sections
    )


def write(folder):
    """Make folder/report.html; returns its path and the names of the examples of an earlier gate that were left out."""
    run = read(folder)
    page = build(run).encode()
    with artifacts.atomic(folder / "report.html") as file:
        file.write(page)
    return folder / "report.html", run["left_out"]
