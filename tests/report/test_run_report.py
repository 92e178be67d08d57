"""The run's report: numbers of the JSON files on one page; refusal of files that do not fit."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import ROOT, make_data, run_step

from rewardlib import artifacts
from rewardlib.cli import report
from rewardlib.errors import InputError
from rewardlib.report import run_report

SECTIONS = [
    "Results",
    "Differences to the teacher",
    "Best of n",
    "Members and aggregations",
    "Reliability",
    "Golden against predicted",
    "Scale check",
    "Training",
    "Label noise",
    "No leakage",
    "Settings",
    "Provenance",
]
COLUMNS = ("spearman", "pair_accuracy", "best_of_n", "best_of_n_gain", "mse", "r2")
VOID = ("meta", "br", "hr", "img", "link", "input")


class Page(HTMLParser):
    """Tables as rows of cell texts, ids, links, visible text; fails where tags do not balance."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tables, self.ids, self.links, self.text, self.tags = [], [], [], [], "", []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "small":
            self.tables[-1][-1][-1] += " "

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if (
            "table" in self.open
            and self.open[-1] != "sup"
            and ("td" in self.open or "th" in self.open)
        ):
            self.tables[-1][-1][-1] += data


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return Path(
        shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("*.ckpt"))
    )


@pytest.fixture(scope="module")
def html(finished, tmp_path_factory):
    """The page of the finished run; the run itself stays as it is."""
    return page_of(shutil.copytree(finished, tmp_path_factory.mktemp("report") / "out"))


def change(folder, step, name, edit):
    """Rewrite a JSON file by edit(content), and its digest, as if the step had written it so."""
    content = json.loads((folder / name).read_text())
    edit(content)
    artifacts.write_json(folder / name, content)
    manifest = artifacts.read_manifest(folder)
    manifest[step]["outputs"][name] = told = artifacts.describe_file(folder / name)
    for entry in manifest.values():
        if name in entry["inputs"]:
            entry["inputs"][name] = told["sha256"]
    artifacts.write_json(folder / artifacts.MANIFEST, manifest)


def page_of(folder):
    report.main([str(folder)])
    return (folder / "report.html").read_text()


def shown(value, sign=""):
    """Three decimals, as the page prints them, of a number that does not round to zero."""
    return f"{value:{sign}.3f}".replace("-", "−") if abs(value) >= 0.0005 else "0.000"


def test_tables_show_the_numbers_of_the_json(finished, html):
    tables = Page(html).tables
    results = json.loads((finished / "validation_results.json").read_text())
    for table, block in zip(tables[:2], (results, results["test"]), strict=True):
        rows = {row[0]: row[1:] for row in table}
        size = max((n for n in block["golden_best_of_n"] if int(n) <= 10), key=int)
        assert rows[""][2:4] == [f"Best of {size}", f"Gain, best of {size}"]
        told = {name: block[name] for name in run_report.VARIANTS}
        told |= {name.replace("_", " "): row for name, row in block["baselines"].items()}
        assert set(rows) == {"", "oracle", *told}
        for name, row in told.items():
            for column, cell in zip(COLUMNS, rows[name], strict=True):
                value, ci = row.get(column), row.get(f"{column}_ci95")
                value, ci = (value[size], ci[size]) if isinstance(value, dict) else (value, ci)
                expected = (
                    "—" if value is None else f"{shown(value)} [{shown(ci[0])}, {shown(ci[1])}]"
                )
                assert cell == expected, (name, column)
        assert rows["oracle"][2] == shown(block["golden_best_of_n"][size])
    for table, block in zip(tables[2:4], (results, results["test"]), strict=True):
        for row in table[1:]:
            for cell, told in zip(row[1:], block["against_teacher"][row[0]].values(), strict=True):
                low, high = told["ci95"]
                numbers = (
                    f"{shown(told['difference'], '+')} [{shown(low, '+')}, {shown(high, '+')}]"
                )
                assert cell == f"{numbers} p = {told['p_value']:.3f}"
    for table, block in zip(tables[4:6], (results, results["test"]), strict=True):
        assert [row[1:] for row in table[1:]] == [
            [shown(v) for v in row.values()] for row in block["scale_check"]
        ]


def test_text_shows_settings_label_noise_and_provenance(finished, html):
    text = Page(html).text
    results, manifest = (
        json.loads((finished / "validation_results.json").read_text()),
        artifacts.read_manifest(finished),
    )
    noise = json.loads((finished / manifest["step5"]["record"]).read_text())["pairs"]
    told = [
        f"realised label error{noise['label_error']:.3f}",
        f"expected label error{noise['expected_label_error']:.3f}",
    ]
    told += [f"labelled pairs{noise['n']}", f"reward scale{noise['reward_scale']:.3f}"]
    told += [
        f"{results['n_heldout_prompts']} held-out prompts",
        "held-out prompts in fits0",
        results["calibrated_on"],
    ]
    told += ["learning_rate0.001", "ensemble_number3", "reward_scalenot set", "replacementno"]
    told += [
        f"{v['reliability']['calibration_error']:.3f}"
        for k, v in results.items()
        if k in run_report.VARIANTS[1:]
    ]
    told += [f"{manifest[step]['wall_seconds']:.1f} s" for step in run_report.STEPS]
    told += [digest[:12] for name, digest in manifest["step5"]["inputs"].items()]
    assert [part for part in told if part not in text] == []


def test_page_stands_alone_and_is_well_formed(html):
    page = Page(html)
    assert not re.search(r"https?:|//\w|\bsrc=|@import|<script|<link|javascript:", html)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert len(page.ids) == len(set(page.ids))
    assert all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    assert {f"{name}" for name in re.findall(r"url\(#([^)]*)\)", html)} <= set(page.ids)
    assert [tag for tag in page.tags if tag in ("h1", "svg")] == ["h1", *["svg"] * 11]
    assert page.text.count("golden reward of the choice") == 2
    sections = re.findall(r'<h2>(.*)</h2>\n<p class="how">.{40,}', html)
    assert sections == SECTIONS
    anchors = ["#" + title.lower().replace(" ", "-") for title in SECTIONS]
    assert page.links[: len(SECTIONS)] == anchors


def test_same_bytes_whatever_the_users_matplotlib_settings(run_dir, html):
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        assert page_of(run_dir) == html


def test_only_the_report_is_written(run_dir):
    before = {path.name: artifacts.describe_file(path) for path in run_dir.iterdir()}
    page_of(run_dir)
    after = {path.name: artifacts.describe_file(path) for path in run_dir.iterdir()}
    after.pop("report.html")
    assert after == before


@pytest.mark.parametrize(
    "name",
    [
        "validation_results.json",
        "distillation_config.json",
        "training_log.jsonl",
        "student_log.jsonl",
        "golden_test.npy",
    ],
)
def test_missing_or_changed_file_is_named(run_dir, name):
    with open(run_dir / name, "ab") as file:
        file.write(b"\n")
    with pytest.raises(
        InputError, match=f"{re.escape(name)} is not the file that step[578] recorded"
    ):
        run_report.read(run_dir)
    (run_dir / name).unlink()
    with pytest.raises(
        InputError, match=f"{re.escape(name)} not found; it is written by step[578]"
    ):
        run_report.read(run_dir)


def test_steps_of_different_runs_are_refused(run_dir):
    manifest = artifacts.read_manifest(run_dir)
    manifest["step8"]["inputs"]["distillation_config.json"] = "0" * 64
    artifacts.write_json(run_dir / artifacts.MANIFEST, manifest)
    with pytest.raises(
        InputError, match=r"step7 has replaced distillation_config\.json since step8 ran"
    ):
        run_report.read(run_dir)
    del manifest["step8"]
    artifacts.write_json(run_dir / artifacts.MANIFEST, manifest)
    with pytest.raises(InputError, match="step8 has not finished here"):
        run_report.read(run_dir)


def test_command_line(run_dir):
    def call(folder):
        command = [sys.executable, "-m", "rewardlib.cli.report", str(folder)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = call(run_dir)
    assert (done.returncode, done.stderr) == (0, "") and "wrote" in done.stdout
    failed = call(run_dir / "nowhere")
    assert failed.returncode == 2 and not (run_dir / "nowhere").exists()
    assert re.fullmatch(
        r"report: .*nowhere: expected the OUTPUT_DIR of a finished run, found no such folder\n",
        failed.stderr,
    )


def test_text_from_files_is_escaped(run_dir):
    hostile = "<script>alert('x')</script>\"&amp;"

    def edit(results):
        results["settings"] |= {"task": hostile, "embed_model_name": hostile}
        results["calibrated_on"] = hostile
        results["baselines"][hostile] = results["baselines"]["random"]

    change(run_dir, "step8", "validation_results.json", edit)
    manifest = artifacts.read_manifest(run_dir)
    manifest["step5"] |= {"git_revision": hostile, "packages": {hostile: hostile}}
    manifest["step5"]["inputs"] = {hostile.replace("/", ""): hostile}
    artifacts.write_json(run_dir / artifacts.MANIFEST, manifest)
    html = page_of(run_dir)
    assert "<script" not in html
    assert Page(html).text.count(hostile) >= 7


def test_smallest_run(tmp_path):
    """K = 2, one member, plain isotonic, perfect labels, classifier, binary target, no test set."""
    data = make_data(tmp_path / "data", "--n_splits", "2", "--n_test_splits", "2")
    flags = [
        "--ensemble_number",
        "1",
        "--rm_objective",
        "clf",
        "--pairing",
        "sameprompt",
        "--annotation_quality",
        "-1",
    ]
    for step in (5, 6, 7, 8):
        last = ["--isotonic", "plain", "--binarize_rewards", "1"] if step >= 7 else []
        run_step(step, data, tmp_path / "out", *flags, "--n_pairs", "1", *last)
    folder = tmp_path / "out"
    change(folder, "step8", "validation_results.json", lambda results: results.update(test=None))
    for name in ("predictions_test.npy", "golden_test.npy"):
        (folder / name).unlink()
    page = Page(page_of(folder))
    assert len(page.tables) == 4 and page.tables[0][0][3:5] == ["Best of 2", "Gain, best of 2"]
    assert (
        "classification objective, same-prompt pairs" in page.text
        and "Loss of 1 member" in page.text
    )
    assert "annotation quality-1, perfect labels" in page.text and "Test:" not in page.text


def test_nulls_have_a_reason(run_dir):
    def edit(results):
        teacher = results["Teacher ORM"]
        teacher |= {
            "spearman": None,
            "spearman_ci95": [None, None],
            "n_prompts_without_spearman": 12,
        }
        teacher["best_of_n_gain"] = dict.fromkeys(teacher["best_of_n_gain"])
        results["Student"]["n_prompts_without_spearman"] = 1
        told = {"difference": None, "ci95": [None, None], "p_value": None}
        results["against_teacher"]["Student"]["spearman"] = told

    change(run_dir, "step8", "validation_results.json", edit)
    html = page_of(run_dir)
    page = Page(html)
    assert page.tables[0][1][1] == page.tables[0][1][4] == page.tables[2][2][1] == "—"
    n = json.loads((run_dir / "validation_results.json").read_text())["n_prompts"]
    for note in (
        "undefined: golden rewards do not differ",
        f"left out: 1 of {n} prompts",
        "raw scores have no unit",
    ):
        assert note in page.text
    assert "On held-out prompts Spearman is undefined" in page.text


def test_scatter_is_subsampled_the_same_way_every_time():
    rng = np.random.default_rng(1)
    predicted, golden = rng.standard_normal((2, 40, 50))
    drawing = run_report.scatter_figure("a", predicted, golden, "golden reward")
    assert drawing == run_report.scatter_figure("a", predicted, golden, "golden reward")
    colour = run_report.COLOUR[run_report.FINAL]
    points = re.findall(rf"<use[^>]*fill: {colour}", drawing.elements, re.I)
    assert len(points) == run_report.MAX_POINTS


def test_summary_does_not_overclaim():
    row = {"spearman": 0.5, "spearman_ci95": [0.4, 0.6]}

    def sentence(low, high):
        told = {"difference": (low + high) / 2, "ci95": [low, high], "p_value": 0.5}
        block = {"Teacher ORM": row, "Student": row, "baselines": {"random": row}, "n_prompts": 7}
        return run_report.summary({**block, "against_teacher": {"Student": {"spearman": told}}})

    assert sentence(-0.1, 0.2).endswith("+0.050 [−0.100, +0.200], an interval that includes zero.")
    assert sentence(-0.2, -0.1).endswith("an interval that lies below zero.")
    assert sentence(0.1, 0.2).endswith("an interval that lies above zero.")
