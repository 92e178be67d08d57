"""docs/ and examples/: every code block runs as it stands; names and links exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import rewardlib

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """Fenced blocks of a page: [(language, number of the first line, text)]."""
    text = page.read_text(encoding="utf-8")
    return [
        (match[1], text.count("\n", 0, match.start(2)), match[2]) for match in BLOCK.finditer(text)
    ]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name == "api.md"], ids=lambda page: page.name
)
def test_the_blocks_of_the_page_run_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EMBD_REPO_DIR", "")
    monkeypatch.chdir(tmp_path)
    page_blocks = blocks(page)
    assert len(page_blocks) > 8 and {language for language, _, _ in page_blocks} == {"python"}
    names = {"__name__": page.name}
    for _, line, text in page_blocks:
        exec(compile("\n" * line + text, str(page), "exec"), names)
    assert re.search(
        r"best of 500: \d\.\d\d of \d\.\d\d; Spearman 0\.\d\d", capsys.readouterr().out
    )
    assert not Path(names["folder"].name).exists()


def test_the_page_names_every_call_and_model():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in rewardlib.PUBLIC if not re.search(rf"\b{name}\b", text)] == []
    assert [name for name in rewardlib.PUBLIC if getattr(rewardlib, name).__name__ != name] == []


def test_files_that_pages_link_to_exist():
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_example_runs_from_anywhere(tmp_path):
    script = ROOT / "examples" / "five_calls.py"
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", str(script)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    rows = {
        tuple(line.split()[:2]): line.split()[2:] for line in result.stdout.splitlines() if line
    }
    for model in ("BT_MLP", "CLF_MLP"):
        by_strategy = {
            name: float(rows[name, model][1])
            for name in ("diverse", "random", "cross_prompt", "similar")
        }
        assert min(by_strategy.values()) > 0.1 and by_strategy["diverse"] > 0.5
    assert "order error" in result.stdout and not list(tmp_path.rglob("*.npy"))


def test_the_example_opens_as_a_notebook():
    """Percent format: markdown cells hold nothing but comments, and every line is in a cell."""
    text = (ROOT / "examples" / "five_calls.py").read_text(encoding="utf-8")
    cells = re.split(r"^# %%", text, flags=re.MULTILINE)
    assert cells[0] == "" and len(cells) > 8
    for cell in cells[1:]:
        kind, *lines = cell.splitlines()
        assert kind in ("", " [markdown]")
        if kind:
            assert all(line.startswith("#") for line in lines if line)
    assert not re.search(
        r"^(import|from) step|generate_demo_data|convert_embeddings", text, re.MULTILINE
    )
