"""step2_gen_sample.py: responses depend on their prompt alone; ids, dropped prompts, backends."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_models
from conftest import ROOT

import step2_gen_sample
from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.llm import loading, responses, sampling

transformers = pytest.importorskip("transformers", reason="steps 1 to 4 need the extra [llm]")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models.make_all(tmp_path_factory.mktemp("tiny"), n_train=12, n_test=4)


def flags_of(tiny, out, *flags):
    source = str(tiny / "prompts_{data_class}.jsonl")
    model = [
        "--model_name",
        str(tiny / "language"),
        "--adapter_name",
        "none",
        "--eval_dataset",
        source,
    ]
    return [*model, "--n_samples", "3", "--max_len", "8", "--output_dir", str(out), *flags]


def generate(tiny, out, *flags):
    step2_gen_sample.main(flags_of(tiny, out, *flags))
    return next(out.glob("prompts_*"))


def rows_of(folder, data_class="train"):
    parts = [responses.part_folder(folder, data_class, part) for part in range(responses.PARTS)]
    return [
        json.loads(line)
        for part in parts
        for line in (part / "responses.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def generated(tiny, tmp_path_factory):
    return generate(tiny, tmp_path_factory.mktemp("generated"))


def test_ids_survive_dropped_prompts(tiny, generated):
    rows = rows_of(generated)
    prompts = [json.loads(line) for line in (tiny / "prompts_train.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [
        row["id"] for row in prompts if row["id"] != "train-long"
    ]
    queries = {row["id"]: f"\n\nHuman: {row['prompt']}\n\nAssistant:" for row in prompts}
    assert all(row["query"] == queries[row["id"]] and len(row["responses"]) == 3 for row in rows)
    about = artifacts.read_json(
        responses.part_folder(generated, "train", 0) / "prompts.json", "step 2"
    )
    assert (about["n_read"], about["n_kept"]) == (13, 12)
    [dropped] = about["dropped"]
    assert dropped["id"] == "train-long" and dropped["tokens"] > 450


def test_text_depends_on_its_prompt_alone(tiny, generated, tmp_path):
    """Fewer prompts in another order and other parts give the same responses to each prompt."""
    reference = {row["id"]: row["responses"] for row in rows_of(generated)}
    assert len({text for texts in reference.values() for text in texts}) > 30
    lines = (tiny / "prompts_train.jsonl").read_text().splitlines()
    for name in ("language", "prompts_test.jsonl"):
        (tmp_path / name).symlink_to(tiny / name)
    (tmp_path / "prompts_train.jsonl").write_text("\n".join(lines[::-1][:7]) + "\n")
    fewer = rows_of(generate(tmp_path, tmp_path / "out"))
    assert len(fewer) == 7 and all(row["responses"] == reference[row["id"]] for row in fewer)
    other_seed = rows_of(
        generate(tmp_path, tmp_path / "other", "--seed", "7", "--max_prompts", "5")
    )
    assert len(other_seed) == 5 and all(
        row["responses"] != reference[row["id"]] for row in other_seed
    )


def test_seeds_are_spaced():
    prompt_seeds = sorted(step2_gen_sample.prompt_seed(6, f"train-{i}") for i in range(2000))
    assert min(b - a for a, b in itertools.pairwise(prompt_seeds)) >= 65536
    assert prompt_seeds[0] >= 0 and prompt_seeds[-1] + 65536 < 2**63


def test_skips_then_replaces_when_settings_change(tiny, tmp_path, capsys):
    folder = generate(tiny, tmp_path)
    before = rows_of(folder)
    capsys.readouterr()
    generate(tiny, tmp_path)
    assert capsys.readouterr().out.count("already done") == 5
    generate(tiny, tmp_path, "--max_len", "4")
    assert capsys.readouterr().out.count("replacing earlier results: max_len 8 -> 4") == 5
    assert rows_of(folder) != before


def test_parts_by_hand_equal_all(tiny, generated, tmp_path):
    for part in "30412":
        folder = generate(tiny, tmp_path, "--split", part)
    assert rows_of(folder) == rows_of(generated)


def test_killed_and_run_again(tiny, generated, tmp_path):
    command = [sys.executable, "step2_gen_sample.py", *flags_of(tiny, tmp_path)]
    running = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 60
    while (
        not list(tmp_path.glob("*/train-part_1/responses.jsonl"))
        and running.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert rows_of(generate(tiny, tmp_path)) == rows_of(generated)


def test_settings_of_the_checkpoint_do_not_mix_in(tiny):
    """With top_k 1 from generation_config.json, sampling would be greedy."""
    tokenizer = loading.load_tokenizer(str(tiny / "language"))
    model = loading.load_model("causal", str(tiny / "language"))
    model.generation_config = transformers.GenerationConfig(do_sample=True, top_k=1)
    ids = sampling.encode(tokenizer, "\n\nHuman: a\n\nAssistant:")
    sampled = sampling.sample(model, tokenizer, ids, 3, 4, 8, 1.0, 1.0)
    assert len({tuple(ids) for ids in sampled}) == 4
    greedy = sampling.sample(model, tokenizer, ids, 3, 1, 8, 0.0, 1.0)
    assert greedy == sampling.sample(model, tokenizer, ids, 4, 1, 8, 0.0, 1.0)


def test_decode_keeps_the_space_and_stops_at_the_end_token(tiny):
    tokenizer = loading.load_tokenizer(str(tiny / "language"))
    prompt = sampling.encode(tokenizer, "\n\nHuman: a\n\nAssistant:")
    new = tokenizer(" red stone", add_special_tokens=False)["input_ids"]
    assert sampling.decode(tokenizer, prompt, [*new, tokenizer.eos_token_id, *new]) == " red stone"
    assert sampling.decode(tokenizer, prompt, [tokenizer.eos_token_id]) == ""


def test_refusals(tiny, tmp_path):
    with pytest.raises(
        InputError, match="temperature 0 gives one response: expected --n_samples 1, found 3"
    ):
        generate(tiny, tmp_path, "--temperature", "0")
    with pytest.raises(InputError, match="the finished files of step1_sft.py are missing"):
        generate(tiny, tmp_path, "--adapter_name", "sft", "--sft_dir", str(tmp_path))
    with pytest.raises(InputError, match="expected sft, none or a folder of a LoRA adapter"):
        generate(tiny, tmp_path, "--adapter_name", str(tmp_path))
    with pytest.raises(InputError, match="none of 13 prompts has at most 3 tokens"):
        generate(tiny, tmp_path, "--max_prompt_tokens", "3")
    with pytest.raises(
        InputError,
        match="no/such: expected the tokenizer of a local folder or of a model on the hub",
    ):
        generate(tiny, tmp_path, "--model_name", "no/such")


def test_download_that_breaks_off(tiny, tmp_path):
    broken = tiny_models.make_language_model(tmp_path / "language")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(
        InputError, match="a causal model in a local folder or on the hub, found: SafetensorError"
    ):
        loading.load_model("causal", str(broken))


def test_vllm_missing_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="backend vllm: the package vllm is missing"):
        step2_gen_sample.choose_backend("vllm")
    assert step2_gen_sample.choose_backend("auto") == "transformers"


def test_adapter_changes_the_text(tiny, generated, tmp_path):
    pytest.importorskip("peft", reason="adapters need the extra [llm]")
    adapter = tiny_models.make_adapter(tmp_path / "adapter", tiny / "language")
    tuned = rows_of(generate(tiny, tmp_path / "out", "--adapter_name", str(adapter)))
    plain = rows_of(generated)
    assert [row["id"] for row in tuned] == [row["id"] for row in plain]
    assert sum(a["responses"] != b["responses"] for a, b in zip(tuned, plain, strict=True)) > 10


@pytest.mark.parametrize("tuned", [False, True])
def test_greedy_vllm_agrees(tiny, tmp_path, tuned):
    pytest.importorskip(
        "vllm", reason="vllm is not installed: its agreement with transformers is not checked here"
    )
    flags = ["--n_samples", "1", "--temperature", "0", "--dtype", "float32"]
    if tuned:
        flags += [
            "--adapter_name",
            str(tiny_models.make_adapter(tmp_path / "adapter", tiny / "language")),
        ]
    ours = rows_of(generate(tiny, tmp_path / "transformers", *flags, "--backend", "transformers"))
    command = flags_of(
        tiny, tmp_path / "vllm", *flags, "--backend", "vllm", "--gpu_memory_utilization", "0.3"
    )
    subprocess.run([sys.executable, "step2_gen_sample.py", *command], cwd=ROOT, check=True)
    theirs = rows_of(next((tmp_path / "vllm").glob("prompts_*")))
    assert [row["responses"] for row in theirs] == [row["responses"] for row in ours]
