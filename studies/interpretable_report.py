"""Report of the interpretable reward: one HTML page of what the stages of interpretable.sh wrote.

Reads   what interpretable_regression.py, interpretable_gating.py and, where they ran, the later
        stages wrote to OUTPUT_DIR
Writes  OUTPUT_DIR/report.html
Example python studies/interpretable_report.py interpretable_out
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewardlib import artifacts
from rewardlib.cli import console
from studies.interpretable import report


def parse_args(argv=None):
    parser = console.parser(__doc__)
    parser.add_argument(
        "output_dir", type=Path, help="OUTPUT_DIR in which regression and gating have finished"
    )
    return parser.parse_args(argv)


def main(argv=None):
    folder = console.existing_folder(
        parse_args(argv).output_dir, "the OUTPUT_DIR of a finished run"
    )
    with artifacts.lock(artifacts.writable_dir(folder)):
        page, left_out = report.write(folder)
    if left_out:
        print(f"report: of an earlier gate, left out: {', '.join(left_out)}")
    print(f"report: wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    console.run(main, "report")
