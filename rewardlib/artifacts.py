"""Files that a run leaves behind: atomic writes, digests, the manifest, the lock.

A step computes its *identity* (a hash of its arguments, the digests of its inputs and the digest of
the code), asks `is_finished`, works, publishes its outputs by renaming, and calls `record` last.
Killed anywhere before that, it leaves the earlier entry or none, and the same command does the work
again.
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
from contextlib import contextmanager
from pathlib import Path

import numpy as np

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
def atomic(path, mode="wb"):
    """Open a temporary sibling of `path` for writing; rename it onto `path` when the block ends without an error."""
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


def write_json(path, content):
    """Write `content` as strict JSON. A float that is not finite is a defect upstream and raises ValueError."""
    text = json.dumps(content, indent=1, allow_nan=False, default=_plain)
    with atomic(path) as file:
        file.write((text + "\n").encode())


def write_jsonl(path, rows):
    with atomic(path) as file:
        for row in rows:
            file.write((json.dumps(row, allow_nan=False, default=_plain) + "\n").encode())


def write_npy(path, array):
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


def read_json(path, made_by):
    """The content of a JSON file; InputError naming `made_by` (the step that writes it) when it is absent or broken."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path} not found; it is written by {made_by}: run that first") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); run {made_by} again") from None


def null_if_nan(value):
    """`value` as a float for JSON: None stands for an undefined number."""
    return None if value is None or not math.isfinite(value) else float(value)


def writable_dir(path):
    """Create the folder `path` if need be and make sure that files can be written to it."""
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


def sha256(path):
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise InputError(f"{path} not found; run the step that writes it first") from None
    return digest.hexdigest()


def describe_file(path):
    """{"bytes", "sha256"} of a file, as manifests hold them."""
    return {"bytes": Path(path).stat().st_size, "sha256": sha256(path)}


def hash_of(content):
    """Hash of a JSON-able value; equal values (1e-3 and 0.001) give equal hashes."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=_plain).encode()).hexdigest()


def source_digests(script):
    """{file: sha256} of the script and of every file of this project that it imports, directly or through others.

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
    """Files below `root` that the Python file `path`, whose content has this digest, imports by absolute names."""
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


def identity(script, arguments, inputs):
    """Identity of one piece of work: {"arguments", "inputs" {name: digest}, "code" {file: digest}, "hash" of them}."""
    content = {"arguments": arguments, "inputs": inputs, "code": source_digests(script)}
    return {**json.loads(json.dumps(content, default=_plain)), "hash": hash_of(content)}


def read_manifest(folder):
    path = Path(folder) / MANIFEST
    return read_json(path, "the steps of run_all.sh") if path.exists() else {}


def is_finished(folder, name, work):
    """True when the manifest of `folder` holds `work` under `name` and every output is still as it was written."""
    entry = read_manifest(folder).get(name)
    if os.environ.get("FORCE", "0") == "1" or not entry or entry["hash"] != work["hash"]:
        return False
    outputs = ((Path(folder) / file, told) for file, told in entry["outputs"].items())
    return all(path.is_file() and describe_file(path) == told for path, told in outputs)


def describe_change(folder, name, work):
    """What differs between `work` and the recorded work `name`: arguments, input files, source files; one line each."""
    entry = read_manifest(folder).get(name)
    if not entry:
        return []
    old, new = entry["arguments"], work["arguments"]
    changes = [
        f"{key} {old.get(key)} -> {new.get(key)}" for key in new if old.get(key) != new.get(key)
    ]
    for kind in ("inputs", "code"):
        changes += [f"{file} changed" for file in _differing(entry[kind], work[kind])]
    return changes


def _differing(old, new):
    """Names whose digests differ between two {name: digest}, or that one of them lacks."""
    if not isinstance(old, dict):  # manifests of version 0.1 hold one digest of all source files
        return ["the source code"] if old != new else []
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def record(folder, name, work, outputs, started):
    """Write the manifest entry `name`: the work's identity, its outputs with digests, and where it was made.

    `outputs` are file names inside `folder`; `started` is the time.time() at which the work began.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    manifest[name] = {
        **work,
        "outputs": {name: describe_file(folder / name) for name in outputs},
        "git_revision": git_revision(),
        "packages": package_versions(),
        "python": sys.version.split()[0],
        "wall_seconds": round(time.time() - started, 3),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / MANIFEST, manifest)


@functools.cache
def git_revision():
    """Revision of the checkout this code runs from, with "+changes" when it was edited, or None outside git."""
    try:
        call = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+changes"]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.cache
def package_versions():
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


# --------------------------------------------------------------------------------------------- lock


@contextmanager
def lock(folder):
    """Hold `folder` for this process. A second run says that it waits. Free when the process ends, however it ends.

    run_all.sh holds the lock across its steps and names the folder in REWARDLIB_LOCKED_DIR, so its
    steps pass through.
    """
    folder = Path(folder)
    held = os.environ.get(LOCK_ENV)
    if held and folder.exists() and Path(held).resolve() == folder.resolve():
        yield
        return
    with open(folder / ".lock", "a") as file:
        take_lock(file, folder)
        yield


def take_lock(file, folder):
    """flock an open file (or descriptor) exclusively; say so before waiting."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another run is using {folder}: waiting for it to end", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
