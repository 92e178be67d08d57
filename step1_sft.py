"""Step 1: fine-tune a language model with LoRA on prompts and completions; the loss counts completion tokens only.

Reads   --dataset: hh-rlhf-{helpful,harmless}-gpt4 (DATA_DIR/synthetic_hhrlhf_{task}_expert_gpt4.csv: query, response),
        hh-rlhf-{helpful,harmless} (chosen answers; DATA_DIR/NAME made by save_to_disk, or the hub), or a .jsonl / .csv
        file with prompt (query) and completion (response)
Writes  OUTPUT_DIR/{model}_{dataset}/adapter/         the adapter and its tokenizer
        OUTPUT_DIR/{model}_{dataset}/training.json    rows used, dropped and truncated; the loss
        OUTPUT_DIR/{model}_{dataset}/checkpoints/     every --save_steps; an interrupted run goes on from the last
        OUTPUT_DIR/{model}_{dataset}/manifest.json
Example python step1_sft.py --model_name gemma2b --dataset hh-rlhf-helpful-gpt4 --output_dir sft_models
        accelerate launch --num_processes 4 step1_sft.py --model_name gemma7b ...     (several GPUs)
"""

import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

from rewardlib import artifacts
from rewardlib.cli import console, kinds
from rewardlib.errors import InputError
from rewardlib.llm import loading, prompts, responses, sampling

IGNORED = -100
STEP = "step1"


def parse_args(argv=None):
    parser = console.parser(__doc__)
    group = parser.add_argument_group("inputs")
    group.add_argument(
        "--model_name", default="gemma7b", help="gemma2b, gemma7b, llama38b, a hub id or a folder"
    )
    group.add_argument("--dataset", default="hh-rlhf-helpful-gpt4", help="what to fine-tune on")
    group.add_argument("--data_dir", default="data", help="folder of the data files")
    group.add_argument(
        "--max_examples", type=kinds.count_or_all, default="all", help="first rows, or all"
    )
    group = parser.add_argument_group("model")
    group.add_argument("--lora_rank", type=kinds.count, default=32, help="rank of the adapter")
    group.add_argument(
        "--lora_alpha", type=kinds.count, default=32, help="its scale, times the rank"
    )
    group.add_argument(
        "--max_length",
        type=kinds.count,
        default=1024,
        help="tokens of a row; longer ones lose their end",
    )
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--learning_rate", type=kinds.positive, default=5e-5, help="peak of the schedule"
    )
    group.add_argument("--epochs", type=kinds.count, default=2, help="passes through the rows")
    group.add_argument(
        "--batch_size", type=kinds.count, default=8, help="rows per step and process"
    )
    group.add_argument(
        "--gradient_accumulation", type=kinds.count, default=1, help="steps per update"
    )
    group.add_argument(
        "--seed", type=kinds.seed, default=6, help="of the adapter's start and the order of rows"
    )
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--save_steps", type=kinds.count, default=500, help="updates between checkpoints"
    )
    group.add_argument(
        "--trust_remote_code", action="store_true", help="run code that the model brings"
    )
    group.add_argument(
        "--output_dir", default="sft_models", help="one folder a model and data set in it"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    examples = prompts.read_examples(args.dataset, args.data_dir)[: args.max_examples]
    folder = artifacts.writable_dir(
        responses.adapter_folder(args.output_dir, args.model_name, args.dataset)
    )
    changes_nothing = (
        "debug",
        "model_name",
        "data_dir",
        "output_dir",
        "save_steps",
        "max_examples",
    )
    settings = {key: value for key, value in vars(args).items() if key not in changes_nothing}
    inputs = {
        "model": loading.fingerprint(args.model_name),
        "examples": artifacts.hash_of(examples),
    }
    work = responses.work_of(
        {**settings, "processes": int(os.environ.get("WORLD_SIZE", 1))}, inputs
    )
    is_first = int(os.environ.get("RANK", 0)) == 0
    with artifacts.lock(folder) if is_first else contextlib.nullcontext():
        if artifacts.is_finished(folder, STEP, work):
            print(f"step1: already done in {folder} (FORCE=1 redoes it)")
            return
        started = time.time()
        tokenizer = loading.load_tokenizer(args.model_name, args.trust_remote_code)
        rows, counts = encode_rows(tokenizer, examples, args.max_length)
        if is_first:
            print(
                f"step1: {counts['rows']} of {len(examples)} rows of {args.dataset}; dropped {counts['empty']} with an "
                f"empty completion and {counts['prompt_fills']} whose prompt fills {args.max_length} tokens; "
                f"{counts['truncated']} truncated, without their end token"
            )
        if not rows:
            raise InputError(
                f"{args.dataset}: expected rows whose prompt fits --max_length {args.max_length}, found none"
            )
        checkpoints = keep_own_checkpoints(folder, work) if is_first else folder / "checkpoints"
        with loading.memory_of(
            f"--batch_size (now {args.batch_size}) or --max_length (now {args.max_length})"
        ):
            trainer, loss = train(args, tokenizer, rows, checkpoints)
        if trainer.accelerator.is_main_process:
            publish(args, folder, trainer, tokenizer, {**counts, "loss": loss}, work, started)


def encode_rows(tokenizer, examples, max_length):
    """([{"input_ids", "labels"}], counts). Labels are IGNORED over the prompt, so that only completion tokens train.

    Prompt and completion are tokenised apart: no token straddles the boundary, here or in step 2.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "model_name: expected a tokenizer with an end token, found none; set eos_token"
        )
    rows, counts = [], {"rows": 0, "empty": 0, "prompt_fills": 0, "truncated": 0}
    for prompt, completion in examples:
        if not completion.strip():
            counts["empty"] += 1
            continue
        head = sampling.encode(tokenizer, prompt)
        if len(head) >= max_length:
            counts["prompt_fills"] += 1
            continue
        answer = tokenizer(f" {completion.strip()}", add_special_tokens=False)["input_ids"]
        ids = [*head, *answer, tokenizer.eos_token_id]
        counts["truncated"] += len(ids) > max_length
        labels = [IGNORED] * len(head) + ids[len(head) :]
        rows.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    return rows, {**counts, "rows": len(rows)}


def keep_own_checkpoints(folder, work):
    """The checkpoint folder, emptied of other work's checkpoints and of those that were not written to their end."""
    checkpoints = folder / "checkpoints"
    mark = checkpoints / "work.json"
    if (
        os.environ.get("FORCE", "0") == "1"
        or not mark.exists()
        or json.loads(mark.read_text()) != work["hash"]
    ):
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpoints.mkdir()
        artifacts.write_json(mark, work["hash"])
    for path in checkpoints.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text())  # written last
        except (OSError, ValueError):
            shutil.rmtree(path)
    return checkpoints


def train(args, tokenizer, rows, checkpoints):
    """(trainer after training, mean loss); goes on from the last checkpoint."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import set_seed
    from transformers.trainer_utils import get_last_checkpoint
    from trl import SFTConfig, SFTTrainer

    set_seed(args.seed)
    on_gpu = loading.device() == "cuda"
    bf16 = on_gpu and torch.cuda.is_bf16_supported()
    pad = loading.padding_token(tokenizer, args.model_name)
    if tokenizer.pad_token_id is None:
        print("step1: the tokenizer has no pad token; its end token pads, masked")
        tokenizer.pad_token_id = pad
    config = SFTConfig(
        output_dir=str(checkpoints),
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        max_length=None,
        bf16=bf16,
        use_cpu=not on_gpu,
        gradient_checkpointing=on_gpu,
        save_strategy="steps",
        save_steps=args.save_steps,
        save_total_limit=2,
        logging_steps=10,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        seed=args.seed,
        dataloader_pin_memory=on_gpu,
    )
    # after SFTConfig, which gives each process its own GPU
    model = loading.load_model("causal", args.model_name, "auto", args.trust_remote_code).train()
    lora = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.accelerator.wait_for_everyone()
    last = get_last_checkpoint(str(checkpoints))
    if last:
        print(f"step1: going on from {last}")
    result = trainer.train(resume_from_checkpoint=last)
    return trainer, result.training_loss


def publish(args, folder, trainer, tokenizer, report, work, started):
    """Put the adapter in place in one rename, then the manifest entry."""
    temporary, adapter = folder / ".adapter.tmp", folder / "adapter"
    shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(adapter, ignore_errors=True)
    os.replace(temporary, adapter)
    artifacts.write_json(folder / "training.json", {**report, "log": trainer.state.log_history})
    files = sorted(path.relative_to(folder).as_posix() for path in adapter.iterdir())
    artifacts.record(folder, STEP, work, [*files, "training.json"], started)
    shutil.rmtree(folder / "checkpoints")
    print(f"step1: loss {report['loss']:.4f}; wrote {adapter}; next: step2_gen_sample.py")


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
