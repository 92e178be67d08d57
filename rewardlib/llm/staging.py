"""How step 4 fills DATA_DIR: files staged one response at a time, then moved into place together.

DATA_DIR/.embedding/{split}_{k mod 5}/   finished files, with {k}.json: from what they were made, their digests
DATA_DIR/.embedding/publishing.json      the manifest to be, from the moment that old files start to go
DATA_DIR/.unfinished                     there while files are moved: the reader refuses the folder
"""

import contextlib
import os
import shutil
from pathlib import Path

from rewardlib import artifacts
from rewardlib.artifacts import MANIFEST
from rewardlib.data import embeddings
from rewardlib.errors import InputError
from rewardlib.llm.responses import PARTS

PRODUCER = "step4_gen_embeddings.py"
STAGING, PUBLISHING = ".embedding", "publishing.json"
TEXT_BYTES = 1000


def plan_of(records, embedder):
    """{split: {"K", "N", "work"}}; work is the hash of all that the files of the split depend on, but for K."""
    return {
        split: {
            "K": part.K,
            "N": len(part.ids),
            "work": artifacts.hash_of([embedder["hash"], part.digest]),
        }
        for split, part in records.items()
    }


def part_folder(data_dir, split, part):
    return Path(data_dir) / STAGING / f"{split}_{part}"


def is_done(data_dir, plan):
    """True when the manifest says that DATA_DIR holds `plan` and the files are as it says."""
    manifest = artifacts.read_manifest(data_dir)
    if (
        artifacts.is_forced()
        or manifest.get("producer") != PRODUCER
        or (data_dir / embeddings.UNFINISHED).exists()
    ):
        return False
    if any(_told(manifest.get(split)) != part for split, part in plan.items()):
        return False
    written = (data_dir / MANIFEST).stat().st_mtime_ns
    for name, told in manifest["files"].items():
        path = data_dir / name
        if not path.is_file() or path.stat().st_size != told["bytes"]:
            return False
        if path.stat().st_mtime_ns > written and artifacts.sha256(path) != told["sha256"]:
            return False
    return True


def _told(part):
    return part and {key: part[key] for key in ("K", "N", "work")}


def check_room(data_dir):
    """InputError where the data in DATA_DIR could not be made again."""
    manifest, found = artifacts.read_manifest(data_dir), data_files(data_dir)
    ours = manifest.get("producer") in (PRODUCER, *embeddings.PRODUCERS)
    if (found or manifest) and not ours and not (data_dir / embeddings.UNFINISHED).exists():
        raise InputError(
            f"{data_dir}: expected an empty folder or data that can be made again, found "
            f"{found[0] if found else MANIFEST} put there by hand; choose another --output_dir"
        )


def check_disk(data_dir, plan, row_bytes):
    """InputError where the files that are not finished yet would not fit."""
    rows = sum(
        part["N"]
        for split, part in plan.items()
        for k in range(part["K"])
        if not staged(data_dir, plan, split, k)
    )
    needed, free = rows * (row_bytes + TEXT_BYTES), shutil.disk_usage(data_dir).free
    if needed > free:
        raise InputError(
            f"{data_dir}: expected {needed / 1e9:.1f} GB of free disk space, found {free / 1e9:.1f} GB; "
            "free some, or choose another --output_dir or --storage_dtype float16"
        )


def data_files(data_dir):
    """Names of the embedding and reward files in DATA_DIR."""
    found = [
        (split, k) for split in ("train", "test") for k in embeddings.find_splits(data_dir, split)
    ]
    names = [name for where in found for name in embeddings.file_names(*where)]
    return [name for name in names if (Path(data_dir) / name).exists()]


# ------------------------------------------------------------------------------------------ staging


def stage(folder, plan, split, k, array, rows):
    """Write the two files of response k, and last the note that they are finished."""
    names = embeddings.file_names(split, k)
    artifacts.write_npy(folder / names[0], array)
    artifacts.write_jsonl(folder / names[1], rows)
    files = {name: artifacts.describe_file(folder / name) for name in names}
    note = {
        "work": plan[split]["work"],
        "D": array.shape[1],
        "dtype": array.dtype.name,
        "files": files,
    }
    artifacts.write_json(folder / f"{k}.json", note)


def staged(data_dir, plan, split, k):
    """The note of response k if its files are finished, staged or already moved, else None."""
    folder = part_folder(data_dir, split, k % PARTS)
    if not (folder / f"{k}.json").exists():
        return None
    note = artifacts.read_json(folder / f"{k}.json", "step 4")
    if note["work"] != plan[split]["work"]:
        return None
    moving = (data_dir / STAGING / PUBLISHING).exists()
    for name, told in note["files"].items():
        path = folder / name if (folder / name).exists() or not moving else data_dir / name
        if not path.is_file() or path.stat().st_size != told["bytes"]:
            return None
        if moving and path.parent == data_dir and artifacts.sha256(path) != told["sha256"]:
            return None
    return note


def missing(data_dir, plan):
    """Names of the embedding files that are not finished."""
    return [
        embeddings.file_names(split, k)[0]
        for split, part in plan.items()
        for k in range(part["K"])
        if staged(data_dir, plan, split, k) is None
    ]


# --------------------------------------------------------------------------------------- publishing


def publish(data_dir, plan, embedder, arguments):
    """Move the staged files into DATA_DIR and write its manifest; the other split stays if the same model made it."""
    staging = data_dir / STAGING
    old = artifacts.read_manifest(data_dir)
    if (staging / PUBLISHING).exists() and not old:
        old = artifacts.read_json(staging / PUBLISHING, "step 4")
    same = (
        old.get("producer") == PRODUCER and old.get("embedder", {}).get("hash") == embedder["hash"]
    )
    manifest = {
        "producer": PRODUCER,
        "arguments": arguments,
        "embedder": embedder,
        "train": None,
        "test": None,
    }
    files, where = {}, {}
    for split in ("train", "test"):
        if split in plan:
            notes = [staged(data_dir, plan, split, k) for k in range(plan[split]["K"])]
            manifest[split] = {**plan[split], "D": notes[0]["D"], "dtype": notes[0]["dtype"]}
            for k, note in enumerate(notes):
                files |= note["files"]
                homes = [part_folder(data_dir, split, k % PARTS) / name for name in note["files"]]
                where |= {path.name: path for path in homes if path.exists()}
        elif same and old.get(split):
            manifest[split] = old[split]
            names = {
                name for k in range(old[split]["K"]) for name in embeddings.file_names(split, k)
            }
            files |= {name: told for name, told in old["files"].items() if name in names}
        elif old.get(split):
            print(
                f"step4: the {split} files of other data or another model are removed; embed them again"
            )
    manifest["files"] = files
    artifacts.write_json(staging / PUBLISHING, manifest)
    (data_dir / embeddings.UNFINISHED).write_text(PRODUCER)
    (data_dir / MANIFEST).unlink(missing_ok=True)
    for name in data_files(data_dir):
        if name not in files or name in where:
            (data_dir / name).unlink()
    for name, path in where.items():
        os.replace(path, data_dir / name)
    artifacts.write_json(
        data_dir / MANIFEST, {**manifest, "git_revision": artifacts.git_revision()}
    )
    (data_dir / embeddings.UNFINISHED).unlink()
    (staging / PUBLISHING).unlink()
    for split in plan:
        for part in range(PARTS):
            shutil.rmtree(part_folder(data_dir, split, part), ignore_errors=True)
    with contextlib.suppress(OSError):  # the other split may be at work in it
        staging.rmdir()
