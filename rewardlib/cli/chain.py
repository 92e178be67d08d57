"""Steps 5 to 8 and their report one after another in one process, each with its own log: what run_all.sh calls.

Python, torch and scipy start once instead of five times. Each step does what its script does when
it is called alone. Flags before "--" go to every step, flags after it to steps 7 and 8.

Reads   what the steps read
Writes  what the steps write; OUTPUT_DIR/logs/{step}.log   what each of them printed
Example python -m rewardlib.cli.chain 5 8 --data_dir data --output_dir distill_out -- --distill_epochs 20
"""

import importlib
import shlex
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from rewardlib import artifacts
from rewardlib.cli import console, kinds

STEPS = {
    5: "step5_train_rms",
    6: "step6_eval_rms",
    7: "step7_isotonic_distillation",
    8: "step8_validate_distillation",
}
LAST_LINES = 8


class Tee:
    """A text stream and a copy of all it is given in a log, but for progress bars, which redraw their line."""

    def __init__(self, stream, log):
        self.stream, self.log = stream, log

    def write(self, text):
        if "\r" not in text:
            self.log.write(text)
        return self.stream.write(text)

    def flush(self):
        self.log.flush()
        self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def parse_args(argv):
    parser = console.parser(__doc__)
    parser.add_argument("first", type=int, choices=list(STEPS), help="step to begin with")
    parser.add_argument("last", type=int, choices=list(STEPS), help="step to end with")
    parser.add_argument(
        "--report", type=kinds.switch, default=True, help="0: no report after step 8"
    )
    parser.add_argument(
        "--output_dir", default="distill_out", help="of the steps; their logs go to logs/ in it"
    )
    cut = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser.parse_known_args(argv[:cut])
    if args.first > args.last:
        parser.error(f"first: expected at most the last step, {args.last}, found {args.first}")
    args.run_flags = [*flags, "--output_dir", args.output_dir, *(["--debug"] if args.debug else [])]
    args.distillation_flags = argv[cut + 1 :]
    return args


def main():
    args = parse_args(sys.argv[1:])
    logs = artifacts.writable_dir(Path(args.output_dir) / "logs")
    for number in range(args.first, args.last + 1):
        flags = args.run_flags + (args.distillation_flags if number >= 7 else [])
        run(f"step{number}", STEPS[number], [f"{STEPS[number]}.py", *flags], flags, logs)
    if args.last == 8 and args.report:
        run(
            "report",
            "rewardlib.cli.report",
            ["-m", "rewardlib.cli.report", args.output_dir],
            [args.output_dir],
            logs,
        )


def run(name, module, shown, argv, logs):
    """Call main(argv) of a step with its output copied to logs/{name}.log; end the process where it fails."""
    print(f"\n==> {name}: {shlex.join(['python', *shown])}", flush=True)
    path, started = logs / f"{name}.log", time.time()
    with (
        open(path, "w") as log,
        redirect_stdout(Tee(sys.stdout, log)),
        redirect_stderr(Tee(sys.stderr, log)),
    ):
        try:
            console.run(lambda: importlib.import_module(module).main(argv), name)
            status = 0
        except SystemExit as error:
            status = error.code
    if status:
        last = "".join(f"    {line}\n" for line in path.read_text().splitlines()[-LAST_LINES:])
        print(
            f"\nrun_all.sh: {name} failed after {time.time() - started:.0f} s; its last lines:\n{last}"
            f"the whole log: {path}\nthe same command goes on from here; finished steps are skipped",
            file=sys.stderr,
        )
        sys.exit(status)


if __name__ == "__main__":
    console.run(main, "run_all.sh")
