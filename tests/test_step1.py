"""step1_sft.py and its data: completion mask, counts, resuming, refusals."""

import json
import subprocess
import sys

import pytest
import tiny_models
from conftest import ROOT

import step1_sft
from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.llm import loading, prompts, responses

pytest.importorskip("transformers", reason="steps 1 to 4 need the extra [llm]")
pytest.importorskip("trl", reason="step 1 needs the extra [llm]")
pytest.importorskip("peft", reason="step 1 needs the extra [llm]")
datasets = pytest.importorskip("datasets", reason="step 1 needs the extra [llm]")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models.make_all(tmp_path_factory.mktemp("tiny"))


def sft(tiny, out, *flags):
    flags = ["--epochs", "1", "--learning_rate", "0.01", "--output_dir", str(out), *flags]
    step1_sft.main(
        ["--model_name", str(tiny / "language"), "--dataset", str(tiny / "sft.jsonl"), *flags]
    )
    return responses.adapter_folder(out, str(tiny / "language"), str(tiny / "sft.jsonl"))


def test_help_is_light():
    code = (
        "import runpy, sys\n"
        "for path in sys.argv[1:]:\n"
        "    try: runpy.run_path(path)['parse_args'](['--help'])\n"
        "    except SystemExit: pass\n"
        "assert not {'transformers', 'trl', 'vllm', 'datasets'} & set(sys.modules)\n"
    )
    names = sorted(path.name for path in ROOT.glob("step[1-4]*.py"))
    assert len(names) == 5
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.count("usage:") == 5


def test_completion_mask_exact(tiny):
    tokenizer = loading.load_tokenizer(str(tiny / "language"))
    rows, counts = step1_sft.encode_rows(
        tokenizer, [("\n\nHuman: a b\n\nAssistant:", "red stone ")], 64
    )
    head = tokenizer("\n\nHuman: a b\n\nAssistant:")["input_ids"]
    tail = [*tokenizer(" red stone", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert head[0] == tokenizer.bos_token_id and head[-1] != tokenizer.eos_token_id
    assert rows == [{"input_ids": head + tail, "labels": [-100] * len(head) + tail}]
    assert counts == {"rows": 1, "empty": 0, "prompt_fills": 0, "truncated": 0}


def test_dropped_and_truncated_are_counted(tiny):
    tokenizer = loading.load_tokenizer(str(tiny / "language"))
    short, long = "\n\nHuman: a\n\nAssistant:", f"\n\nHuman: {'river ' * 50}\n\nAssistant:"
    examples = [(short, "good"), (short, "  "), (long, "good"), (short, "river " * 50)]
    rows, counts = step1_sft.encode_rows(tokenizer, examples, 40)
    assert counts == {"rows": 2, "empty": 1, "prompt_fills": 1, "truncated": 1}
    assert rows[0]["input_ids"][-1] == tokenizer.eos_token_id != rows[1]["input_ids"][-1]
    assert len(rows[1]["input_ids"]) == len(rows[1]["labels"]) == 40


def test_trainer_sees_the_mask(tiny, tmp_path):
    args = step1_sft.parse_args(["--model_name", str(tiny / "language"), "--epochs", "1"])
    tokenizer = loading.load_tokenizer(args.model_name)
    examples = prompts.read_examples(str(tiny / "sft.jsonl"), ".")[:8]
    rows, _ = step1_sft.encode_rows(tokenizer, examples, 64)
    trainer, _ = step1_sft.train(args, tokenizer, rows, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    trained = {tuple(label for label in row if label != -100) for row in batch["labels"].tolist()}
    assert trained == {tuple(label for label in row["labels"] if label != -100) for row in rows}


def test_learns_skips_and_resumes_to_the_same_adapter(tiny, tmp_path, capsys, monkeypatch):
    uninterrupted = sft(tiny, tmp_path / "uninterrupted")
    assert (uninterrupted / "adapter" / "tokenizer.json").exists()
    assert not (uninterrupted / "checkpoints").exists()
    assert "32 of 32 rows" in capsys.readouterr().out
    sft(tiny, tmp_path / "uninterrupted")
    assert "already done" in capsys.readouterr().out

    publish = step1_sft.publish
    monkeypatch.setattr(
        step1_sft, "publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        sft(tiny, tmp_path / "cut", "--save_steps", "2")
    cut = responses.adapter_folder(
        tmp_path / "cut", str(tiny / "language"), str(tiny / "sft.jsonl")
    )
    assert artifacts.read_manifest(cut) == {}
    # as if the newest checkpoint was not written to its end: training resumes from the one before
    newest = max(
        (cut / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
    )
    (newest / "trainer_state.json").unlink()
    monkeypatch.setattr(step1_sft, "publish", publish)
    sft(tiny, tmp_path / "cut", "--save_steps", "2")
    assert "going on from" in capsys.readouterr().out
    names = ("adapter_model.safetensors",)
    assert [(uninterrupted / "adapter" / n).read_bytes() for n in names] == [
        (cut / "adapter" / n).read_bytes() for n in names
    ]


def test_sources(tmp_path):
    (tmp_path / "synthetic_hhrlhf_helpful_expert_gpt4.csv").write_text(
        'query,response\n"\n\nHuman: hi\n\nAssistant:","first line\nsecond, line"\nplain,answer\n'
    )
    examples = prompts.read_examples("hh-rlhf-helpful-gpt4", tmp_path)
    assert examples == [
        ("\n\nHuman: hi\n\nAssistant:", "first line\nsecond, line"),
        ("\n\nHuman: plain\n\nAssistant:", "answer"),
    ]
    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    rows = {"chosen": [talk], "rejected": [talk]}
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(rows), test=datasets.Dataset.from_dict(rows)
    )
    both.save_to_disk(tmp_path / "hh-rlhf-harmless")
    assert prompts.read_examples("hh-rlhf-harmless", tmp_path) == [(talk.removesuffix(" d"), " d")]
    queries = prompts.read_prompts("hh-rlhf-harmless", "test", tmp_path)
    assert queries == [{"id": "hh-rlhf-harmless-test-0", "query": talk.removesuffix(" d")}]
    (tmp_path / "ultrafeedback_test.csv").write_text("id,prompt\nu7,why?\n")
    queries = prompts.read_prompts("ultrafeedback", "test", tmp_path)
    assert queries == [{"id": "u7", "query": "\n\nHuman: why?\n\nAssistant:"}]
    assert prompts.messages(talk.removesuffix(" d"), " d") == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]


def test_bad_sources(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="synthetic_hhrlhf_harmless_expert_gpt4.csv not found"):
        prompts.read_examples("hh-rlhf-harmless-gpt4", tmp_path)
    path = tmp_path / "x.csv"
    path.write_text("prompt,text\na,b\n")
    with pytest.raises(
        InputError, match="line 2: expected text under completion or response, found the columns"
    ):
        prompts.read_examples(str(path), tmp_path)
    path.write_text("prompt\n")
    with pytest.raises(InputError, match=r"x\.csv: no rows"):
        prompts.read_prompts(str(path), "train", tmp_path)
    path.write_text("id,prompt\n1,a\n1,b\n")
    with pytest.raises(InputError, match="a different id in every row, found '1' more than once"):
        prompts.read_prompts(str(path), "train", tmp_path)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n[3]\n")
    with pytest.raises(InputError, match="line 2: expected one JSON object per line"):
        prompts.read_prompts(str(path), "train", tmp_path)
    with pytest.raises(InputError, match="dataset nonsense: expected hh-rlhf-helpful"):
        prompts.read_examples("nonsense", tmp_path)

    def broken_connection(*args, **kwargs):
        raise ConnectionError(
            "peer closed connection without sending complete message body\nreceived 3 of 9"
        )

    monkeypatch.setattr(datasets, "load_dataset", broken_connection)
    with pytest.raises(
        InputError,
        match=r"Anthropic/hh-rlhf: expected .* peer closed .* \(the same command resumes a",
    ):
        prompts.read_prompts("hh-rlhf-helpful", "train", tmp_path)


def test_bad_model_is_one_line(tiny, tmp_path):
    flags = [
        "--model_name",
        "no/such-model",
        "--dataset",
        str(tiny / "sft.jsonl"),
        "--output_dir",
        str(tmp_path),
    ]
    command = [sys.executable, "step1_sft.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "step1: no/such-model: expected a local folder or a model on the hub" in done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1


def test_model_without_pad_or_end_token(tiny, tmp_path):
    tokenizer = loading.load_tokenizer(str(tiny / "language"))
    tokenizer.pad_token = None
    assert loading.padding_token(tokenizer, "x") == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="x: the tokenizer has neither a padding nor an end token"):
        loading.padding_token(tokenizer, "x")


def test_out_of_memory_names_the_flags():
    import torch

    with (
        pytest.raises(InputError, match=r"CUDA out of memory; lower --batch_size \(now 8\)"),
        loading.memory_of("--batch_size (now 8)"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    with pytest.raises(ValueError, match="other"), loading.memory_of("--x"):
        raise ValueError("other")
