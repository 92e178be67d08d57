"""studies/interpretable_prepare.py: chat templates, shards, kills, long rows, arrays, pairs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from conftest import ROOT

from rewardlib.errors import InputError
from rewardlib.llm import loading
from studies import interpretable_prepare as script
from studies.interpretable import attribute_data, attribute_sources, chat_data, chat_embeddings

SCRIPT = ROOT / "studies" / "interpretable_prepare.py"
SHARED = ROOT.parent / "shared" / "data"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TURN = "<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n"
OPENING = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TEMPLATES = {  # name: (template, whether it opens the assistant's turn)
    "chatml": "{% for m in messages %}" + TURN + "{% endfor %}" + OPENING,
    "bos": "{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}" + OPENING,
    "no opening": "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}",
}
THOUGHT = TEMPLATES["chatml"].replace(
    "<|assistant|>\n{% endif %}", "<|assistant|>\n<think>\n{% endif %}"
)
SPACE = "{% for m in messages %}{{ 'A: ' if m['role'] == 'assistant' else 'Q: ' }}"
SPACE += "{{ m['content'] }}\n{% endfor %}"
SPACE += "{% if add_generation_prompt %}A: {% endif %}"
COUNTING = "{{ messages | length }} turns\n" + TEMPLATES["chatml"]


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def make_model(folder, template=TEMPLATES["bos"]):
    pytest.importorskip("transformers", reason="chat data need the extra [llm]")
    tiny_models.make_language_model(folder)
    path = folder / "chat_template.jinja"
    path.write_text(template)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """30 rated responses to 10 prompts of one and two turns.

    Row 7 is long. Labels tell the row; two thirds of the label "short" are missing.
    """
    path = tmp_path_factory.mktemp("rated") / "rated.jsonl"
    answers, prompts = tiny_models.sentences(30, 1, 1, 30), tiny_models.sentences(10, 2)
    answers[7] = " ".join(tiny_models.sentences(20, 3))
    rows = []
    for i, answer in enumerate(answers):
        prompt = prompts[i % 10]
        start = chat(prompt) if i % 2 else chat(prompt, "yes", "why")
        row = {
            "id": f"r{i}",
            "messages": [*start, *chat("", answer)[1:]],
            "helpful": i,
            "short": 0.5 * i,
        }
        if i % 3 == 0:
            row["short"] = None
        if i % 3 == 1:
            del row["short"]
        rows.append(row)
    tiny_models.write_jsonl(path, rows)
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    texts = tiny_models.sentences(36, 4, 1, 30)
    rows = [
        {
            "id": i,
            "chosen": chat(texts[3 * i], texts[3 * i + 1]),
            "rejected": chat(texts[3 * i], texts[3 * i + 2]),
        }
        for i in range(12)
    ]
    tiny_models.write_jsonl(path, [{**row, "subset": f"s{i % 2}"} for i, row in enumerate(rows)])
    return path


def prepare(output, *flags):
    script.main([*map(str, flags), "--output", str(output)])
    return attribute_data.read(output)


def embedded(output, dataset, model, *flags):
    return prepare(output, "--dataset", dataset, "--model", model, "--batch_tokens", 300, *flags)


def alone(model_dir, messages, opened=False):
    """Last hidden state of a conversation, or of an opened prompt, from a pass without padding."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    causal = transformers.AutoModelForCausalLM.from_pretrained(model_dir).eval()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        return causal(**ids, output_hidden_states=True).hidden_states[-1][0, -1].numpy()


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("name", TEMPLATES)
def test_position_is_where_the_assistant_begins(tmp_path, name):
    tokenizer = loading.load_tokenizer(make_model(tmp_path, TEMPLATES[name]))
    prompt, answer = chat("how are you", "good", "and now"), chat("", "very good")[1]
    opened, (conversation,) = chat_embeddings.encode(tokenizer, prompt, [answer], "row 0")
    index = chat_embeddings.position(opened, conversation)
    text = tokenizer.apply_chat_template([*prompt, answer], tokenize=False)
    end = {
        "chatml": "now</s>\n<|assistant|>\n",
        "bos": "now</s>\n<|assistant|>\n",
        "no opening": "now [/INST]",
    }[name]
    assert tokenizer.decode(conversation) == text
    assert tokenizer.decode(conversation[: index + 1]) == text[: text.index(end) + len(end)]
    assert (
        conversation.count(tokenizer.bos_token_id),
        conversation[0] == tokenizer.bos_token_id,
    ) == ((0, False) if name == "chatml" else (1, True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_states_equal_single_passes(tmp_path, name, side):
    folder = make_model(tmp_path, TEMPLATES[name])
    tokenizer, base = loading.load_tokenizer(folder), loading.load_model("base", folder)
    texts = tiny_models.sentences(24, 7, 1, 40)
    prompts, answers = (
        [chat(text) for text in texts[::2]],
        [chat("", text)[1] for text in texts[1::2]],
    )
    encoded = [
        chat_embeddings.encode(tokenizer, p, [a], "row")
        for p, a in zip(prompts, answers, strict=True)
    ]
    rows, positions = [whole[0] for _, whole in encoded], [len(opened) - 1 for opened, _ in encoded]
    states = chat_embeddings.states_at(base, rows, positions, tokenizer.pad_token_id, 400, side)
    np.testing.assert_allclose(states[:, 0], [alone(folder, p, True) for p in prompts], atol=1e-5)
    whole = [alone(folder, [*p, a]) for p, a in zip(prompts, answers, strict=True)]
    np.testing.assert_allclose(states[:, 1], whole, atol=1e-5)
    one_by_one = chat_embeddings.states_at(base, rows, positions, tokenizer.pad_token_id, 1, side)
    np.testing.assert_allclose(states, one_by_one, atol=1e-5)


@pytest.mark.parametrize(("template", "n_alone"), [(THOUGHT, 3), (SPACE, 2)])
def test_prompts_without_a_place_in_the_conversation_take_their_own_pass(
    tmp_path, pairs, capsys, template, n_alone
):
    """Two openings: one that a finished turn lacks, one whose space joins the next word's token."""
    rows = rows_of(pairs)[:3]
    rows[1]["rejected"][-1]["content"] = "\n" + rows[1]["rejected"][-1]["content"]
    tiny_models.write_jsonl(tmp_path / "pairs.jsonl", rows)
    folder = make_model(tmp_path / "model", template)
    tokenizer = loading.load_tokenizer(folder)
    for row, places in zip(
        rows, ([False, False], [False, n_alone == 2], [False, False]), strict=True
    ):
        opened, conversations = chat_embeddings.encode(
            tokenizer, row["chosen"][:-1], [row["chosen"][-1], row["rejected"][-1]], ""
        )
        assert [chat_embeddings.position(opened, ids) for ids in conversations] == [
            len(opened) - 1 if has_place else None for has_place in places
        ]
    data = embedded(tmp_path / "pairs.safetensors", tmp_path / "pairs.jsonl", folder)
    expected = [alone(folder, row["chosen"][:-1], True) for row in rows]
    np.testing.assert_allclose(data.prompt_embeddings[0], expected, atol=1e-5)
    expected = [[alone(folder, row[side]) for side in ("chosen", "rejected")] for row in rows]
    np.testing.assert_allclose(data.embeddings[0], expected, atol=1e-5)
    assert f"{n_alone} prompts in a pass of their own" in capsys.readouterr().out


def test_template_that_rewrites_the_prompt_is_refused(tmp_path, rated):
    with pytest.raises(
        InputError,
        match=r"row 'r0': expected the chat template to write a prompt in one way, found",
    ):
        embedded(tmp_path / "x.safetensors", rated, make_model(tmp_path / "model", COUNTING))
    refusing = (
        "{{ raise_exception('only users here') if messages | length > 3 }}" + TEMPLATES["bos"]
    )
    with pytest.raises(
        InputError,
        match=r"row 'r0': expected messages that the chat template takes, found user, ass.*",
    ):
        embedded(tmp_path / "x.safetensors", rated, make_model(tmp_path / "other", refusing))


def test_template_from_a_file_and_none(tmp_path, pairs, model):
    tiny_models.make_language_model(tmp_path / "plain")
    with pytest.raises(
        InputError,
        match=r"the tokenizer has no chat template; give --chat_template",
    ):
        embedded(tmp_path / "x.safetensors", pairs, tmp_path / "plain")
    template = Path(model) / "chat_template.jinja"
    actual = embedded(
        tmp_path / "x.safetensors", pairs, tmp_path / "plain", "--chat_template", template
    )
    expected = embedded(tmp_path / "y.safetensors", pairs, model)
    assert (actual.embeddings[0] == expected.embeddings[0]).all()


# ---------------------------------------------------------------------------------- rows and labels


def test_rated_rows_keep_their_labels(tmp_path, rated, model, capsys):
    data = embedded(tmp_path / "rated.safetensors", rated, model, "--max_length", 130)
    rows = [row for i, row in enumerate(rows_of(rated)) if i != 7]
    assert (
        data.shape == (29, 64)
        and data.attributes == ["helpful", "short"]
        and data.left_out == ["r7"]
    )
    assert data.ids == [row["id"] for row in rows]
    assert data.labels[:, 0].tolist() == [row["helpful"] for row in rows]
    short = [row["short"] if row.get("short") is not None else np.nan for row in rows]
    np.testing.assert_array_equal(data.labels[:, 1], np.float32(short))
    assert np.isnan(data.labels[:, 1]).sum() == sum(np.isnan(short)) > 10
    np.testing.assert_allclose(
        data.embeddings[0], [alone(model, row["messages"]) for row in rows], atol=1e-5
    )
    expected = [alone(model, row["messages"][:-1], True) for row in rows]
    np.testing.assert_allclose(data.prompt_embeddings[0], expected, atol=1e-5)
    assert "1 of 30 rows were too long and are left out: r7" in capsys.readouterr().out
    by_prompt = {}
    for row, group in zip(rows, data.groups.tolist(), strict=True):
        by_prompt.setdefault(json.dumps(row["messages"][:-1]), set()).add(group)
    assert len(by_prompt) == len(set(data.groups.tolist())) == 10
    assert (
        data.source["sha256"]
        and data.source["embedding_model"] == model
        and data.source["prompt_position"]
    )


def test_changed_labels_are_prepared_again(tmp_path, rated, model):
    first = embedded(tmp_path / "rated.safetensors", rated, model)
    rows = rows_of(rated)
    rows[4]["helpful"] = -1
    tiny_models.write_jsonl(tmp_path / "rated.jsonl", rows)
    again = embedded(tmp_path / "rated.safetensors", tmp_path / "rated.jsonl", model)
    assert (first.labels[4, 0], again.labels[4, 0]) == (4, -1)


def test_pairs_share_their_prompt(tmp_path, pairs, model, capsys):
    data = embedded(tmp_path / "pairs.safetensors", pairs, model, "--storage_dtype", "float16")
    rows = rows_of(pairs)
    assert (
        data.shape == (12, 2, 64) and data.embeddings[0].dtype == np.float16 and data.labels is None
    )
    assert data.subsets == ["s0", "s1"] * 6 and data.ids == [str(i) for i in range(12)]
    expected = [[alone(model, row[side]) for side in ("chosen", "rejected")] for row in rows]
    np.testing.assert_allclose(data.embeddings[0], expected, atol=0.01)
    capsys.readouterr()
    before = (tmp_path / "pairs.safetensors").read_bytes()
    embedded(tmp_path / "pairs.safetensors", pairs, model, "--storage_dtype", "float16")
    assert "already done" in capsys.readouterr().out
    assert (tmp_path / "pairs.safetensors").read_bytes() == before


def test_forms_of_a_row(tmp_path):
    """Texts, single messages and whole conversations; the same from a folder of save_to_disk."""
    conversations = {"chosen": chat("hi", "yes"), "rejected": chat("hi", "no")}
    forms = [
        conversations,
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": chat("hi"), "chosen": chat("", "yes")[1:], "rejected": chat("", "no")[1:]},
        {"prompt": "hi", **conversations},
    ]
    for row in forms:
        assert chat_data.split_row(row, chat_data.find_kind(row, "x"), "x") == (
            chat("hi"),
            [one[0] for one in (chat("", "yes")[1:], chat("", "no")[1:])],
        )
    rows = [
        {"messages": chat("hi", "yes"), "good": 1},
        {"messages": chat("so", "no"), "good": None},
    ]
    tiny_models.write_jsonl(tmp_path / "x.jsonl", rows)
    plain = [{"prompt": "hi", "response": "yes", "good": 1}, {"prompt": "so", "response": "no"}]
    tiny_models.write_jsonl(tmp_path / "y.jsonl", plain)
    chats = [chat_data.read(str(tmp_path / name)) for name in ("x.jsonl", "y.jsonl")]
    assert chats[0].digest == chats[1].digest and (chats[0].groups == chats[1].groups).all()
    datasets = pytest.importorskip("datasets", reason="chat data need the extra [llm]")
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": dataset}).save_to_disk(str(tmp_path / "two"))
    for folder, split in (("one", "train"), ("two", "test")):
        assert chat_data.read(str(tmp_path / folder), split).digest == chats[0].digest
    with pytest.raises(InputError, match="expected a split named train, found test"):
        chat_data.read(str(tmp_path / "two"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": chat("a", "b"), "rejected": chat("c", "d")},
            "row 1: expected chosen and rejected to differ in the",
        ),
        (
            {"chosen": chat("a", "b", "c"), "rejected": chat("a", "b", "c")},
            "assistant's message last in chosen, found",
        ),
        ({"chosen": "b", "rejected": "c"}, "row 1: expected prompt as text or as a list"),
        (
            {"chosen": [{"role": "user"}], "rejected": "c"},
            "row 1: expected chosen as text or as a list",
        ),
        ({"chosen": chat("a", "b")}, "row 1: expected rejected as text or as a list"),
        (
            {"chosen": chat("a", "b"), "rejected": chat("a", "c"), "subset": 3},
            "row 1: expected the name of a subset",
        ),
    ],
)
def test_rows_that_are_refused(tmp_path, row, message):
    good = {"chosen": chat("a", "b"), "rejected": chat("a", "c"), "subset": "s"}
    tiny_models.write_jsonl(tmp_path / "x.jsonl", [good, {"subset": "s", **row}])
    with pytest.raises(InputError, match=message):
        chat_data.read(str(tmp_path / "x.jsonl"))


def test_columns_that_are_refused(tmp_path, rated):
    with pytest.raises(
        InputError,
        match="no columns for the attributes witty; the columns are",
    ):
        chat_data.read(str(rated), attributes=["helpful", "witty"])
    row = {"messages": chat("a", "b"), "good": 1, "kind": "x", "id": 4}
    tiny_models.write_jsonl(tmp_path / "x.jsonl", [row, {**row, "good": "high"}])
    assert chat_data.read(str(tmp_path / "x.jsonl")).attributes == []
    with pytest.raises(InputError, match="row 1: good: expected a number or null, found 'high'"):
        chat_data.read(str(tmp_path / "x.jsonl"), attributes=["good"])
    tiny_models.write_jsonl(tmp_path / "y.jsonl", [row, {**row, "good": 2}])
    assert chat_data.read(str(tmp_path / "y.jsonl")).ids == ["4 (row 0)", "4 (row 1)"]
    tiny_models.write_jsonl(tmp_path / "z.jsonl", [{**row, "chosen": "a", "rejected": "b"}])
    with pytest.raises(
        InputError, match="found messages, good, kind, id, chosen, rejected; choose with --kind"
    ):
        chat_data.read(str(tmp_path / "z.jsonl"))
    (tmp_path / "z.jsonl").write_text('{"messages": \n')
    with pytest.raises(InputError, match="z.jsonl line 1: expected one JSON object, found"):
        chat_data.read(str(tmp_path / "z.jsonl"))
    with pytest.raises(InputError, match="no.jsonl not found"):
        chat_data.read(str(tmp_path / "no.jsonl"))


# ------------------------------------------------------------------------------------------- shards


def test_shards_in_any_order_give_the_same_file(tmp_path, rated, model, capsys):
    flags = ["--n_shards", 4, "--max_length", 130]
    whole = embedded(tmp_path / "whole.safetensors", rated, model, "--max_length", 130)
    contents = []
    for order in ("0123", "2031"):
        folder = tmp_path / order
        for idx in order:
            script.main([*map(str, shard_flags(folder, rated, model, *flags)), "--shard_idx", idx])
        assert len(list(folder.glob("rated-0000?-of-00004.safetensors"))) == 4
        capsys.readouterr()
        embedded(
            folder / "rated.safetensors",
            rated,
            model,
            *flags,
            *(["--merge"] if order == "0123" else []),
        )
        assert "rated-0000" not in capsys.readouterr().out
        assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == [
            "manifest.json",
            "rated.safetensors",
        ]
        contents.append((folder / "rated.safetensors").read_bytes())
    embedded(tmp_path / "at once" / "rated.safetensors", rated, model, *flags)
    assert contents[0] == contents[1] == (tmp_path / "at once" / "rated.safetensors").read_bytes()
    joined = attribute_data.read(tmp_path / "0123" / "rated.safetensors")
    assert joined.ids == whole.ids and joined.left_out == whole.left_out == ["r7"]
    np.testing.assert_array_equal(joined.labels, whole.labels)
    np.testing.assert_allclose(joined.embeddings[0], whole.embeddings[0], atol=1e-5)


def shard_flags(folder, dataset, model, *flags):
    output = folder / "rated.safetensors"
    return [
        "--dataset",
        dataset,
        "--model",
        model,
        "--batch_tokens",
        300,
        "--output",
        output,
        *flags,
    ]


def test_a_missing_shard_and_one_of_other_settings(tmp_path, rated, model):
    flags = list(map(str, shard_flags(tmp_path, rated, model, "--n_shards", "3")))
    with pytest.raises(
        InputError, match="rated-00000-of-00003.safetensors is missing, and so are all other shards"
    ):
        script.main([*flags, "--merge"])
    for idx in "02":
        script.main([*flags, "--shard_idx", idx])
    with pytest.raises(
        InputError, match=r"rated-00001-of-00003.safetensors is missing: expected 3 shards, found 2"
    ):
        script.main([*flags, "--merge"])
    script.main([*flags, "--shard_idx", "1", "--max_length", "130"])
    with pytest.raises(InputError, match="expected source .* found"):
        script.main([*flags, "--merge"])
    script.main([*flags, "--shard_idx", "1"])
    script.main([*flags, "--merge"])
    with pytest.raises(
        InputError, match=r"--shard_idx: expected a number below --n_shards \(3\), found 3"
    ):
        script.main([*flags, "--shard_idx", "3"])
    with pytest.raises(
        InputError, match="--n_shards: expected at most the number of rows, 30, found 31"
    ):
        script.main([*map(str, shard_flags(tmp_path / "new", rated, model, "--n_shards", "31"))])


def test_all_rows_too_long(tmp_path, rated, model):
    with pytest.raises(
        InputError,
        match=r"no rows: all 30 are longer than --max_length or than the model has positions",
    ):
        embedded(tmp_path / "x.safetensors", rated, model, "--max_length", 3)
    assert not (tmp_path / "x.safetensors").exists()


def test_killed_and_run_again(tmp_path, rated, model):
    embedded(tmp_path / "whole" / "rated.safetensors", rated, model, "--n_shards", 10)
    folder = tmp_path / "killed"
    command = [
        sys.executable,
        str(SCRIPT),
        *map(str, shard_flags(folder, rated, model, "--n_shards", 10)),
    ]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    deadline = time.time() + 60
    while (
        not list(folder.glob("rated-0000[2-9]*"))
        and running.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    embedded(folder / "rated.safetensors", rated, model, "--n_shards", 10)
    assert (folder / "rated.safetensors").read_bytes() == (
        tmp_path / "whole" / "rated.safetensors"
    ).read_bytes()
    assert not list(folder.glob("*-of-*"))


def test_finished_shards_are_not_embedded_again(tmp_path, rated, model, monkeypatch, capsys):
    flags = [*map(str, shard_flags(tmp_path, rated, model, "--n_shards", 3))]
    for idx in "012":
        script.main([*flags, "--shard_idx", idx])
    monkeypatch.setattr(chat_embeddings, "embed", None)
    script.main(flags)
    script.main(flags)
    assert "already done" in capsys.readouterr().out


def test_disk_and_embeddings_that_are_not_finite(tmp_path, rated, model, monkeypatch):
    states_at = chat_embeddings.states_at

    def broken(*args, **kwargs):
        states = states_at(*args, **kwargs)
        states[3, 1, 2] = 1e6
        return states

    monkeypatch.setattr(chat_embeddings, "states_at", broken)
    with pytest.raises(
        InputError,
        match="expected finite embeddings, found NaN or inf; use float32 for both dtypes",
    ):
        embedded(tmp_path / "x.safetensors", rated, model, "--storage_dtype", "float16")
    monkeypatch.setattr(
        chat_embeddings.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(InputError, match="GB of free disk space"):
        embedded(tmp_path / "x.safetensors", rated, model)


# ------------------------------------------------------------------------------------------- arrays


@pytest.fixture
def arrays(tmp_path):
    """3 responses to 4 prompts, of which 0 and 3 are the same; every number tells its position."""
    k, n = np.arange(3)[:, None], np.arange(4)[None]
    values = (10 * k + n).astype(np.float16)
    np.save(tmp_path / "EMBD_x.npy", np.stack([values, -values], -1))
    labels = np.stack([values, values % 2], -1).astype(np.float32)
    labels[2, 1] = np.nan
    np.save(tmp_path / "ATTRIBUTES_x.npy", labels)
    np.save(tmp_path / "PROMPTEMBD_x.npy", np.float16([[0, 1], [1, 1], [2, 1], [0, 1]]))
    (tmp_path / "attributes.json").write_text('["quality", "odd"]')
    return tmp_path


def array_flags(folder, **changes):
    flags = {"source": "arrays", "embeddings": "EMBD_x.npy", "labels": "ATTRIBUTES_x.npy"}
    flags |= {"prompt_embeddings": "PROMPTEMBD_x.npy", **changes}
    return [
        text
        for key, value in flags.items()
        for text in (
            f"--{key}",
            str(folder / value) if str(value).endswith((".npy", ".npz", ".json")) else value,
        )
        if value is not None
    ]


def test_published_arrays(arrays, capsys):
    data = prepare(arrays / "out.safetensors", *array_flags(arrays))
    assert data.shape == (12, 2) and data.embeddings[0].dtype == np.float16
    by_id = {name: i for i, name in enumerate(data.ids)}
    for k in range(3):
        for n in range(4):
            row = by_id[f"{n}-{k}"]
            assert data.take([row])[0].tolist() == [10 * k + n, -(10 * k + n)]
            assert data.take_prompts([row])[0].tolist() == [[0, 1], [1, 1], [2, 1], [0, 1]][n]
            np.testing.assert_equal(
                data.labels[row, 0], np.nan if (n, k) == (1, 2) else 10.0 * k + n
            )
            assert data.groups[row] == data.groups[by_id[f"{n % 3}-0"]]
    assert len(set(data.groups.tolist())) == 3 and np.isnan(data.labels[by_id["1-2"]]).all()
    assert "labels: quality 11, odd 11" in capsys.readouterr().out
    chosen = prepare(arrays / "odd.safetensors", *array_flags(arrays), "--attributes", "odd")
    assert chosen.attributes == ["odd"] and chosen.labels.shape == (12, 1)
    without = prepare(arrays / "none.safetensors", *array_flags(arrays, prompt_embeddings=None))
    assert without.prompt_embeddings is None and len(set(without.groups.tolist())) == 4
    (arrays / "one.json").write_text('["quality"]')
    with pytest.raises(
        InputError, match=r"one.json: expected 2 names, one for each label, found \['quality'\]"
    ):
        prepare(arrays / "x.safetensors", *array_flags(arrays, attribute_names="one.json"))
    np.save(arrays / "L.npy", np.zeros((3, 5, 2)))
    with pytest.raises(
        InputError, match=r"L.npy: expected labels \(K, N, A\) of the K responses to N prompts"
    ):
        prepare(arrays / "x.safetensors", *array_flags(arrays, labels="L.npy"))
    with pytest.raises(
        InputError,
        match=r"expected \(4, D\), one row for each prompt of EMBD_x.npy, found \(3, 5, 2\)",
    ):
        prepare(arrays / "x.safetensors", *array_flags(arrays, prompt_embeddings="L.npy"))
    with pytest.raises(
        InputError, match=r"--source arrays with rated responses \(.npy\) needs --labels"
    ):
        prepare(arrays / "x.safetensors", *array_flags(arrays, labels=None))
    with pytest.raises(
        InputError,
        match=r"ATTRIBUTES_x.npy: expected an attribute among quality, odd, found 'witty'",
    ):
        prepare(arrays / "x.safetensors", *array_flags(arrays), "--attributes", "witty")


def test_pairs_within_prompts(arrays, capsys):
    """Labels: 0 10 20 3 13 23 of prompt 0 = 3; 1 11 and a missing one of prompt 1; 2 12 22 of 2."""
    flags = [*array_flags(arrays), "--pairs_from", "quality", "--min_gap", "10"]
    data = prepare(arrays / "pairs.safetensors", *flags, "--pairs_per_prompt", "99")
    pairs = sorted((int(a[0]), int(b[0])) for a, b in data.take(range(len(data.ids))))
    expected = [
        (a, b) for a in (0, 10, 20, 3, 13, 23) for b in (0, 10, 20, 3, 13, 23) if a - b > 10
    ] + [(22, 2)]
    assert pairs == sorted(expected) and data.labels is None
    assert (
        "prompts 3, prompts without a pair 1, pairs of too small a gap" in capsys.readouterr().out
    )
    for row, name in enumerate(data.ids):
        chosen, rejected = (name.split("-") for name in name.split(" over "))
        assert data.take([row])[0, :, 0].tolist() == [
            10 * int(k) + int(n) for n, k in (chosen, rejected)
        ]
    fewer = prepare(
        arrays / "fewer.safetensors", *flags, "--pairs_per_prompt", "2", "--attributes", "odd"
    )
    assert len(fewer.ids) == 3 and set(fewer.ids) < set(data.ids)
    odd = np.sign(fewer.take(range(3))[:, 0, 0] % 2 - fewer.take(range(3))[:, 1, 0] % 2)
    assert fewer.labels[:, 0].tolist() == (0.5 + odd / 2).tolist()
    with pytest.raises(InputError, match="labels differ by more than 50.0; lower --min_gap"):
        prepare(arrays / "x.safetensors", *flags[:-1], "50")
    with pytest.raises(
        InputError, match="no rated responses with labels, which --attributes and --pairs_from need"
    ):
        source = ["--source", "prepared", "--prepared", arrays / "pairs.safetensors"]
        prepare(arrays / "x.safetensors", *source, "--pairs_from", "quality")


def test_parts_of_the_prompts_are_disjoint_in_every_file(tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (("a", 300), ("b", 200)):
        np.save(tmp_path / f"EMBD_{name}.npy", rng.standard_normal((2, n, 3)).astype(np.float32))
        np.save(tmp_path / f"ATTRIBUTES_{name}.npy", rng.standard_normal((2, n)))
        np.save(tmp_path / f"PROMPTEMBD_{name}.npy", np.arange(n, dtype=np.float32)[:, None])
    (tmp_path / "attributes.json").write_text('["x"]')
    prepared = {}
    for name in "ab":
        flags = array_flags(
            tmp_path,
            **{
                key: f"{value}_{name}.npy"
                for key, value in zip(FILES, ("EMBD", "ATTRIBUTES", "PROMPTEMBD"), strict=True)
            },
        )
        for part in ("first", "second", "all"):
            prepared[name, part] = prepare(
                tmp_path / f"{name}{part}.safetensors", *flags, "--prompts", part
            )
            source = ["--source", "prepared", "--prepared", tmp_path / f"{name}{part}.safetensors"]
            if part == "all":
                again = prepare(
                    tmp_path / "again.safetensors", *source, "--prompts", "second", "--share", "0.5"
                )
                assert again.ids == prepared[name, "second"].ids
    groups = {key: set(data.groups.tolist()) for key, data in prepared.items()}
    for name in "ab":
        assert not groups[name, "first"] & groups["a", "second"]
        assert groups[name, "first"] | groups[name, "second"] == groups[name, "all"]
    assert 120 < len(groups["a", "first"]) < 180 and groups["b", "all"] < groups["a", "all"]
    few = attribute_sources.in_half(np.arange(5000), "first", 0.1, 6)
    other = attribute_sources.in_half(np.arange(5000), "first", 0.1, 7)
    assert 400 < few.sum() < 600 and (few != other).any()


FILES = ("embeddings", "labels", "prompt_embeddings")


def test_npz_pairs(tmp_path, capsys):
    content = {
        "embeddings": np.arange(12.0).reshape(3, 2, 2),
        "prompt_embeddings": np.float16([[1], [2], [1]]),
    }
    np.savez(tmp_path / "p.npz", **content, subset=["a", "b", "a"], length_chars=np.zeros(3))
    data = prepare(
        tmp_path / "p.safetensors", "--source", "arrays", "--embeddings", tmp_path / "p.npz"
    )
    assert (
        data.shape == (3, 2, 2)
        and data.subsets == ["a", "b", "a"]
        and data.embeddings[0].dtype == np.float32
    )
    assert (
        data.take([1]).tolist() == [[[4, 5], [6, 7]]]
        and data.groups[0] == data.groups[2] != data.groups[1]
    )
    assert "not used: length_chars" in capsys.readouterr().out
    np.savez(tmp_path / "q.npz", rows=np.zeros(3))
    with pytest.raises(InputError, match="q.npz: expected an array named embeddings, found rows"):
        prepare(
            tmp_path / "q.safetensors", "--source", "arrays", "--embeddings", tmp_path / "q.npz"
        )


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not on this machine")
def test_real_arrays(tmp_path):
    folder = SHARED / "alpaca"
    kinds = dict(
        zip(
            FILES,
            ("EMBD_alpaca_minilm", "ATTRIBUTES_alpaca", "PROMPTEMBD_alpaca_minilm"),
            strict=True,
        )
    )
    flags = array_flags(folder, **{key: f"{name}_mix55_train.npy" for key, name in kinds.items()})
    data = prepare(tmp_path / "alpaca.safetensors", *flags)
    assert data.shape == (6050, 384) and len(set(data.groups.tolist())) == 605
    rows = np.flatnonzero([name.startswith("17-") for name in data.ids])
    assert (data.take(rows) == np.load(folder / "EMBD_alpaca_minilm_mix55_train.npy")[:, 17]).all()
    np.testing.assert_array_equal(
        data.labels[rows], np.load(folder / "ATTRIBUTES_alpaca_mix55_train.npy")[:, 17]
    )
    pairs = prepare(
        tmp_path / "rmbench.safetensors",
        "--source",
        "arrays",
        "--embeddings",
        SHARED / "pairs/rmbench.npz",
    )
    assert (
        pairs.shape == (2394, 2, 384)
        and len(set(pairs.groups.tolist())) == 796
        and len(set(pairs.subsets)) == 4
    )


# ------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "x.jsonl"], "--source chat needs --model"),
        (["--source", "prepared"], "--source prepared needs --prepared"),
        (
            ["--dataset", "x", "--model", "m", "--pairs_from", "a"],
            "--pairs_from needs --source arrays or prepared",
        ),
        (["--dataset", "x", "--model", "m", "--merge"], "--merge needs --n_shards"),
        (
            ["--dataset", "x", "--model", "m", "--labels", "l"],
            "--source chat does not read --labels; leave it out",
        ),
        (
            ["--source", "arrays", "--embeddings", "p.npz", "--labels", "l.npy"],
            "--source arrays with pairs (.npz) does not read --labels",
        ),
        (
            ["--dataset", "x", "--model", "m", "--share", "1"],
            "--share: expected a number between 0 and 1",
        ),
        (
            ["--dataset", "x", "--model", "m", "--output", "x.npy"],
            "expected a file name that ends in .safetensors",
        ),
    ],
)
def test_flags_are_refused_before_anything_runs(tmp_path, flags, message):
    command = [sys.executable, str(SCRIPT), "--output", "out/x.safetensors", *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
