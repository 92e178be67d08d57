"""The proof that no held-out prompt entered a fit, from the records of steps 5 and 7."""

from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.data import splits
from rewardlib.errors import InputError


def prove_no_leakage(output_dir, split, record, config):
    """Check, from what steps 5 and 7 recorded, that no held-out prompt entered a fit and that the files are those
    recorded.

    Returns the proof as a dict; raises InputError otherwise.
    """
    output_dir = Path(output_dir)
    manifest = artifacts.read_manifest(output_dir)
    for step in ("step5", "step7"):
        if step not in manifest:
            raise InputError(f"{output_dir}: {step} has not finished here; run it first")
        for name, told in manifest[step]["outputs"].items():
            path = output_dir / name
            if not path.is_file() or artifacts.describe_file(path) != told:
                raise InputError(
                    f"leakage check: {path} is not the file that {step} wrote (missing or changed); "
                    f"run {step} again with FORCE=1"
                )
    told, used = manifest["step5"]["inputs"], manifest["step7"]["inputs"]
    other = sorted(name for name in told if told[name] != used.get(name))
    if other:
        raise InputError(
            f"{output_dir}: step7 used other data than step5 ({other[0]}); run step 7 again"
        )
    fits = {
        "reward models": np.asarray(record["prompts"]),
        "isotonic maps": np.asarray(config["calibration"]["prompts"]),
        "student": np.asarray(config["student"]["prompts"]),
    }
    for name, prompts in fits.items():
        leaked = np.intersect1d(prompts, split["held_out"])
        if len(leaked):
            raise InputError(
                f"leakage: {len(leaked)} held-out prompts (first: {leaked[0]}) entered the fit of the {name}; "
                f"run steps 5 to 8 again with the {splits.FILE} that is there"
            )
    external = [
        member["file"] for member in config["teacher"]["members"] if member["origin"] == "external"
    ]
    return {
        "held_out_prompts_in_fits": 0,
        "prompts_in_fits": {name: len(prompts) for name, prompts in fits.items()},
        "files_checked": sum(len(manifest[step]["outputs"]) for step in ("step5", "step7")),
        "external_teacher_files": external,
        "note": "whether external teachers saw held-out prompts cannot be told from here"
        if external
        else None,
    }
