"""Step 4: embed prompt + response, one file of last-token hidden states per response number, as steps 5 to 8 read them.

Texts are batched by a token budget, longest first, and put back in order. The work is done file by file in
--output_dir/.embedding (each finished file is kept when a run ends early) and moved into place when all of it is there.
Several GPUs: one process each with its own --split; the one that ends last moves the files.

Reads   GEN_DIR/{prompts}_{model}_{adapter}/records_{rm}_{train,test}.jsonl of step 3.5
Writes  --output_dir/EMBD-{TRAIN,TEST}-split_{k}.npy, rewards_{,test_}split_{k}.json, manifest.json
        --published_dir/EMBD_{dataset}_{embed}_{gen}_{split}.npy (K, N, D) and REWARD_*.npy (K, N), where it is given
Example python step4_gen_embeddings.py --embed_model_name gemma2b --gen_pref_model_name gemma2b --output_dir data
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


def parse_args(argv=None):
    parser = console.parser(__doc__)
    group = parser.add_argument_group("inputs")
    flags.add_generated_flags(group)
    group.add_argument(
        "--train_test", choices=("train", "test", "both"), default="both", help="which prompts"
    )
    group.add_argument(
        "--n_samples", type=kinds.count, help="first responses of each train prompt; None: all"
    )
    group.add_argument(
        "--n_test_samples", type=kinds.count, help="first responses of each test prompt; None: all"
    )
    group.add_argument(
        "--split", choices=("0", "1", "2", "3", "4", "all"), default="all", help="k = split mod 5"
    )
    group = parser.add_argument_group("embedding")
    group.add_argument(
        "--embed_model_name",
        default="gemma2b",
        help="gemma2b, gemma7b, llama38b, a hub id or a folder",
    )
    group.add_argument(
        "--max_length", type=kinds.count, default=1024, help="most tokens of prompt and response"
    )
    group.add_argument(
        "--pooling", choices=("last", "mean"), default="last", help="of the last hidden states"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="bfloat16 on a GPU",
    )
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--batch_tokens", type=kinds.count, default=16384, help="tokens per batch, with padding"
    )
    group.add_argument(
        "--trust_remote_code", action="store_true", help="run code that the model brings"
    )
    group.add_argument("--gen_dir", default="gen_data", help="OUTPUT_DIR of step 2")
    group = parser.add_argument_group("outputs")
    group.add_argument("--output_dir", default="data", help="DATA_DIR of the other steps")
    group.add_argument(
        "--storage_dtype", choices=("float32", "float16"), default="float32", help="of the files"
    )
    group.add_argument("--published_dir", help="also write (K, N, D) files there; None: no")
    return flags.name_sources(parser.parse_args(argv))


def main(argv=None):
    args = parse_args(argv)
    output_dir = artifacts.writable_dir(args.output_dir)
    folder = responses.run_folder(
        args.gen_dir, args.eval_dataset, args.gen_pref_model_name, args.adapter_name, args.dataset
    )
    rm = responses.label(args.reward_model)
    splits = ("train", "test") if args.train_test == "both" else (args.train_test,)
    wanted = {"train": args.n_samples, "test": args.n_test_samples}
    records = {split: responses.Records(folder, rm, split, wanted[split]) for split in splits}
    report_overlap(records)
    settings = {
        "pooling": args.pooling,
        "max_length": args.max_length,
        "storage_dtype": args.storage_dtype,
    }
    settings["dtype"] = str(loading.torch_dtype(args.dtype))
    embedder = responses.work_of(settings, {"model": loading.fingerprint(args.embed_model_name)})
    plan = staging.plan_of(records, embedder)
    if staging.is_done(output_dir, plan):
        print(f"step4: already done in {output_dir} (FORCE=1 redoes it)")
    else:
        staging.check_room(output_dir)
        make_files(args, output_dir, records, plan)
        with artifacts.lock(output_dir):
            if not staging.is_done(output_dir, plan):
                missing = staging.missing(output_dir, plan)
                if missing:
                    print(
                        f"step4: {len(missing)} files of other --split values are missing: {', '.join(missing[:4])}"
                    )
                    return
                told = {key: value for key, value in vars(args).items() if key != "debug"}
                staging.publish(output_dir, plan, embedder, told)
    for split in splits:
        loaded = embeddings.load(output_dir, split)
        n, k, d = loaded.shape
        print(f"step4: {split}: {n} prompts x {k} responses x {d} dimensions in {output_dir}")
        if args.published_dir:
            names = [
                responses.label(name) for name in (args.embed_model_name, args.gen_pref_model_name)
            ]
            stem = f"{responses.label(args.dataset)}_{{}}_{names[1]}_{split}.npy"
            write_published(
                Path(args.published_dir), stem.format(names[0]), stem.format(rm), loaded
            )
    print("step4: done; next: step5_train_rms.py")


def report_overlap(records):
    """Say how many test prompts are train prompts too: the test set is then no fresh one."""
    if len(records) == 2:
        texts = {
            split: {record["query"] for record in part.of(0)} for split, part in records.items()
        }
        both = len(texts["train"] & texts["test"])
        if both:
            print(
                f"step4: {both} of {len(texts['test'])} test prompts are among the train prompts as well"
            )


def make_files(args, output_dir, records, plan):
    """Embed the responses that are not done yet, a file at a time."""
    model = tokenizer = None
    for split, part in itertools.product(records, responses.parts_named(args.split)):
        source = records[split]
        folder = artifacts.writable_dir(staging.part_folder(output_dir, split, part))
        with artifacts.lock(folder):
            for k in range(part, source.K, responses.PARTS):
                if staging.staged(output_dir, plan, split, k) and not staging.is_forced():
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
            f"{desc}: expected finite embeddings, found {bad.sum()} rows that are not, the first of prompt "
            f"{rows[int(bad.argmax())]['id']}; use --dtype float32 or --storage_dtype float32"
        )
    rate = sum(map(len, ids)) / (time.time() - started)
    print(f"step4: {desc}: {array.shape[0]} x {array.shape[1]}, {rate:.0f} tokens/s", flush=True)
    return array


def write_published(folder, embedding_name, reward_name, loaded):
    """The published format 1: EMBD (K, N, D) and REWARD (K, N)."""
    artifacts.writable_dir(folder)
    n, k, d = loaded.shape
    dtype = loaded.embeddings[0].dtype
    with artifacts.atomic(folder / f"EMBD_{embedding_name}") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": dtype.str, "fortran_order": False, "shape": (k, n, d)}
        )
        for array in loaded.embeddings:
            file.write(np.ascontiguousarray(array).data)
    artifacts.write_npy(folder / f"REWARD_{reward_name}", loaded.rewards.T.astype(np.float32))
    print(f"step4: wrote {folder / f'EMBD_{embedding_name}'} and REWARD_{reward_name}")


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
