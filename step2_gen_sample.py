"""Step 2: sample K responses to every prompt, with vLLM on a GPU or transformers anywhere.

The prompts are worked on in five parts. The text sampled for a prompt depends on the prompt, --seed
and the sampling settings, not on the other prompts. Prompts of more than --max_prompt_tokens are
dropped by id, counted and listed.

Reads   --eval_dataset, one of
        hh-rlhf-{helpful,harmless}   DATA_DIR/NAME, a folder of save_to_disk, or the hub
        ultrafeedback, helpsteer     DATA_DIR/NAME_{train,test}.csv with prompt
        a .jsonl or .csv file        with prompt (and id); {data_class} in its name stands
                                     for train or test
        SFT_DIR/{model}_{dataset}/adapter of step 1, with --adapter_name sft
Writes  OUTPUT_DIR/{prompts}_{model}_{adapter}/{train,test}-part_{0-4}/
        responses.jsonl   id, query, responses in order
        prompts.json      counts and dropped prompts
Example python step2_gen_sample.py --model_name gemma2b --dataset hh-rlhf-helpful-gpt4
"""

import hashlib
import importlib.util
import time
from pathlib import Path

from tqdm import tqdm

from rewardlib import artifacts, seeds
from rewardlib.cli import console, flags, kinds
from rewardlib.errors import InputError
from rewardlib.llm import loading, prompts, responses, sampling

SAMPLING = ("n_samples", "max_len", "temperature", "top_p", "seed")
N_SAMPLES = {"train": 10, "test": 500}
SEED_SPACING = 1 << 16


def make_parser():
    parser = console.parser(__doc__)
    group = parser.add_argument_group("inputs")
    flags.add_generator_flag(group, "model_name")
    flags.add_prompt_flags(group)
    flags.add_data_class_flag(group)
    flags.add_part_flag(group)
    flags.add_max_prompts_flag(group)
    group.add_argument(
        "--max_prompt_tokens",
        type=kinds.count,
        default=450,
        help="upper limit on the number of tokens of a prompt; longer prompts are dropped",
    )
    group.add_argument("--data_dir", default=flags.DATA_DIR, help="folder of the prompt files")
    group.add_argument("--sft_dir", default=flags.SFT_DIR, help="folder of step 1's adapters")
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--n_samples",
        type=kinds.count,
        help="number of responses per prompt, K; None: 10 for train, 500 for test",
    )
    group.add_argument(
        "--max_len",
        type=kinds.count,
        default=128,
        help="upper limit on the number of tokens of a response",
    )
    group.add_argument(
        "--temperature",
        type=kinds.non_negative,
        default=1.0,
        help="sampling temperature; 0: the likeliest token each time",
    )
    group.add_argument(
        "--top_p",
        type=kinds.probability,
        default=0.95,
        help="probability mass of the tokens to sample from",
    )
    flags.add_seed_flag(group)
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--backend",
        choices=("auto", "vllm", "transformers"),
        default="auto",
        help="library that samples; auto: vllm on a GPU",
    )
    flags.add_language_model_flags(group)
    group.add_argument(
        "--tensor_parallel",
        type=kinds.count,
        default=1,
        help="number of GPUs that share the model (vllm)",
    )
    group.add_argument(
        "--gpu_memory_utilization",
        type=kinds.probability,
        default=0.9,
        help="share of the GPU memory to use (vllm)",
    )
    group.add_argument(
        "--output_dir", default=flags.GEN_DIR, help="folder of the generated responses"
    )
    return parser


def parse_args(argv=None):
    args = make_parser().parse_args(argv)
    args.eval_dataset = args.eval_dataset or prompts.default_prompts(args.dataset)
    args.n_samples = args.n_samples or N_SAMPLES[args.data_class]
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
        f"step2: {about['n_kept']} of {about['n_read']} {args.data_class} prompts of "
        f"{args.eval_dataset}; dropped {len(about['dropped'])} of more than "
        f"{args.max_prompt_tokens} tokens"
    )
    settings = {key: getattr(args, key) for key in SAMPLING} | {"backend": backend}
    settings["dtype"] = str(loading.torch_dtype(args.dtype))
    inputs = {
        "model": loading.fingerprint(args.model_name),
        "adapter": loading.fingerprint(adapter) if adapter else None,
    }
    folder = responses.run_folder(
        args.output_dir, args.eval_dataset, args.model_name, args.adapter_name, args.dataset
    )
    sampler = None
    for part in responses.parts_named(args.split):
        part_dir = artifacts.writable_dir(responses.part_folder(folder, args.data_class, part))
        part_rows = responses.part_of(rows, part)
        texts = [[row["id"], row["query"]] for row in part_rows]
        digest = artifacts.hash_of([texts, about])
        with (
            artifacts.lock(part_dir),
            artifacts.work(
                part_dir, "step2", None, settings, {**inputs, "prompts": digest}
            ) as work,
        ):
            if work is None:
                continue
            with loading.memory_of("--gpu_memory_utilization, --n_samples or --max_prompt_tokens"):
                sampler = sampler or open_backend(args, backend, tokenizer, adapter)
                tokens = sample_part(args, sampler, part_rows)
            work.write_jsonl("responses.jsonl", decoded(tokenizer, part_rows, tokens))
            work.write_json("prompts.json", about)
        n_tokens = sum(len(response) for prompt in tokens for response in prompt)
        rate = n_tokens / max(1e-9, time.time() - work.started)
        print(
            f"step2: part {part}: {len(part_rows)} prompts x {args.n_samples} responses in "
            f"{part_dir} ({rate:.0f} tokens/s)"
        )
    print("step2: done; next: step3_reward_annotation.py")


def decoded(tokenizer, rows, tokens):
    """{"id", "query", "responses"} of every prompt, from the token ids of its responses."""
    for row, prompt_tokens in zip(rows, tokens, strict=True):
        texts = [sampling.decode(tokenizer, row["ids"], ids) for ids in prompt_tokens]
        yield {"id": row["id"], "query": row["query"], "responses": texts}


def choose_backend(name):
    """vllm or transformers; auto is vllm where it is installed and there is a GPU."""
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise InputError(
            "backend vllm: the package vllm is missing; install it or use --backend transformers"
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
                f"adapter_name {args.adapter_name}: expected sft, none or a folder of a LoRA "
                "adapter"
            )
        return Path(args.adapter_name)
    folder = responses.adapter_folder(args.sft_dir, args.model_name, args.dataset)
    entry = artifacts.read_manifest(folder).get("step1", {"outputs": {}})
    responses.finished(folder, "step1", entry["outputs"], "step1_sft.py")
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
            f"{args.eval_dataset}: none of {read} prompts has at most {args.max_prompt_tokens} "
            "tokens"
        )
    about = {"source": args.eval_dataset, "n_read": read, "n_kept": len(rows), "dropped": dropped}
    return rows, {**about, "max_prompt_tokens": args.max_prompt_tokens}


def prompt_seed(seed, prompt_id):
    """The seed of a prompt, far from all others: vLLM gives seed + j to response j."""
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
        prompts_and_seeds = list(zip(ids, prompt_seeds, strict=True))
        bar = tqdm(prompts_and_seeds, desc="prompts", disable=None)
        return [
            sampling.sample(model, tokenizer, prompt_ids, seed, *settings)
            for prompt_ids, seed in bar
        ]

    return sample_all


def sample_part(args, sample_all, rows):
    own = [prompt_seed(args.seed, row["id"]) for row in rows]
    settings = (args.n_samples, args.max_len, args.temperature, args.top_p)
    return sample_all([row["ids"] for row in rows], own, *settings) if rows else []


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
