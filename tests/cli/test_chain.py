"""The chain of run_all.sh: each step does what it does alone, with its own log and failures."""

import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
from conftest import ROOT, SMALL, STEPS
from tqdm import tqdm

from rewardlib.cli import chain, console, settings
from rewardlib.errors import InputError

CHANGING = {"manifest.json", ".inspected.json", ".lock", "report.html"}
STUDENT = ["--distill_epochs", "4"]


def variables(*flags):
    """{variable: text} of flags with one value each."""
    names = (flag.removeprefix("--").upper() for flag in flags[::2])
    return dict(zip(names, map(str, flags[1::2]), strict=True))


def call(monkeypatch, first, last, **values):
    """Exit status of the chain from step `first` to step `last` with these settings."""
    for name in (*settings.all_names(), "REWARDLIB_LOCKED_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"START_STEP": first, "STOP_STEP": last, **values}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["chain"])
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
def steps(monkeypatch, data):
    """Stand-ins for steps and report: calls (module, argv); fail {module: error to raise}."""
    calls, fail = [], {}

    def load(module):
        def main(argv):
            calls.append((module, argv))
            print(f"{module} works")
            print(f"{module} warns", file=sys.stderr)
            if module in fail:
                raise fail[module]

        return types.SimpleNamespace(main=main)

    for name in settings.STAGES.values():
        settings.load_script(name)  # parsers are those of the real scripts
    monkeypatch.setattr(chain.importlib, "import_module", load)
    monkeypatch.setenv("DATA_DIR", str(data))
    return types.SimpleNamespace(calls=calls, fail=fail)


# ------------------------------------------------------------------------------------------ results


def test_the_results_are_those_of_the_scripts_called_one_by_one(
    data, finished, tmp_path, monkeypatch
):
    together, alone = tmp_path / "together", tmp_path / "alone"
    flags = [*SMALL, "--data_dir", str(data)]
    assert call(monkeypatch, 5, 8, **variables(*flags, *STUDENT), OUTPUT_DIR=together) == 0
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
    values = variables(*SMALL, *STUDENT) | {"DATA_DIR": data, "OUTPUT_DIR": out, "REPORT": 0}
    assert call(monkeypatch, 5, 8, **values) == 0
    assert capsys.readouterr().out.count("already done") == 4
    assert contents(out) == contents(finished)


# --------------------------------------------------------------------------------------------- logs


def test_logs_hold_what_was_printed(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert call(monkeypatch, 5, 6, **variables(*SMALL), DATA_DIR=data, OUTPUT_DIR=out) == 0
    printed = capsys.readouterr().out
    for number in (5, 6):
        log = (out / "logs" / f"step{number}.log").read_text()
        assert log in printed and f"step{number}: wrote" in log
        assert f"==> step{number}: python {STEPS[number]}.py --n_sample 20" in printed
    assert sorted(path.name for path in (out / "logs").iterdir()) == ["step5.log", "step6.log"]


def test_logs_hold_both_streams_and_are_those_of_the_last_run(
    steps, data, tmp_path, monkeypatch, capsys
):
    for _ in range(2):
        assert call(monkeypatch, 5, 5, OUTPUT_DIR=tmp_path, DATA_DIR=data) == 0
        log = (tmp_path / "logs" / "step5.log").read_text()
        assert log == "step5_train_rms works\nstep5_train_rms warns\n"
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
    values = variables(*SMALL) | {"N_SAMPLE": 1000, "DATA_DIR": data, "OUTPUT_DIR": out}
    assert call(monkeypatch, 5, 8, **values) == 2
    printed, error = capsys.readouterr()
    assert "==> step6" not in printed
    lines = [line for line in error.splitlines() if "expected 4 to 48" in line]
    assert [line.strip().startswith("step5: n_sample") for line in lines] == [True, True]
    assert error.startswith("step5: n_sample")
    assert "\nrun_all.sh: step5 failed after 0 s; its last lines:\n" in error
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
    steps, data, tmp_path, monkeypatch, capsys, error, status, message
):
    steps.fail["step7_isotonic_distillation"] = error
    assert call(monkeypatch, 5, 8, OUTPUT_DIR=tmp_path, DATA_DIR=data) == status
    assert [module for module, _ in steps.calls] == [STEPS[number] for number in (5, 6, 7)]
    printed = capsys.readouterr().err
    assert "step7 failed after" in printed and f"    {message}" in printed
    assert message in (tmp_path / "logs" / "step7.log").read_text()


def test_only_the_last_lines_of_a_long_log_are_told(steps, data, tmp_path, monkeypatch, capsys):
    steps.fail["step5_train_rms"] = InputError("bad")
    monkeypatch.setattr(chain, "LAST_LINES", 2)
    call(monkeypatch, 5, 5, OUTPUT_DIR=tmp_path, DATA_DIR=data)
    last = capsys.readouterr().err.split("its last lines:\n")[1]
    assert last.startswith("    step5_train_rms warns\n    step5: bad\nthe whole log")


def test_steps_in_the_wrong_order_are_refused(steps, data, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, 8, 5, OUTPUT_DIR=tmp_path, DATA_DIR=data) == 2
    assert "START_STEP: expected at most STOP_STEP=5, found 8" in capsys.readouterr().err
    assert steps.calls == [] and list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file_is_refused(steps, data, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert call(monkeypatch, 5, 8, OUTPUT_DIR=tmp_path / "file", DATA_DIR=data) == 2
    assert capsys.readouterr().err.startswith("run_all.sh: ") and steps.calls == []


def test_other_arguments_are_refused(steps, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chain", "--n_sample", "20"])
    with pytest.raises(SystemExit) as stop:
        console.run(chain.main, "run_all.sh")
    assert stop.value.code == 2 and "--n_sample" in capsys.readouterr().err
    assert steps.calls == []


# -------------------------------------------------------------------------------------------- flags


def test_a_step_gets_the_settings_that_are_flags_of_its_own(steps, data, tmp_path, monkeypatch):
    values = {"HIDDEN": "256 64", "CONSIDER_FIRST_N": "-1", "N_SAMPLE": "20", "DATA_DIR": data}
    values |= {"OUTPUT_DIR": tmp_path, "DISTILL_EPOCHS": 4, "ISOTONIC": "plain", "TOP_P": 0.5}
    assert call(monkeypatch, 5, 8, **values) == 0
    common = ["--consider_first_n", "-1", "--n_sample", "20", "--hidden", "256", "64"]
    common += ["--data_dir", str(data), "--output_dir", str(tmp_path)]
    student = ["--distill_epochs", "4", "--isotonic", "plain"]
    assert steps.calls == [
        (STEPS[5], common),
        (STEPS[6], common),
        (STEPS[7], common + student),
        (STEPS[8], common + student),
        ("rewardlib.cli.report", [str(tmp_path)]),
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((5, 8), [5, 6, 7, 8, "report"]),
        ((7, 8), [7, 8, "report"]),
        ((5, 7), [5, 6, 7]),
        ((6, 6), [6]),
        ((8, 8, 0), [8]),
    ],
    ids=str,
)
def test_the_steps_asked_for_and_a_report_after_the_last(
    steps, data, tmp_path, monkeypatch, settings, expected
):
    first, last, *report = settings
    report = {"REPORT": report[0]} if report else {}
    assert call(monkeypatch, first, last, OUTPUT_DIR=tmp_path, DATA_DIR=data, **report) == 0
    names = {module: number for number, module in STEPS.items()}
    names |= {"rewardlib.cli.report": "report"}
    assert [names[module] for module, _ in steps.calls] == expected


def test_the_steps_are_those_of_the_scripts():
    assert {number: settings.STAGES[f"step{number}"] for number in STEPS} == STEPS


def test_help_lists_the_settings_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["chain", "--help"])
    with pytest.raises(SystemExit) as stop:
        console.run(chain.main, "run_all.sh")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for part in ("Reads   ", "Writes  ", "Example ", *settings.all_names()):
        assert part in text
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------- own processes


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """run_apart of a script with this code; its log is tmp_path/log."""
    monkeypatch.setattr(chain.artifacts, "ROOT", tmp_path)

    def run(code):
        (tmp_path / "script.py").write_text(code)
        stage = chain.Stage("script", "script", [])
        with open(tmp_path / "log", "w") as log, open(tmp_path / ".lock", "a") as lock_file:
            chain.artifacts.take_lock(lock_file, tmp_path)
            return chain.run_apart(stage, log, lock_file)

    return run


def test_output_of_a_process_is_copied_byte_by_byte(apart, tmp_path, capfdbinary):
    written = b"caf\xe9\rbar 0\rbar 1\n"
    assert apart(f"import sys; sys.stdout.buffer.write({written!r}); sys.exit(3)") == 3
    assert (tmp_path / "log").read_bytes() == written == capfdbinary.readouterr().out


def test_a_killed_process_has_the_status_of_its_signal(apart):
    assert apart("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 137


def test_a_process_that_outlives_the_chain_keeps_the_lock(apart, tmp_path, capfdbinary):
    """It inherits the descriptor of the lock, so that no second run starts beside it."""
    code = f"""
import subprocess
quiet = {{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "close_fds": False}}
child = subprocess.Popen(["sleep", "60"], **quiet)
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
"""
    assert apart(code) == 0
    with open(tmp_path / ".lock", "a") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_a_killed_stage_is_told_and_ends_the_chain(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chain, "run_apart", lambda stage, log, lock_file: 137)
    with pytest.raises(SystemExit) as stop:
        chain.run("run_all.sh", chain.Stage("step2-train", "step2", []), tmp_path, None)
    assert stop.value.code == 1
    assert "run_all.sh: step2-train failed after" in capsys.readouterr().err


def test_gpu_steps_that_are_over_need_no_language_models(steps, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"RUN_GPU_STEPS": 1, "DATA_DIR": data, "OUTPUT_DIR": tmp_path / "out", "REPORT": 0}
    assert call(monkeypatch, 5, 6, **values) == 0
    assert [module for module, _ in steps.calls] == [STEPS[5], STEPS[6]]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
