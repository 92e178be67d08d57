"""step3_reward_annotation.py: every response has its own text's reward, whatever the padding."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

import step3_reward_annotation
from rewardlib.errors import InputError
from rewardlib.llm import encoding, loading, prompts, responses

transformers = pytest.importorskip("transformers", reason="steps 1 to 4 need the extra [llm]")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
K = 40


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return str(tiny_models.make_reward_model(tmp_path_factory.mktemp("reward")))


@pytest.fixture
def gen(tmp_path):
    folder = responses.run_folder(tmp_path, "hh-rlhf-helpful", "gemma7b", "none", "-")
    return tiny_models.make_parts(folder, "train", tiny_models.hand_rows(6, K))


def annotate(gen, reward_model, *flags):
    where = [
        "--gen_dir",
        str(gen.parent),
        "--eval_dataset",
        "hh-rlhf-helpful",
        "--adapter_name",
        "none",
    ]
    step3_reward_annotation.main([*where, "--reward_model", reward_model, *flags])


def read(gen, reward_model, name="rewards"):
    name = (
        f"rewards_{responses.label(reward_model)}.jsonl" if name == "rewards" else "responses.jsonl"
    )
    parts = [responses.part_folder(gen, "train", part) / name for part in range(responses.PARTS)]
    return [json.loads(line) for path in parts for line in path.read_text().splitlines()]


def alone(reward_model, texts):
    """The reward that transformers gives each text alone, without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward_model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    with torch.inference_mode():
        return [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]


def test_each_response_has_its_own_reward(gen, reward_model, capsys):
    annotate(gen, reward_model, "--batch_tokens", "700")
    rows, scored = read(gen, reward_model, "responses"), read(gen, reward_model)
    assert [row["id"] for row in scored] == [f"train-{i}" for i in range(6)]
    for row, score in zip(rows, scored, strict=True):
        assert len(set(score["rewards"])) == K and score["rewards"][37] != score["rewards"][7]
        expected = alone(reward_model, [row["query"] + text for text in row["responses"]])
        np.testing.assert_allclose(score["rewards"], expected, atol=1e-5)
    capsys.readouterr()
    annotate(gen, reward_model)
    assert capsys.readouterr().out.count("already done") == 5


def test_text_is_cut_at_the_next_turn(tmp_path, reward_model):
    row = {"id": "a", "query": "\n\nHuman: why?\n\nAssistant:"}
    row["responses"] = [" good\n\nHuman: and you?\n\nAssistant: bad", " good", " very good\n\nHuma"]
    folder = responses.run_folder(tmp_path, "hh-rlhf-helpful", "gemma7b", "none", "-")
    gen = tiny_models.make_parts(folder, "train", [row])
    annotate(gen, reward_model)
    (scored,) = read(gen, reward_model)
    assert scored["rewards"][0] == pytest.approx(scored["rewards"][1], abs=1e-6)
    assert scored["texts"][0] == scored["texts"][1] == responses.text_digest(row["query"], " good")
    expected = alone(reward_model, [row["query"] + " good", row["query"] + " very good\n\nHuma"])
    np.testing.assert_allclose(scored["rewards"][1:], expected, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_id", [1, 2])
def test_padding_does_not_change_a_reward(reward_model, side, pad_id):
    """Also with pad id 1, the end token, which every text here ends with."""
    tokenizer = loading.load_tokenizer(reward_model)
    model = loading.load_model("reward", reward_model)
    ids = [
        [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        for text in tiny_models.sentences(20, 8)
    ]
    single = [encoding.score(model, [row], pad_id, 1)[0] for row in ids]
    batched = encoding.score(model, ids, pad_id, 300, side)
    np.testing.assert_allclose(batched, single, atol=1e-5)
    assert np.ptp(single) > 0.5


def test_other_heads_use_their_own_forward(tmp_path):
    torch.manual_seed(0)
    tiny_models.make_tokenizer(tmp_path)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = transformers.BertConfig(vocab_size=400, num_labels=1, pad_token_id=2, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    model = loading.load_model("reward", str(tmp_path))
    ids = [[0, *range(5, 5 + n)] for n in (3, 9, 5)]
    batched = encoding.score(model, ids, 2, 1000)
    np.testing.assert_allclose(
        batched, [encoding.score(model, [row], 2, 1)[0] for row in ids], atol=1e-5
    )


def test_chat_template(reward_model, tmp_path):
    tokenizer = loading.load_tokenizer(reward_model)
    with pytest.raises(InputError, match="a chat template that takes this dialogue"):
        step3_reward_annotation.reward_ids(
            tokenizer, "\n\nHuman: a\n\nAssistant:", " b", True, "rm"
        )
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    ids = step3_reward_annotation.reward_ids(
        tokenizer, "\n\nHuman: a\n\nAssistant:", " b", True, "rm"
    )
    assert tokenizer.decode(ids) == "<user>a<assistant>b"


def test_untrained_head_is_refused(gen, tmp_path, capsys):
    headless = str(tiny_models.make_reward_model(tmp_path / "headless", head=False))
    with pytest.raises(
        InputError,
        match="expected a reward model with a trained score head, found no values for score",
    ):
        annotate(gen, headless)
    assert not list(gen.glob("*/rewards_*"))


def test_several_labels_are_refused(gen, tmp_path):
    tokenizer = tiny_models.make_tokenizer(tmp_path / "two")
    config = tiny_models.tiny_config(tokenizer, num_labels=2)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "two")
    with pytest.raises(InputError, match="expected a reward model with one score, found 2 labels"):
        annotate(gen, str(tmp_path / "two"))


def test_refusals(gen, reward_model):
    with pytest.raises(InputError, match=r"expected at most 20 tokens per text, found \d+ longer"):
        annotate(gen, reward_model, "--max_length", "20")
    with pytest.raises(InputError, match="task other: expected --reward_model beside it"):
        step3_reward_annotation.parse_args(["--task", "other"])
    with pytest.raises(
        InputError, match=r"test-part_0: the finished files of step2_gen_sample.py are missing"
    ):
        annotate(gen, reward_model, "--data_class", "test")
    path = responses.part_folder(gen, "train", 0) / "responses.jsonl"
    path.write_text(path.read_text().replace("river", "water"))
    with pytest.raises(
        InputError, match="expected the file as step2_gen_sample.py wrote it, found a changed file"
    ):
        annotate(gen, reward_model)


def test_out_of_memory_names_batch_tokens(gen, reward_model, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(encoding, "score", full)
    with pytest.raises(InputError, match=r"CUDA out of memory; lower --batch_tokens \(now 16384\)"):
        annotate(gen, reward_model)


def test_default_models():
    assert step3_reward_annotation.parse_args(["--task", "harmless"]).reward_model == "rayharmless"
    assert step3_reward_annotation.parse_args([]).reward_model == "rmmistral7b"
    assert loading.full_name("rmmistral7b") == "weqweasdas/RM-Mistral-7B"
    assert prompts.default_prompts("hh-rlhf-harmless-gpt4") == "hh-rlhf-harmless"
    assert responses.label("llama3-8b") == responses.label("llama38b") == "llama38b"
    assert responses.label("Ray2333/gpt2-large") == "Ray2333-gpt2-large" or Path("Ray2333").exists()
