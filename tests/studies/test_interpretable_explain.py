"""studies/interpretable_explain.py: contributions that add up to the reward; refusals."""

import json

import numpy as np
import pytest
from interpretable_data import NAMES, D, make_gate, make_pairs, script

from rewardlib import artifacts
from rewardlib.errors import InputError
from studies.interpretable import attribute_data, gating, multi_objective


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with a gate, pairs of two subsets, and rated responses."""
    folder = make_gate(tmp_path_factory.mktemp("models") / "model", "--freeze", "clear=0.2")
    make_pairs(folder / "new.safetensors", n=20, seed=7, subsets=["even", "odd/other"] * 10)
    x = np.random.default_rng(8).standard_normal((20, D)).astype(np.float32)
    make_pairs(folder / "rated.safetensors", n=20, seed=7, embeddings=[x])
    return folder


def explain(model, out, *flags):
    script("interpretable_explain").main(
        ["--model_dir", str(model), "--output_dir", str(out), *map(str, flags)]
    )
    paths = [path for path in out.glob("explanation_*.json")]
    assert len(paths) == 1
    return json.loads(paths[0].read_text()), paths[0]


def test_contributions_are_weight_times_debiased_score_and_add_up_to_the_reward(
    model, tmp_path, capsys
):
    content, path = explain(model, tmp_path, "--data", model / "new.safetensors", "--index", 3)
    assert (
        path.name == "explanation_new_row_3.json"
        and content["what"] == "row 3 (p3)"
        and content["ids"] == ["p3"]
    )
    data = attribute_data.read(model / "new.safetensors")
    gated = gating.load(model)
    x, scores = data.embeddings[0][3], gating.rewards(gated, data, np.array([3]))["gate"][0]
    assert list(content["weights"]) == NAMES and sum(content["weights"].values()) == pytest.approx(
        1, abs=1e-6
    )
    assert content["weights"]["clear"] == pytest.approx(0.2)
    for k, side in enumerate(("chosen", "rejected")):
        row = content["responses"][side]
        for a, name in enumerate(NAMES):
            verbosity = 3 * x[k, 2] if a < 2 else 0
            assert row["score"][name] == pytest.approx(x[k, a] + verbosity, rel=1e-4)
            assert row["debiased"][name] == pytest.approx(x[k, a], abs=1e-4)
            standardised = (x[k, a] - gated.centre[a]) / gated.spread[a]
            assert row["standardised"][name] == pytest.approx(standardised, abs=1e-4)
            assert row["contribution"][name] == pytest.approx(
                content["weights"][name] * standardised, abs=1e-4
            )
        assert sum(row["contribution"].values()) == pytest.approx(row["reward"], abs=1e-9)
        assert row["reward"] == pytest.approx(scores[k], abs=1e-5)
    out = capsys.readouterr().out
    assert "contribution" in out and f"{content['responses']['chosen']['reward']:+.4f}" in out
    assert content["n_rows_trained_on"] == 0 and "trained on" not in out


def test_debiasing_changes_what_is_explained(model, tmp_path):
    row = explain(model, tmp_path, "--data", model / "new.safetensors", "--index", 0)[0][
        "responses"
    ]["chosen"]
    assert abs(row["score"]["helpful"] - row["debiased"]["helpful"]) > 0.1
    assert row["score"]["verbosity"] == row["debiased"]["verbosity"]


def test_a_subset_is_the_mean_of_its_rows(model, tmp_path, capsys):
    content, path = explain(
        model, tmp_path, "--data", model / "new.safetensors", "--subset", "odd/other"
    )
    assert path.name == "explanation_new_odd_other.json" and content["n_rows"] == 10
    data = attribute_data.read(model / "new.safetensors")
    each = gating.rewards(gating.load(model), data, np.arange(1, 20, 2))["gate"]
    rewards = [content["responses"][side]["reward"] for side in ("chosen", "rejected")]
    assert rewards == pytest.approx(each.mean(0).tolist(), abs=1e-5)
    assert content["share_of_pairs_right"] == pytest.approx((each[:, 0] > each[:, 1]).mean())
    for side in ("chosen", "rejected"):
        row = content["responses"][side]
        assert sum(row["contribution"].values()) == pytest.approx(row["reward"], abs=1e-9)
    assert "right for" in capsys.readouterr().out


def test_a_rated_response(model, tmp_path):
    content, _ = explain(model, tmp_path, "--data", model / "rated.safetensors", "--index", 5)
    assert list(content["responses"]) == ["response"] and content["share_of_pairs_right"] is None
    data = attribute_data.read(model / "rated.safetensors")
    reward = gating.rewards(gating.load(model), data, np.array([5]))["gate"][0]
    assert content["responses"]["response"]["reward"] == pytest.approx(reward, abs=1e-5)


def test_rows_that_were_trained_on_are_counted(model, tmp_path, capsys):
    split = artifacts.read_json(model / gating.SPLIT, "gating")
    data = attribute_data.read(model / "train.safetensors")
    row = int(np.flatnonzero(data.groups == split["fit"][0])[0])
    content, _ = explain(model, tmp_path, "--data", model / "train.safetensors", "--index", row)
    assert content["n_rows_trained_on"] == 1
    assert "1 of 1 rows have prompts that were trained on" in capsys.readouterr().out


def test_the_same_command_gives_the_same_bytes_and_an_entry_in_the_manifest(model, tmp_path):
    flags = ["--data", model / "new.safetensors", "--index", 3]
    digests = []
    for name in ("a", "b"):
        _, path = explain(model, artifacts.writable_dir(tmp_path / name), *flags)
        digests.append(artifacts.sha256(path))
    assert digests[0] == digests[1]
    entry = artifacts.read_manifest(tmp_path / "a")["explain new_row_3"]
    assert list(entry["outputs"]) == ["explanation_new_row_3.json"]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--data", "new"], "expected one of --index, --subset and --text, found none"),
        (["--data", "new", "--index", "1", "--subset", "even"], "found index and subset"),
        (["--index", "1"], "--index needs --data"),
        (["--text", "a", "b"], "--text needs --model"),
        (
            ["--text", "a", "b", "--model", "m", "--data", "new"],
            "--text does not use --data, found",
        ),
        (
            ["--data", "new", "--index", "1", "--model", "m"],
            "--index does not use --model, found m; leave it out",
        ),
        (["--data", "new", "--index", "20"], "expected a row from 0 to 19 of .*, found 20"),
        (
            ["--data", "new", "--subset", "evens"],
            "expected a subset among even, odd/other, found 'evens'",
        ),
        (["--data", "rated", "--subset", "even"], "expected a subset among none, found 'even'"),
    ],
)
def test_what_cannot_be_explained(model, tmp_path, flags, match):
    flags = [
        str(model / f"{flag}.safetensors") if flag in ("new", "rated") else flag for flag in flags
    ]
    with pytest.raises(InputError, match=match):
        explain(model, tmp_path, *flags)


# --------------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A tiny language model, pairs prepared with it, and a gate trained on random heads."""
    pytest.importorskip("transformers", reason="texts need the extra [llm]")
    import tiny_models

    folder = tmp_path_factory.mktemp("chain")
    tiny_models.make_language_model(folder / "lm")
    template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant> {% endif %}"
    (folder / "lm" / "chat_template.jinja").write_text(template)
    texts = tiny_models.sentences(90, 1)
    rows = [
        dict(zip(("prompt", "chosen", "rejected"), texts[i : i + 3], strict=True))
        for i in range(0, 90, 3)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--dataset",
        folder / "pairs.jsonl",
        "--model",
        folder / "lm",
        "--output",
        folder / "pairs.safetensors",
    ]
    script("interpretable_prepare").main([str(flag) for flag in flags])
    data = attribute_data.read(folder / "pairs.safetensors")
    heads = np.random.default_rng(0).standard_normal((3, data.shape[-1])).astype(np.float32)
    model = multi_objective.AttributeModel(
        heads, np.array([0.5, 0, 0.2]), ["a", "length", "b"], "length"
    )
    multi_objective.save(folder, model, np.ones(3), "ratings")
    artifacts.write_json(folder / gating.HEADS_RECORD, {"data": {"source": data.source}})
    artifacts.write_json(folder / gating.HEADS_SPLIT, {"fit": [1], "held_out": [2]})
    flags = [
        "--pairs",
        folder / "pairs.safetensors",
        "--model_dir",
        folder,
        "--hidden",
        "8",
        "--epochs",
        "2",
    ]
    script("interpretable_gating").main([str(flag) for flag in flags])
    return folder, rows


def test_a_text_is_explained_as_its_prepared_row_is(chain, tmp_path):
    folder, rows = chain
    row, _ = explain(
        folder,
        artifacts.writable_dir(tmp_path / "row"),
        "--data",
        folder / "pairs.safetensors",
        "--index",
        4,
    )
    flags = ["--text", rows[4]["prompt"], rows[4]["chosen"], "--model", folder / "lm"]
    text, path = explain(folder, artifacts.writable_dir(tmp_path / "text"), *flags)
    assert path.name == "explanation_text.json" and text["text"] == [
        rows[4]["prompt"],
        rows[4]["chosen"],
    ]
    assert text["weights"] == pytest.approx(row["weights"], abs=1e-5)
    for measure in ("score", "debiased", "contribution"):
        expected = row["responses"]["chosen"][measure]
        assert text["responses"]["response"][measure] == pytest.approx(expected, abs=1e-4)


def test_a_text_embedded_by_another_model_is_refused(chain, tmp_path):
    import tiny_models

    folder, _ = chain
    tiny_models.make_language_model(tmp_path / "lm", seed=1)
    with pytest.raises(
        InputError, match="expected the model that embedded the training data of the gate"
    ):
        explain(folder, tmp_path, "--text", "a", "b", "--model", tmp_path / "lm")
