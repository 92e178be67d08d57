"""Step 4: embed prompt and response, one file per response number, as steps 5 to 8 read them.

The embedding of a text is the last hidden state of its last token (or the mean over its tokens).
Texts are batched by a token budget, longest first, and put back in order. Files are made one by one
in --output_dir/.embedding, where finished files survive a run that ends early, and move into place
together. Several GPUs: one process each with its own --split; the last to end moves the files.

Reads   GEN_DIR/{prompts}_{model}_{adapter}/records_{rm}_{train,test}.jsonl of step 3.5
Writes  OUTPUT_DIR/EMBD-{TRAIN,TEST}-split_{k}.npy, rewards_{,test_}split_{k}.json, manifest.json
Example python step4_gen_embeddings.py --embed_model_name gemma2b --gen_pref_model_name gemma2b
"""

import itertools
import time
from pathlib import Path

import numpy as np

from rewardlib import artifacts
from rewardlib.cli import console, flags, kinds
from rewardlib.data import embeddings
from rewardlib.errors import InputError
from rewardlib.llm import encoding, loading, responses, sampling, staging


def make_parser():
    parser = console.parser(__doc__)
    group = parser.add_argument_group("inputs")
    flags.add_generated_flags(group)
    group.add_argument(
        "--train_test",
        choices=("train", "test", "both"),
        default="both",
        help="prompts whose responses are embedded",
    )
    group.add_argument(
        "--n_samples",
        type=kinds.count,
        help="number of responses to embed per train prompt, the first ones; None: all",
    )
    group.add_argument(
        "--n_test_samples",
        type=kinds.count,
        help="number of responses to embed per test prompt, the first ones; None: all",
    )
    flags.add_part_flag(group)
    group = parser.add_argument_group("embedding")
    flags.add_embedder_flag(group)
    group.add_argument(
        "--pooling",
        choices=("last", "mean"),
        default="last",
        help="embedding of a text: last hidden state of its last token, or mean over its tokens",
    )
    flags.add_batch_flags(group)
    group = parser.add_argument_group("runtime")
    flags.add_language_model_flags(group)
    group = parser.add_argument_group("outputs")
    group.add_argument(
        "--output_dir", default=flags.DATA_DIR, help="folder of the embeddings, DATA_DIR"
    )
    group.add_argument(
        "--storage_dtype",
        choices=("float32", "float16"),
        default="float32",
        help="type of the embeddings in the files",
    )
    return parser


def parse_args(argv=None):
    return flags.name_sources(make_parser().parse_args(argv))


def main(argv=None):
    args = parse_args(argv)
    output_dir = artifacts.writable_dir(args.output_dir)
    folder = responses.run_folder(
        args.gen_dir, args.eval_dataset, args.gen_pref_model_name, args.adapter_name, args.dataset
    )
    rm = responses.label(args.reward_model)
    splits = ("train", "test") if args.train_test == "both" else (args.train_test,)
    limits = {"train": args.n_samples, "test": args.n_test_samples}
    records = {split: responses.Records(folder, rm, split, limits[split]) for split in splits}
    report_overlap(records)
    settings = {
        "pooling": args.pooling,
        "max_length": args.max_length,
        "storage_dtype": args.storage_dtype,
        "dtype": str(loading.torch_dtype(args.dtype)),
    }
    inputs = {"model": loading.fingerprint(args.embed_model_name)}
    embedder = artifacts.identity(None, settings, inputs)
    plan = staging.plan_of(records, embedder)
    if staging.is_done(output_dir, plan):
        print(f"step4: already done in {output_dir} (FORCE=1 redoes it)")
    else:
        staging.check_room(output_dir)
        make_files(args, output_dir, records, plan)
        if not publish(args, output_dir, plan, embedder):
            return
    for split in splits:
        n, k, d = embeddings.load(output_dir, split).shape
        print(f"step4: {split}: {n} prompts x {k} responses x {d} dimensions in {output_dir}")
    print("step4: done; next: step5_train_rms.py")


def publish(args, output_dir, plan, embedder):
    """Move all files into place; False where those of other --split values are missing."""
    with artifacts.lock(output_dir):
        if not staging.is_done(output_dir, plan):
            missing = staging.missing(output_dir, plan)
            if missing:
                print(
                    f"step4: {len(missing)} files of other --split values are missing: "
                    f"{', '.join(missing[:4])}"
                )
                return False
            arguments = {key: value for key, value in vars(args).items() if key != "debug"}
            staging.publish(output_dir, plan, embedder, arguments)
    return True


def report_overlap(records):
    """Print how many test prompts are train prompts too: the test set is then no fresh one."""
    if len(records) == 2:
        texts = {
            split: {record["query"] for record in part.of(0)} for split, part in records.items()
        }
        both = len(texts["train"] & texts["test"])
        if both:
            print(
                f"step4: {both} of {len(texts['test'])} test prompts are among the train prompts "
                "as well"
            )


def make_files(args, output_dir, records, plan):
    """Embed the responses that are not done yet, a file at a time."""
    model = tokenizer = None
    for split, part in itertools.product(records, responses.parts_named(args.split)):
        source = records[split]
        folder = artifacts.writable_dir(staging.part_folder(output_dir, split, part))
        with artifacts.lock(folder):
            for k in range(part, source.K, responses.PARTS):
                if staging.staged(output_dir, plan, split, k) and not artifacts.is_forced():
                    continue
                if model is None:
                    tokenizer = loading.load_tokenizer(
                        args.embed_model_name, args.trust_remote_code
                    )
                    model = loading.load_model(
                        "base", args.embed_model_name, args.dtype, args.trust_remote_code
                    )
                    row_bytes = (
                        model.config.get_text_config().hidden_size
                        * np.dtype(args.storage_dtype).itemsize
                    )
                    staging.check_disk(output_dir, plan, row_bytes)
                rows = list(source.of(k))
                with loading.memory_of(f"--batch_tokens (now {args.batch_tokens})"):
                    array = embed_rows(
                        args, model, tokenizer, rows, f"{split} response {k} of {source.K}"
                    )
                kept = [
                    {key: row[key] for key in ("reward", "id", "query", "response")} for row in rows
                ]
                staging.stage(folder, plan, split, k, array, kept)


def embed_rows(args, model, tokenizer, rows, desc):
    """(N, D) embeddings of the records `rows`, in their order."""
    started = time.time()
    pad_id = loading.padding_token(tokenizer, args.embed_model_name)
    ids = [sampling.encode(tokenizer, row["query"] + row["response"]) for row in rows]
    encoding.refuse_long(ids, args.max_length, model, desc)
    array = encoding.embed(model, ids, pad_id, args.batch_tokens, args.pooling, desc=desc)
    with np.errstate(over="ignore"):
        array = array.astype(args.storage_dtype)
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise InputError(
            f"{desc}: expected finite embeddings, found {bad.sum()} rows that are not, the first "
            f"of prompt {rows[int(bad.argmax())]['id']}; use --dtype float32 or "
            "--storage_dtype float32"
        )
    rate = sum(map(len, ids)) / (time.time() - started)
    print(f"step4: {desc}: {array.shape[0]} x {array.shape[1]}, {rate:.0f} tokens/s", flush=True)
    return array


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
