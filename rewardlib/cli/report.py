"""Report of a run: one HTML page of its results, made from the files that steps 5 to 8 wrote.

Reads   what steps 5 to 8 wrote to OUTPUT_DIR
Writes  OUTPUT_DIR/report.html
Example python -m rewardlib.cli.report distill_out
"""

from pathlib import Path

from rewardlib import artifacts
from rewardlib.cli import console
from rewardlib.report import run_report


def parse_args(argv=None):
    parser = console.parser(__doc__)
    parser.add_argument(
        "output_dir", type=Path, help="OUTPUT_DIR of a run whose steps 5 to 8 have finished"
    )
    return parser.parse_args(argv)


def main(argv=None):
    folder = console.existing_folder(
        parse_args(argv).output_dir, "the OUTPUT_DIR of a finished run"
    )
    with artifacts.lock(artifacts.writable_dir(folder)):
        page = run_report.write(folder)
    print(f"report: wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    console.run(main, "report")
