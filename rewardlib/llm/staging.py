"""How step 4 fills DATA_DIR: files staged one response at a time, then moved into place together.

DATA_DIR/.embedding/{split}_{k mod 5}/   the finished files of response k, and {k}.json with their
                                         digests and the work that made them
DATA_DIR/.embedding/publishing.json      the next manifest, written before any old file is removed
DATA_DIR/.unfinished                     present while files are moved: readers refuse the folder
"""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.artifacts import MANIFEST
from rewardlib.data import embeddings
from rewardlib.errors import InputError
from rewardlib.llm.responses import PARTS, Records

PRODUCER = "step4_gen_embeddings.py"
STAGING, PUBLISHING = ".embedding", "publishing.json"
TEXT_BYTES = 1000  # estimate of the text and reward of one response


def plan_of(records: dict[str, Records], embedder: dict) -> dict[str, dict]:
    """What DATA_DIR is to hold: {split: {"K", "N", "work"}}.

    "work" is a hash of everything that the split's files depend on except K, so that another K
    leaves finished files valid.
    """
    return {
        split: {
            "K": part.K,
            "N": len(part.ids),
            "work": artifacts.hash_of([embedder["hash"], part.digest]),
        }
        for split, part in records.items()
    }


def part_folder(data_dir: Path, split: str, part: int) -> Path:
    """Folder in which the responses k with k mod 5 == `part` are staged."""
    return Path(data_dir) / STAGING / f"{split}_{part}"


def is_done(data_dir: Path, plan: dict) -> bool:
    """Whether DATA_DIR holds `plan` according to its manifest, and the files match the manifest."""
    manifest = artifacts.read_manifest(data_dir)
    if (
        artifacts.is_forced()
        or manifest.get("producer") != PRODUCER
        or (data_dir / embeddings.UNFINISHED).exists()
    ):
        return False
    if any(_plan_part(manifest.get(split)) != part for split, part in plan.items()):
        return False
    manifest_time = (data_dir / MANIFEST).stat().st_mtime_ns
    for name, recorded in manifest["files"].items():
        path = data_dir / name
        if not path.is_file() or path.stat().st_size != recorded["bytes"]:
            return False
        # a file that is no newer than the manifest is not read again, which could take hours
        if path.stat().st_mtime_ns > manifest_time and not _has_digest(path, recorded):
            return False
    return True


def _plan_part(entry):
    """The part of a manifest's entry of a split that a plan has too, or None."""
    return entry and {key: entry[key] for key in ("K", "N", "work")}


def _has_digest(path, recorded):
    return artifacts.sha256(path) == recorded["sha256"]


def check_room(data_dir: Path) -> None:
    """InputError when DATA_DIR holds data that no command of this project can make again."""
    manifest, names = artifacts.read_manifest(data_dir), data_files(data_dir)
    ours = manifest.get("producer") in (PRODUCER, *embeddings.PRODUCERS)
    if (names or manifest) and not ours and not (data_dir / embeddings.UNFINISHED).exists():
        raise InputError(
            f"{data_dir}: expected an empty folder or data that can be made again, found "
            f"{names[0] if names else MANIFEST} put there by hand; choose another output_dir"
        )


def check_disk(data_dir: Path, plan: dict, row_bytes: int) -> None:
    """InputError when the disk has no space for the files that are not finished yet.

    row_bytes: size of one embedding.
    """
    rows = sum(
        part["N"]
        for split, part in plan.items()
        for k in range(part["K"])
        if not staged(data_dir, plan, split, k)
    )
    needed, free = rows * (row_bytes + TEXT_BYTES), shutil.disk_usage(data_dir).free
    if needed > free:
        raise InputError(
            f"{data_dir}: expected {needed / 1e9:.1f} GB of free disk space, found "
            f"{free / 1e9:.1f} GB; free some space, or choose another output_dir or "
            "storage_dtype float16"
        )


def data_files(data_dir: Path) -> list[str]:
    """Names of the embedding and reward files in DATA_DIR."""
    splits = [
        (split, k) for split in ("train", "test") for k in embeddings.find_splits(data_dir, split)
    ]
    names = [name for split, k in splits for name in embeddings.file_names(split, k)]
    return [name for name in names if (Path(data_dir) / name).exists()]


# ------------------------------------------------------------------------------------------ staging


def stage(
    folder: Path, plan: dict, split: str, k: int, array: np.ndarray, rows: Iterable[dict]
) -> None:
    """Write the embeddings (N, D) and reward rows of response k, and last the note {k}.json."""
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


def staged(data_dir: Path, plan: dict, split: str, k: int) -> dict | None:
    """The note of response k if its files are finished, whether staged or moved, else None."""
    folder = part_folder(data_dir, split, k % PARTS)
    if not (folder / f"{k}.json").exists():
        return None
    note = artifacts.read_json(folder / f"{k}.json", "step 4")
    if note["work"] != plan[split]["work"]:
        return None
    moving = (data_dir / STAGING / PUBLISHING).exists()
    for name, recorded in note["files"].items():
        path = folder / name if (folder / name).exists() or not moving else data_dir / name
        if not path.is_file() or path.stat().st_size != recorded["bytes"]:
            return None
        # of equal size, the file in DATA_DIR may still be the old one
        if moving and path.parent == data_dir and not _has_digest(path, recorded):
            return None
    return note


def missing(data_dir: Path, plan: dict) -> list[str]:
    """Names of the embedding files that are not finished."""
    return [
        embeddings.file_names(split, k)[0]
        for split, part in plan.items()
        for k in range(part["K"])
        if staged(data_dir, plan, split, k) is None
    ]


# --------------------------------------------------------------------------------------- publishing


def publish(data_dir: Path, plan: dict, embedder: dict, arguments: dict) -> None:
    """Move the staged files into DATA_DIR and write its manifest.

    A split that is not in `plan` stays if the same embedder made it, and is removed otherwise.
    Killed at any point, `publish` completes when it is called again: while PUBLISHING exists, it
    stands for the missing manifest, and staged files may already be in DATA_DIR.
    """
    staging = data_dir / STAGING
    manifest, sources = _next_manifest(data_dir, plan, embedder, arguments)
    artifacts.write_json(staging / PUBLISHING, manifest)
    (data_dir / embeddings.UNFINISHED).write_text(PRODUCER)
    (data_dir / MANIFEST).unlink(missing_ok=True)
    for name in data_files(data_dir):
        if name not in manifest["files"] or name in sources:
            (data_dir / name).unlink()
    for name, path in sources.items():
        os.replace(path, data_dir / name)
    artifacts.write_json(
        data_dir / MANIFEST, {**manifest, "git_revision": artifacts.git_revision()}
    )
    (data_dir / embeddings.UNFINISHED).unlink()
    (staging / PUBLISHING).unlink()
    for split in plan:
        for part in range(PARTS):
            shutil.rmtree(part_folder(data_dir, split, part), ignore_errors=True)
    with contextlib.suppress(OSError):  # another process may be staging the other split there
        staging.rmdir()


def _next_manifest(data_dir, plan, embedder, arguments):
    """(the manifest of the new data, {name: path} of the files that are still to be moved)."""
    old = _previous_manifest(data_dir)
    same_embedder = (
        old.get("producer") == PRODUCER and old.get("embedder", {}).get("hash") == embedder["hash"]
    )
    manifest = {
        "producer": PRODUCER,
        "arguments": arguments,
        "embedder": embedder,
        "train": None,
        "test": None,
    }
    files, sources = {}, {}
    for split in ("train", "test"):
        if split in plan:
            notes = [staged(data_dir, plan, split, k) for k in range(plan[split]["K"])]
            manifest[split] = {**plan[split], "D": notes[0]["D"], "dtype": notes[0]["dtype"]}
            for k, note in enumerate(notes):
                files |= note["files"]
                folder = part_folder(data_dir, split, k % PARTS)
                paths = [folder / name for name in note["files"]]
                sources |= {path.name: path for path in paths if path.exists()}
        elif same_embedder and old.get(split):
            manifest[split] = old[split]
            files |= _files_of(split, old)
        elif old.get(split):
            print(
                f"step4: the {split} files were made from other data or by another model and are "
                f"removed; embed the {split} responses again"
            )
    manifest["files"] = files
    return manifest, sources


def _previous_manifest(data_dir):
    """The manifest in DATA_DIR, or the one that an interrupted `publish` was about to write."""
    manifest = artifacts.read_manifest(data_dir)
    if (data_dir / STAGING / PUBLISHING).exists() and not manifest:
        return artifacts.read_json(data_dir / STAGING / PUBLISHING, "step 4")
    return manifest


def _files_of(split, manifest):
    """The entries of one split's files in a manifest."""
    n_responses = manifest[split]["K"]
    names = {name for k in range(n_responses) for name in embeddings.file_names(split, k)}
    return {name: entry for name, entry in manifest["files"].items() if name in names}
