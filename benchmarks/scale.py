"""How time and memory of steps 5 to 8 grow with prompts, dimensions, responses and members, one at a time.

Every step runs as a process of its own on a case of the given size; the middle size is repeated in
every column. The number of labels stays the same, so steps 5 and 7 have a bounded amount of work,
and the memory of steps 6 and 8 should not depend on the number of prompts.

Reads   nothing
Writes  --output, where it is given: the numbers as JSON
Example python -m benchmarks.scale --output scale.json
"""

import shutil
import tempfile
from pathlib import Path

from benchmarks import case, cpu_pipeline
from rewardlib import artifacts
from rewardlib.cli import console, kinds

BASE = {"n": 4000, "d": 512, "k": 10, "members": 5}
SIZES = {"n": (1000, 4000, 16000), "d": (128, 512, 2048), "k": (3, 10, 30), "members": (1, 5, 20)}


def parse_args(argv=None):
    parser = console.parser(__doc__)
    parser.add_argument("--n_pairs", type=kinds.count, default=1000, help="preference pairs")
    parser.add_argument(
        "--shrink", type=kinds.count, default=1, help="divide prompts and dimensions by this"
    )
    parser.add_argument("--output", help="JSON file; None: print only")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    print(f"{'':24}" + "".join(f"{step + ' CPU s':>14}{'MB':>8}" for step in cpu_pipeline.STEPS))
    rows, done = [], {}
    for name, values in SIZES.items():
        for value in values:
            size = BASE | {name: value}
            key = tuple(size.values())
            done[key] = done.get(key) or run(size, args)
            rows.append(size | {"steps": done[key]})
            cells = (
                f"{done[key][step]['cpu']:14.1f}{done[key][step]['peak_mb']:8.0f}"
                for step in cpu_pipeline.STEPS
            )
            print(
                f"{', '.join(f'{k} {v}' for k, v in size.items()):24}" + "".join(cells), flush=True
            )
    if args.output:
        artifacts.write_json(
            args.output, {"machine": cpu_pipeline.describe_machine(), "rows": rows}
        )


def run(size, args):
    """{step: measures} of one size."""
    n, d = size["n"] // args.shrink, max(case.LATENT_DIM, size["d"] // args.shrink)
    with tempfile.TemporaryDirectory() as scratch:
        case_dir, output_dir = f"{scratch}/case", f"{scratch}/out"
        cpu_pipeline.elsewhere(cpu_pipeline.make_case, case_dir, n, size["k"], d, n // 5)
        Path(output_dir).mkdir()
        flags = [
            "--data_dir",
            case_dir,
            "--output_dir",
            output_dir,
            "--n_sample",
            str(min(500, n // 2)),
        ]
        flags += [
            "--n_pairs",
            str(max(1, args.n_pairs // 500)),
            "--ensemble_number",
            str(size["members"]),
        ]
        found = cpu_pipeline.run_alone(flags, output_dir)
        shutil.rmtree(case_dir)
    return found


if __name__ == "__main__":
    console.run(main, "scale")
