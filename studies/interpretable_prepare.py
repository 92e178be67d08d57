"""Prepare data of the interpretable-reward study: embeddings, labels, and prompt numbers.

--source chat      conversations, rated or in pairs, through a language model. The embedding of a
                   response is the state of the last token of the conversation; the embedding of its
                   prompt is the state of the token with which the assistant's turn opens.
--source arrays    the same from existing .npy or .npz files
--source prepared  a part of a prepared file, or pairs from its ratings (--pairs_from)

Conversations are embedded shard by shard. Finished shards are kept when a run ends early, and
joined at the end. For several GPUs or machines, start one process for each --shard_idx, then the
same command without --shard_idx.

Reads   --dataset: rows of {"messages", numbers...} or {"chosen", "rejected"}, as described in
        studies/interpretable/chat_data.py; or --embeddings, --labels, --attribute_names and
        --prompt_embeddings; or --prepared
Writes  --output (.safetensors), as described in studies/interpretable/attribute_data.py, and
        manifest.json beside it
Example python studies/interpretable_prepare.py --dataset rated.jsonl --model MODEL \\
            --output rated.safetensors
        python studies/interpretable_prepare.py --source prepared --prepared rated.safetensors \\
            --pairs_from helpfulness --output pairs.safetensors
"""

import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewardlib import artifacts
from rewardlib.cli import console, flags, kinds
from rewardlib.errors import InputError
from rewardlib.llm import loading
from studies.interpretable import (
    attribute_data,
    attribute_sources,
    chat_data,
    chat_embeddings,
    flag_values,
)

SHARD_ROWS = 4096
IDS_SHOWN = 5
ARRAYS = ("embeddings", "labels", "attribute_names", "prompt_embeddings")
SOURCES = {"chat": ("dataset",), "arrays": ARRAYS, "prepared": ("prepared",)}
REQUIRED = {"chat": ("dataset", "model"), "arrays": ("embeddings",), "prepared": ("prepared",)}
SELECTION = ("prompts", "share", "seed", "attributes", "pairs_from", "min_gap", "pairs_per_prompt")


def make_parser():
    """The parser of all flags. Flags that contradict each other pass; parse_args refuses them."""
    parser = console.parser(__doc__)
    parser.add_argument(
        "--source", choices=tuple(SOURCES), default="chat", help="kind of the input"
    )
    group = parser.add_argument_group("conversations (--source chat)")
    group.add_argument(
        "--dataset",
        help="data set of conversations: a .jsonl file, a folder of save_to_disk, or a hub name",
    )
    group.add_argument(
        "--dataset_split", default="train", help="split to read, where the data set has splits"
    )
    group.add_argument(
        "--kind",
        choices=("auto", "rated", "pairs"),
        default="auto",
        help="rated responses or pairs; auto: told by the columns",
    )
    add_array_flags(parser)
    group = parser.add_argument_group("prepared data (--source prepared)")
    group.add_argument("--prepared", help="prepared file, or a quoted pattern of its shards")
    add_selection_flags(parser)
    add_embedding_flags(parser)
    group = parser.add_argument_group("outputs")
    group.add_argument(
        "--output", type=Path, required=True, help="prepared file to write, .safetensors"
    )
    return parser


def add_array_flags(parser):
    group = parser.add_argument_group("arrays (--source arrays)")
    group.add_argument(
        "--embeddings",
        type=Path,
        help="file EMBD_*.npy (K, N, D) of rated responses, or .npz file of pairs",
    )
    group.add_argument(
        "--labels",
        type=Path,
        help="file ATTRIBUTES_*.npy (K, N, A), with NaN where a label is missing",
    )
    group.add_argument(
        "--attribute_names",
        type=Path,
        help="JSON file with a list of A names; None: attributes.json beside --labels",
    )
    group.add_argument(
        "--prompt_embeddings",
        type=Path,
        help="file PROMPTEMBD_*.npy (N, D); None: all prompts count as different",
    )


def add_selection_flags(parser):
    group = parser.add_argument_group("selection")
    group.add_argument(
        "--attributes",
        nargs="+",
        help="labels to keep, of pairs P(chosen is preferred); None: all of rated responses, none "
        "of pairs",
    )
    group.add_argument(
        "--prompts",
        choices=("all", "first", "second"),
        default="all",
        help="part of the prompts to keep",
    )
    group.add_argument(
        "--share",
        type=flag_values.share,
        default=0.5,
        help="share of the prompts that belong to the first part",
    )
    group.add_argument(
        "--seed", type=kinds.seed, default=6, help="random seed of the two parts and of the pairs"
    )
    group.add_argument(
        "--pairs_from",
        help="make pairs of responses to one prompt: the response with more of this attribute is "
        "the chosen one",
    )
    group.add_argument(
        "--min_gap",
        type=kinds.non_negative,
        default=0.0,
        help="the labels of a pair differ by more than this",
    )
    group.add_argument(
        "--pairs_per_prompt",
        type=kinds.count,
        default=10,
        help="largest number of pairs of a prompt, drawn at random",
    )


def add_embedding_flags(parser):
    group = parser.add_argument_group("embedding of conversations")
    group.add_argument(
        "--model",
        help=f"model that embeds: {flags.MODEL_HELP}; with other sources a name to record",
    )
    group.add_argument(
        "--chat_template",
        type=Path,
        help="Jinja file with a chat template; None: the template of the tokenizer",
    )
    group.add_argument(
        "--max_length",
        type=kinds.count,
        default=4096,
        help="largest number of tokens of a conversation; longer rows are left out and counted",
    )
    group.add_argument(
        "--batch_tokens",
        type=kinds.count,
        default=16384,
        help="largest number of tokens in a batch, with padding",
    )
    group.add_argument(
        "--storage_dtype",
        choices=("float32", "float16"),
        default="float32",
        help="type of the embeddings in the prepared file",
    )
    flags.add_language_model_flags(group)
    group.add_argument(
        "--n_shards",
        type=kinds.count,
        help=f"number of shards; None: one for every {SHARD_ROWS} rows",
    )
    group.add_argument(
        "--shard_idx",
        type=kinds.seed,
        help="make this shard alone, counted from 0; None: make all shards and join them",
    )
    group.add_argument(
        "--merge",
        action="store_true",
        help="join the existing shards without making any; a missing shard is an error",
    )


def parse_args(argv=None):
    """The parsed flags; InputError where they contradict each other."""
    args = make_parser().parse_args(argv)
    check_inputs(args)
    if args.output.suffix != ".safetensors":
        raise InputError(
            f"--output: expected a file name that ends in .safetensors, found {args.output}"
        )
    if args.source == "chat" and args.pairs_from:
        raise InputError(
            "--pairs_from needs --source arrays or prepared; prepare the ratings, then pairs from "
            "them"
        )
    if args.shard_idx is not None and not (args.n_shards and args.shard_idx < args.n_shards):
        raise InputError(
            f"--shard_idx: expected a number below --n_shards ({args.n_shards}), "
            f"found {args.shard_idx}"
        )
    if args.merge and not args.n_shards:
        raise InputError("--merge needs --n_shards")
    return args


def check_inputs(args):
    """InputError unless the inputs that --source reads are given, and no others."""
    lacking = [f"--{name}" for name in REQUIRED[args.source] if getattr(args, name) is None]
    if lacking:
        raise InputError(f"--source {args.source} needs {' and '.join(lacking)}")
    reads, title = SOURCES[args.source], f"--source {args.source}"
    if args.embeddings and args.embeddings.suffix == ".npz":
        reads = reads[:1]
        title += " with pairs (.npz)" if args.source == "arrays" else ""
    names = [name for names in SOURCES.values() for name in names]
    unused = [f"--{n}" for n in names if n not in reads and getattr(args, n) is not None]
    if unused:
        raise InputError(f"{title} does not read {', '.join(unused)}; leave it out")


def main(argv=None):
    args = parse_args(argv)
    folder = artifacts.writable_dir(args.output.parent)
    prepare = prepare_chats if args.source == "chat" else prepare_arrays
    if prepare(args, folder):
        describe(args.output, attribute_data.read(args.output))


def entry(args):
    """Name of the manifest entry of --output."""
    return f"prepare {args.output.name}"


# ------------------------------------------------------------------------------------ arrays, pairs


def prepare_arrays(args, folder):
    """Write --output from arrays or a prepared file; False where that was done before."""
    settings = {name: getattr(args, name) for name in SELECTION}
    rated = (open_arrays if args.source == "arrays" else open_prepared)(args, settings)
    digests, model = rated.source["sha256"], rated.source["embedding_model"]
    inputs = {**digests, "embedding_model": model}
    with (
        artifacts.lock(folder),
        artifacts.work(folder, entry(args), None, settings, inputs) as work,
    ):
        if work is None:
            return False
        attribute_data.write(args.output, select(args, rated))
        work.outputs.append(args.output.name)
    return True


def open_arrays(args, settings):
    """Rated responses or pairs from the files of ARRAYS."""
    files = {name: getattr(args, name) for name in ARRAYS}
    if args.labels and not args.attribute_names:
        files["attribute_names"] = args.labels.parent / attribute_sources.NAMES_FILE
    source = {
        "producer": attribute_data.MADE_BY,
        "settings": settings,
        "dataset": str(args.embeddings),
        "embedding_model": args.model,
        "prompt_position": "as in the arrays",
        "sha256": {
            f"{name} {path.name}": artifacts.sha256(path) for name, path in files.items() if path
        },
    }
    if args.embeddings.suffix == ".npz":
        return attribute_sources.from_npz(args.embeddings, source)
    if args.labels is None:
        raise InputError("--source arrays with rated responses (.npy) needs --labels")
    return attribute_sources.from_arrays(*files.values(), source)


def open_prepared(args, settings):
    """The prepared file --prepared, whose source becomes part of the new source."""
    rated = attribute_data.read(args.prepared)
    origin = ("dataset", "embedding_model", "prompt_position")
    source = {
        "producer": attribute_data.MADE_BY,
        "settings": settings,
        **{key: rated.source.get(key) for key in origin},
        "made_of": rated.source,
        "sha256": rated.digests,
    }
    return replace(rated, source=source)


def select(args, rated):
    """The part of `rated` that the flags ask for, or pairs from it."""
    if args.prompts != "all":
        in_part = attribute_sources.in_half(rated.groups, args.prompts, args.share, args.seed)
        rated = attribute_sources.take(rated, np.flatnonzero(in_part))
    needs_labels = args.pairs_from or args.attributes
    if (needs_labels and rated.labels is None) or (args.pairs_from and rated.is_pairs):
        raise InputError(
            f"{rated.source['dataset']}: no rated responses with labels, which --attributes and "
            "--pairs_from need; give rated data"
        )
    if args.pairs_from:
        settings = (args.min_gap, args.pairs_per_prompt, args.seed)
        rated, counts = attribute_sources.pairs_of(
            rated, args.pairs_from, args.attributes or [], *settings
        )
        words = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in counts.items())
        print(f"prepare: {len(rated.ids)} pairs by {args.pairs_from}: {words}")
    elif args.attributes:
        rated = attribute_sources.choose(rated, args.attributes)
    return rated


# ------------------------------------------------------------------------------------ conversations


def prepare_chats(args, folder):
    """Embed the shards of --dataset and join them.

    False where that was done before, or where --shard_idx leaves other shards to other processes.
    """
    chats = chat_data.read(args.dataset, args.dataset_split, args.kind, args.attributes)
    if args.prompts != "all":
        in_part = attribute_sources.in_half(chats.groups, args.prompts, args.share, args.seed)
        chats = chats.take(np.flatnonzero(in_part))
    settings = chat_settings(args, chats)
    inputs = {"dataset": chats.digest, "model": artifacts.hash_of(loading.fingerprint(args.model))}
    source = {
        "producer": attribute_data.MADE_BY,
        "dataset": args.dataset,
        "sha256": chats.digest,
        "embedding_model": loading.full_name(args.model),
        "model": inputs["model"],
        "prompt_position": chat_embeddings.PROMPT_POSITION,
        "settings": settings,
    }
    paths = shard_paths(args, folder, len(chats.ids))
    if args.shard_idx is not None:
        make_shards(args, chats, source, paths, [args.shard_idx])
        print(
            f"prepare: {paths[args.shard_idx]} is finished; the same command without --shard_idx "
            "joins all shards"
        )
        return False
    started, identity = time.time(), artifacts.identity(None, settings, inputs)
    if not (args.merge or artifacts.is_finished(folder, entry(args), identity)):
        # without the lock of the folder, in which other files may be prepared meanwhile
        make_shards(args, chats, source, paths, range(len(paths)))
    with (
        artifacts.lock(folder),
        artifacts.work(folder, entry(args), None, settings, inputs) as work,
    ):
        if work is None:
            return False
        work.started = started
        chat_embeddings.join(args.output, paths, source)
        work.outputs.append(args.output.name)
    return True


def chat_settings(args, chats):
    """The settings that decide what the embeddings of conversations are."""
    names = ("prompts", "share", "seed", "kind", "max_length", "storage_dtype")
    return {
        **{name: getattr(args, name) for name in names},
        "attributes": chats.attributes,
        "dtype": str(loading.torch_dtype(args.dtype)),
        "chat_template": args.chat_template and artifacts.sha256(args.chat_template),
    }


def shard_paths(args, folder, n_rows):
    """Paths of all shards, in order."""
    n_shards = args.n_shards or math.ceil(n_rows / SHARD_ROWS)
    if n_shards > n_rows:
        raise InputError(
            f"--n_shards: expected at most the number of rows, {n_rows}, found {n_shards}; lower it"
        )
    names = [attribute_data.shard_name(args.output.stem, i, n_shards) for i in range(n_shards)]
    return [folder / name for name in names]


def make_shards(args, chats, source, paths, numbers):
    """Embed the rows of the shards with these numbers, except those that are finished."""
    model = None
    for idx in numbers:
        path = paths[idx]
        with chat_embeddings.shard_lock(path):
            if chat_embeddings.is_shard(path, source):
                continue
            if model is None:  # loaded once, and only where a shard is to be made
                model, tokenizer = load(args)
                pad_id = loading.padding_token(tokenizer, args.model)
                chat_embeddings.check_disk(path.parent, chats, model, args.storage_dtype)
            shard = chats.take(chat_embeddings.shard_rows(len(chats.ids), idx, len(paths)))
            with loading.memory_of(f"--batch_tokens (now {args.batch_tokens})"):
                rated, n_alone = chat_embeddings.embed(
                    model,
                    tokenizer,
                    pad_id,
                    shard,
                    max_length=args.max_length,
                    batch_tokens=args.batch_tokens,
                    storage_dtype=args.storage_dtype,
                    desc=path.stem,
                )
            attribute_data.write(path, replace(rated, source=source))
            alone = f"; {n_alone} prompts in a pass of their own" if n_alone else ""
            counts = f"{len(rated.ids)} rows, {len(rated.left_out)} left out{alone}"
            print(f"prepare: {path.stem}: {counts}", flush=True)


def load(args):
    """(model, tokenizer) of --model."""
    tokenizer = chat_embeddings.load_tokenizer(
        args.model, args.chat_template, args.trust_remote_code
    )
    return loading.load_model("base", args.model, args.dtype, args.trust_remote_code), tokenizer


# ------------------------------------------------------------------------------------------- report


def describe(path, rated):
    """Print what a prepared file holds."""
    n_rows, n_prompts = len(rated.ids), len(set(rated.groups.tolist()))
    kind = "pairs" if rated.is_pairs else "rated responses"
    print(f"prepare: {path}: {n_rows} {kind} to {n_prompts} prompts x {rated.shape[-1]} dimensions")
    if n_left_out := len(rated.left_out):
        shown = ", ".join(rated.left_out[:IDS_SHOWN]) + (", ..." if n_left_out > IDS_SHOWN else "")
        n_all = n_rows + n_left_out
        print(f"prepare: {n_left_out} of {n_all} rows were too long and are left out: {shown}")
    if rated.labels is not None:
        counts = zip(rated.attributes, np.isfinite(rated.labels).sum(0), strict=True)
        print("prepare: labels: " + ", ".join(f"{name} {n}" for name, n in counts))
    if rated.subsets:
        print(f"prepare: {len(set(rated.subsets))} subsets")


if __name__ == "__main__":
    console.run(main, "prepare")
