"""Step 2: sample K responses to every prompt, with vLLM on a GPU or transformers anywhere.

The prompts are worked on in five parts. The text sampled for a prompt depends on the prompt, --seed
and the sampling settings, not on the other prompts. Prompts of more than --max_prompt_tokens are
dropped by id, counted and listed.

Reads   --eval_dataset: hh-rlhf-{helpful,harmless} (DATA_DIR/NAME made by save_to_disk, or the hub), ultrafeedback,
        helpsteer (DATA_DIR/NAME_{train,test}.csv with prompt), or a .jsonl / .csv file with prompt (and id), where
        {data_class} in the name stands for train or test
        SFT_DIR/{model}_{dataset}/adapter of step 1, with --adapter_name sft
Writes  OUTPUT_DIR/{prompts}_{model}_{adapter}/{train,test}-part_{0-4}/responses.jsonl   id, query, responses in order
        OUTPUT_DIR/{prompts}_{model}_{adapter}/{train,test}-part_{0-4}/prompts.json      counts and dropped prompts
Example python step2_gen_sample.py --model_name gemma2b --dataset hh-rlhf-helpful-gpt4 --data_class train --n_samples 10
"""

import hashlib
import time
from pathlib import Path

from tqdm import tqdm

from rewardlib import artifacts, seeds
from rewardlib.cli import console, kinds
from rewardlib.errors import InputError
from rewardlib.llm import loading, prompts, responses, sampling

STEP = "step2"
N_SAMPLES = {"train": 10, "test": 500}
SEED_SPACING = 1 << 16


def parse_args(argv=None):
    parser = console.parser(__doc__)
    group = parser.add_argument_group("inputs")
    group.add_argument(
        "--model_name", default="gemma7b", help="gemma2b, gemma7b, llama38b, a hub id or a folder"
    )
    group.add_argument(
        "--adapter_name", default="sft", help="sft: step 1's on --dataset; none; or a folder"
    )
    group.add_argument(
        "--dataset", default="hh-rlhf-helpful-gpt4", help="what the model was fine-tuned on"
    )
    group.add_argument(
        "--eval_dataset", help="where the prompts come from; None: as --dataset, without -gpt4"
    )
    group.add_argument(
        "--data_class", choices=("train", "test"), default="train", help="which prompts"
    )
    group.add_argument(
        "--split",
        choices=("0", "1", "2", "3", "4", "all"),
        default="all",
        help="part of the prompts",
    )
    group.add_argument(
        "--max_prompts",
        type=kinds.count_or_all,
        default="all",
        help="first prompts that fit, or all",
    )
    group.add_argument(
        "--max_prompt_tokens", type=kinds.count, default=450, help="longer prompts are dropped"
    )
    group.add_argument("--data_dir", default="data", help="folder of the prompt files")
    group.add_argument("--sft_dir", default="sft_models", help="OUTPUT_DIR of step 1")
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--n_samples",
        type=kinds.count,
        help="responses per prompt, K; None: 10 for train, 500 for test",
    )
    group.add_argument("--max_len", type=kinds.count, default=128, help="most tokens of a response")
    group.add_argument(
        "--temperature", type=kinds.finite, default=1.0, help="0: the likeliest token each time"
    )
    group.add_argument(
        "--top_p", type=kinds.positive, default=0.95, help="share of the probability to sample from"
    )
    group.add_argument("--seed", type=kinds.seed, default=6, help="of every prompt's own stream")
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--backend",
        choices=("auto", "vllm", "transformers"),
        default="auto",
        help="auto: vllm on a GPU",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="bfloat16 on a GPU",
    )
    group.add_argument(
        "--tensor_parallel", type=kinds.count, default=1, help="GPUs that share the model (vllm)"
    )
    group.add_argument(
        "--gpu_memory_utilization", type=kinds.positive, default=0.9, help="share for vllm"
    )
    group.add_argument(
        "--trust_remote_code", action="store_true", help="run code that the model brings"
    )
    group.add_argument("--output_dir", default="gen_data", help="GEN_DIR of the next steps")
    args = parser.parse_args(argv)
    args.eval_dataset = args.eval_dataset or prompts.default_prompts(args.dataset)
    args.n_samples = args.n_samples or N_SAMPLES[args.data_class]
    if args.temperature < 0 or args.top_p > 1:
        raise InputError(
            f"expected --temperature of at least 0 and --top_p of at most 1, found {args.temperature} and {args.top_p}"
        )
    if args.temperature == 0 and args.n_samples > 1:
        raise InputError(
            f"temperature 0 gives one response: expected --n_samples 1, found {args.n_samples}"
        )
    return args


def main(argv=None):
    args = parse_args(argv)
    backend = choose_backend(args.backend)
    adapter = find_adapter(args)
    tokenizer = loading.load_tokenizer(args.model_name, args.trust_remote_code)
    rows, about = choose_prompts(args, tokenizer)
    print(
        f"step2: {about['n_kept']} of {about['n_read']} {args.data_class} prompts of {args.eval_dataset}; dropped "
        f"{len(about['dropped'])} of more than {args.max_prompt_tokens} tokens"
    )
    names = ("n_samples", "max_len", "temperature", "top_p", "seed")
    settings = {**{key: getattr(args, key) for key in names}, "backend": backend}
    settings["dtype"] = str(loading.torch_dtype(args.dtype))
    inputs = {"model": loading.fingerprint(args.model_name)}
    inputs["adapter"] = loading.fingerprint(adapter) if adapter else None
    folder = responses.run_folder(
        args.output_dir, args.eval_dataset, args.model_name, args.adapter_name, args.dataset
    )
    sample_all = None
    for part in responses.parts_named(args.split):
        part_dir = artifacts.writable_dir(responses.part_folder(folder, args.data_class, part))
        chosen = responses.part_of(rows, part)
        texts = [[row["id"], row["query"]] for row in chosen]
        work = responses.work_of(settings, {**inputs, "prompts": artifacts.hash_of([texts, about])})
        with artifacts.lock(part_dir):
            if artifacts.is_finished(part_dir, STEP, work):
                print(f"step2: already done in {part_dir} (FORCE=1 redoes it)")
                continue
            for change in artifacts.describe_change(part_dir, STEP, work):
                print(f"step2: replacing earlier responses: {change}")
            started = time.time()
            with loading.memory_of("--gpu_memory_utilization, --n_samples or --max_prompt_tokens"):
                sample_all = sample_all or open_backend(args, backend, tokenizer, adapter)
                made = sample_part(args, sample_all, chosen)
            artifacts.write_jsonl(
                part_dir / "responses.jsonl",
                (
                    {
                        "id": row["id"],
                        "query": row["query"],
                        "responses": [sampling.decode(tokenizer, row["ids"], one) for one in new],
                    }
                    for row, new in zip(chosen, made, strict=True)
                ),
            )
            artifacts.write_json(part_dir / "prompts.json", about)
            artifacts.record(part_dir, STEP, work, ["responses.jsonl", "prompts.json"], started)
            tokens = sum(len(one) for new in made for one in new)
            print(
                f"step2: part {part}: {len(chosen)} prompts x {args.n_samples} responses in {part_dir} "
                f"({tokens / max(1e-9, time.time() - started):.0f} tokens/s)"
            )
    print("step2: done; next: step3_reward_annotation.py")


def choose_backend(name):
    """vllm or transformers; auto is vllm where it is installed and there is a GPU."""
    import importlib.util

    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise InputError(
            "backend vllm: expected the package vllm, found none; install it or --backend transformers"
        )
    if name != "auto":
        return name
    return "vllm" if installed and loading.device() == "cuda" else "transformers"


def find_adapter(args):
    if args.adapter_name == "none":
        return None
    if args.adapter_name != "sft":
        if not (Path(args.adapter_name) / "adapter_config.json").is_file():
            raise InputError(
                f"adapter_name {args.adapter_name}: expected sft, none or a folder with a LoRA adapter"
            )
        return Path(args.adapter_name)
    folder = responses.adapter_folder(args.sft_dir, args.model_name, args.dataset)
    told = artifacts.read_manifest(folder).get("step1", {"outputs": {}})
    responses.finished(folder, "step1", told["outputs"], "step1_sft.py")
    return folder / "adapter"


def choose_prompts(args, tokenizer):
    """(rows {"id", "query", "ids"} that fit, the record of what was read and dropped)."""
    rows, dropped, read = [], [], 0
    for row in prompts.read_prompts(args.eval_dataset, args.data_class, args.data_dir):
        if len(rows) == args.max_prompts:
            break
        read += 1
        ids = sampling.encode(tokenizer, row["query"])
        if len(ids) > args.max_prompt_tokens:
            dropped.append({"id": row["id"], "tokens": len(ids)})
        else:
            rows.append({**row, "ids": ids})
    if not rows:
        raise InputError(
            f"{args.eval_dataset}: expected prompts of at most {args.max_prompt_tokens} tokens, found none among {read}"
        )
    about = {"source": args.eval_dataset, "n_read": read, "n_kept": len(rows), "dropped": dropped}
    return rows, {**about, "max_prompt_tokens": args.max_prompt_tokens}


def prompt_seed(seed, prompt_id):
    """A prompt's own seed; those of two prompts are far enough apart for vLLM, whose j-th response takes seed + j."""
    number = int(hashlib.sha256(prompt_id.encode()).hexdigest()[:16], 16)
    return seeds.torch_seed(seed, "sample", number) // SEED_SPACING * SEED_SPACING


def open_backend(args, backend, tokenizer, adapter):
    """sample_all(prompts, seeds, n, max_len, temperature, top_p) of either backend."""
    if backend == "vllm":
        longest = args.max_prompt_tokens + args.max_len
        return sampling.vllm_engine(
            args.model_name,
            args.dtype,
            adapter,
            longest,
            args.tensor_parallel,
            args.gpu_memory_utilization,
            args.seed,
            args.trust_remote_code,
        )
    model = loading.load_model(
        "causal", args.model_name, args.dtype, args.trust_remote_code, adapter
    )

    def sample_all(ids, prompt_seeds, *settings):
        pairs = tqdm(list(zip(ids, prompt_seeds, strict=True)), desc="prompts", disable=None)
        return [sampling.sample(model, tokenizer, one, seed, *settings) for one, seed in pairs]

    return sample_all


def sample_part(args, sample_all, rows):
    own = [prompt_seed(args.seed, row["id"]) for row in rows]
    settings = (args.n_samples, args.max_len, args.temperature, args.top_p)
    return sample_all([row["ids"] for row in rows], own, *settings) if rows else []


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
