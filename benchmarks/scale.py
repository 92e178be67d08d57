"""Growth of the time and memory of steps 5 to 8 with the size of the data and of the ensemble.

Prompts, dimensions, responses per prompt and ensemble members are varied one at a time. Every step
runs as a process of its own. The number of labels stays the same, so that the work of steps 5 and 7
is bounded, and the memory of steps 6 and 8 should not depend on the number of prompts.

Reads   nothing
Writes  --output, where it is given: the numbers as JSON
Example python -m benchmarks.scale --output scale.json
"""

import tempfile
from pathlib import Path

from benchmarks import case, cpu_pipeline
from rewardlib import artifacts
from rewardlib.cli import console, kinds

BASE = {"n": 4000, "d": 512, "k": 10, "members": 5}
SIZES = {"n": (1000, 4000, 16000), "d": (128, 512, 2048), "k": (3, 10, 30), "members": (1, 5, 20)}
N_SAMPLE = 500  # prompts that step 5 draws pairs from, where there are enough


def parse_args(argv=None):
    parser = console.parser(__doc__)
    parser.add_argument(
        "--n_pairs", type=kinds.count, default=1000, help="number of preference pairs"
    )
    parser.add_argument(
        "--shrink",
        type=kinds.count,
        default=1,
        help="divisor of the numbers of prompts and dimensions, for a quick trial",
    )
    parser.add_argument("--output", help="JSON file for the results; None: print them only")
    return parser.parse_args(argv)


def run(size: dict[str, int], args) -> dict[str, dict]:
    """Run steps 5 to 8 on a case of one size: {step: measures}."""
    n, d = size["n"] // args.shrink, max(case.LATENT_DIM, size["d"] // args.shrink)
    with tempfile.TemporaryDirectory() as scratch:
        case_dir, output_dir = f"{scratch}/case", f"{scratch}/out"
        cpu_pipeline.in_own_process(cpu_pipeline.make_case, case_dir, n, size["k"], d, n // 5)
        Path(output_dir).mkdir()
        flags = ["--data_dir", case_dir, "--output_dir", output_dir]
        flags += ["--n_sample", min(N_SAMPLE, n // 2)]
        flags += ["--n_pairs", max(1, args.n_pairs // N_SAMPLE)]
        flags += ["--ensemble_number", size["members"]]
        return cpu_pipeline.run_alone([str(flag) for flag in flags], output_dir)


def main(argv=None):
    args = parse_args(argv)
    print(f"{'':24}" + "".join(f"{step + ' CPU s':>14}{'MB':>8}" for step in cpu_pipeline.STEPS))
    rows, measures = [], {}
    for name, values in SIZES.items():
        for value in values:
            size = BASE | {name: value}
            key = tuple(size.values())
            # the middle size of every name is BASE, which is run once
            measures[key] = measures.get(key) or run(size, args)
            rows.append(size | {"steps": measures[key]})
            by_step = (measures[key][step] for step in cpu_pipeline.STEPS)
            cells = (f"{row['cpu']:14.1f}{row['peak_mb']:8.0f}" for row in by_step)
            label = ", ".join(f"{letter} {number}" for letter, number in size.items())
            print(f"{label:24}" + "".join(cells), flush=True)
    if args.output:
        results = {"machine": cpu_pipeline.describe_machine(), "rows": rows}
        artifacts.write_json(args.output, results)


if __name__ == "__main__":
    console.run(main, "scale")
