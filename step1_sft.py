"""Step 1: fine-tune a language model with LoRA on prompts and completions.

The loss counts the tokens of the completions only.

Reads   --dataset, one of
        hh-rlhf-{helpful,harmless}-gpt4   DATA_DIR/synthetic_hhrlhf_{task}_expert_gpt4.csv
                                          with query, response
        hh-rlhf-{helpful,harmless}        chosen answers: DATA_DIR/NAME, a folder of
                                          save_to_disk, or the data set on the hub
        a .jsonl or .csv file             with prompt (query) and completion (response)
Writes  OUTPUT_DIR/{model}_{dataset}/
        adapter/        the adapter and its tokenizer
        training.json   rows used, dropped and truncated; the loss
        checkpoints/    one every --save_steps; an interrupted run goes on from the last
        manifest.json
Example python step1_sft.py --model_name gemma2b --dataset hh-rlhf-helpful-gpt4
        accelerate launch --num_processes 4 step1_sft.py --model_name gemma7b ...   (several GPUs)
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from rewardlib import artifacts
from rewardlib.cli import console, flags, kinds
from rewardlib.errors import InputError
from rewardlib.llm import loading, prompts, responses, sampling

IGNORED = -100


def make_parser():
    parser = console.parser(__doc__)
    group = parser.add_argument_group("inputs")
    flags.add_generator_flag(group, "model_name")
    flags.add_dataset_flag(group)
    group.add_argument("--data_dir", default=flags.DATA_DIR, help="folder of the data files")
    group.add_argument(
        "--max_examples",
        type=kinds.count_or_all,
        default="all",
        help="upper limit on the number of rows to fine-tune on, the first ones; or all",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--lora_rank", type=kinds.count, default=32, help="rank of the adapter")
    group.add_argument(
        "--lora_alpha", type=kinds.count, default=32, help="scale of the adapter times its rank"
    )
    group.add_argument(
        "--max_length",
        type=kinds.count,
        default=1024,
        help="upper limit on the number of tokens of a row; longer rows lose their end",
    )
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--learning_rate", type=kinds.positive, default=5e-5, help="peak learning rate"
    )
    group.add_argument(
        "--epochs", type=kinds.count, default=2, help="number of passes through the rows"
    )
    group.add_argument(
        "--batch_size", type=kinds.count, default=8, help="number of rows per step and process"
    )
    group.add_argument(
        "--gradient_accumulation",
        type=kinds.count,
        default=1,
        help="number of steps per update of the weights",
    )
    flags.add_seed_flag(group)
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--save_steps", type=kinds.count, default=500, help="number of updates between checkpoints"
    )
    flags.add_trust_flag(group)
    group.add_argument(
        "--output_dir",
        default=flags.SFT_DIR,
        help="folder of the adapters, a folder for each model and data set",
    )
    return parser


def parse_args(argv=None):
    return make_parser().parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    examples = prompts.read_examples(args.dataset, args.data_dir)[: args.max_examples]
    folder = artifacts.writable_dir(
        responses.adapter_folder(args.output_dir, args.model_name, args.dataset)
    )
    without_effect = ("debug", "model_name", "data_dir", "output_dir", "save_steps", "max_examples")
    settings = {key: value for key, value in vars(args).items() if key not in without_effect}
    settings["processes"] = int(os.environ.get("WORLD_SIZE", 1))
    inputs = {
        "model": loading.fingerprint(args.model_name),
        "examples": artifacts.hash_of(examples),
    }
    if int(os.environ.get("RANK", 0)) > 0:  # trains along; the first process prints and writes
        if not artifacts.is_finished(folder, "step1", artifacts.identity(None, settings, inputs)):
            tokenizer, rows, _ = load_rows(args, examples)
            train_adapter(args, tokenizer, rows, folder / "checkpoints")
        return
    with artifacts.lock(folder):
        with artifacts.work(folder, "step1", None, settings, inputs) as work:
            if work is None:
                return
            tokenizer, rows, counts = load_rows(args, examples)
            print(
                f"step1: {counts['rows']} of {len(examples)} rows of {args.dataset}; dropped "
                f"{counts['empty']} with an empty completion and {counts['prompt_fills']} whose "
                f"prompt fills {args.max_length} tokens; {counts['truncated']} truncated, without "
                "their end token"
            )
            checkpoints = keep_own_checkpoints(folder, work.identity["hash"])
            trainer, loss = train_adapter(args, tokenizer, rows, checkpoints)
            publish(work, trainer, tokenizer, {**counts, "loss": loss})
        shutil.rmtree(folder / "checkpoints")
    print(f"step1: loss {loss:.4f}; wrote {folder / 'adapter'}; next: step2_gen_sample.py")


def load_rows(args, examples):
    """(tokenizer, rows to train on, counts); InputError where no row fits."""
    tokenizer = loading.load_tokenizer(args.model_name, args.trust_remote_code)
    rows, counts = encode_rows(tokenizer, examples, args.max_length)
    if not rows:
        raise InputError(
            f"{args.dataset}: no row has a prompt that fits --max_length {args.max_length}"
        )
    return tokenizer, rows, counts


def train_adapter(args, tokenizer, rows, checkpoints):
    limits = f"--batch_size (now {args.batch_size}) or --max_length (now {args.max_length})"
    with loading.memory_of(limits):
        return train(args, tokenizer, rows, checkpoints)


def encode_rows(tokenizer, examples, max_length):
    """([{"input_ids", "labels"}], counts), with labels IGNORED over the prompt: it trains nothing.

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


def keep_own_checkpoints(folder, work_hash):
    """The checkpoint folder, without the checkpoints of other work and those written in part."""
    checkpoints = folder / "checkpoints"
    mark = checkpoints / "work.json"
    is_own = mark.exists() and json.loads(mark.read_text()) == work_hash
    if artifacts.is_forced() or not is_own:
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpoints.mkdir()
        artifacts.write_json(mark, work_hash)
    for path in checkpoints.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text())  # the trainer writes it last
        except (OSError, ValueError):
            shutil.rmtree(path)
    return checkpoints


def train(args, tokenizer, rows, checkpoints):
    """(trainer after training, mean loss); goes on from the last checkpoint."""
    import datasets
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


def publish(work, trainer, tokenizer, report):
    """Put the adapter in place in one rename."""
    temporary, adapter = work.folder / ".adapter.tmp", work.folder / "adapter"
    shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(adapter, ignore_errors=True)
    os.replace(temporary, adapter)
    work.outputs += sorted(f"adapter/{path.name}" for path in adapter.iterdir())
    work.write_json("training.json", {**report, "log": trainer.state.log_history})


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
