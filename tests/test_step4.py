"""step4_gen_embeddings.py: last-token states whatever the batch, rewards, kills, refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_models
import torch
from conftest import ROOT
from test_step3_5 import change, step3_5

import step4_gen_embeddings
from rewardlib import artifacts
from rewardlib.data import embeddings
from rewardlib.errors import InputError
from rewardlib.llm import encoding, loading, responses, sampling, staging

transformers = pytest.importorskip("transformers", reason="steps 1 to 4 need the extra [llm]")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SIZES = {"train": (7, 6), "test": (4, 8)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_models.make_language_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def gen(tmp_path):
    """Records with hand-made rewards that encode their place: 100 n + k, negative for test."""
    folder = responses.run_folder(tmp_path / "gen", "hh-rlhf-helpful", "gemma7b", "none", "-")
    for split, (n, k) in SIZES.items():
        sign = 1 if split == "train" else -1
        rows = tiny_models.hand_rows(n, k, split)
        tiny_models.make_parts(folder, split, rows)
        tiny_models.make_rewards(
            folder,
            split,
            {r["id"]: [sign * (100 * i + j) for j in range(k)] for i, r in enumerate(rows)},
        )
        step3_5.main([*flags_of(folder)[:-2], "--data_class", split])
    return folder


def flags_of(gen, out="", model=""):
    names = [
        "--gen_dir",
        str(gen.parent),
        "--eval_dataset",
        "hh-rlhf-helpful",
        "--adapter_name",
        "none",
    ]
    return [
        *names,
        "--reward_model",
        "rm",
        *(["--embed_model_name", model] if model else []),
        "--output_dir",
        str(out),
    ]


def run(gen, out, model, *flags):
    step4_gen_embeddings.main([*flags_of(gen, out, model), "--batch_tokens", "300", *flags])
    return {path.name: path.read_bytes() for path in out.glob("*split_*")}


def alone(model_dir, texts):
    """Last hidden state of each text alone, without padding, from the causal model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir).eval()
    with torch.inference_mode():
        states = [
            model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            for text in texts
        ]
    return np.stack([layers[-1][0, -1].numpy() for layers in states])


def make_gpt2(folder):
    """A model with absolute positions, which must be passed in when padding is on the left."""
    tokenizer = tiny_models.make_tokenizer(folder)
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=256
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_equal_to_batch_size_one(model, tmp_path, family, side):
    folder = model if family == "llama" else make_gpt2(tmp_path)
    texts = tiny_models.sentences(30, 7, 1, 40)
    tokenizer = loading.load_tokenizer(folder)
    base = loading.load_model("base", folder)
    rows = [sampling.encode(tokenizer, text) for text in texts]
    last = encoding.embed(base, rows, tokenizer.pad_token_id, 400, side=side)
    np.testing.assert_allclose(last, alone(folder, texts), atol=1e-5)
    mean = encoding.embed(base, rows, tokenizer.pad_token_id, 400, "mean", side)
    single = [encoding.embed(base, [row], tokenizer.pad_token_id, 1, "mean")[0] for row in rows]
    np.testing.assert_allclose(mean, single, atol=1e-5)


def test_pool_by_hand():
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    assert encoding.pool(hidden, mask).tolist() == [[3, 4, 5], [21, 22, 23]]
    assert encoding.pool(hidden, mask, "mean").tolist() == [[1.5, 2.5, 3.5], [19.5, 20.5, 21.5]]


def test_batches_hold_the_budget_and_every_text_once():
    lengths = np.random.default_rng(0).integers(1, 200, 500).tolist()
    batches = list(encoding.batches(lengths, 512))
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 512 for batch in batches)
    assert max(lengths[i] for i in batches[0]) == max(lengths)
    assert [len(batch) for batch in encoding.batches([900, 3], 512)] == [1, 1]


def test_every_row_in_its_place(gen, tmp_path, model, capsys):
    out = tmp_path / "data"
    run(gen, out, model)
    for split, (n, k) in SIZES.items():
        loaded = embeddings.load(out, split)
        assert loaded.shape == (n, k, 64)
        rows = tiny_models.hand_rows(n, k, split)
        texts = [[row["query"] + row["responses"][j] for row in rows] for j in range(k)]
        for j in range(k):
            np.testing.assert_allclose(loaded.embeddings[j], alone(model, texts[j]), atol=1e-5)
            lines = (out / embeddings.file_names(split, j)[1]).read_text().splitlines()
            records = [json.loads(line) for line in lines]
            assert [record["query"] + record["response"] for record in records] == texts[j]
            assert [record["id"] for record in records] == [row["id"] for row in rows]
        sign = 1 if split == "train" else -1
        assert loaded.rewards.tolist() == [
            [sign * (100 * i + j) for j in range(k)] for i in range(n)
        ]
    manifest = artifacts.read_manifest(out)
    assert manifest["producer"] == "step4_gen_embeddings.py"
    assert len(manifest["files"]) == 2 * (6 + 8)
    assert not [
        p.name for p in out.glob(".*") if p.name != ".lock" and not p.name.startswith(".rewards_")
    ]
    capsys.readouterr()
    run(gen, out, model)
    assert "already done" in capsys.readouterr().out


def test_shuffled_responses_are_found(gen, tmp_path, model):
    path = gen / "records_rm_train.jsonl"
    kept = path.read_bytes()

    def swap(rows, *keys):
        for key in keys:
            rows[0][key], rows[1][key] = rows[1][key], rows[0][key]
        return rows

    change(path, lambda rows: swap(rows, "response"))
    with pytest.raises(
        InputError,
        match="line 1: expected the text that was scored, found another response under k 0",
    ):
        run(gen, tmp_path / "data", model)
    path.write_bytes(kept)
    change(path, lambda rows: swap(rows, "k", "response", "text", "reward", "rank"))
    with pytest.raises(
        InputError, match="line 1: expected response 0 to train-0, found response 1 to train-0"
    ):
        run(gen, tmp_path / "data", model)
    path.write_bytes(kept)
    change(path, lambda rows: rows[:-1])
    with pytest.raises(InputError, match="expected 6 records per prompt, found 41 records of 7"):
        run(gen, tmp_path / "data", model)
    path.write_bytes(kept)
    change(path, lambda rows: rows)
    rows = [json.loads(line) for line in kept.decode().splitlines()]
    artifacts.write_jsonl(path, swap(rows, "reward"))
    with pytest.raises(
        InputError, match=r"as step3.5_processing_data.py wrote it, found a changed file"
    ):
        run(gen, tmp_path / "data", model)
    assert not list((tmp_path / "data").glob("*split_*"))


def test_parts_and_splits_by_hand_equal_all(gen, tmp_path, model, capsys):
    whole = run(gen, tmp_path / "whole", model)
    for part in "41203":
        files = run(gen, tmp_path / "parts", model, "--split", part)
        assert part == "3" or not files
    assert files == whole and "files of other --split values are missing" in capsys.readouterr().out
    run(gen, tmp_path / "both", model, "--train_test", "test")
    assert run(gen, tmp_path / "both", model, "--train_test", "train") == whole
    assert embeddings.load_pair(tmp_path / "both")[1].shape == (4, 8, 64)
    # with fewer responses the files of higher k are removed; the test split stays
    fewer = run(gen, tmp_path / "both", model, "--train_test", "train", "--n_samples", "2")
    assert embeddings.load(tmp_path / "both").shape == (7, 2, 64)
    assert fewer == {name: data for name, data in whole.items() if name in fewer}
    assert len(fewer) == 2 * (2 + 8)
    # with another pooling the test files belong to another embedder and are removed
    run(gen, tmp_path / "both", model, "--train_test", "train", "--pooling", "mean")
    assert embeddings.load(tmp_path / "both", "test") is None
    assert (
        "the test files were made from other data or by another model and are removed"
        in capsys.readouterr().out
    )


def test_killed_and_run_again(gen, tmp_path, model):
    whole = run(gen, tmp_path / "whole", model)
    out = tmp_path / "killed"
    flags = [*flags_of(gen, out, model), "--batch_tokens", "300"]
    running = subprocess.Popen(
        [sys.executable, "step4_gen_embeddings.py", *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    deadline = time.time() + 60
    while (
        not list(out.glob(".embedding/train_*/*.json"))
        and running.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.005)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert run(gen, out, model) == whole


@pytest.mark.parametrize("moved", [0, 5, 28])
def test_stopped_while_files_are_moved(gen, tmp_path, model, monkeypatch, moved):
    """The reader refuses half-moved data; the next run completes without embedding again."""
    out = tmp_path / "data"
    old = run(gen, out, model, "--pooling", "mean")
    replace, calls = os.replace, []

    def stop(source, target):
        if ".embedding" in str(source) and "split_" in str(target) and ".tmp" not in str(source):
            calls.append(source)
            if len(calls) > moved:
                raise KeyboardInterrupt
        if moved == 28 and str(target) == str(out / "manifest.json"):
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        run(gen, out, model)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(
        InputError,
        match=r"unfinished; run step4_gen_embeddings.py again|expected EMBD-TRAIN-split_0",
    ):
        embeddings.load(out)
    monkeypatch.setattr(encoding, "embed", None)
    new = run(gen, out, model)
    monkeypatch.undo()
    assert new == run(gen, tmp_path / "whole", model) and new.keys() == old.keys() and new != old
    assert not (out / ".embedding").exists() and not (out / embeddings.UNFINISHED).exists()


def test_data_of_others(gen, tmp_path, model):
    out = tmp_path / "data"
    demo = [
        "--n_prompts",
        "3",
        "--n_splits",
        "9",
        "--n_test_prompts",
        "2",
        "--n_test_splits",
        "2",
        "--emb_dim",
        "16",
    ]
    subprocess.run(
        [sys.executable, "generate_demo_data.py", *demo, "--output_dir", str(out)],
        cwd=ROOT,
        check=True,
    )
    run(gen, out, model)
    assert embeddings.load(out).shape == (7, 6, 64)
    (out / "manifest.json").unlink()
    with pytest.raises(
        InputError,
        match=r"data that can be made again, found EMBD-TRAIN-split_0.npy put there by hand",
    ):
        run(gen, out, model)


def test_changed_files_are_made_again(gen, tmp_path, model):
    out = tmp_path / "data"
    whole = run(gen, out, model)
    np.save(out / "EMBD-TRAIN-split_1.npy", np.zeros((7, 64), np.float32))
    assert run(gen, out, model) == whole


def test_refusals(gen, tmp_path, model, monkeypatch):
    out = tmp_path / "data"
    with pytest.raises(
        InputError, match="expected at least n_samples = 11 responses per prompt, found 6;"
    ):
        run(gen, out, model, "--n_samples", "11")
    with pytest.raises(InputError, match=r"expected at most 9 tokens per text, found \d+ longer"):
        run(gen, out, model, "--max_length", "9")
    with pytest.raises(InputError, match="no/such: expected a local folder or a model on the hub"):
        run(gen, out, "no/such")
    with pytest.raises(
        InputError, match="the finished files of step3.5_processing_data.py are missing"
    ):
        run(gen, out, model, "--reward_model", "another")

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(encoding, "embed", full)
    with pytest.raises(InputError, match=r"CUDA out of memory; lower --batch_tokens \(now 300\)"):
        run(gen, out, model)
    monkeypatch.setattr(
        encoding, "embed", lambda model, rows, *a, **k: np.full((len(rows), 4), np.nan)
    )
    with pytest.raises(
        InputError,
        match="expected finite embeddings, found 7 rows that are not, the first of prompt",
    ):
        run(gen, out, model)
    monkeypatch.setattr(staging, "TEXT_BYTES", 1 << 50)
    monkeypatch.setattr(encoding, "embed", None)
    with pytest.raises(InputError, match="GB of free disk space"):
        run(gen, tmp_path / "full", model)


def test_half_precision_storage(gen, tmp_path, model):
    run(gen, tmp_path / "data", model, "--storage_dtype", "float16")
    assert embeddings.load(tmp_path / "data").embeddings[0].dtype == np.float16
