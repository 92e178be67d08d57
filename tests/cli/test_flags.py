"""Flags: defaults in the help, one value for a number, one-line errors, the same flags for all."""

import argparse
import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, STEPS

from rewardlib.cli import console, flags, tables
from rewardlib.errors import InputError
from rewardlib.nets import mlp
from rewardlib.pipeline import run_record

MODULES = {number: importlib.import_module(name) for number, name in STEPS.items()}


def run_parser():
    made = console.parser("Doc.")
    flags.add_run_flags(made)
    return made


def parse(*flags):
    return run_parser().parse_args(list(flags))


def ran(monkeypatch, capsys, error=None, argv=()):
    """(exit status, stdout, stderr) of a script whose main raises `error`."""

    def main():
        print("working")
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["step5_train_rms.py", *argv])
    status = 0
    try:
        console.run(main, "step5")
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


# ------------------------------------------------------------------------------------------- errors


def test_a_script_that_ends_well_says_nothing_more(monkeypatch, capsys):
    assert ran(monkeypatch, capsys) == (0, "working\n", "")


def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys):
    error = InputError("data/a.npy: expected 4 rows,\n   found 3;  make it again")
    expected = "step5: data/a.npy: expected 4 rows, found 3; make it again\n"
    assert ran(monkeypatch, capsys, error) == (2, "working\n", expected)


def test_anything_else_is_one_line_and_status_1(monkeypatch, capsys):
    status, _, errors = ran(monkeypatch, capsys, ValueError("odd\nvalue"))
    assert (status, errors) == (1, "step5: ValueError: odd value (--debug shows where)\n")


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    status, _, errors = ran(monkeypatch, capsys, KeyboardInterrupt())
    assert (status, errors) == (130, "step5: interrupted; the same command completes the job\n")


@pytest.mark.parametrize("error", [InputError("bad"), ValueError("odd")])
def test_debug_shows_the_traceback(monkeypatch, capsys, error):
    with pytest.raises(type(error), match=str(error)):
        ran(monkeypatch, capsys, error, ["--debug"])


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_away_makes_no_traceback(lines):
    """As in `python step6_eval_rms.py | head -1`: the rest may fit into the buffer or not."""
    code = f"""
import sys
from rewardlib.cli import console
def main():
    print("first", flush=True)
    sys.stdin.readline()
    for i in range({lines}):
        print(i)
console.run(main, "step5")
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes
    ) as process:
        assert process.stdout.readline() == b"first\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


# ------------------------------------------------------------------------------------------ parsing


def test_numbers_have_one_value_however_they_are_spelt():
    first, second = (
        parse("--learning_rate", "1e-3", "--annotation_quality", "10"),
        parse("--annotation_quality=1e1"),
    )
    assert flags.run_settings(first) == flags.run_settings(second)
    assert type(first.annotation_quality) is float


def test_values_that_look_like_flags():
    args = parse("--consider_first_n", "-1", "--annotation_quality", "-1", "--n_sample", "all")
    assert (args.consider_first_n, args.annotation_quality, args.n_sample) == (-1, -1.0, None)


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("TRUE", True), ("yes", True), ("0", False), ("no", False)]
)
def test_switches(text, value):
    assert parse("--replacement", text).replacement is value


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_pairs", "0"], "n_pairs: expected a whole number of at least 1, found '0'"),
        (["--n_pairs", "1e3"], "n_pairs: expected a whole number of at least 1, found '1e3'"),
        (["--n_sample", "some"], "n_sample: expected a whole number of at least 1, found 'some'"),
        (["--seed", "-1"], "seed: expected a whole number of at least 0, found '-1'"),
        (["--learning_rate", "0"], "learning_rate: expected a number above 0, found '0'"),
        (["--learning_rate", "inf"], "learning_rate: expected a number, found 'inf'"),
        (["--annotation_quality", "nan"], "annotation_quality: expected a number, found 'nan'"),
        (["--reward_scale", "1,5"], "reward_scale: expected a number, found '1,5'"),
        (["--replacement", "2"], "replacement: expected 1 or 0, found '2'"),
        (["--consider_first_n", "3"], "consider_first_n: invalid choice: '?3'?"),
        (["--pairing", "both"], "pairing: invalid choice: 'both'"),
        (["--n_samples", "10"], "unrecognized arguments: --n_samples 10"),
        (["--n_samp", "10"], "unrecognized arguments: --n_samp 10"),
        (["--seed"], "seed: expected one argument"),
        (["--hidden", "256"], "hidden: expected 2 arguments"),
        (["--hidden", "256", "0"], "hidden: expected a whole number of at least 1, found '0'"),
        (["--precision", "fp16"], "precision: invalid choice: 'fp16'"),
        (["--num_threads", "0"], "num_threads: expected a whole number of at least 1, found '0'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_are_bad_input(flags, message):
    with pytest.raises(InputError, match=f"{message}.*; --help lists the flags"):
        parse(*flags)


def test_two_ways_to_change_the_rewards_are_one_too_many():
    args = MODULES[7].parse_args(["--normalize_rewards", "1", "--binarize_rewards", "1"])
    with pytest.raises(InputError, match="expected at most one of them to be 1, found both"):
        flags.distillation_settings(args)


def test_no_ranking_term_is_a_weight_of_0():
    assert MODULES[7].parse_args(["--ranking_lambda", "0"]).ranking_lambda == 0
    with pytest.raises(
        InputError, match="ranking_lambda: expected a number of at least 0, found '-0.5'"
    ):
        MODULES[7].parse_args(["--ranking_lambda", "-0.5"])


def test_fewer_than_two_folds_leave_nothing_to_fit():
    with pytest.raises(InputError, match="cv_folds: expected at least 2, found '1'"):
        MODULES[7].parse_args(["--cv_folds", "1"])


def test_fewer_than_twenty_responses_teach_nothing():
    assert MODULES[7].parse_args(["--distill_responses", "20"]).distill_responses == 20
    with pytest.raises(InputError, match="distill_responses: expected at least 20, found '19'"):
        MODULES[7].parse_args(["--distill_responses", "19"])


# ------------------------------------------------------------------------------------ one interface


@pytest.mark.parametrize("number", STEPS)
def test_every_step_names_a_run_in_the_same_way(number):
    """Another seed here, or a number clamped here only, would end in 'checkpoint not found'."""
    defaults = MODULES[number].parse_args([])
    assert flags.run_settings(defaults) == flags.run_settings(parse())
    assert (defaults.data_dir, defaults.output_dir, defaults.debug) == (
        "data",
        "distill_out",
        False,
    )


def test_step_8_names_a_student_as_step_7_does():
    settings = [flags.distillation_settings(MODULES[number].parse_args([])) for number in (7, 8)]
    assert settings[0] == settings[1]


def test_every_flag_that_changes_results_is_part_of_what_a_run_is_called():
    args = vars(MODULES[7].parse_args([]))
    arguments = argparse.Namespace(**args)
    named = {*flags.run_settings(arguments), *flags.distillation_settings(arguments)}
    assert set(args) - named == {
        "debug",
        "data_dir",
        "output_dir",
        "teacher_ckpt",
        "num_threads",
    }


OF_MLPS = {"training_epochs", "learning_rate", "batch_size", "hidden", "precision"}


@pytest.mark.parametrize(
    ("model", "objective"), [("linear", "bt"), ("lgbm", "clf"), ("ridge", "regression")]
)
def test_a_model_without_hidden_layers_is_not_called_after_settings_of_mlps(model, objective):
    kind = ["--rm_model", model, "--rm_objective", objective]
    settings = flags.run_settings(parse(*kind))
    others = ["--training_epochs", "9", "--learning_rate", "0.1", "--hidden", "16", "8"]
    assert settings == flags.run_settings(parse(*kind, *others, "--batch_size", "7"))
    assert set(flags.run_settings(parse())) - set(settings) == OF_MLPS
    assert (
        run_record.stem(settings) == f"XPrompt_{model}_{objective}_seed6_firstn_2_n_100_pair_1_"
        "replacement_true"
    )


def test_a_student_adds_what_it_uses_of_the_settings_of_mlps():
    linear = parse("--rm_model", "linear", "--hidden", "16", "8", "--precision", "fp32")
    assert flags.student_settings(parse(), starts_from_mlp=True) == {}
    assert flags.student_settings(linear, starts_from_mlp=True) == {"precision": "fp32"}
    assert flags.student_settings(linear, starts_from_mlp=False) == {
        "hidden": [16, 8],
        "precision": "fp32",
    }


@pytest.mark.parametrize("able", ["fp32", "bf16"])
def test_a_run_is_called_after_the_precision_that_it_runs_in(monkeypatch, able):
    """So that results of one machine are not taken for those of another."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able == "bf16"})
    assert flags.run_settings(parse())["precision"] == able
    for name in ("fp32", "bf16"):
        assert flags.run_settings(parse("--precision", name))["precision"] == name


def test_threads_are_set_where_they_are_given_and_change_no_name():
    before = torch.get_num_threads()
    try:
        settings = flags.run_settings(parse())
        assert torch.get_num_threads() == before
        assert flags.run_settings(parse("--num_threads", str(before + 1))) == settings
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_hidden_units_are_two_numbers():
    assert flags.run_settings(parse("--hidden", "256", "64"))["hidden"] == [256, 64]
    assert tuple(parse().hidden) == mlp.HIDDEN


@pytest.mark.parametrize("number", STEPS)
def test_help_holds_the_docstring_and_every_flag_with_its_default(number, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        MODULES[number].parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for part in ("Reads   ", "Writes  ", f"Example python {STEPS[number]}.py"):
        assert part in text
    flags = dict(re.findall(r"^  --(\w+)\b(.*?)(?=^  -|\Z)", text, re.MULTILINE | re.DOTALL))
    for name, value in vars(MODULES[number].parse_args([])).items():
        said = " ".join(flags[name].split())
        assert len(said) > 20 and (
            name in ("debug", "teacher_ckpt") or f"(default: {value})" in said
        ), name


# ----------------------------------------------------------------------------------------- printing


def test_a_metric_with_its_interval():
    row = {"spearman": 0.51249, "spearman_ci95": [0.5, -0.00049], "mse": None, "mse_ci95": None}
    assert tables.with_interval(row, "spearman") == "0.512 [0.500, -0.000]"
    assert tables.with_interval(row, "spearman", digits=1) == "0.5 [0.5, -0.0]"
    assert tables.with_interval({"r2": 0.0, "r2_ci95": [-1, 0]}, "r2") == "0.000 [-1.000, 0.000]"
    assert tables.with_interval(row, "mse") == tables.with_interval(row, "r2") == "-"
