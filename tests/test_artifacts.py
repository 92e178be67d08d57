"""Writes that happen whole or not at all, digests, what counts as finished, the lock."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, STEPS
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardlib import artifacts
from rewardlib.errors import InputError

STEP = ROOT / "step5_train_rms.py"


def start(code, *arguments, stdin=subprocess.PIPE, **environment):
    """A Python process running `code` in the repository."""
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, env={**os.environ, **environment}, **pipes
    )


# ------------------------------------------------------------------------------------------ writing


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), artifacts.atomic(path) as file:
        file.write(b"new, first ha")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_old_content_stays_until_the_block_ends(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with open(path) as reader:
        with artifacts.atomic(path) as file:
            file.write(b"new")
            file.flush()
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert reader.read() == "old", "the old file was written over, not replaced"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file_and_the_next_write_works(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    code = """
import sys
from rewardlib import artifacts
with artifacts.atomic(sys.argv[1]) as file:
    file.write(b"new" * 100_000)
    file.flush()
    print("half way", flush=True)
    sys.stdin.read()
"""
    process = start(code, path)
    try:
        assert process.stdout.readline() == "half way\n"
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    with artifacts.atomic(path) as file:
        file.write(b"newer")
    assert path.read_bytes() == b"newer"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_json_takes_numpy_values_and_paths(tmp_path):
    content = {
        "a": np.arange(3),
        "b": np.float32(0.5),
        "c": Path("x/y"),
        "d": np.bool_(True),
        "e": None,
    }
    artifacts.write_json(tmp_path / "a.json", content)
    assert artifacts.read_json(tmp_path / "a.json", "x") == {
        "a": [0, 1, 2],
        "b": 0.5,
        "c": "x/y",
        "d": True,
        "e": None,
    }


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), np.float32("nan"), np.array([1, np.inf])]
)
def test_numbers_that_are_not_finite_have_no_json_form(tmp_path, value):
    for write, content in (
        (artifacts.write_json, {"a": value}),
        (artifacts.write_jsonl, [{"a": 1}, {"a": value}]),
    ):
        (tmp_path / "a").write_text("old")
        with pytest.raises(ValueError, match="Out of range float values"):
            write(tmp_path / "a", content)
        assert (tmp_path / "a").read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_objects_have_no_json_form(tmp_path):
    with pytest.raises(TypeError, match="set has no JSON form"):
        artifacts.write_json(tmp_path / "a.json", {"a": {1, 2}})


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
@settings(deadline=None)
def test_json_round_trip(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    artifacts.write_json(path, content)
    assert artifacts.read_json(path, "x") == content


def test_jsonl_and_npy(tmp_path):
    artifacts.write_jsonl(tmp_path / "a.jsonl", [{"a": np.int64(1)}, {"a": 2}])
    assert (tmp_path / "a.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    artifacts.write_npy(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        artifacts.write_npy(tmp_path / "a.npy", np.array([{}], object))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)


# ------------------------------------------------------------------------------------------ reading


def test_json_that_is_not_there_names_the_step_that_writes_it(tmp_path):
    with pytest.raises(
        InputError, match=r"a\.json not found; it is written by step 5: run that first"
    ):
        artifacts.read_json(tmp_path / "a.json", "step 5")


@pytest.mark.parametrize(
    "content", [b"", b'{"a": 1', b"\xff\xfe"], ids=["empty", "cut off", "not UTF-8"]
)
def test_json_that_is_broken(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json is not readable JSON \(.*\); run step 5 again"):
        artifacts.read_json(tmp_path / "a.json", "step 5")


def test_a_folder_instead_of_json(tmp_path):
    with pytest.raises(InputError, match="is not readable JSON .*directory"):
        artifacts.read_json(tmp_path, "step 5")


def test_null_if_nan():
    assert [artifacts.null_if_nan(v) for v in (None, np.nan, -np.inf, np.float32(0.5), 0)] == [
        None,
        None,
        None,
        0.5,
        0.0,
    ]


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    path = artifacts.writable_dir(str(tmp_path / "a" / "b"))
    assert path == tmp_path / "a" / "b" and list(path.iterdir()) == []
    assert artifacts.writable_dir(path) == path


@pytest.mark.parametrize(("below", "reason"), [("", "File exists"), ("/out", "Not a directory")])
def test_a_file_where_a_folder_should_be(tmp_path, below, reason):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        InputError,
        match=f"file{below}: expected a writable folder, found: {reason}; choose another",
    ):
        artifacts.writable_dir(f"{tmp_path}/file{below}")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(
            InputError, match="expected a writable folder, found: Permission denied"
        ):
            artifacts.writable_dir(tmp_path)
    finally:
        tmp_path.chmod(0o700)


# ------------------------------------------------------------------------------------------ digests


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, (1 << 20) + 1])
def test_sha256_reads_all_of_a_file(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "a").write_bytes(content[:size])
    expected = hashlib.sha256(content[:size]).hexdigest()
    assert artifacts.sha256(tmp_path / "a") == expected
    assert artifacts.describe_file(tmp_path / "a") == {"bytes": size, "sha256": expected}


def test_the_hash_is_of_values_not_of_their_spelling():
    same = [
        {"lr": float("1e-3"), "n": [1, 2]},
        {"n": (1, 2), "lr": 0.001},
        {"n": np.array([1, 2]), "lr": np.float64(1e-3)},
    ]
    assert len({artifacts.hash_of(content) for content in same}) == 1
    other = [
        {"lr": 0.002, "n": [1, 2]},
        {"lr": 0.001, "n": [2, 1]},
        {"lr": 0.001},
        {"lr": "0.001", "n": [1, 2]},
    ]
    assert len({artifacts.hash_of(content) for content in [same[0], *other]}) == 5


# ----------------------------------------------------------------------------------------- manifest


@pytest.fixture
def finished(tmp_path):
    """A folder in which the work below wrote two files and recorded them."""
    for name in ("a.json", "b.npy"):
        (tmp_path / name).write_text(name)
    artifacts.record(tmp_path, "step5", work(), ["a.json", "b.npy"], time.time() - 2)
    return tmp_path


def work(script=STEP, inputs=None, **arguments):
    return artifacts.identity(
        script, {"seed": 6, "learning_rate": 0.001, **arguments}, inputs or {"x.npy": "12ab"}
    )


def test_what_is_recorded(finished):
    entry = artifacts.read_manifest(finished)["step5"]
    assert entry["arguments"] == {"seed": 6, "learning_rate": 0.001} and entry["inputs"] == {
        "x.npy": "12ab"
    }
    assert entry["outputs"] == {
        name: artifacts.describe_file(finished / name) for name in ("a.json", "b.npy")
    }
    assert entry["hash"] == work()["hash"] and 2 <= entry["wall_seconds"] < 60
    assert entry["packages"]["numpy"] == np.__version__
    assert {"git_revision", "python", "finished_at", "code"} <= set(entry)


def test_recorded_work_is_finished_and_entries_stand_beside_each_other(finished):
    assert artifacts.is_finished(finished, "step5", work())
    assert not artifacts.is_finished(finished, "step6", work())
    artifacts.record(finished, "step6", work(seed=7), ["b.npy"], time.time())
    assert artifacts.is_finished(finished, "step5", work()) and artifacts.is_finished(
        finished, "step6", work(seed=7)
    )


def test_numbers_count_not_their_spelling(finished):
    assert artifacts.is_finished(finished, "step5", work(learning_rate=float("1e-3")))


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 7},
        {"learning_rate": 0.002},
        {"more": 1},
        {"inputs": {"x.npy": "12ac"}},
        {"inputs": {"y.npy": "12ab"}},
    ],
    ids=str,
)
def test_other_arguments_or_inputs_are_other_work(finished, changed):
    assert not artifacts.is_finished(finished, "step5", work(**changed))


def test_another_script_is_other_work(finished):
    assert not artifacts.is_finished(finished, "step5", work(script=ROOT / "step6_eval_rms.py"))


SOURCES = {
    "step.py": "import json\nfrom rewardlib.cli import flags\nfrom rewardlib.data import splits\n",
    "rewardlib/__init__.py": "",
    "rewardlib/seeds.py": "import rewardlib.seeds\n",
    "rewardlib/unused.py": "",
    "rewardlib/data/__init__.py": "",
    "rewardlib/data/splits.py": "def load():\n    from rewardlib import seeds\n",
    "rewardlib/data/pairs.py": "from rewardlib.data import splits\n",
    "rewardlib/cli/flags.py": "from rewardlib.data import pairs\n",
    "studies/study.py": "from rewardlib.data import splits\n",
}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A small project whose step.py imports some of its modules."""
    monkeypatch.setattr(artifacts, "ROOT", tmp_path)
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_code_is_what_the_script_imports_directly_or_through_others(sources):
    digests = artifacts.source_digests(sources / "step.py")
    assert list(digests) == [
        "rewardlib/__init__.py",
        "rewardlib/data/__init__.py",
        "rewardlib/data/splits.py",
        "rewardlib/seeds.py",
        "step.py",
    ]
    assert digests["step.py"] == artifacts.sha256(sources / "step.py")


@pytest.mark.parametrize("name", SOURCES)
def test_a_finished_step_stays_finished_until_a_file_that_it_imports_is_edited(
    sources, tmp_path, name
):
    out = artifacts.writable_dir(tmp_path / "out")
    step = sources / "step.py"
    artifacts.record(out, "step", artifacts.identity(step, {}, {}), [], time.time())
    used = name in artifacts.source_digests(step)
    (sources / name).write_text(SOURCES[name] + "# edited\n")
    work = artifacts.identity(step, {}, {})
    assert artifacts.is_finished(out, "step", work) == (not used)
    assert artifacts.describe_change(out, "step", work) == ([f"{name} changed"] if used else [])


def test_an_import_that_is_new_counts_at_once(sources):
    with open(sources / "step.py", "a") as file:
        file.write("from rewardlib import unused\n")
    assert "rewardlib/unused.py" in artifacts.source_digests(sources / "step.py")


def test_the_steps_count_the_modules_that_they_share_and_no_study_report_or_command_line():
    for number, name in STEPS.items():
        files = list(artifacts.source_digests(ROOT / f"{name}.py"))
        assert {
            "rewardlib/artifacts.py",
            "rewardlib/data/splits.py",
            "rewardlib/pipeline/run_record.py",
        } < set(files)
        assert not [
            file
            for file in files
            if file.startswith(("rewardlib/cli", "rewardlib/report", "studies"))
        ]
        assert ("rewardlib/pipeline/leakage.py" in files) == (number == 8)


@pytest.mark.parametrize("change", ["missing", "changed", "longer", "folder"])
def test_outputs_must_be_as_they_were_written(finished, change):
    path = finished / "b.npy"
    if change in ("missing", "folder"):
        path.unlink()
    if change == "folder":
        path.mkdir()
    if change == "changed":
        path.write_text("b.npz")
    if change == "longer":
        path.write_text("b.npy ")
    assert not artifacts.is_finished(finished, "step5", work())


def test_force_does_the_work_again(finished, monkeypatch):
    for value, done in (("1", False), ("0", True), ("", True)):
        monkeypatch.setenv("FORCE", value)
        assert artifacts.is_finished(finished, "step5", work()) == done


def test_without_a_manifest_nothing_is_finished(tmp_path):
    assert artifacts.read_manifest(tmp_path) == {}
    assert not artifacts.is_finished(tmp_path, "step5", work())


def test_a_broken_manifest_is_refused(finished):
    (finished / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is not readable JSON"):
        artifacts.is_finished(finished, "step5", work())


def test_what_changed_is_told(finished):
    assert artifacts.describe_change(finished, "step5", work()) == []
    assert artifacts.describe_change(finished, "step5", work(seed=7, task="harmless")) == [
        "seed 6 -> 7",
        "task None -> harmless",
    ]
    assert artifacts.describe_change(finished, "step6", work(seed=7)) == []


# --------------------------------------------------------------------------------------------- lock

HOLD = """
import sys
from rewardlib import artifacts
with artifacts.lock(sys.argv[1]):
    print("inside", flush=True)
    sys.stdin.readline()
print("out", flush=True)
"""


def test_a_second_run_waits_and_says_so(tmp_path):
    with artifacts.lock(tmp_path):
        second = start(HOLD, tmp_path, stdin=subprocess.DEVNULL)
        said = second.stderr.readline()
        assert said == f"another run is using {tmp_path}: waiting for it to end\n"
        assert second.poll() is None
    assert second.communicate(timeout=30) == ("inside\nout\n", "")
    assert second.returncode == 0


def test_a_killed_run_frees_the_folder(tmp_path):
    first = start(HOLD, tmp_path)
    try:
        assert first.stdout.readline() == "inside\n"
    finally:
        first.kill()
        first.communicate(timeout=30)
    second = start(HOLD, tmp_path)
    assert second.communicate("\n", timeout=30) == ("inside\nout\n", "")


def test_a_folder_that_the_driver_holds_is_passed_through(tmp_path):
    with artifacts.lock(tmp_path):
        inner = start(HOLD, tmp_path, REWARDLIB_LOCKED_DIR=str(tmp_path / ".." / tmp_path.name))
        assert inner.communicate("\n", timeout=30) == ("inside\nout\n", "")


def test_a_driver_that_holds_another_folder_does_not_help(tmp_path):
    (tmp_path / "other").mkdir()
    with artifacts.lock(tmp_path):
        second = start(
            HOLD, tmp_path, stdin=subprocess.DEVNULL, REWARDLIB_LOCKED_DIR=str(tmp_path / "other")
        )
        assert "waiting" in second.stderr.readline()
    assert second.communicate(timeout=30) == ("inside\nout\n", "")


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="inside"), artifacts.lock(tmp_path):
        raise RuntimeError("inside")
    process = start(HOLD, tmp_path)
    assert process.communicate("\n", timeout=30) == ("inside\nout\n", "")
