"""Prepare data of the interpretable-reward study: embeddings of responses and prompts, labels, prompts as groups.

--source chat      conversations, rated or in pairs, through a language model: the state of the last token, and of the
                   token with which the assistant's turn opens, which is the embedding of the prompt
--source arrays    the same from .npy or .npz files that exist
--source prepared  a part of a prepared file, or pairs from its ratings (--pairs_from)

Chat data are embedded shard by shard, each finished shard is kept when a run ends early, and joined
at the end. Several GPUs or machines: one process for each --shard_idx, then the same command
without it.

Reads   --dataset: rows of {"messages", numbers...} or {"chosen", "rejected"} (studies/interpretable/chat_data.py describes them);
        --embeddings, --labels, --attribute_names, --prompt_embeddings; or --prepared
Writes  --output (.safetensors; studies/interpretable/attribute_data.py describes it), manifest.json beside it
Example python studies/interpretable_prepare.py --dataset rated.jsonl --model MODEL --output rated.safetensors
        python studies/interpretable_prepare.py --source prepared --prepared rated.safetensors \\
            --pairs_from helpfulness --output pairs.safetensors
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewardlib import artifacts
from rewardlib.cli import console, kinds
from rewardlib.errors import InputError
from rewardlib.llm import loading, responses
from studies.interpretable import attribute_data, attribute_sources, chat_data, chat_embeddings

SHARD_ROWS = 4096
SHOWN = 5
ARRAYS = ("embeddings", "labels", "attribute_names", "prompt_embeddings")
SOURCES = {"chat": ("dataset",), "arrays": ARRAYS, "prepared": ("prepared",)}
SELECTION = ("prompts", "share", "seed", "attributes", "pairs_from", "min_gap", "pairs_per_prompt")


def parse_args(argv=None):
    parser = console.parser(__doc__)
    parser.add_argument(
        "--source", choices=("chat", "arrays", "prepared"), default="chat", help="what is read"
    )
    group = parser.add_argument_group("chat data")
    group.add_argument(
        "--dataset", help="a .jsonl file, a folder of save_to_disk, or a name on the hub"
    )
    group.add_argument("--dataset_split", default="train", help="where the data set has splits")
    group.add_argument(
        "--kind", choices=("auto", "rated", "pairs"), default="auto", help="auto: by the columns"
    )
    group = parser.add_argument_group("arrays")
    group.add_argument("--embeddings", type=Path, help="EMBD_*.npy (K, N, D), or .npz with pairs")
    group.add_argument("--labels", type=Path, help="ATTRIBUTES_*.npy (K, N, A); NaN where missing")
    group.add_argument(
        "--attribute_names",
        type=Path,
        help="JSON list of A names; None: attributes.json beside --labels",
    )
    group.add_argument(
        "--prompt_embeddings", type=Path, help="PROMPTEMBD_*.npy (N, D); None: prompts all differ"
    )
    group = parser.add_argument_group("prepared data")
    group.add_argument("--prepared", help="a prepared file, or a pattern of its shards")
    group = parser.add_argument_group("selection")
    group.add_argument(
        "--attributes",
        nargs="+",
        help="labels to keep; None: all of rated data; of pairs none, or P(chosen wins) on each",
    )
    group.add_argument(
        "--prompts", choices=("all", "first", "second"), default="all", help="part of the prompts"
    )
    group.add_argument(
        "--share", type=share, default=0.5, help="of the prompts that are in the first part"
    )
    group.add_argument(
        "--seed", type=kinds.seed, default=6, help="of the two parts and of the pairs"
    )
    group.add_argument(
        "--pairs_from",
        help="make pairs within prompts: the response with more of this attribute wins",
    )
    group.add_argument(
        "--min_gap",
        type=kinds.non_negative,
        default=0.0,
        help="a pair's labels differ by more than this",
    )
    group.add_argument(
        "--pairs_per_prompt", type=kinds.count, default=10, help="at most, drawn at random"
    )
    group = parser.add_argument_group("embedding of chat data")
    group.add_argument(
        "--model",
        help="gemma2b, gemma7b, llama38b, a hub id or a folder; with other sources a name",
    )
    group.add_argument(
        "--chat_template", type=Path, help="a Jinja file; None: the tokenizer's own template"
    )
    group.add_argument(
        "--max_length",
        type=kinds.count,
        default=4096,
        help="tokens; longer rows are left out and counted",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="bfloat16 on a GPU",
    )
    group.add_argument(
        "--batch_tokens", type=kinds.count, default=16384, help="tokens per batch, with padding"
    )
    group.add_argument(
        "--storage_dtype", choices=("float32", "float16"), default="float32", help="of the file"
    )
    group.add_argument(
        "--trust_remote_code", action="store_true", help="run code that the model brings"
    )
    group.add_argument(
        "--n_shards", type=kinds.count, help=f"parts of the work; None: of {SHARD_ROWS} rows each"
    )
    group.add_argument(
        "--shard_idx",
        type=kinds.seed,
        help="make this shard alone, from 0; None: all, and join them",
    )
    group.add_argument(
        "--merge",
        action="store_true",
        help="join the shards that are there; a missing one is an error",
    )
    group = parser.add_argument_group("outputs")
    group.add_argument("--output", type=Path, required=True, help="the prepared file, .safetensors")
    return check_flags(parser.parse_args(argv))


def share(text):
    value = kinds.positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, found {text!r}")
    return value


def check_flags(args):
    needed = {"chat": ("dataset", "model"), "arrays": ("embeddings",), "prepared": ("prepared",)}[
        args.source
    ]
    if lacking := [f"--{name}" for name in needed if getattr(args, name) is None]:
        raise InputError(
            f"--source {args.source}: expected {' and '.join(lacking)} beside it, found none"
        )
    meant = (
        SOURCES[args.source][:1]
        if args.embeddings and args.embeddings.suffix == ".npz"
        else SOURCES[args.source]
    )
    known = [
        name for names in SOURCES.values() for name in names if getattr(args, name) is not None
    ]
    if unused := [f"--{name}" for name in known if name not in meant]:
        of = f"--source {args.source}" + (" with pairs (.npz)" if meant == ARRAYS[:1] else "")
        raise InputError(
            f"{of}: expected no {', '.join(unused)}, which it does not read; leave it out"
        )
    if args.output.suffix != ".safetensors":
        raise InputError(
            f"--output: expected a name that ends in .safetensors, found {args.output}"
        )
    if args.source == "chat" and args.pairs_from:
        raise InputError(
            "--pairs_from: expected --source arrays or prepared; prepare the ratings, then pairs of them"
        )
    if args.shard_idx is not None and not (args.n_shards and args.shard_idx < args.n_shards):
        raise InputError(
            f"--shard_idx: expected it below --n_shards ({args.n_shards}), found {args.shard_idx}"
        )
    if args.merge and not args.n_shards:
        raise InputError("--merge: expected --n_shards beside it, found none")
    return args


def main(argv=None):
    args, started = parse_args(argv), time.time()
    folder = artifacts.writable_dir(args.output.parent)
    if args.source == "chat":
        work = prepare_chats(args, folder)
    else:
        work = prepare_arrays(args, folder)
    if work is None:
        return
    with artifacts.lock(folder):
        artifacts.record(folder, entry(args), work, [args.output.name], started)
    describe(args.output, attribute_data.read(args.output))


def entry(args):
    return f"prepare {args.output.name}"


def is_finished(args, folder, work):
    done = artifacts.is_finished(folder, entry(args), work)
    if done:
        print(f"prepare: already done in {args.output} (FORCE=1 redoes it)")
    return done


# ------------------------------------------------------------------------------------ arrays, pairs


def prepare_arrays(args, folder):
    """Write --output from arrays or a prepared file; returns the work that was done, None where it was before."""
    paths = [getattr(args, name) for name in ARRAYS]
    if args.labels and not args.attribute_names:
        paths[2] = args.labels.parent / attribute_sources.NAMES_FILE
    source = {
        "producer": attribute_data.MADE_BY,
        "settings": {name: getattr(args, name) for name in SELECTION},
    }
    if args.source == "arrays":
        digests = {
            f"{name} {path.name}": artifacts.sha256(path)
            for name, path in zip(ARRAYS, paths, strict=True)
            if path
        }
        told = {
            "dataset": str(args.embeddings),
            "embedding_model": args.model,
            "prompt_position": "as in the arrays",
        }
        source |= {**told, "sha256": digests}
        if args.embeddings.suffix == ".npz":
            rated = attribute_sources.from_npz(args.embeddings, source)
        elif args.labels is None:
            raise InputError("--source arrays: expected --labels beside --embeddings, found none")
        else:
            rated = attribute_sources.from_arrays(*paths, source)
    else:
        rated = attribute_data.read(args.prepared)
        source |= {
            key: rated.source.get(key) for key in ("dataset", "embedding_model", "prompt_position")
        }
        source |= {"made_of": rated.source, "sha256": rated.digests}
    work = responses.work_of(
        source["settings"], {**source["sha256"], "embedding_model": source["embedding_model"]}
    )
    with artifacts.lock(folder):
        if is_finished(args, folder, work):
            return None
        attribute_data.write(args.output, select(args, rated, source))
    return work


def select(args, rated, source):
    """The part of `rated` that the flags ask for, or pairs made of it."""
    rated = replace(rated, source=source)
    if args.prompts != "all":
        part = attribute_sources.in_half(rated.groups, args.prompts, args.share, args.seed)
        rated = attribute_sources.take(rated, np.flatnonzero(part))
    if (args.pairs_from or args.attributes) and (
        rated.labels is None or (args.pairs_from and rated.is_pairs)
    ):
        raise InputError(
            f"{source['dataset']}: expected rated responses with labels, found none; give rated data"
        )
    if args.pairs_from:
        settings = (args.min_gap, args.pairs_per_prompt, args.seed)
        rated, counts = attribute_sources.pairs_of(
            rated, args.pairs_from, args.attributes or [], *settings
        )
        told = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in counts.items())
        print(f"prepare: {len(rated.ids)} pairs by {args.pairs_from}: {told}")
    elif args.attributes:
        rated = attribute_sources.choose(rated, args.attributes)
    return rated


# ---------------------------------------------------------------------------------------- chat data


def prepare_chats(args, folder):
    """Embed shards and join them; returns the work that was done, None where some are missing or all was done."""
    chats = chat_data.read(args.dataset, args.dataset_split, args.kind, args.attributes)
    if args.prompts != "all":
        part = attribute_sources.in_half(chats.groups, args.prompts, args.share, args.seed)
        chats = chats.take(np.flatnonzero(part))
    names = ("prompts", "share", "seed", "kind", "max_length", "storage_dtype")
    settings = {**{name: getattr(args, name) for name in names}, "attributes": chats.attributes}
    settings["dtype"] = str(loading.torch_dtype(args.dtype))
    settings["chat_template"] = args.chat_template and artifacts.sha256(args.chat_template)
    inputs = {"dataset": chats.digest, "model": artifacts.hash_of(loading.fingerprint(args.model))}
    work = responses.work_of(settings, inputs)
    if args.shard_idx is None and is_finished(args, folder, work):
        return None
    source = {
        "producer": attribute_data.MADE_BY,
        "dataset": args.dataset,
        "sha256": chats.digest,
        "embedding_model": loading.full_name(args.model),
        "model": inputs["model"],
        "prompt_position": chat_embeddings.PROMPT_POSITION,
        "settings": settings,
    }
    args.n_shards = args.n_shards or math.ceil(len(chats.ids) / SHARD_ROWS)
    if args.n_shards > len(chats.ids):
        raise InputError(
            f"--n_shards: expected at most the {len(chats.ids)} rows, found {args.n_shards}; lower it"
        )
    paths = [
        folder / attribute_data.shard_name(args.output.stem, idx, args.n_shards)
        for idx in range(args.n_shards)
    ]
    wanted = (
        [] if args.merge else range(args.n_shards) if args.shard_idx is None else [args.shard_idx]
    )
    make_shards(args, chats, source, {idx: paths[idx] for idx in wanted})
    if args.shard_idx is not None:
        print(
            f"prepare: {paths[args.shard_idx]} is there; the same command without --shard_idx joins all of them"
        )
        return None
    with artifacts.lock(folder):
        chat_embeddings.join(args.output, paths, source)
    return work


def make_shards(args, chats, source, paths):
    """Embed the rows of the shards in `paths` {number: path} that are not finished."""
    model = None
    for idx, path in paths.items():
        with chat_embeddings.shard_lock(path):
            if chat_embeddings.is_shard(path, source):
                continue
            if model is None:
                model, tokenizer = load(args)
                pad_id = loading.padding_token(tokenizer, args.model)
                chat_embeddings.check_disk(path.parent, chats, model, args.storage_dtype)
            part = chats.take(chat_embeddings.shard_rows(len(chats.ids), idx, args.n_shards))
            sizes = {
                name: getattr(args, name)
                for name in ("max_length", "batch_tokens", "storage_dtype")
            }
            with loading.memory_of(f"--batch_tokens (now {args.batch_tokens})"):
                rated, n_alone = chat_embeddings.embed(
                    model, tokenizer, pad_id, part, **sizes, desc=path.stem
                )
            attribute_data.write(path, replace(rated, source=source))
            alone = f"; {n_alone} prompts in a pass of their own" if n_alone else ""
            print(
                f"prepare: {path.stem}: {len(rated.ids)} rows, {len(rated.left_out)} left out{alone}",
                flush=True,
            )


def load(args):
    tokenizer = chat_embeddings.load_tokenizer(
        args.model, args.chat_template, args.trust_remote_code
    )
    return loading.load_model("base", args.model, args.dtype, args.trust_remote_code), tokenizer


def describe(path, rated):
    """Print what a prepared file holds."""
    n, *rest = rated.shape
    kind = "pairs" if rated.is_pairs else "rated responses"
    print(
        f"prepare: {path}: {n} {kind} to {len(set(rated.groups.tolist()))} prompts x {rest[-1]} dimensions"
    )
    if rated.left_out:
        shown = ", ".join(rated.left_out[:SHOWN]) + (", ..." if len(rated.left_out) > SHOWN else "")
        print(
            f"prepare: {len(rated.left_out)} of {n + len(rated.left_out)} rows too long, left out: {shown}"
        )
    if rated.labels is not None:
        found = np.isfinite(rated.labels).sum(0)
        print(
            "prepare: labels: "
            + ", ".join(f"{a} {m}" for a, m in zip(rated.attributes, found, strict=True))
        )
    if rated.subsets:
        print(f"prepare: {len(set(rated.subsets))} subsets")


if __name__ == "__main__":
    console.run(main, "prepare")
