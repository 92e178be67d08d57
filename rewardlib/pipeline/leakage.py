"""The proof that no held-out prompt entered a fit, from the records of steps 5 and 7."""

from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.data import splits
from rewardlib.errors import InputError


def prove_no_leakage(output_dir: Path, split: dict, record: dict, config: dict) -> dict:
    """Check that no held-out prompt entered a fit, and that all files are those recorded.

    record: of step 5; config: of step 7. Returns the proof; InputError where it does not hold.
    """
    output_dir = Path(output_dir)
    manifest = artifacts.read_manifest(output_dir)
    n_files = sum(check_outputs(output_dir, manifest, step) for step in ("step5", "step7"))
    check_same_data(output_dir, manifest)
    fits = {
        "reward models": np.asarray(record["prompts"]),
        "isotonic maps": np.asarray(config["calibration"]["prompts"]),
        "student": np.asarray(config["student"]["prompts"]),
    }
    for name, prompts in fits.items():
        leaked = np.intersect1d(prompts, split["held_out"])
        if len(leaked):
            raise InputError(
                f"leakage: {len(leaked)} held-out prompts (first: {leaked[0]}) entered the fit of "
                f"the {name}; run steps 5 to 8 again with the {splits.FILE} that is there"
            )
    members = config["teacher"]["members"]
    external = [member["file"] for member in members if member["origin"] == "external"]
    note = "whether external teachers saw held-out prompts cannot be told from here"
    return {
        "held_out_prompts_in_fits": 0,
        "prompts_in_fits": {name: len(prompts) for name, prompts in fits.items()},
        "files_checked": n_files,
        "external_teacher_files": external,
        "note": note if external else None,
    }


def check_outputs(output_dir: Path, manifest: dict, step: str) -> int:
    """Number of files that the step wrote; InputError where one is missing or was changed."""
    if step not in manifest:
        raise InputError(f"{output_dir}: {step} has not finished here; run it first")
    outputs = manifest[step]["outputs"]
    for name, recorded in outputs.items():
        path = output_dir / name
        if not path.is_file() or artifacts.describe_file(path) != recorded:
            raise InputError(
                f"leakage check: {path} is not the file that {step} wrote (missing or changed); "
                f"run {step} again with FORCE=1"
            )
    return len(outputs)


def check_same_data(output_dir: Path, manifest: dict) -> None:
    """InputError where steps 5 and 7 read different data."""
    first, second = manifest["step5"]["inputs"], manifest["step7"]["inputs"]
    other = sorted(name for name in first if first[name] != second.get(name))
    if other:
        raise InputError(
            f"{output_dir}: step7 used other data than step5 ({other[0]}); run step 7 again"
        )
