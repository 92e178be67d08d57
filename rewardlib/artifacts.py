"""Files that a run leaves behind: atomic writes, digests, the manifest, the lock.

A step has an *identity*: its arguments, the digests of its inputs and of its source files. Inside
`work` it computes, and publishes its outputs by renaming them into place; its manifest entry comes
last. Killed anywhere before that, a step leaves the earlier entry or none, and the same command
does the work again.
"""

import ast
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

import rewardlib
from rewardlib.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "manifest.json"
PACKAGES = (
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "joblib",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "vllm",
)
LOCK_ENV = "REWARDLIB_LOCKED_DIR"


# ------------------------------------------------------------------------------------------ writing


@contextmanager
def atomic(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Write to a temporary sibling of `path`, renamed onto `path` when the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` as strict JSON; ValueError for a float that is not finite."""
    text = json.dumps(content, indent=1, allow_nan=False, default=_plain)
    with atomic(path) as file:
        file.write((text + "\n").encode())


def write_jsonl(path: Path, rows: Iterable) -> None:
    with atomic(path) as file:
        for row in rows:
            file.write((json.dumps(row, allow_nan=False, default=_plain) + "\n").encode())


def write_npy(path: Path, array: np.ndarray) -> None:
    with atomic(path) as file:
        np.save(file, array, allow_pickle=False)


def _plain(value):
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def read_json(path: Path, made_by: str) -> Any:
    """Content of a JSON file that `made_by` writes; InputError where it is absent or broken."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path} not found; it is written by {made_by}: run that first") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); run {made_by} again") from None


def null_if_nan(value: float | None) -> float | None:
    """`value` as a float for JSON: None stands for an undefined number."""
    return None if value is None or not math.isfinite(value) else float(value)


def writable_dir(path: Path | str) -> Path:
    """The folder `path`, made where it is missing; InputError unless files can be written to it."""
    path = Path(path)
    probe = path / ".write_probe"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{path}: expected a writable folder, found: {error.strerror}; choose another one"
        ) from None
    return path


# ------------------------------------------------------------------------------------------ digests


def sha256(path: Path) -> str:
    """Digest of a file; InputError where there is none."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise InputError(f"{path} not found; run the step that writes it first") from None
    return digest.hexdigest()


def describe_file(path: Path) -> dict:
    """{"bytes", "sha256"} of a file, as manifests hold them."""
    return {"bytes": Path(path).stat().st_size, "sha256": sha256(path)}


def hash_of(content: Any) -> str:
    """Hash of a value that has a JSON form; equal values (1e-3 and 0.001) give equal hashes."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_plain).encode()).hexdigest()


def source_digests(script: str) -> dict[str, str]:
    """{file: sha256} of a script and of all files of this project that its imports reach.

    Imports are read from the syntax trees, those inside functions included. The command line
    (rewardlib/cli) is left out: what it does to a result stands in the arguments.
    """
    digests, pending = {}, [Path(script).resolve()]
    while pending:
        path = pending.pop()
        name = path.relative_to(ROOT).as_posix() if ROOT in path.parents else path.name
        if name not in digests and not name.startswith("rewardlib/cli/"):
            digests[name] = sha256(path)
            pending += _imported_files(path, digests[name], ROOT)
    return dict(sorted(digests.items()))


@functools.cache
def _imported_files(path, digest, root):
    """Files below `root` that a Python file imports; its digest is part of the cache key."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    # importing a.b.c runs a/__init__.py and a/b/__init__.py as well
    modules |= {
        module.rsplit(".", n)[0] for module in modules for n in range(1, module.count(".") + 1)
    }
    places = [root.joinpath(*module.split(".")) for module in modules]
    files = [
        file
        for place in places
        for file in (place.with_name(f"{place.name}.py"), place / "__init__.py")
    ]
    return tuple(file for file in files if file.is_file())


# ----------------------------------------------------------------------------------------- manifest


@dataclass
class Work:
    """One piece of work under way: its identity, and the files it wrote to `folder` so far."""

    folder: Path
    name: str
    identity: dict
    started: float
    outputs: list[str] = field(default_factory=list)
    notes: dict = field(default_factory=dict)  # more keys of the manifest entry

    def write_json(self, name: str, content: Any) -> None:
        write_json(self.folder / name, content)
        self.outputs.append(name)

    def write_jsonl(self, name: str, rows: Iterable) -> None:
        write_jsonl(self.folder / name, rows)
        self.outputs.append(name)

    def write_npy(self, name: str, array: np.ndarray) -> None:
        write_npy(self.folder / name, array)
        self.outputs.append(name)


@contextmanager
def work(
    folder: Path, name: str, script: str | None, arguments: dict, inputs: dict
) -> Iterator[Work | None]:
    """The frame of a step: skip what is finished, say what changed, record when the block ends.

    Yields None where the manifest of `folder` holds this very work, with its outputs unchanged.
    Otherwise yields a Work, and writes its manifest entry when the block ends without an error.
    `script`, `arguments` and `inputs` make the identity; see `identity`.
    """
    step = name.split()[0]
    this = identity(script, arguments, inputs)
    if is_finished(folder, name, this):
        print(f"{step}: already done in {folder} (FORCE=1 redoes it)")
        yield None
        return
    for change in describe_change(folder, name, this):
        print(f"{step}: replacing earlier results: {change}")
    current = Work(Path(folder), name, this, time.time())
    yield current
    record(folder, name, this | current.notes, current.outputs, current.started)


def identity(script: str | None, arguments: dict, inputs: dict) -> dict:
    """Identity of one piece of work, as manifests hold it.

    {"arguments", "inputs" {name: digest}, "code" {source file: digest}, "hash" of the three}.
    script: the file whose imports are the code. None: the code is the version of this package,
    for work of GPU hours, which an edited source file is no reason to repeat.
    """
    code = rewardlib.__version__ if script is None else source_digests(script)
    content = {"arguments": arguments, "inputs": inputs, "code": code}
    return {**json.loads(json.dumps(content, default=_plain)), "hash": hash_of(content)}


def read_manifest(folder: Path) -> dict:
    path = Path(folder) / MANIFEST
    return read_json(path, "the steps of run_all.sh") if path.exists() else {}


def is_forced() -> bool:
    """Whether FORCE=1 asks to repeat finished work; InputError for other values than 0 and 1."""
    value = os.environ.get("FORCE") or "0"
    if value not in ("0", "1"):
        raise InputError(f"FORCE: expected one of 0 1, found {value!r}")
    return value == "1"


def is_finished(folder: Path, name: str, this: dict) -> bool:
    """Whether `folder` holds the work `name` of identity `this` with unchanged outputs."""
    entry = read_manifest(folder).get(name)
    if is_forced() or not entry or entry["hash"] != this["hash"]:
        return False
    outputs = ((Path(folder) / file, digests) for file, digests in entry["outputs"].items())
    return all(path.is_file() and describe_file(path) == digests for path, digests in outputs)


def describe_change(folder: Path, name: str, this: dict) -> list[str]:
    """How the identity `this` differs from the recorded one: arguments, input and source files."""
    entry = read_manifest(folder).get(name)
    if not entry:
        return []
    old, new = entry["arguments"], this["arguments"]
    names = [*new, *(key for key in old if key not in new)]
    changes = [
        f"{key} {old.get(key)} -> {new.get(key)}" for key in names if old.get(key) != new.get(key)
    ]
    for kind in ("inputs", "code"):
        changes += [f"{file} changed" for file in _differing(entry[kind], this[kind])]
    return changes


def _differing(old, new):
    """Names whose digests differ between two {name: digest}, or that one of them lacks."""
    if not (isinstance(old, dict) and isinstance(new, dict)):  # a version
        return ["the version of the code"] if old != new else []
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def record(folder: Path, name: str, this: dict, outputs: Iterable[str], started: float) -> None:
    """Write the manifest entry `name`: the identity, the outputs with digests, where it was made.

    `outputs` are file names inside `folder`; `started` is the time.time() at which the work began.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    manifest[name] = {
        **this,
        "outputs": {name: describe_file(folder / name) for name in outputs},
        "git_revision": git_revision(),
        "packages": package_versions(),
        "python": sys.version.split()[0],
        "wall_seconds": round(time.time() - started, 3),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / MANIFEST, manifest)


@functools.cache
def git_revision() -> str | None:
    """Revision of this checkout, with "+changes" where files were edited; None outside git."""
    try:
        call = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+changes"]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.cache
def package_versions() -> dict[str, str | None]:
    versions = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# --------------------------------------------------------------------------------------------- lock


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; another process prints that it waits, and waits.

    The system frees the lock when the process ends, however it ends. A run of several steps holds
    the lock across its steps and names the folder in REWARDLIB_LOCKED_DIR: its steps pass through.
    """
    folder = Path(folder)
    held = os.environ.get(LOCK_ENV)
    if held and folder.exists() and Path(held).resolve() == folder.resolve():
        yield
        return
    with open(folder / ".lock", "a") as file:
        take_lock(file, folder)
        yield


def take_lock(file: IO | int, folder: Path) -> None:
    """Lock an open file (or descriptor) for this process alone; print a line before waiting."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another run is using {folder}: waiting for it to end", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
