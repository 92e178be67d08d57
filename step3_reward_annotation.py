"""Step 3: score every response with the golden reward model.

A response is cut at the next turn of the human; that text is scored here, kept by step 3.5 and
embedded by step 4.

Reads   GEN_DIR/{prompts}_{model}_{adapter}/{train,test}-part_{p}/responses.jsonl
Writes  GEN_DIR/{prompts}_{model}_{adapter}/{train,test}-part_{p}/rewards_{rm}.jsonl
        id, K rewards, digests of the K texts that were scored
Example python step3_reward_annotation.py --task helpful --gen_pref_model_name gemma2b
"""

from pathlib import Path

from rewardlib import artifacts
from rewardlib.cli import console, flags
from rewardlib.errors import InputError
from rewardlib.llm import encoding, loading, prompts, responses


def make_parser():
    parser = console.parser(__doc__)
    group = parser.add_argument_group("inputs")
    flags.add_generated_flags(group)
    flags.add_data_class_flag(group)
    flags.add_part_flag(group)
    group = parser.add_argument_group("golden reward model")
    group.add_argument(
        "--text_format",
        choices=("auto", "chat", "plain"),
        default="auto",
        help="form in which the reward model reads a dialogue; auto: its chat template, if any",
    )
    flags.add_batch_flags(group)
    group = parser.add_argument_group("runtime")
    flags.add_language_model_flags(group)
    return parser


def parse_args(argv=None):
    return flags.name_sources(make_parser().parse_args(argv))


def main(argv=None):
    args = parse_args(argv)
    folder = responses.run_folder(
        args.gen_dir, args.eval_dataset, args.gen_pref_model_name, args.adapter_name, args.dataset
    )
    name = responses.label(args.reward_model)
    settings = {
        "text_format": args.text_format,
        "max_length": args.max_length,
        "dtype": str(loading.torch_dtype(args.dtype)),
    }
    reward_model = loading.fingerprint(args.reward_model)
    model = tokenizer = None
    for part in responses.parts_named(args.split):
        part_dir = responses.part_folder(folder, args.data_class, part)
        rows, n_responses, digest = responses.read_responses(part_dir)
        inputs = {"reward_model": reward_model, "responses": digest}
        with (
            artifacts.lock(part_dir),
            artifacts.work(part_dir, f"step3 {name}", None, settings, inputs) as work,
        ):
            if work is None:
                continue
            if model is None:
                tokenizer = loading.load_tokenizer(args.reward_model, args.trust_remote_code)
                model = loading.load_model(
                    "reward", args.reward_model, args.dtype, args.trust_remote_code
                )
            with loading.memory_of(f"--batch_tokens (now {args.batch_tokens})"):
                rewards = score_rows(args, model, tokenizer, rows, part_dir, f"part {part}")
            work.write_jsonl(f"rewards_{name}.jsonl", reward_rows(rows, rewards, n_responses))
        mean = sum(rewards) / max(1, len(rewards))
        print(
            f"step3: part {part}: {len(rewards)} responses scored, mean {mean:.4f}, in {part_dir}"
        )
    print("step3: done; next: step3.5_processing_data.py")


def reward_rows(rows, rewards, n_responses):
    """{"id", "rewards", "texts"} of every prompt; texts: digests of what was scored."""
    for n, row in enumerate(rows):
        yield {
            "id": row["id"],
            "rewards": rewards[n * n_responses : (n + 1) * n_responses],
            "texts": [responses.text_digest(row["query"], text) for text in row["responses"]],
        }


def score_rows(args, model, tokenizer, rows, part_dir, desc):
    """Rewards of all responses of all rows, each from its own text, as floats."""
    if not rows:
        return []
    pad_id = loading.padding_token(tokenizer, args.reward_model)
    if not hasattr(model, "score") and tokenizer.pad_token_id is None:
        raise InputError(
            f"{args.reward_model}: expected a tokenizer with a pad token, found none; set pad_token"
        )
    chat = (
        bool(tokenizer.chat_template) if args.text_format == "auto" else args.text_format == "chat"
    )
    if chat and not tokenizer.chat_template:
        raise InputError(
            f"{args.reward_model}: expected a chat template, found none; use --text_format plain"
        )
    ids = [
        reward_ids(tokenizer, row["query"], text, chat, args.reward_model)
        for row in rows
        for text in row["responses"]
    ]
    encoding.refuse_long(ids, args.max_length, model, part_dir)
    rewards = encoding.score(model, ids, pad_id, args.batch_tokens, desc=desc).tolist()
    bad = sum(reward != reward or abs(reward) == float("inf") for reward in rewards)
    if bad:
        raise InputError(
            f"{args.reward_model}: expected finite rewards, found {bad} that are not; "
            "use --dtype float32"
        )
    return rewards


def reward_ids(tokenizer, query, response, chat, name):
    """Token ids of the dialogue as the reward model reads it."""
    if not chat:
        return tokenizer(query + response)["input_ids"]
    with loading.fetching(
        name, "a chat template that takes this dialogue (or --text_format plain)"
    ):
        text = tokenizer.apply_chat_template(prompts.messages(query, response), tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    console.run(main, Path(__file__).stem.split("_")[0])
