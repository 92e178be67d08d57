"""Convert published embedding files to DATA_DIR's format: one file of embeddings and one of rewards per response.

Reads   EMBD_*.npy with REWARD_*.npy, EMBD-TRAIN-*.npy with REWARD-TRAIN-*.npy, or embd_*.npy with reward_*.npy
        (rewardlib/data/published.py has the names in full), found in --embd_dir or named by --embd_file and --reward_file
Writes  --output_dir/EMBD-{TRAIN,TEST}-split_{k}.npy, rewards_split_{k}.json, rewards_test_split_{k}.json, manifest.json

The work is done in --output_dir/.converting and moved into place when all of it is complete: until
then the folder keeps what it had. Stopped at any moment, the same command goes on from the last
finished file. Memory is constant.

Example
    python convert_embeddings.py --embd_dir embd/RM-Embeddings --task harmless --gen_model gemma7b --output_dir data
"""

import contextlib
import hashlib
import io
import os
import shlex
import shutil

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
OPEN_FILES = 200
REWARD_LINE_BYTES = 40


def make_parser():
    parser = console.parser(__doc__)
    group = parser.add_argument_group("inputs")
    group.add_argument("--embd_dir", help="folder to search, sub-folders included")
    group.add_argument(
        "--embd_file", nargs="+", help="embedding file instead of a search; two: train, then test"
    )
    group.add_argument("--reward_file", nargs="+", help="reward file of each --embd_file")
    group.add_argument(
        "--split",
        choices=("train", "test", "both"),
        default="both",
        help="which prompts to convert",
    )
    group.add_argument(
        "--axes",
        choices=("auto", "KND", "NKD"),
        default="auto",
        help="axis order of the embeddings",
    )
    group = parser.add_argument_group("names to search for, case aside")
    group.add_argument(
        "--task", default="helpful", help="helpful, harmless, or another with --dataset"
    )
    group.add_argument("--dataset", help="name in the files; None: hh-rlhf-{task}-{sft_obj}")
    group.add_argument(
        "--sft_obj", default="gpt4", help="data of the supervised fine-tuning; 'none' for no suffix"
    )
    group.add_argument("--embed_model", default="gemma2b", help="model that embedded the responses")
    group.add_argument("--gen_model", default="gemma2b", help="model that wrote the responses")
    group.add_argument(
        "--reward_model", help="golden reward model, for where several fit; None: any"
    )
    group = parser.add_argument_group("outputs")
    group.add_argument("--output_dir", default="data", help="DATA_DIR of the other steps")
    group.add_argument(
        "--max_prompts",
        type=kinds.count_or_all,
        default="all",
        help="first prompts of a split, or all",
    )
    group.add_argument(
        "--dtype", choices=("keep", "float16", "float32"), default="keep", help="of the embeddings"
    )
    return parser


def parse_args(argv=None):
    return make_parser().parse_args(argv)


def main(argv=None):
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
            publish(
                output_dir, plan, progress, {k: v for k, v in vars(args).items() if k != "debug"}
            )
        report(output_dir)


# ------------------------------------------------------------------------------------------- inputs


def make_plan(args):
    """{split: (Source, number of prompts, dtype)} of what is to be converted, from the headers alone."""
    plan = {}
    for split, files in find_files(args).items():
        source = published.open_source(*files, args.axes)
        k, n, d = source.shape
        kind = f"format {source.format}" if source.format else "a name of no published format"
        print(f"{split}: {source.embedding} with {source.reward.name} ({kind})")
        print(
            f"{split}: axes {source.axes}: {k} responses to each of {n} prompts, {d} dimensions, {source.dtype.name}"
        )
        if args.max_prompts and args.max_prompts > n:
            print(
                f"{split}: all {n} prompts are taken; --max_prompts {args.max_prompts} is more than there are"
            )
        dtype = np.dtype(source.dtype.name if args.dtype == "keep" else args.dtype)
        plan[split] = source, min(args.max_prompts or n, n), dtype
    dimensions = {split: source.shape[2] for split, (source, _, _) in plan.items()}
    if len(set(dimensions.values())) > 1:
        raise InputError(
            f"expected one number of dimensions, found {dimensions}; take one --embed_model for both"
        )
    return plan


def find_files(args):
    """{split: (embedding path, reward path)}, given or searched for."""
    given, rewards = args.embd_file or [], args.reward_file or []
    if bool(given) == bool(args.embd_dir) or len(given) != len(rewards):
        raise InputError(
            "expected either --embd_dir, or --embd_file with a --reward_file for each, found "
            f"--embd_dir {args.embd_dir}, {len(given)} --embd_file and {len(rewards)} --reward_file"
        )
    if given:
        return name_splits(args.split, list(zip(given, rewards, strict=True)))
    splits = ("train", "test") if args.split == "both" else (args.split,)
    wanted = published.names(
        args.task, args.dataset, args.sft_obj, args.embed_model, args.gen_model, args.reward_model
    )
    files = published.files_in(args.embd_dir)
    found = {split: published.find(files, args.embd_dir, split, wanted) for split in splits}
    for split in splits:
        if found[split] is None and (split, args.split) != ("test", "both"):
            raise published.not_found(files, args.embd_dir, split, wanted)
        if found[split] is None:
            print(f"no test file of these names in {args.embd_dir}: train only")
    return {split: pair for split, pair in found.items() if pair}


def name_splits(split, pairs):
    """{split: (embedding path, reward path)} of given files: one of the split asked for or named, or train and test."""
    told = [published.read_name(embedding)[1].get("split") for embedding, _ in pairs]
    if len(pairs) == 1:
        return {told[0] or "train" if split == "both" else split: pairs[0]}
    if len(pairs) > 2 or split != "both" or told[0] == "test" or told[1] == "train":
        raise InputError(
            f"expected one --embd_file, or with --split both the train file and then the test file, found {len(pairs)} "
            f"with --split {split}: {', '.join(embedding for embedding, _ in pairs)}"
        )
    return dict(zip(("train", "test"), pairs, strict=True))


def identity_of(plan):
    """Hash of all that the converted files depend on."""
    return artifacts.hash_of(
        [rewardlib.__version__, {split: what_matters(*part) for split, part in plan.items()}]
    )


def what_matters(source, n, dtype):
    files = {
        "embedding": published.fingerprint(source.embedding),
        "reward": published.fingerprint(source.reward),
    }
    return {
        **files,
        "axes": source.axes,
        "reward_axes": source.reward_axes,
        "N": n,
        "dtype": dtype.name,
    }


# ------------------------------------------------------------------------------------ output folder


def split_files(folder):
    """Names of the embedding and reward files in `folder`, train first and in ascending order of k."""
    found = [
        (split, k) for split in ("train", "test") for k in embeddings.find_splits(folder, split)
    ]
    return [
        name
        for where in found
        for name in embeddings.file_names(*where)
        if (folder / name).exists()
    ]


def is_done(folder, identity):
    manifest = artifacts.read_manifest(folder)
    if manifest.get("identity") != identity or sorted(split_files(folder)) != sorted(
        manifest["files"]
    ):
        return False
    written = (folder / MANIFEST).stat().st_mtime_ns
    for name, told in manifest["files"].items():
        status = (folder / name).stat()
        if status.st_size != told["bytes"]:
            return False
        if status.st_mtime_ns > written and artifacts.sha256(folder / name) != told["sha256"]:
            return False
    return True


def begin(folder, identity, plan):
    """The progress record of this work, new or of an earlier run, after making sure that it may go into `folder`."""
    manifest, found = artifacts.read_manifest(folder), split_files(folder)
    staging = folder / STAGING
    record = staging / PROGRESS
    progress = artifacts.read_json(record, embeddings.PRODUCERS[0]) if record.exists() else {}
    half_published = progress.get("publishing", False) and not manifest
    if (manifest or found) and not half_published:
        if manifest.get("producer") not in embeddings.PRODUCERS:
            raise InputError(
                f"{folder}: expected an empty folder or data that can be made again, found "
                f"{found[0] if found else MANIFEST} put there by hand or by step 4; choose another --output_dir"
            )
        if "train" not in plan and embeddings.find_splits(folder, "train"):
            raise InputError(
                f"{folder}: expected no train split beside a conversion of the test split alone, found one; convert "
                "both at once, or choose another --output_dir"
            )
        print(
            f"{folder}: {len(found)} files made by {manifest['producer']} will be replaced when all is ready"
        )
    if (
        progress.get("identity") == identity
        and not artifacts.is_forced()
        and is_whole(folder, progress)
    ):
        print(f"going on with an earlier run: {len(progress['files'])} files are ready")
    else:
        for name in found if half_published else []:
            (folder / name).unlink()
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        progress = {"identity": identity, "publishing": False, "files": {}, "rewards": {}}
        artifacts.write_json(record, progress)
    check_space(folder, plan, progress)
    return progress


def is_whole(folder, progress):
    """True when every file that `progress` calls ready is still there: staged, or published already."""
    homes = [folder / STAGING, folder] if progress["publishing"] else [folder / STAGING]
    paths = {
        name: next((h / name for h in homes if (h / name).exists()), None)
        for name in progress["files"]
    }
    return all(
        path and path.stat().st_size == progress["files"][name]["bytes"]
        for name, path in paths.items()
    )


def check_space(folder, plan, progress):
    needed = -sum(told["bytes"] for told in progress["files"].values())
    for source, n, dtype in plan.values():
        needed += source.shape[0] * n * (source.shape[2] * dtype.itemsize + REWARD_LINE_BYTES)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder}: expected {needed / 1e9:.1f} GB of free disk space, found {free / 1e9:.1f} GB; "
            "free some, or choose another --output_dir, --dtype float16 or a smaller --max_prompts"
        )


def publish(folder, plan, progress, arguments):
    """Move the finished files into place, then write the manifest.

    Old files go in ascending order of k and new ones come in descending order, train last: a folder
    in between always lacks the first train files, which the reader refuses.
    """
    staging = folder / STAGING
    progress["publishing"] = True
    artifacts.write_json(staging / PROGRESS, progress)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in split_files(folder):
        if name not in progress["files"] or (staging / name).exists():
            (folder / name).unlink()
    splits = [(split, k) for split, (source, _, _) in plan.items() for k in range(source.shape[0])]
    names = [name for where in splits for name in embeddings.file_names(*where)]
    for name in reversed(names):
        if (staging / name).exists():
            os.replace(staging / name, folder / name)
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
    artifacts.write_json(folder / MANIFEST, {**manifest, "git_revision": artifacts.git_revision()})
    shutil.rmtree(staging)


def describe(source, n, dtype):
    paths = {
        "embedding_file": str(source.embedding),
        "reward_file": str(source.reward),
        "format": source.format,
    }
    return {**paths, **what_matters(source, n, dtype)}


# --------------------------------------------------------------------------------------- conversion


def stage(staging, plan, progress):
    """Write all files that `progress` does not hold yet into `staging`, checked, and note each in `progress`."""

    def finished(told):
        progress["files"].update(told)
        artifacts.write_json(staging / PROGRESS, progress)

    for split, (source, n, _) in plan.items():
        if split not in progress["rewards"]:
            told, progress["rewards"][split] = write_rewards(staging, split, source, n)
            finished(told)
    for split, (source, n, dtype) in plan.items():
        k, _, d = source.shape
        size = n * d * dtype.itemsize
        ready = sum(embeddings.file_names(split, i)[0] in progress["files"] for i in range(k))
        # a file of prompts is read once for all its responses, one of responses once for each
        group = 1 if source.axes == "KND" else OPEN_FILES
        show = {"desc": f"converting {split}", "unit": "B", "unit_scale": True, "disable": None}
        with tqdm(total=k * size, initial=ready * size, **show) as bar:
            for start in range(ready, k, group):
                responses = range(start, min(start + group, k))
                finished(write_embeddings(staging, split, source, responses, n, dtype, bar))
    if identity_of(plan) != progress["identity"]:
        raise InputError(
            "the published files changed while they were read; run the same command again"
        )


def write_rewards(staging, split, source, n):
    """The reward files of a split: ({name: {"bytes", "sha256"}}, {"mean", "sd", "min", "max"} of all rewards)."""
    told, moments = {}, []
    for k in tqdm(range(source.shape[0]), desc=f"rewards {split}", leave=False, disable=None):
        block = published.read_block(
            source.reward, source.reward_axes, slice(k, k + 1), slice(0, n), np.float64
        )
        values = block.ravel().tolist()
        path = staging / embeddings.file_names(split, k)[1]
        artifacts.write_jsonl(path, ({"reward": value} for value in values))
        if [record["reward"] for record in embeddings.read_rewards(path, n)] != values:
            raise InputError(
                f"{path}: reads back other than it was written; check the disk of --output_dir"
            )
        told[path.name] = artifacts.describe_file(path)
        moments.append((block.mean(), block.var(), block.min(), block.max()))
    mean, variance, low, high = np.array(moments).T
    # all responses have n rewards, so the total variance is that within responses plus that between
    # them
    spread = np.sqrt(variance.mean() + mean.var())
    return told, {"mean": mean.mean(), "sd": spread, "min": low.min(), "max": high.max()}


def write_embeddings(staging, split, source, responses, n, dtype, bar):
    """The embedding files of a range of responses, in one pass over the source: {name: {"bytes", "sha256"}}."""
    d = source.shape[2]
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype.str, "fortran_order": False, "shape": (n, d)}
    )
    paths = [staging / embeddings.file_names(split, k)[0] for k in responses]
    digests = [hashlib.sha256(header.getvalue()) for _ in paths]
    step = max(
        1, embeddings.BLOCK_BYTES // (len(paths) * d * max(dtype.itemsize, source.dtype.itemsize))
    )
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(artifacts.atomic(path)) for path in paths]
        for file in files:
            file.write(header.getvalue())
        for start in range(0, n, step):
            ks, ns = slice(responses.start, responses.stop), slice(start, min(start + step, n))
            block = published.read_block(source.embedding, source.axes, ks, ns, dtype)
            for file, digest, rows in zip(files, digests, block, strict=True):
                file.write(rows.data)
                digest.update(rows.data)
            bar.update(block.nbytes)
    told = {}
    for path, digest in zip(paths, digests, strict=True):
        told[path.name] = artifacts.describe_file(path)
        if told[path.name]["sha256"] != digest.hexdigest():
            raise InputError(
                f"{path}: reads back other than it was written; check the disk of --output_dir"
            )
    return told


def report(folder):
    manifest = artifacts.read_manifest(folder)
    for split in ("train", "test"):
        if part := manifest[split]:
            rewards = ", ".join(f"{name} {value:.4g}" for name, value in part["rewards"].items())
            print(
                f"{split}: K={part['K']} N={part['N']} D={part['D']} {part['dtype']}; rewards {rewards}"
            )
    size = sum(told["bytes"] for told in manifest["files"].values())
    print(f"{folder}: {len(manifest['files'])} files, {size:,} bytes, and {MANIFEST}")
    print(f"next: DATA_DIR={shlex.quote(str(folder))} bash run_all.sh")


if __name__ == "__main__":
    console.run(main, "convert_embeddings")
