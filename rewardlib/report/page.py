"""Page kit: formatted numbers, drawings, checked files, and the page that a template makes of them.

Reports hand the content of JSON files, rows and drawings to `render`; all HTML is in the templates.
A page loads nothing from elsewhere, and the same content gives the same bytes.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from rewardlib import artifacts
from rewardlib.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"
# Okabe and Ito's colours, which stay apart for colour-blind readers. INK becomes the colour of the
# page's text, which is light on a dark screen.
INK, GREY = "#111213", "#828282"
BLUE, SKY, RED, ORANGE = "#0072B2", "#56B4E9", "#D55E00", "#E69F00"
PINK, YELLOW, GREEN = "#CC79A7", "#F0E442", "#009E73"


class Drawing(NamedTuple):
    """An SVG image: a description in words, the view box, the elements."""

    label: str
    view_box: str
    elements: Markup


# --------------------------------------------------------------------------------------------- text


def number(value: float | None, sign: str = "") -> str:
    """Three decimals with a true minus sign, an em dash for None; -0.000 is 0.000."""
    text = "—" if value is None else f"{value:{sign}.3f}"
    return (text.lstrip("+-") if text.strip("+-") == "0.000" else text).replace("-", "−")


def interval(ci: list | None, sign: str = "") -> str:
    """Both ends of an interval; nothing where an end is undefined."""
    return "" if ci is None or None in ci else f"[{number(ci[0], sign)}, {number(ci[1], sign)}]"


def p_value(p: float | None) -> str:
    return "" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def plain(value) -> str:
    """A setting in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(plain, value)) or "none"
    return "not set" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def in_text(row: dict, key: str) -> str:
    """A metric and its 95 % interval for a sentence."""
    return f"{number(row[key])} {interval(row[f'{key}_ci95'])}"


def gap_in_text(gap: dict) -> str:
    """A paired difference for a sentence, and where its interval lies."""
    low, high = gap["ci95"]
    place = "includes zero" if low <= 0 <= high else f"lies {'above' if low > 0 else 'below'} zero"
    difference = f"{number(gap['difference'], '+')} {interval(gap['ci95'], '+')}"
    return f"{difference}, an interval that {place}"


# ----------------------------------------------------------------------------------------- drawings


def draw(name: str, label: str, paint: Callable, height: float = 3.5) -> Drawing:
    """The drawing of paint(axes), with a legend below. name: starts its ids, unique on the page."""
    from matplotlib import style
    from matplotlib.figure import Figure

    looks = ["default", TEMPLATES / "figure.mplstyle", {"svg.hashsalt": name}]
    with style.context(looks):
        figure, file = Figure(figsize=(4.4, height), layout="constrained"), io.StringIO()
        axes = figure.subplots()
        paint(axes)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            place = {"loc": "outside lower center", "columnspacing": 1.2}
            figure.legend(handles, labels, ncols=2 if max(map(len, labels)) < 20 else 1, **place)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    view_box, svg = re.search(r'viewBox="([^"]*)".*?>(.*)</svg>', file.getvalue(), re.S).groups()
    return Drawing(label, view_box, Markup(_fit_into_page(svg, name)))


def _fit_into_page(svg, name):
    """The elements with ids of their own, the page's font and text colour, and few decimals."""
    unneeded = r"<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;\"]*;? ?"
    svg = re.sub(unneeded, "", svg, flags=re.S)
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    used = set(re.findall(r"#([\w.-]+)[\")]", svg))

    def rename(match):
        return f' id="{name}-{match[1]}"' if match[1] in used else ""

    svg = re.sub(r' id="([^"]*)"', rename, svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    # two decimals of a point (1/72 inch) are as sharp, and make the page much smaller
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), svg)
    return re.sub(r"\s*\n\s*", "\n", svg)


def training_curves(name: str, logs: list, key: str, colour: str, ylabel: str) -> Drawing | None:
    """One line per log (a list of epochs), the best epoch marked; None if no log has the key."""
    from matplotlib.ticker import MaxNLocator

    logs = [log for log in logs if all(key in entry for entry in log)]

    def points(entries):
        return [entry["epoch"] for entry in entries], [entry[key] for entry in entries]

    def paint(axes):
        for log in logs:
            axes.plot(*points(log), "-o", color=colour, linewidth=1, markersize=2.5, alpha=0.7)
        best = [[entry for entry in log if entry["best"]][-1] for log in logs]
        marks = {"color": INK, "mfc": "none", "markersize": 7, "label": "best epoch", "zorder": 3}
        axes.plot(*points(best), "o", **marks)
        axes.set(xlabel="epoch", ylabel=ylabel, xlim=(0.7, max(map(len, logs)) + 0.3))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    return draw(name, f"{ylabel} by epoch", paint, 3.2) if logs else None


# --------------------------------------------------------------------------------- files of the run


def recorded(folder: Path, manifest: dict, step: str, name: str) -> Path:
    """Path of a file that `step` wrote; InputError where it is missing or was changed since."""
    path = folder / name
    if not path.is_file():
        raise InputError(f"{path} not found; it is written by {step}: run that first")
    if artifacts.describe_file(path) != manifest[step]["outputs"].get(name):
        raise InputError(
            f"{path} is not the file that {step} recorded; run {step} again with FORCE=1"
        )
    return path


def provenance(entries: dict) -> dict:
    """Rows of the steps, their packages, and digests of the files that came from outside.

    entries: {title of the step: its entry in the manifest}.
    """
    rows, titles, digests = [], {}, {}
    for title, entry in entries.items():
        code, seconds = artifacts.hash_of(entry["code"])[:12], f"{entry['wall_seconds']:.1f} s"
        revision = entry["git_revision"] or "not known"
        rows.append([title, revision, code, entry["python"], seconds, entry["finished_at"]])
        versions = (f"{name} {version or 'absent'}" for name, version in entry["packages"].items())
        titles.setdefault(", ".join(versions), []).append(title)
        digests |= {Path(name).name: digest[:12] for name, digest in entry["inputs"].items()}
    outputs = {name for entry in entries.values() for name in entry["outputs"]}
    inputs = {name: digest for name, digest in digests.items() if name not in outputs}
    return {"rows": rows, "titles_by_packages": titles, "inputs": inputs}


# ----------------------------------------------------------------------------------------- the page


def render(template: Path, content: dict) -> str:
    """The page that `template`, which extends base.html, makes of `content`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        extensions=["jinja2.ext.do"],
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, interval=interval, p_value=p_value, plain=plain)
    # every section adds its title to `contents`, which the navigation lists
    return environment.get_template(template.name).render(content, contents=[], INK=INK)


def write(path: Path, template: Path, content: dict) -> Path:
    """Render the page and move it into place; returns its path."""
    with artifacts.atomic(path) as file:
        file.write(render(template, content).encode())
    return path
