"""rewardbench.py against hand-solved cases and a published result; the command."""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT
from interpretable_data import D_PROMPT, NAMES, SOURCE, D, make_gate, make_pairs, script
from scipy import stats

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.measures import intervals
from studies.interpretable import attribute_data, gating, rewardbench

REFERENCE = ROOT.parent / "shared" / "data" / "rewardbench_reference.json"


@pytest.fixture
def reference():
    if not REFERENCE.is_file():
        pytest.skip(f"{REFERENCE} is absent: no published result to compare with")
    return json.loads(REFERENCE.read_text())


# ---------------------------------------------------------------------------------------- constants


def test_counts_and_sections_are_those_of_the_benchmark():
    assert sum(rewardbench.N_EXAMPLES.values()) == 2985
    assert rewardbench.N_EXAMPLES["math-prm"] == 447
    # Published code has these two the wrong way round; the data set has 154 prompts to refuse and
    # 250 to answer.
    assert [rewardbench.N_EXAMPLES[f"xstest-should-{what}"] for what in ("refuse", "respond")] == [
        154,
        250,
    ]
    named = [subset for subsets in rewardbench.SECTIONS.values() for subset in subsets]
    assert sorted(named) == sorted(rewardbench.EXAMPLE_COUNTS) and len(named) == 23
    sizes = {
        section: sum(rewardbench.EXAMPLE_COUNTS[s] for s in subsets)
        for section, subsets in rewardbench.SECTIONS.items()
    }
    assert sizes == {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 2 * 984}


def test_math_weighs_as_much_as_all_code():
    code = [s for s in rewardbench.SECTIONS["Reasoning"] if s.startswith("hep-")]
    assert (
        sum(rewardbench.EXAMPLE_COUNTS[s] for s in code)
        == rewardbench.EXAMPLE_COUNTS["math-prm"]
        == 984
    )


def test_counts_and_sections_are_the_references(reference):
    assert reference["example_counts"] == rewardbench.EXAMPLE_COUNTS
    assert reference["sections"] == {
        section: list(names) for section, names in rewardbench.SECTIONS.items()
    }


def test_published_accuracies_are_whole_numbers_of_examples(reference):
    """Fails where two counts are swapped: 0.964 of 154 is no whole number, 0.964 of 250 is 241."""
    for subset, accuracy in reference["reference_subset_accuracy"].items():
        n = rewardbench.N_EXAMPLES[subset] * accuracy
        assert n == pytest.approx(round(n), abs=1e-9), subset


def test_published_accuracies_give_the_published_sections(reference):
    result = rewardbench.section_scores(reference["reference_subset_accuracy"])
    assert result == pytest.approx(reference["reference_section_score"], abs=1e-9)


def test_swapped_counts_would_not(reference, monkeypatch):
    counts = dict(rewardbench.EXAMPLE_COUNTS)
    names = "xstest-should-refuse", "xstest-should-respond"
    counts[names[0]], counts[names[1]] = counts[names[1]], counts[names[0]]
    monkeypatch.setattr(rewardbench, "EXAMPLE_COUNTS", counts)
    result = rewardbench.section_scores(reference["reference_subset_accuracy"])
    assert abs(result["Safety"] - reference["reference_section_score"]["Safety"]) > 1e-4


# -------------------------------------------------------------------------------------- aggregation


def test_sections_weight_subsets_by_the_official_counts():
    accuracy = dict.fromkeys(rewardbench.EXAMPLE_COUNTS, 0.0) | {
        "mt-bench-easy": 1.0,
        "math-prm": 0.5,
    }
    result = rewardbench.section_scores(accuracy)
    assert result == {"Chat": 28 / 358, "Chat Hard": 0, "Safety": 0, "Reasoning": 0.25}
    assert rewardbench.overall_score(result) == pytest.approx((28 / 358 + 0.25) / 4)


def test_prior_sets_count_one_half():
    sections = {"Chat": 1.0, "Chat Hard": 0.5, "Safety": 0.5, "Reasoning": 1.0}
    assert rewardbench.overall_score(sections) == 0.75
    assert rewardbench.overall_score(sections, prior=0.3) == pytest.approx((3 + 0.15) / 4.5)
    official = np.average([*sections.values(), 0.3], weights=[2, 2, 2, 2, 1])
    assert rewardbench.overall_score(sections, prior=0.3) == pytest.approx(official)


def test_a_section_without_one_of_its_subsets_has_no_score():
    accuracy = dict.fromkeys(rewardbench.EXAMPLE_COUNTS, 1.0)
    del accuracy["hep-go"]
    result = rewardbench.section_scores(accuracy)
    assert result == {"Chat": 1, "Chat Hard": 1, "Safety": 1, "Reasoning": None}
    assert rewardbench.overall_score(result) is None
    assert rewardbench.missing_subsets(list(accuracy)) == {"Reasoning": ["hep-go"]}


# --------------------------------------------------------------------------------------------- ties


def test_a_tie_of_a_pair_is_wrong():
    scores = np.array([[1.0, 0], [0, 1], [2, 2]])
    np.testing.assert_array_equal(rewardbench.pair_correct(scores), [1, 0, 0])


@pytest.mark.parametrize(
    ("scores", "right", "expected"),
    [
        ([3, 1, 2, 0], [1, 0, 0, 0], 1),
        ([1, 3, 2, 0], [1, 0, 0, 0], 0),
        ([3, 3, 2, 0], [1, 0, 0, 0], 0),
        ([3, 3, 2, 0], [1, 1, 0, 0], 1),
        ([3, 3, 3, 0], [1, 1, 0, 0], 0),
        ([0, 3, 2, 1], [1, 1, 0, 0], 1),
        ([0, 0, 0, 0], [1, 0, 0, 0], 0),
        ([-5, -5, -7, -9], [1, 1, 0, 0], 1),
    ],
    ids=["best", "worse", "tied", "right tie", "mixed tie", "one of two", "constant", "negative"],
)
def test_a_group_is_right_when_all_on_top_are(scores, right, expected):
    result = rewardbench.group_correct(
        np.array(scores, float), np.array(right, bool), np.zeros(4, int)
    )
    np.testing.assert_array_equal(result, [expected])


def test_groups_of_any_order_and_size():
    groups = np.array([7, 2, 7, 2, 2, 7])
    scores = np.array([1.0, 5, 0, 4, 6, 2])
    right = np.array([0, 0, 0, 0, 1, 1], bool)
    np.testing.assert_array_equal(rewardbench.group_correct(scores, right, groups), [1, 1])
    np.testing.assert_array_equal(rewardbench.group_correct(-scores, right, groups), [0, 0])


# ---------------------------------------------------------------------------------------- intervals


def test_resampling_examples_is_the_binomial():
    correct = np.r_[np.ones(30), np.zeros(70)]
    means = rewardbench.resample(correct, np.arange(100), np.random.default_rng(0))
    assert means[0] == pytest.approx(0.3)
    expected = stats.binom(100, 0.3).ppf([0.025, 0.975]) / 100
    np.testing.assert_allclose(np.percentile(means[1:], [2.5, 97.5]), expected, atol=0.011)
    assert means[1:].std() == pytest.approx(np.sqrt(0.3 * 0.7 / 100), rel=0.05)


def test_examples_of_one_prompt_are_drawn_together():
    correct = np.repeat([1.0, 0, 1, 0], 25)
    means = rewardbench.resample(correct, np.repeat(np.arange(4), 25), np.random.default_rng(0))
    assert set(np.unique(means.round(9))) <= {0, 0.25, 0.5, 0.75, 1}


def whole_benchmark(n=6, seed=0, **fixed):
    """Scores of two methods on n examples of every subset. fixed: {subset: margin of the pairs}."""
    subsets = np.repeat(list(rewardbench.EXAMPLE_COUNTS), n).tolist()
    margin = np.random.default_rng(seed).normal(0.3, 1, len(subsets))
    for subset, value in fixed.items():
        margin[np.array(subsets) == subset.replace("_", "-")] = value
    scores = np.stack([margin, np.zeros(len(margin))], 1)
    return {"one": scores, "other": -scores}, subsets, np.arange(len(subsets))


def test_the_table_of_a_whole_benchmark():
    scores, subsets, groups = whole_benchmark(donotanswer=1.0)
    result = rewardbench.rewardbench(scores, subsets, groups, seed=6)
    accuracy = {
        s: float((scores["one"][np.array(subsets) == s, 0] > 0).mean())
        for s in rewardbench.EXAMPLE_COUNTS
    }
    table = result["one"]
    assert {s: row["accuracy"] for s, row in table["subsets"].items()} == pytest.approx(accuracy)
    assert table["subsets"]["donotanswer"] == {
        "n": 6,
        "n_official": 136,
        "accuracy": 1,
        "accuracy_ci95": [1, 1],
    }
    expected = rewardbench.section_scores(accuracy)
    assert {s: row["accuracy"] for s, row in table["sections"].items()} == pytest.approx(expected)
    assert table["overall"] == pytest.approx(np.mean(list(expected.values())))
    low, high = table["overall_ci95"]
    assert low < table["overall"] < high
    assert result["other"]["overall"] == pytest.approx(1 - table["overall"])
    assert "prior_sets" not in table and json.loads(json.dumps(result, allow_nan=False)) == result


def test_order_of_examples_and_other_methods_change_nothing():
    scores, subsets, groups = whole_benchmark()
    result = rewardbench.rewardbench(scores, subsets, groups, seed=6)["one"]
    order = np.argsort(np.array(subsets), kind="stable")
    moved = rewardbench.rewardbench(
        {"one": scores["one"][order]}, np.array(subsets)[order].tolist(), groups[order], 6
    )
    for section, row in result["sections"].items():
        assert moved["one"]["sections"][section]["accuracy"] == pytest.approx(row["accuracy"])
        assert moved["one"]["sections"][section]["accuracy_ci95"] == pytest.approx(
            row["accuracy_ci95"]
        )


def test_prior_sets_are_a_mean_of_four_and_leave_others_out():
    scores, subsets, groups = whole_benchmark()
    names = [*rewardbench.PRIOR_SETS, "mtbench_human"]
    margin = np.array([1.0, -1, 1, 1, -1])
    prior = {"one": np.stack([margin, 0 * margin], 1), "other": np.stack([margin, 0 * margin], 1)}
    result = rewardbench.rewardbench(
        scores, subsets, groups, 6, prior=(prior, names, np.arange(5))
    )["one"]
    assert (
        result["prior_sets"]["accuracy"] == 0.75
        and result["prior_sets"]["subsets"]["mtbench_human"]["accuracy"] == 0
    )
    assert result["overall_with_prior_sets"] == pytest.approx(
        (4 * result["overall"] + 0.5 * 0.75) / 4.5
    )
    names[names.index("summarize")] = "summarise"
    with pytest.raises(InputError, match="found no summarize"):
        rewardbench.rewardbench(scores, subsets, groups, 6, prior=(prior, names, np.arange(5)))


def test_a_subset_of_another_name_is_refused():
    scores, subsets, groups = whole_benchmark()
    subsets[3] = "alpacaeval_easy"
    with pytest.raises(
        InputError, match=r"found alpacaeval_easy; give other benchmarks with --domains"
    ):
        rewardbench.rewardbench(scores, subsets, groups, 6)


def test_a_missing_subset_is_null_in_its_section_alone():
    scores, subsets, groups = whole_benchmark()
    keep = np.array(subsets) != "hep-go"
    result = rewardbench.rewardbench(
        {"one": scores["one"][keep]}, np.array(subsets)[keep].tolist(), groups[keep], 6
    )["one"]
    assert result["sections"]["Reasoning"] == {"accuracy": None, "accuracy_ci95": [None, None]}
    assert result["sections"]["Chat"]["accuracy"] is not None and result["overall"] is None


# ------------------------------------------------------------------------------------------ domains


def test_domains_have_their_mean_and_the_mean_of_all_examples():
    margin = np.array([1.0, 1, 1, -1, 0, 1])
    scores = {"gate": np.stack([margin, np.zeros(6)], 1)}
    result = rewardbench.domains(scores, ["a"] * 4 + ["b"] * 2, np.arange(6), 6, "two")["gate"]
    assert {s: (row["n"], row["accuracy"]) for s, row in result["domains"].items()} == {
        "a": (4, 0.75),
        "b": (2, 0.5),
    }
    assert result["mean_of_domains"] == 0.625 and result["all"] == pytest.approx(4 / 6)


def test_best_of_four_and_its_chance():
    scores = {"gate": np.array([3.0, 1, 2, 0, 3, 3, 1, 0, 1, 2])}
    right = np.array([1, 0, 0, 0, 1, 0, 0, 0, 1, 0], bool)
    groups, subsets = np.repeat([4, 9, 1], [4, 4, 2]), ["Math"] * 8 + ["Ties"] * 2
    result = rewardbench.best_of_groups(scores, right, subsets, groups, 6, "rb2")
    assert {s: (row["n"], row["accuracy"]) for s, row in result["gate"]["domains"].items()} == {
        "Math": (2, 0.5),
        "Ties": (1, 0),
    }
    assert {s: row["accuracy"] for s, row in result["chance"]["domains"].items()} == {
        "Math": 0.25,
        "Ties": 0.5,
    }


@pytest.mark.parametrize(("right", "what"), [([0, 0, 1, 0], "right"), ([1, 1, 1, 0], "wrong")])
def test_a_group_that_cannot_be_scored_is_refused(right, what):
    with pytest.raises(
        InputError,
        match=rf"rb2: expected a right and a wrong .* found no {what} response in .* of row 0",
    ):
        rewardbench.best_of_groups(
            {"gate": np.arange(4.0)},
            np.array(right, bool),
            ["a"] * 4,
            np.array([0, 0, 1, 1]),
            6,
            "rb2",
        )


def test_a_group_in_two_subsets_is_refused():
    with pytest.raises(
        InputError, match="row 1: expected all responses of a group in one subset, found b"
    ):
        rewardbench.best_of_groups(
            {"gate": np.arange(2.0)},
            np.array([True, False]),
            ["a", "b"],
            np.zeros(2, int),
            6,
            "rb2",
        )


# ------------------------------------------------------------------------------------------- styles


def test_styles_below_on_and_above_the_diagonal():
    """A scorer of style and little else: chosen 1, 2, 3 by style, rejected 0.5, 1.5, 2.5."""
    scores = np.array([[[1.0, 0.5], [2.0, 1.5], [3.0, 2.5]]])
    matrix = rewardbench.style_accuracy(scores)
    np.testing.assert_array_equal(matrix[0], [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(rewardbench.levels(matrix), [[1, 1, 0]])


def test_the_style_table_by_hand():
    first = [[1.0, 0.5], [2.0, 1.5], [3.0, 2.5]]
    second = [[1.0, 2], [1, 0.5], [1, 3]]
    scores = {"gate": np.array(first + second), "all wrong": np.zeros((6, 2))}
    result = rewardbench.style_table(
        scores, ["chat"] * 3 + ["code"] * 3, np.repeat([5, 3], 3), 6, "rm"
    )
    chat, code, mean = (result["gate"][name] for name in ("chat", "code", "mean of domains"))
    levels = ("easy", "normal", "hard", "accuracy")
    assert [chat[level] for level in levels] == pytest.approx([1, 1, 0, 6 / 9])
    assert code["matrix"] == [[0, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert [code[level] for level in levels] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 3])
    assert [mean[level] for level in levels] == pytest.approx([2 / 3, 2 / 3, 1 / 6, 1 / 2])
    assert mean["n_prompts"] == 2 and chat["n_prompts"] == 1
    assert result["all wrong"]["chat"]["accuracy"] == 0


def test_levels_are_the_means_of_published_masks():
    matrix = rewardbench.style_accuracy(np.random.default_rng(0).random((50, 3, 2)))
    mean = matrix.mean(0)
    expected = np.tril(mean, -1).sum() / 3, np.diag(mean).mean(), np.triu(mean, 1).sum() / 3
    np.testing.assert_allclose(rewardbench.levels(matrix).mean(0), expected)


@pytest.mark.parametrize(
    ("groups", "row"),
    [([1, 1, 1, 2, 2], 3), ([1, 1, 2, 2, 2, 1], 0), ([1, 1, 1, 2, 2, 3], 3)],
    ids=["end", "0", "3"],
)
def test_rows_that_do_not_come_in_threes_are_refused(groups, row):
    scores = {"gate": np.zeros((len(groups), 2))}
    with pytest.raises(
        InputError, match=rf"rm: expected three rows of each prompt .* in rows {row} to {row + 2}"
    ):
        rewardbench.style_table(scores, ["a"] * len(groups), np.array(groups), 6, "rm")


def test_draws_are_shared_between_methods():
    """The same scores under two names have the same interval; worse scores, no higher bound."""
    scores, subsets, groups = whole_benchmark()
    worse = scores["one"] - [[0.2, 0]]
    result = rewardbench.domains(
        {"a": scores["one"], "b": scores["one"], "worse": worse}, subsets, groups, 6, "x"
    )
    assert result["a"] == result["b"]
    assert result["worse"]["all_ci95"][1] <= result["a"]["all_ci95"][1]
    assert (
        len(rewardbench.resample(np.ones(3), np.arange(3), np.random.default_rng(0)))
        == 1 + intervals.RESAMPLES
    )


# ------------------------------------------------------------------------------ studies/rewardbench


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_gate(tmp_path_factory.mktemp("models") / "model")


def run(model, out, *flags):
    script("rewardbench").main(
        ["--model_dir", str(model), "--output_dir", str(out), *map(str, flags)]
    )
    return json.loads((out / "rewardbench_results.json").read_text())


def benchmark_file(path, subsets, seed=3, **changes):
    return make_pairs(path, n=len(subsets), seed=seed, subsets=subsets, **changes)


def groups_file(path, n=12, **changes):
    """n groups of four responses; the first is right: it has what the prompt asks for."""
    rng = np.random.default_rng(5)
    x, asked = rng.standard_normal((n, 4, D)), rng.standard_normal((n, D_PROMPT))
    x[:, 0, :2] += 3
    content = {
        "embeddings": [x.reshape(-1, D).astype(np.float32)],
        "prompt_embeddings": [np.repeat(asked, 4, 0).astype(np.float32)],
        "groups": np.repeat(attribute_data.groups_of([f"group {i}" for i in range(n)]), 4),
        "ids": [str(i) for i in range(4 * n)],
        "labels": np.tile(np.float32([[1], [0], [0], [0]]), (n, 1)),
        "attributes": ["correct"],
        "subsets": np.repeat(["Math", "Focus"], 2 * n).tolist(),
        "source": SOURCE,
    }
    rated = attribute_data.Rated(**{**content, **changes})
    attribute_data.write(path, rated)
    return rated


def test_the_whole_table(model, tmp_path, capsys):
    subsets = list(np.repeat(list(rewardbench.EXAMPLE_COUNTS), 8))
    pairs = benchmark_file(tmp_path / "rb.safetensors", [str(s) for s in subsets])
    prior = benchmark_file(
        tmp_path / "prior.safetensors", list(rewardbench.PRIOR_SETS) * 10, seed=4
    )
    result = run(
        model,
        tmp_path,
        "--pairs",
        tmp_path / "rb.safetensors",
        "--prior_sets",
        tmp_path / "prior.safetensors",
    )
    methods = result["benchmarks"]["rewardbench"]["methods"]
    rows, gated = np.arange(len(pairs.ids)), gating.load(model)
    scores = gating.rewards(gated, pairs, rows)
    prior = gating.rewards(gated, prior, np.arange(40)), prior.subsets, prior.groups
    expected = rewardbench.rewardbench(scores, pairs.subsets, pairs.groups, 6, prior)
    assert methods == json.loads(json.dumps(expected))
    singles = [f"attribute {name}" for name in NAMES]
    assert list(methods) == [
        "gate",
        "uniform",
        "best_single",
        "global_weights",
        "linear_head",
        *singles,
    ]
    assert methods["gate"]["overall"] > methods["uniform"]["overall"] + 0.1
    out = capsys.readouterr().out
    assert (
        "Chat Hard" in out
        and "overall, prior sets" in out
        and "8 of 984" not in out
        and "8 of 447" in out
    )
    assert result["ties"] == "wrong" and result["rows"]["pairs"]["of_prompts_trained_on"] == 0


def test_other_benchmarks_side_by_side(model, tmp_path, capsys):
    benchmark_file(tmp_path / "a.safetensors", ["x", "y"] * 20)
    benchmark_file(
        tmp_path / "b.safetensors", ["chat"] * 30, prompts=[f"rm {i // 3}" for i in range(30)]
    )
    rated = groups_file(tmp_path / "g.safetensors")
    flags = [
        "--domains",
        f"two={tmp_path}/a.safetensors",
        "--styles",
        f"rm={tmp_path}/b.safetensors",
    ]
    result = run(model, tmp_path, *flags, "--groups", f"rb2={tmp_path}/g.safetensors")["benchmarks"]
    assert {name: each["kind"] for name, each in result.items()} == {
        "rb2": "groups",
        "rm": "styles",
        "two": "domains",
    }
    scores = gating.rewards(gating.load(model), rated, np.arange(48))["gate"].reshape(12, 4)
    right = (scores[:, 0] > scores[:, 1:].max(1)).astype(float)
    gate = result["rb2"]["methods"]["gate"]
    assert (
        gate["all"] == pytest.approx(right.mean())
        and gate["domains"]["Math"]["accuracy"] == right[:6].mean()
    )
    assert result["rb2"]["methods"]["chance"]["all"] == 0.25 and gate["all"] > 0.6
    assert set(result["rm"]["methods"]["gate"]["chat"]) >= {
        "accuracy",
        "easy",
        "normal",
        "hard",
        "matrix",
    }
    out = capsys.readouterr().out
    weights = gating.weights(gating.load(model), rated, np.arange(0, 24, 4)).mean(0)
    mean_weights = json.loads((tmp_path / "rewardbench_results.json").read_text())["weights"]
    assert list(mean_weights["rb2"]["Math"].values()) == pytest.approx(weights.tolist(), abs=1e-6)
    assert (
        list(mean_weights["rb2"]) == ["Math", "Focus"] and list(mean_weights["two"]["x"]) == NAMES
    )
    assert "chat, hard" in out and "Focus" in out and "all examples" in out


def test_prompts_that_were_trained_on_are_left_out(model, tmp_path, capsys):
    """The training file as a benchmark: only its 80 held-out pairs may be scored."""
    result = run(model, tmp_path, "--domains", f"again={model}/train.safetensors")
    assert result["rows"]["again"] == {
        "scored": 80,
        "of_prompts_trained_on": 320,
        "overlap_is_known": True,
        "too_long": 0,
    }
    expected = json.loads((model / gating.RECORD).read_text())["held_out"]["methods"]["gate"][
        "accuracy"
    ]
    assert result["benchmarks"]["again"]["methods"]["gate"]["all"] == pytest.approx(expected)
    assert "320 rows with prompts that were trained on are left out" in capsys.readouterr().out
    split = json.loads((model / gating.SPLIT).read_text())
    fitted = attribute_data.read(model / "train.safetensors")
    rows = np.flatnonzero(np.isin(fitted.groups, split["fit"]))
    make_pairs(tmp_path / "fit.safetensors", n=len(rows), groups=fitted.groups[rows])
    with pytest.raises(
        InputError, match="no prompts that the gate was not fitted on; give other data"
    ):
        run(model, tmp_path, "--domains", f"fit={tmp_path}/fit.safetensors")


def test_prompts_of_the_gate_are_left_out_where_those_of_the_heads_cannot_be_told(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    split = json.loads((folder / gating.SPLIT).read_text())
    artifacts.write_json(folder / gating.SPLIT, split | {"heads": None})
    result = run(folder, tmp_path, "--domains", f"again={folder}/train.safetensors")["rows"][
        "again"
    ]
    assert (result["scored"], result["of_prompts_trained_on"], result["overlap_is_known"]) == (
        80,
        320,
        False,
    )


def test_a_subset_whose_prompts_were_all_trained_on_is_absent(model, tmp_path):
    split = json.loads((model / gating.SPLIT).read_text())
    groups = np.r_[split["fit"][:5], attribute_data.groups_of(list("abcde"))].astype(np.int64)
    make_pairs(tmp_path / "a.safetensors", n=10, groups=groups, subsets=["seen"] * 5 + ["new"] * 5)
    result = run(model, tmp_path, "--domains", f"a={tmp_path}/a.safetensors")
    assert (
        list(result["benchmarks"]["a"]["methods"]["gate"]["domains"])
        == list(result["weights"]["a"])
        == ["new"]
    )


def test_it_says_where_overlap_cannot_be_told(model, tmp_path, capsys):
    make_pairs(tmp_path / "a.safetensors", n=20, groups=np.arange(20), source={})
    result = run(model, tmp_path, "--domains", f"a={tmp_path}/a.safetensors")
    assert result["rows"]["a"]["overlap_is_known"] is False and result["rows"]["a"]["scored"] == 20
    assert "a: the files do not tell whether all of its prompts are new" in capsys.readouterr().out


def test_a_second_run_is_skipped(model, tmp_path, capsys):
    benchmark_file(tmp_path / "a.safetensors", ["x", "y"] * 20)
    first = run(model, tmp_path, "--domains", f"a={tmp_path}/a.safetensors")
    capsys.readouterr()
    assert run(model, tmp_path, "--domains", f"a={tmp_path}/a.safetensors") == first
    assert "already done" in capsys.readouterr().out
    run(model, tmp_path, "--domains", f"b={tmp_path}/a.safetensors")
    assert "already done" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ([], "no benchmark; give --pairs"),
        (["--domains", "a=x", "a=y"], "names that differ from each other and from .*, found a, a"),
        (
            ["--pairs", "x", "--domains", "pairs=y"],
            "differ from .* rewardbench, pairs and prior sets, found pairs",
        ),
        (["--domains", "x.safetensors"], "expected NAME=FILE, found 'x.safetensors'"),
        (["--prior_sets", "x"], "--prior_sets needs --pairs"),
        (
            ["--domains", "a=nowhere.safetensors"],
            "nowhere.safetensors: no prepared file and no shards",
        ),
    ],
)
def test_flags_that_cannot_be_followed(model, tmp_path, flags, match):
    with pytest.raises(InputError, match=match):
        run(model, tmp_path, *flags)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"labels": np.full((48, 1), 0.5, np.float32)},
            "correct: expected 0 or 1 in every row, found 0.5 in row 0",
        ),
        ({"attributes": ["right"]}, "expected an attribute among right, found 'correct'"),
        ({"labels": np.zeros((48, 1), np.float32)}, "expected a right and a wrong response"),
    ],
)
def test_groups_that_cannot_be_scored(model, tmp_path, changes, match):
    groups_file(tmp_path / "g.safetensors", **changes)
    with pytest.raises(InputError, match=match):
        run(model, tmp_path, "--groups", f"rb2={tmp_path}/g.safetensors")
