"""run_steps.py: each step does what it does alone, with its own log; failures are told; flags reach their steps."""

import io
import shutil
import subprocess
import sys
import types

import pytest
from conftest import ROOT, SMALL, STEPS
from tqdm import tqdm

from rewardlib.cli import chain, console
from rewardlib.errors import InputError

CHANGING = {"manifest.json", ".inspected.json", ".lock", "report.html"}
STUDENT = ["--distill_epochs", "4"]


def call(monkeypatch, *argv):
    """Exit status of `python -m rewardlib.cli.chain ARGV`."""
    monkeypatch.setattr(sys, "argv", ["chain", *map(str, argv)])
    try:
        console.run(chain.main, "run_all.sh")
    except SystemExit as stop:
        return stop.code
    return 0


def contents(folder):
    return {
        p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in CHANGING
    }


@pytest.fixture
def steps(monkeypatch):
    """Stand-ins for the steps and the report: a list of (module, argv); `fail` holds {module: error to raise}."""
    calls, fail = [], {}

    def load(module):
        def main(argv):
            calls.append((module, argv))
            print(f"{module} works")
            print(f"{module} warns", file=sys.stderr)
            if module in fail:
                raise fail[module]

        return types.SimpleNamespace(main=main)

    monkeypatch.setattr(chain.importlib, "import_module", load)
    return types.SimpleNamespace(calls=calls, fail=fail)


# ------------------------------------------------------------------------------------------ results


def test_the_results_are_those_of_the_scripts_called_one_by_one(
    data, finished, tmp_path, monkeypatch
):
    together, alone = tmp_path / "together", tmp_path / "alone"
    flags = [*SMALL, "--data_dir", str(data)]
    assert call(monkeypatch, 5, 8, *flags, "--output_dir", together, "--", *STUDENT) == 0
    for number, name in STEPS.items():
        more = STUDENT if number >= 7 else []
        command = [
            sys.executable,
            str(ROOT / f"{name}.py"),
            *flags,
            "--output_dir",
            str(alone),
            "--num_threads",
            "1",
        ]
        subprocess.run([*command, *more], check=True, stdout=subprocess.DEVNULL)
    first, second = contents(together), contents(alone)
    assert set(first) == set(second) == set(contents(finished))
    assert [name for name in first if first[name] != second[name]] == []
    assert (together / "report.html").exists()


def test_finished_steps_are_skipped_in_one_process_too(
    data, finished, tmp_path, monkeypatch, capsys
):
    out = shutil.copytree(finished, tmp_path / "out")
    flags = [*SMALL, "--data_dir", data, "--output_dir", out, "--report", 0, "--", *STUDENT]
    assert call(monkeypatch, 5, 8, *flags) == 0
    assert capsys.readouterr().out.count("already done") == 4
    assert contents(out) == contents(finished)


# --------------------------------------------------------------------------------------------- logs


def test_logs_hold_what_was_printed(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert call(monkeypatch, 5, 6, *SMALL, "--data_dir", data, "--output_dir", out) == 0
    printed = capsys.readouterr().out
    for number in (5, 6):
        log = (out / "logs" / f"step{number}.log").read_text()
        assert log in printed and f"step{number}: wrote" in log
        assert f"==> step{number}: python {STEPS[number]}.py --n_sample 20" in printed
    assert sorted(path.name for path in (out / "logs").iterdir()) == ["step5.log", "step6.log"]


def test_logs_hold_both_streams_and_are_those_of_the_last_run(steps, tmp_path, monkeypatch, capsys):
    for _ in range(2):
        assert call(monkeypatch, 5, 5, "--output_dir", tmp_path) == 0
        assert (
            tmp_path / "logs" / "step5.log"
        ).read_text() == "step5_train_rms works\nstep5_train_rms warns\n"
    out, error = capsys.readouterr()
    assert out.count("step5_train_rms works\n") == 2 and error == "step5_train_rms warns\n" * 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bars_are_shown_and_not_logged():
    terminal, log = Terminal(), io.StringIO()
    tee = chain.Tee(terminal, log)
    for leave in (False, True):
        for i in tqdm(range(3), desc="members", disable=None, file=tee, leave=leave, mininterval=0):
            tee.write(f"line {i}\n")
    assert "members" in terminal.getvalue() and tee.isatty()
    assert [line for line in log.getvalue().splitlines() if line] == [
        f"line {i}" for i in range(3)
    ] * 2


# ----------------------------------------------------------------------------------------- failures


def test_bad_input_ends_the_run_with_status_2_and_the_last_lines(
    data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    assert (
        call(monkeypatch, 5, 8, *SMALL, "--n_sample", 1000, "--data_dir", data, "--output_dir", out)
        == 2
    )
    printed, error = capsys.readouterr()
    assert "==> step6" not in printed
    told = [line for line in error.splitlines() if "expected 4 to 48" in line]
    assert [line.strip().startswith("step5: n_sample") for line in told] == [True, True]
    assert (
        error.startswith("step5: n_sample")
        and "\nrun_all.sh: step5 failed after 0 s; its last lines:\n" in error
    )
    assert f"the whole log: {out}/logs/step5.log\nthe same command goes on from here" in error
    assert "expected 4 to 48" in (out / "logs" / "step5.log").read_text()


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("odd\nfile"), 2, "step7: odd file"),
        (ValueError("odd"), 1, "step7: ValueError: odd (--debug shows where)"),
        (KeyboardInterrupt(), 130, "step7: interrupted; the same command completes the job"),
        (MemoryError(), 1, "step7: MemoryError"),
    ],
    ids=["input", "defect", "interrupt", "memory"],
)
def test_a_failing_step_is_the_last_one(
    steps, tmp_path, monkeypatch, capsys, error, status, message
):
    steps.fail["step7_isotonic_distillation"] = error
    assert call(monkeypatch, 5, 8, "--output_dir", tmp_path) == status
    assert [module for module, _ in steps.calls] == [STEPS[number] for number in (5, 6, 7)]
    told = capsys.readouterr().err
    assert "step7 failed after" in told and f"    {message}" in told
    assert message in (tmp_path / "logs" / "step7.log").read_text()


def test_only_the_last_lines_of_a_long_log_are_told(steps, tmp_path, monkeypatch, capsys):
    steps.fail["step5_train_rms"] = InputError("bad")
    monkeypatch.setattr(chain, "LAST_LINES", 2)
    call(monkeypatch, 5, 5, "--output_dir", tmp_path)
    assert (
        capsys.readouterr()
        .err.split("its last lines:\n")[1]
        .startswith("    step5_train_rms warns\n    step5: bad\nthe whole log")
    )


def test_steps_in_the_wrong_order_are_refused(steps, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, 8, 5, "--output_dir", tmp_path) == 2
    assert "first: expected at most the last step, 5, found 8" in capsys.readouterr().err
    assert call(monkeypatch, 4, 8, "--output_dir", tmp_path) == 2
    assert steps.calls == []


def test_an_output_folder_that_is_a_file_is_refused(steps, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert call(monkeypatch, 5, 8, "--output_dir", tmp_path / "file") == 2
    assert capsys.readouterr().err.startswith("run_all.sh: ") and steps.calls == []


# -------------------------------------------------------------------------------------------- flags


def test_flags_after_the_dashes_are_those_of_steps_7_and_8(steps, tmp_path, monkeypatch):
    flags = ["--hidden", "256", "64", "--consider_first_n", "-1", "--n_sample=20"]
    assert (
        call(
            monkeypatch,
            5,
            8,
            *flags,
            "--output_dir",
            tmp_path,
            "--",
            *STUDENT,
            "--isotonic",
            "plain",
        )
        == 0
    )
    common, student = [*flags, "--output_dir", str(tmp_path)], [*STUDENT, "--isotonic", "plain"]
    assert steps.calls == [
        (STEPS[5], common),
        (STEPS[6], common),
        (STEPS[7], common + student),
        (STEPS[8], common + student),
        ("rewardlib.cli.report", [str(tmp_path)]),
    ]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((5, 8), [5, 6, 7, 8, "report"]),
        ((7, 8), [7, 8, "report"]),
        ((5, 7), [5, 6, 7]),
        ((6, 6), [6]),
        ((8, 8, "--report", 0), [8]),
    ],
    ids=str,
)
def test_the_steps_asked_for_and_a_report_after_the_last(
    steps, tmp_path, monkeypatch, argv, expected
):
    assert call(monkeypatch, *argv, "--output_dir", tmp_path) == 0
    names = {module: number for number, module in STEPS.items()} | {
        "rewardlib.cli.report": "report"
    }
    assert [names[module] for module, _ in steps.calls] == expected


def test_debug_reaches_the_steps_and_shows_the_traceback(steps, tmp_path, monkeypatch):
    steps.fail[STEPS[6]] = ValueError("odd")
    with pytest.raises(ValueError, match="odd"):
        call(monkeypatch, 5, 8, "--output_dir", tmp_path, "--debug")
    assert all("--debug" in argv for _, argv in steps.calls)


def test_the_steps_are_those_of_the_scripts():
    assert chain.STEPS == STEPS


def test_help(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for part in ("Reads   ", "Writes  ", "Example python -m rewardlib.cli.chain 5 8"):
        assert part in text
    assert list(tmp_path.iterdir()) == []
