"""studies/interpretable.sh from arrays or chats to the report: runs, reruns, kills, refusals."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_models
from conftest import ROOT
from interpretable_data import script

from rewardlib import artifacts
from rewardlib.cli import console
from rewardlib.errors import InputError
from studies.interpretable import attribute_data, chain, report, rewardbench

QUICK = {"HIDDEN": "16;16", "EPOCHS": 3, "TEMPERATURE": 1, "DROPOUT": 0, "THRESHOLD": 0.1}
COMMAND = ["bash", str(ROOT / "studies" / "interpretable.sh")]
SECTIONS = (
    "Attributes",
    "Ridge strengths",
    "Debiasing",
    "Gate against baselines",
    "Gate weights",
    "Benchmarks",
    "Examples",
    "Training of the gate",
    "Prompts",
    "Settings",
    "Provenance",
)
STAGES = ("regression", "gating", "rewardbench", "report")


def environment(**settings):
    inherited = {
        name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ
    }
    fixed = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {
        **inherited,
        **fixed,
        **{name: str(value) for name, value in {**QUICK, **settings}.items()},
    }


def run(cwd, **settings):
    return subprocess.run(
        COMMAND, cwd=cwd, env=environment(**settings), capture_output=True, text=True
    )


def results(folder):
    """{file: bytes} of all files of a run, except files with times, logs and locks."""
    changing = {"manifest.json", "report.html", ".lock"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in changing and "logs" not in path.parts
    }


# ------------------------------------------------------------------------------------------- arrays


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Ratings of 6 responses to each of 150 prompts in four attributes of known directions.

    One label in five of the second attribute is missing. A prompt whose embedding begins above 0
    prefers the helpful response, any other prompt the safe one; both attributes depend on length.
    """
    folder = tmp_path_factory.mktemp("my arrays")
    rng = np.random.default_rng(0)
    k, n, names = 6, 150, ["helpful", "safe", "length", "$clear$"]
    x, asked = (
        rng.standard_normal((k, n, 8)).astype(np.float32),
        rng.standard_normal((n, 5)).astype(np.float32),
    )
    labels = x[..., :4] + 0.1 * rng.standard_normal((k, n, 4))
    labels[..., :2] += labels[..., 2:3]
    preference = np.where(asked[:, 0] > 0, x[..., 0], x[..., 1])
    labels = np.concatenate([labels, preference[..., None]], -1)
    labels[..., 1][rng.random((k, n)) < 0.2] = np.nan
    np.save(folder / "EMBD_x.npy", x)
    np.save(folder / "ATTRIBUTES_x.npy", labels.astype(np.float32))
    np.save(folder / "PROMPTEMBD_x.npy", asked)
    (folder / "attributes.json").write_text(json.dumps([*names, "preference"]))
    pairs, prompts = (
        rng.standard_normal((90, 2, 8)).astype(np.float32),
        rng.standard_normal((30, 5)),
    )
    content = {"embeddings": pairs, "prompt_embeddings": np.repeat(prompts, 3, 0)}
    np.savez(folder / "styles.npz", **content, subset=np.repeat(["chat", "code"], 45))
    np.savez(folder / "domains.npz", **content, subset=np.tile(["a<b", "other"], 45))
    groups = {
        "ids": [str(i) for i in range(90)],
        "attributes": ["correct"],
        "labels": np.float32([[1], [0], [0]] * 30),
    }
    groups |= {
        "groups": np.repeat(np.arange(30), 3),
        "prompt_embeddings": [content["prompt_embeddings"].astype("f4")],
    }
    attribute_data.write(
        folder / "groups.safetensors", attribute_data.Rated([pairs[:, 0]], **groups)
    )
    return folder


def array_settings(folder, **changes):
    return {
        "PREPARE": 1,
        "RATED": folder / "EMBD_x.npy",
        "LABELS": folder / "ATTRIBUTES_x.npy",
        "PROMPT_EMBEDDINGS": folder / "PROMPTEMBD_x.npy",
        "PAIRS_FROM": "preference",
        "ATTRIBUTES": "helpful;safe;length;$clear$",
        "VERBOSITY": "length",
        "DOMAINS": f"made up={folder / 'domains.npz'}",
        "STYLES": f"styles={folder / 'styles.npz'}",
        "BEST_OF": f"best of 3={folder / 'groups.safetensors'}",
        "EXPLAIN": "made up=a<b",
        **changes,
    }


@pytest.fixture(scope="module")
def from_arrays(arrays, tmp_path_factory):
    """(working folder, result) of a whole run. Tests read OUTPUT_DIR or repeat the same command."""
    folder = tmp_path_factory.mktemp("from arrays")
    return folder, run(folder, **array_settings(arrays))


def test_from_arrays(from_arrays):
    folder, result = from_arrays
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    out = folder / "interpretable_out"
    for name in (
        "prepare-rated",
        "prepare-first",
        "prepare-pairs",
        "prepare-benchmark-made up",
        *STAGES,
    ):
        assert f"==> {name}: " in result.stdout
        assert (out / "logs" / f"{name}.log").stat().st_size
    first, pairs = (
        attribute_data.read(out / "prepared" / f"{n}.safetensors")
        for n in ("rated-first", "pairs-from-second")
    )
    assert not set(first.groups.tolist()) & set(pairs.groups.tolist())
    heads = json.loads((out / "attribute_heads.json").read_text())
    assert heads["attributes"] == ["helpful", "safe", "length", "$clear$"]
    assert heads["regression"]["helpful"]["held_out"]["r2"] > 0.9
    assert (
        json.loads((out / "gate.json").read_text())["held_out"]["methods"]["gate"]["accuracy"] > 0.6
    )
    assert [path.name for path in out.glob("explanation_*.json")] == [
        "explanation_benchmark-made_up_a_b.json"
    ]


def test_report(from_arrays):
    out = from_arrays[0] / "interpretable_out"
    page = (out / "report.html").read_text()
    assert tuple(re.findall(r"<h2>(.*)</h2>", page)) == SECTIONS
    for title in SECTIONS:
        assert (
            page.count(f"<h2>{title}</h2>") == 1
            and f'href="#{title.lower().replace(" ", "-")}"' in page
        )
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(
        ids
    )
    assert not re.search(r"<script|<link|https?://(?!www\.w3\.org)|\bnan\b", page)
    assert "a&lt;b" in page and "a<b" not in page and page.count("$clear$") > 3
    heads = json.loads((out / "attribute_heads.json").read_text())
    gate = json.loads((out / "gate.json").read_text())
    benchmarks = json.loads((out / "rewardbench_results.json").read_text())["benchmarks"]
    shown = [
        heads["regression"]["safe"]["held_out"]["mse"],
        heads["debiasing"]["attributes"]["helpful"]["held_out"]["after"]["spearman"],
        gate["held_out"]["methods"]["linear_head"]["accuracy"],
        gate["weights"]["mean"]["safe"],
        benchmarks["made up"]["methods"]["gate"]["domains"]["a<b"]["accuracy"],
        benchmarks["styles"]["methods"]["uniform"]["code"]["hard"],
    ]
    for number in shown:
        assert f"{number:.3f}".replace("-", "−") in page
    before = page
    script("interpretable_report").main([str(out)])
    assert (out / "report.html").read_text() == before


def test_second_run_does_nothing(from_arrays, arrays):
    folder, _ = from_arrays
    before = results(folder / "interpretable_out")
    again = run(folder, **array_settings(arrays, EXPLAIN=""), LEARNING_RATE="1e-3")
    assert again.returncode == 0 and again.stdout.count("already done") == 5 + 3
    assert results(folder / "interpretable_out") == before


def test_prepared_files_killed_and_run_again(from_arrays, tmp_path):
    """From prepared files, without benchmarks and examples: the heads and gate of the whole run."""
    finished = from_arrays[0] / "interpretable_out"
    settings = prepared_settings(finished, EXPLAIN="", OUTPUT_DIR="my results")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(COMMAND, cwd=tmp_path, env=environment(**settings), **quiet)
    out = tmp_path / "my results"
    while process.poll() is None and not (out / "attribute_heads.safetensors").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "gate.safetensors").exists()
    result = run(tmp_path, **settings)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    for name in (
        "attribute_heads.safetensors",
        "gate.safetensors",
        "regression_split.json",
        "gating_split.json",
    ):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    page = (out / "report.html").read_text()
    assert (
        "<h2>Benchmarks</h2>" not in page
        and "<h2>Examples</h2>" not in page
        and 'href="#examples"' not in page
    )


def prepared_settings(finished, **changes):
    files = {"RATED": "rated-first", "PAIRS": "pairs-from-second"}
    files = {
        setting: finished / "prepared" / f"{name}.safetensors" for setting, name in files.items()
    }
    return {**files, "ATTRIBUTES": "helpful;safe;length;$clear$", "VERBOSITY": "length", **changes}


def copy_of(finished, folder, change=None):
    """A copy of the JSON files of a run, with a changed manifest."""
    for path in finished.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    manifest = artifacts.read_manifest(folder)
    if change:
        change(manifest)
    artifacts.write_json(folder / "manifest.json", manifest)
    return folder


def test_report_leaves_out_what_is_of_an_earlier_gate(from_arrays, tmp_path, capsys):
    def change(manifest):
        for step in ("rewardbench", "explain benchmark-made_up_a_b"):
            manifest[step]["inputs"]["gate.safetensors"] = "0" * 64

    folder = copy_of(from_arrays[0] / "interpretable_out", tmp_path, change)
    script("interpretable_report").main([str(folder)])
    names = "explanation_benchmark-made_up_a_b.json, rewardbench_results.json"
    assert f"report: of an earlier gate, left out: {names}" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert (
        f"Of an earlier gate and not on this page: {names}." in page
        and "<h2>Benchmarks</h2>" not in page
    )


def test_report_refuses_what_does_not_belong_together(from_arrays, tmp_path):
    finished = from_arrays[0] / "interpretable_out"
    folder = copy_of(finished, tmp_path)
    gate = (folder / "gate.json").read_bytes()
    (folder / "gate.json").write_bytes(gate.replace(b'"seed": 6', b'"seed": 7'))
    with pytest.raises(InputError, match="gate.json is not the file that gating recorded"):
        report.read(folder)
    copy_of(
        finished,
        folder,
        lambda m: m["gating"]["inputs"].update({"attribute_heads.safetensors": "0" * 64}),
    )
    with pytest.raises(InputError, match="the attribute heads were fitted anew since gating ran"):
        report.read(folder)
    copy_of(finished, folder, lambda manifest: manifest.pop("gating"))
    with pytest.raises(
        InputError, match=r"gating has not finished here; run studies/interpretable_gating.py first"
    ):
        report.read(folder)
    copy_of(finished, folder)
    (folder / "attribute_heads.json").unlink()
    with pytest.raises(
        InputError, match="attribute_heads.json not found; it is written by regression"
    ):
        report.read(folder)


# -------------------------------------------------------------------------------------------- chats


def chat(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A tiny model with a chat template, 121 rated responses, one too long, and RewardBench."""
    pytest.importorskip("transformers", reason="chat data need the extra [llm]")
    folder = tmp_path_factory.mktemp("chats")
    tiny_models.make_language_model(folder / "model")
    turn = "<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n"
    template = "{{ bos_token }}{% for m in messages %}" + turn + "{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    (folder / "model" / "chat_template.jinja").write_text(template)
    prompts, answers = tiny_models.sentences(30, 1), tiny_models.sentences(400, 2, 1, 20)
    rated = [
        {
            "messages": chat(prompts[i % 30], answers[i]),
            "length": len(answers[i]),
            "the": answers[i].count("e"),
        }
        for i in range(120)
    ]
    rated.append(
        {
            "messages": chat(prompts[0], " ".join(tiny_models.sentences(40, 3))),
            "length": 9,
            "the": 9,
        }
    )
    tiny_models.write_jsonl(folder / "rated.jsonl", rated)
    bench = [
        {
            "prompt": f"{prompts[i % 30]} now",
            "chosen": answers[i],
            "rejected": answers[300 + i],
            "subset": subset,
            "id": i,
        }
        for i, subset in enumerate(sorted(rewardbench.EXAMPLE_COUNTS) * 2)
    ]
    tiny_models.write_jsonl(folder / "bench.jsonl", bench)
    return folder


def test_from_chats(chats, tmp_path):
    settings = {
        "PREPARE": 1,
        "MODEL": chats / "model",
        "RATED": chats / "rated.jsonl",
        "PAIRS_FROM": "the",
        "REWARDBENCH": chats / "bench.jsonl",
        "VERBOSITY": "length",
        "MAX_LENGTH": 200,
        "ALLOW_UNREACHED": 1,
        "EXPLAIN": "",
    }
    result = run(tmp_path, **settings)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert "1 of 121 rows were too long and are left out: row 120" in result.stdout
    out = tmp_path / "interpretable_out"
    page = (out / "report.html").read_text()
    for text in ("Overall", "Chat Hard", "hep-rust (2)", "rewardbench: donotanswer"):
        assert text in page


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "RATED: expected a prepared file of ratings"),
        (
            {"RATED": "x.safetensors"},
            "PAIRS: expected preference pairs, or PAIRS_FROM with an attribute of RATED",
        ),
        (
            {"RATED": "x.safetensors", "PAIRS": "p", "LABELS": "l"},
            "expected RATED=EMBD_*.npy beside them, found 'x.safe",
        ),
        (
            {"RATED": "x.safetensors", "PAIRS": "p", "PAIRS_FROM": "a"},
            "PAIRS_FROM: expected no PAIRS beside it",
        ),
        (
            {"RATED": "x.safetensors", "PAIRS": "p"},
            "RATED: x.safetensors: expected a prepared file (or shards), found",
        ),
        ({"RATED": "some/hub", "PAIRS": "p"}, "found 'some/hub'; PREPARE=1 makes one of it"),
        (
            {"RATED": "some/hub", "PAIRS": "p", "PREPARE": 1},
            "MODEL: expected the model that embeds RATED=some/hub",
        ),
        (
            {"RATED": "x.jsonl", "PAIRS": "p", "PREPARE": 1},
            "RATED: x.jsonl: expected a file, found none",
        ),
        (
            {"RATED": "{e}", "PAIRS": "p", "PREPARE": 1},
            "LABELS: expected ATTRIBUTES_*.npy for RATED=",
        ),
        (
            {"PREPARE": "yes", "RATED": "x", "PAIRS": "p"},
            "PREPARE (--prepare): expected one of 0 1, found 'yes'",
        ),
        ({"DOMAINS": "{d}"}, "DOMAINS: expected NAME=FILE;NAME=FILE, found"),
        (
            {"EXPLAIN": "nobody=1"},
            "EXPLAIN: expected NAME=ROW or NAME=SUBSET with NAME among rated pairs made up styles "
            "best of 3",
        ),
        ({"SHARE": "2"}, "SHARE (--share): expected a number between 0 and 1, found '2'"),
        ({"STYLES": "made up={d}"}, "found best of 3, made up, made up"),
    ],
)
def test_unknown_values_are_refused_before_anything_runs(
    arrays, tmp_path, monkeypatch, capsys, settings, message
):
    """In this process, as interpretable.sh calls the chain."""
    places = {"d": arrays / "domains.npz", "e": arrays / "EMBD_x.npy"}
    values = {name: str(value).format(**places) for name, value in settings.items()}
    base = {} if "RATED" in values or not values else array_settings(arrays)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["chain"])
    for name in chain.all_actions():
        monkeypatch.delenv(name, raising=False)
    for name, value in {**QUICK, **base, **values}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as stop:
        console.run(chain.main, "interpretable.sh")
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_readme_holds_the_settings_as_the_parsers_have_them():
    assert chain.table() in (ROOT / "studies" / "README.md").read_text(encoding="utf-8")


def test_help_lists_the_settings_and_a_mistyped_one_is_refused(tmp_path):
    result = subprocess.run(
        [*COMMAND, "--help"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout.endswith(chain.table())
    result = run(tmp_path, RATED="x.safetensors", PAIRS="p.safetensors", VERBOSTY="length")
    assert result.returncode == 2 and "did you mean VERBOSITY?" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failing_stage_is_named_with_its_log_and_the_way_on(from_arrays, tmp_path):
    finished = from_arrays[0] / "interpretable_out"
    result = run(
        tmp_path, **prepared_settings(finished, VERBOSITY="wordiness", OUTPUT_DIR="my results")
    )
    assert result.returncode == 2
    assert "interpretable.sh: regression failed after" in result.stderr
    assert "expected an attribute among" in result.stderr and "found 'wordiness'" in result.stderr
    assert "the whole log: my results/logs/regression.log" in result.stderr
    assert "==> gating" not in result.stdout
