"""Convert published embedding files to the format of DATA_DIR.

DATA_DIR holds one file of embeddings and one file of golden rewards per response.

Reads   EMBD_*.npy with REWARD_*.npy, EMBD-TRAIN-*.npy with REWARD-TRAIN-*.npy, or embd_*.npy with
        reward_*.npy (rewardlib/data/published.py lists the names in full), found in --embd_dir or
        given by --embd_file and --reward_file
Writes  --output_dir/EMBD-{TRAIN,TEST}-split_{k}.npy, rewards_split_{k}.json,
        rewards_test_split_{k}.json, manifest.json

All files are written to --output_dir/.converting and moved into place when the last one is
complete: until then --output_dir keeps its earlier files. If the command is stopped, running it
again continues after the last finished file. Memory use does not grow with the files.

Example
    python convert_embeddings.py --embd_dir embd/RM-Embeddings --task harmless \\
        --gen_model gemma7b --output_dir data
"""

import argparse
import contextlib
import hashlib
import io
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

import rewardlib
from rewardlib import artifacts
from rewardlib.artifacts import MANIFEST
from rewardlib.cli import console, kinds
from rewardlib.data import embeddings, published
from rewardlib.errors import InputError

STAGING = ".converting"
PROGRESS = "progress.json"
OPEN_FILES = 200  # responses that are written at once
# How this command names the settings that an error asks for; see rewardlib/data/published.py.
WORDS = {
    "folder": "--embd_dir",
    "narrower": "a narrower --embd_dir",
    "files": "--embd_file and --reward_file",
    "names": "--dataset, --task, --embed_model, --gen_model",
    "dataset": "--dataset {}",
    "reward_model": "--reward_model {}",
    "axes": "--axes {}",
}
REWARD_LINE_BYTES = 40  # assumed by the check of free disk space


def make_parser() -> argparse.ArgumentParser:
    parser = console.parser(__doc__)
    group = parser.add_argument_group("inputs")
    group.add_argument(
        "--embd_dir",
        help="folder to search for the files, with its sub-folders; run_all.sh searches "
        "embd/RM-Embeddings where no other is given",
    )
    group.add_argument(
        "--embd_file",
        nargs="+",
        help="embedding files to convert, without a search: one, or the train and the test file",
    )
    group.add_argument("--reward_file", nargs="+", help="the reward file of each --embd_file")
    group.add_argument(
        "--split",
        choices=("train", "test", "both"),
        default="both",
        help="split of the prompts to convert",
    )
    group.add_argument(
        "--axes",
        choices=("auto", "KND", "NKD"),
        default="auto",
        help="axis order of the embedding files: K responses, N prompts, D dimensions",
    )
    group = parser.add_argument_group("names to search for, in upper or lower case")
    group.add_argument(
        "--task", default="helpful", help="helpful, harmless, or another task with --dataset"
    )
    group.add_argument(
        "--dataset", help="data set in the file names; None: hh-rlhf-{task}-{sft_obj}"
    )
    group.add_argument(
        "--sft_obj",
        default="gpt4",
        help="data of the supervised fine-tuning, a suffix of the data set; 'none' for no suffix",
    )
    group.add_argument("--embed_model", default="gemma2b", help="model that embedded the responses")
    group.add_argument("--gen_model", default="gemma2b", help="model that wrote the responses")
    group.add_argument(
        "--reward_model",
        help="golden reward model, needed only if several reward files fit; None: any",
    )
    group = parser.add_argument_group("outputs")
    group.add_argument("--output_dir", default="data", help="DATA_DIR of the other steps")
    group.add_argument(
        "--max_prompts",
        type=kinds.count_or_all,
        default="all",
        help="number of prompts to convert per split, from the first, or all",
    )
    group.add_argument(
        "--dtype",
        choices=("keep", "float16", "float32"),
        default="keep",
        help="floating-point type of the converted embeddings",
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    plan = make_plan(args)
    identity = identity_of(plan)
    output_dir = artifacts.writable_dir(args.output_dir)
    with artifacts.lock(output_dir):
        if is_done(output_dir, identity) and not artifacts.is_forced():
            shutil.rmtree(output_dir / STAGING, ignore_errors=True)
            print(f"{output_dir} already holds this conversion (FORCE=1 does it again)")
        else:
            progress = begin(output_dir, identity, plan)
            try:
                stage(output_dir / STAGING, plan, progress)
            except InputError:
                shutil.rmtree(output_dir / STAGING)
                raise
            arguments = {name: value for name, value in vars(args).items() if name != "debug"}
            publish(output_dir, plan, progress, arguments)
        report(output_dir)


# ------------------------------------------------------------------------------------------- inputs


def make_plan(args: argparse.Namespace) -> dict[str, tuple[published.Source, int, np.dtype]]:
    """{split: (Source, number of prompts, dtype)} of the conversion, from the file headers alone.

    Prints what will be converted. Raises InputError if the splits differ in dimensions.
    """
    plan = {}
    for split, files in find_files(args).items():
        source = published.open_source(*files, args.axes, WORDS)
        k, n, d = source.shape
        kind = f"format {source.format}" if source.format else "a name of no published format"
        print(f"{split}: {source.embedding} with {source.reward.name} ({kind})")
        print(
            f"{split}: axes {source.axes}: {k} responses to each of {n} prompts, {d} dimensions, "
            f"{source.dtype.name}"
        )
        if args.max_prompts and args.max_prompts > n:
            print(
                f"{split}: all {n} prompts are taken; --max_prompts {args.max_prompts} is more "
                "than there are"
            )
        dtype = np.dtype(source.dtype.name if args.dtype == "keep" else args.dtype)
        plan[split] = source, min(args.max_prompts or n, n), dtype
    dimensions = {split: source.shape[2] for split, (source, _, _) in plan.items()}
    if len(set(dimensions.values())) > 1:
        raise InputError(
            f"expected the same number of dimensions in both splits, found {dimensions}; take "
            "files of the same --embed_model"
        )
    return plan


def find_files(args: argparse.Namespace) -> dict[str, tuple[Path | str, Path | str]]:
    """{split: (embedding path, reward path)} of the files given or found; InputError if missing.

    With --split both, the test files may be missing.
    """
    embd_files, reward_files = args.embd_file or [], args.reward_file or []
    if bool(embd_files) == bool(args.embd_dir) or len(embd_files) != len(reward_files):
        raise InputError(
            "expected either --embd_dir, or --embd_file with a --reward_file for each, found "
            f"--embd_dir {args.embd_dir}, {len(embd_files)} --embd_file and "
            f"{len(reward_files)} --reward_file"
        )
    if embd_files:
        return name_splits(args.split, list(zip(embd_files, reward_files, strict=True)))
    splits = ("train", "test") if args.split == "both" else (args.split,)
    query = published.names(
        args.task, args.dataset, args.sft_obj, args.embed_model, args.gen_model, args.reward_model
    )
    files = published.files_in(args.embd_dir, WORDS)
    pairs = {
        split: published.find(files, args.embd_dir, split, query, words=WORDS) for split in splits
    }
    for split in splits:
        if pairs[split] is None and (split, args.split) != ("test", "both"):
            raise published.not_found(files, args.embd_dir, split, query, words=WORDS)
        if pairs[split] is None:
            print(f"no test file of these names in {args.embd_dir}: only the train split is made")
    return {split: pair for split, pair in pairs.items() if pair}


def name_splits(split: str, pairs: list[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """{split: (embedding path, reward path)} of given files.

    A single pair belongs to the split asked for or, with --split both, to the split in its name,
    else to train. Two pairs are train, then test.
    """
    named = [published.read_name(embedding)[1].get("split") for embedding, _ in pairs]
    if len(pairs) == 1:
        return {named[0] or "train" if split == "both" else split: pairs[0]}
    if len(pairs) > 2 or split != "both" or named[0] == "test" or named[1] == "train":
        raise InputError(
            "expected one --embd_file, or with --split both the train file and then the test file, "
            f"found {len(pairs)} with --split {split}: "
            f"{', '.join(embedding for embedding, _ in pairs)}"
        )
    return dict(zip(("train", "test"), pairs, strict=True))


def identity_of(plan: dict) -> str:
    """Hash of everything that the converted files depend on."""
    inputs = {split: identity_of_split(*part) for split, part in plan.items()}
    return artifacts.hash_of([rewardlib.__version__, inputs])


def identity_of_split(source: published.Source, n: int, dtype: np.dtype) -> dict:
    """What the converted files of one split depend on, as a JSON-able dict."""
    return {
        "embedding": published.fingerprint(source.embedding),
        "reward": published.fingerprint(source.reward),
        "axes": source.axes,
        "reward_axes": source.reward_axes,
        "N": n,
        "dtype": dtype.name,
    }


# ------------------------------------------------------------------------------------ output folder


def split_files(folder: Path) -> list[str]:
    """Names of the embedding and reward files in `folder`, train first, in ascending order of k."""
    numbers = [
        (split, k) for split in ("train", "test") for k in embeddings.find_splits(folder, split)
    ]
    names = [name for split, k in numbers for name in embeddings.file_names(split, k)]
    return [name for name in names if (folder / name).exists()]


def is_done(folder: Path, identity: str) -> bool:
    """True if `folder` holds this conversion, with every file as its manifest records it."""
    manifest = artifacts.read_manifest(folder)
    if manifest.get("identity") != identity:
        return False
    if sorted(split_files(folder)) != sorted(manifest["files"]):
        return False
    written = (folder / MANIFEST).stat().st_mtime_ns
    for name, recorded in manifest["files"].items():
        status = (folder / name).stat()
        if status.st_size != recorded["bytes"]:
            return False
        # files that are not newer than the manifest are not read again
        if status.st_mtime_ns > written and artifacts.sha256(folder / name) != recorded["sha256"]:
            return False
    return True


def begin(folder: Path, identity: str, plan: dict) -> dict:
    """The progress record of this conversion: new, or that of an earlier run to continue.

    Raises InputError if `folder` holds data that cannot be made again, or too little free space.
    """
    manifest, names = artifacts.read_manifest(folder), split_files(folder)
    staging = folder / STAGING
    record = staging / PROGRESS
    progress = artifacts.read_json(record, embeddings.PRODUCERS[0]) if record.exists() else {}
    half_published = progress.get("publishing", False) and not manifest
    if (manifest or names) and not half_published:
        if manifest.get("producer") not in embeddings.PRODUCERS:
            raise InputError(
                f"{folder}: expected an empty folder or data that can be made again, found "
                f"{names[0] if names else MANIFEST} put there by hand or by step 4; choose another "
                "--output_dir"
            )
        if "train" not in plan and embeddings.find_splits(folder, "train"):
            raise InputError(
                f"{folder}: this folder holds a train split, which a conversion of the test split "
                "alone would remove; convert both at once, or choose another --output_dir"
            )
        print(
            f"{folder}: {len(names)} files made by {manifest['producer']} will be replaced when "
            "all new files are ready"
        )
    if (
        progress.get("identity") == identity
        and not artifacts.is_forced()
        and is_whole(folder, progress)
    ):
        print(f"continuing an earlier run: {len(progress['files'])} files are ready")
    else:
        # files of another conversion that was killed while it published
        for name in names if half_published else []:
            (folder / name).unlink()
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        progress = {"identity": identity, "publishing": False, "files": {}, "rewards": {}}
        artifacts.write_json(record, progress)
    check_space(folder, plan, progress)
    return progress


def is_whole(folder: Path, progress: dict) -> bool:
    """True if every file that `progress` calls ready is still there: staged or published."""
    folders = [folder / STAGING, folder] if progress["publishing"] else [folder / STAGING]
    for name, recorded in progress["files"].items():
        path = next((home / name for home in folders if (home / name).exists()), None)
        if path is None or path.stat().st_size != recorded["bytes"]:
            return False
    return True


def check_space(folder: Path, plan: dict, progress: dict) -> None:
    """InputError if the disk of `folder` has too little free space for the files still to write."""
    needed = -sum(recorded["bytes"] for recorded in progress["files"].values())
    for source, n, dtype in plan.values():
        needed += source.shape[0] * n * (source.shape[2] * dtype.itemsize + REWARD_LINE_BYTES)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: expected {needed / 1e9:.1f} GB of free disk space, found "
            f"{free / 1e9:.1f} GB; remove other files, or choose another --output_dir, "
            "--dtype float16 or a smaller --max_prompts"
        )


def publish(folder: Path, plan: dict, progress: dict, arguments: dict) -> None:
    """Move the finished files into place, then write the manifest.

    Old files are removed in ascending order of k, and new files arrive in descending order, train
    last: in between, the first train files are always missing, so that the reader of DATA_DIR
    refuses the folder.
    """
    staging = folder / STAGING
    progress["publishing"] = True
    artifacts.write_json(staging / PROGRESS, progress)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in split_files(folder):
        if name not in progress["files"] or (staging / name).exists():
            (folder / name).unlink()
    splits = [(split, k) for split, (source, _, _) in plan.items() for k in range(source.shape[0])]
    names = [name for split, k in splits for name in embeddings.file_names(split, k)]
    for name in reversed(names):
        if (staging / name).exists():
            os.replace(staging / name, folder / name)
    artifacts.write_json(folder / MANIFEST, manifest_of(plan, progress, arguments, names))
    shutil.rmtree(staging)


def manifest_of(plan: dict, progress: dict, arguments: dict, names: list[str]) -> dict:
    """The manifest of the converted files `names`."""
    manifest = {
        "producer": embeddings.PRODUCERS[0],
        "arguments": arguments,
        "identity": progress["identity"],
        "source": {split: describe(*part) for split, part in plan.items()},
        "train": None,
        "test": None,
    }
    for split, (source, n, dtype) in plan.items():
        (k, _, d), rewards = source.shape, progress["rewards"][split]
        manifest[split] = {"K": k, "N": n, "D": d, "dtype": dtype.name, "rewards": rewards}
    manifest["files"] = {name: progress["files"][name] for name in names}
    return {**manifest, "git_revision": artifacts.git_revision()}


def describe(source: published.Source, n: int, dtype: np.dtype) -> dict:
    """The source of one split, as the manifest records it."""
    return {
        "embedding_file": str(source.embedding),
        "reward_file": str(source.reward),
        "format": source.format,
        **identity_of_split(source, n, dtype),
    }


# --------------------------------------------------------------------------------------- conversion


def stage(staging: Path, plan: dict, progress: dict) -> None:
    """Write all files that are not ready yet into `staging`, checked; record each in `progress`."""

    def record(files):
        progress["files"].update(files)
        artifacts.write_json(staging / PROGRESS, progress)

    for split, (source, n, _) in plan.items():
        if split not in progress["rewards"]:
            files, progress["rewards"][split] = write_rewards(staging, split, source, n)
            record(files)
    for split, (source, n, dtype) in plan.items():
        k, _, d = source.shape
        size = n * d * dtype.itemsize
        ready = sum(embeddings.file_names(split, i)[0] in progress["files"] for i in range(k))
        # In order NKD the responses to a prompt lie together: one pass over the file writes many
        # responses at once. In order KND each response lies together and is written alone.
        group = 1 if source.axes == "KND" else OPEN_FILES
        options = {"desc": f"converting {split}", "unit": "B", "unit_scale": True, "disable": None}
        with tqdm(total=k * size, initial=ready * size, **options) as bar:
            for start in range(ready, k, group):
                responses = range(start, min(start + group, k))
                record(write_embeddings(staging, split, source, responses, n, dtype, bar))
    if identity_of(plan) != progress["identity"]:
        raise InputError(
            "the published files changed while they were read; run the same command again"
        )


def write_rewards(staging: Path, split: str, source: published.Source, n: int) -> tuple[dict, dict]:
    """Write the reward files of a split.

    Returns ({name: {"bytes", "sha256"}}, {"mean", "sd", "min", "max"} of all rewards).
    """
    files, moments = {}, []
    for k in tqdm(range(source.shape[0]), desc=f"rewards {split}", leave=False, disable=None):
        block = published.read_block(
            source.reward, source.reward_axes, slice(k, k + 1), slice(0, n), np.float64
        )
        values = block.ravel().tolist()
        path = staging / embeddings.file_names(split, k)[1]
        artifacts.write_jsonl(path, ({"reward": value} for value in values))
        if [record["reward"] for record in embeddings.read_rewards(path, n)] != values:
            raise InputError(
                f"{path}: the file reads back with other content than was written; check the disk "
                "of --output_dir"
            )
        files[path.name] = artifacts.describe_file(path)
        moments.append((block.mean(), block.var(), block.min(), block.max()))
    mean, variance, low, high = np.array(moments).T
    # all responses have n rewards, so the total variance is the mean variance within responses plus
    # the variance between their means
    sd = np.sqrt(variance.mean() + mean.var())
    return files, {"mean": mean.mean(), "sd": sd, "min": low.min(), "max": high.max()}


def write_embeddings(
    staging: Path,
    split: str,
    source: published.Source,
    responses: range,
    n: int,
    dtype: np.dtype,
    bar: tqdm,
) -> dict:
    """Write the embedding files of a range of responses, in one pass over the source.

    Returns {name: {"bytes", "sha256"}}.
    """
    d = source.shape[2]
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype.str, "fortran_order": False, "shape": (n, d)}
    )
    paths = [staging / embeddings.file_names(split, k)[0] for k in responses]
    digests = [hashlib.sha256(header.getvalue()) for _ in paths]
    prompt_bytes = len(paths) * d * max(dtype.itemsize, source.dtype.itemsize)
    step = max(1, embeddings.BLOCK_BYTES // prompt_bytes)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(artifacts.atomic(path)) for path in paths]
        for file in files:
            file.write(header.getvalue())
        for start in range(0, n, step):
            ks, ns = slice(responses.start, responses.stop), slice(start, min(start + step, n))
            block_knD = published.read_block(source.embedding, source.axes, ks, ns, dtype)
            for file, digest, rows_nD in zip(files, digests, block_knD, strict=True):
                file.write(rows_nD.data)
                digest.update(rows_nD.data)
            bar.update(block_knD.nbytes)
    written = {}
    for path, digest in zip(paths, digests, strict=True):
        written[path.name] = artifacts.describe_file(path)
        if written[path.name]["sha256"] != digest.hexdigest():
            raise InputError(
                f"{path}: the file reads back with other content than was written; check the disk "
                "of --output_dir"
            )
    return written


def report(folder: Path) -> None:
    """Print the shapes, rewards and sizes of the converted data, and the next command."""
    manifest = artifacts.read_manifest(folder)
    for split in ("train", "test"):
        if part := manifest[split]:
            rewards = ", ".join(f"{name} {value:.4g}" for name, value in part["rewards"].items())
            print(
                f"{split}: K={part['K']} N={part['N']} D={part['D']} {part['dtype']}; "
                f"rewards {rewards}"
            )
    size = sum(recorded["bytes"] for recorded in manifest["files"].values())
    print(f"{folder}: {len(manifest['files'])} files, {size:,} bytes, and {MANIFEST}")
    print(f"next: DATA_DIR={shlex.quote(str(folder))} bash run_all.sh")


if __name__ == "__main__":
    console.run(main, "convert_embeddings")
