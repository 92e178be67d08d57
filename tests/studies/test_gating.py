"""The gate: weights, frozen weights, training, standardisation, splits and files."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.nets.gate import SCALES, Gate, gated_rewards, predict_gate, train_gate
from rewardlib.nets.training import Training
from studies.interpretable import attribute_data, gating, multi_objective, tensor_files

A, D = 4, 6
LEARNED = np.full(A, np.nan, np.float32)


def rng(seed=0):
    return np.random.default_rng(seed)


def make_gate(frozen=LEARNED, **settings):
    settings = {"hidden": (16, 16), "generator": torch.Generator().manual_seed(0), **settings}
    return Gate(D, frozen, **settings).eval()


def prompts(n=5, seed=0):
    return torch.from_numpy(3 * rng(seed).standard_normal((n, D)).astype(np.float32))


# ------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("shape", [(5,), (5, 2), (2, 3, 5)], ids=str)
def test_weights_sum_to_1_over_the_attributes_and_over_nothing_else(shape):
    """A softmax over axis 1 of (n, 2, D) inputs would make the weights of two sides sum to 1."""
    x = torch.from_numpy(rng().standard_normal((*shape, D)).astype(np.float32))
    with torch.inference_mode():
        weights = make_gate()(x)
    assert weights.shape == (*shape, A)
    np.testing.assert_allclose(weights.sum(-1), np.ones(shape), rtol=1e-6)
    assert (weights > 0).all()
    for axis in range(len(shape)):
        assert not np.allclose(weights.sum(axis), 1)


def test_both_responses_of_a_pair_stacked_have_the_weights_of_their_prompt():
    x = prompts(3)
    with torch.inference_mode():
        gate = make_gate()
        stacked = gate(torch.stack([x, x], 1))
        np.testing.assert_allclose(stacked[:, 0], gate(x), rtol=1e-5)
    assert not np.allclose(stacked, 0.5) and not np.allclose(stacked, 1 / A)


def test_prompts_differ_and_a_high_temperature_levels_them():
    spread = {}
    for temperature in (0.01, 1, 1e4):
        with torch.inference_mode():
            weights = make_gate(temperature=temperature)(prompts(20))
        spread[temperature] = weights.std(0).mean().item()
    assert spread[0.01] > spread[1] > spread[1e4]
    np.testing.assert_allclose(weights, np.full((20, A), 1 / A), atol=1e-4)


def test_the_weights_are_the_softmax_of_the_last_layer():
    gate = make_gate(temperature=2.0)
    x = prompts(3)
    with torch.inference_mode():
        h = x
        for layer in gate.layers[:-1]:
            h = torch.relu(h @ layer.weight.T + layer.bias)
        logits = (h @ gate.layers[-1].weight.T + gate.layers[-1].bias).numpy() / 2
        expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(gate(x), expected, rtol=1e-5)


def test_frozen_weights_are_given_and_the_others_share_the_rest():
    frozen = np.array([np.nan, 0.25, np.nan, 0], np.float32)
    with torch.inference_mode():
        weights = make_gate(frozen)(prompts(10)).numpy()
    np.testing.assert_array_equal(weights[:, [1, 3]], np.tile(np.float32([0.25, 0]), (10, 1)))
    np.testing.assert_allclose(weights[:, [0, 2]].sum(1), 0.75, rtol=1e-6)
    assert np.ptp(weights[:, 0]) > 0


def test_a_gate_of_zero_hidden_weights_is_uniform_over_what_is_learned():
    gate = make_gate(np.array([np.nan, 0.4, np.nan, np.nan], np.float32))
    with torch.no_grad():
        gate.layers[-1].weight.zero_()
        gate.layers[-1].bias.zero_()
        np.testing.assert_allclose(gate(prompts(2)), [[0.2, 0.4, 0.2, 0.2]] * 2, rtol=1e-6)


# ------------------------------------------------------------------------------------------- reward


def test_the_reward_is_the_weighted_sum_with_one_gate_for_all_responses():
    gate, x = make_gate(), prompts(3)
    rewards = torch.from_numpy(rng(1).standard_normal((3, 2, A)).astype(np.float32))
    with torch.inference_mode():
        weights, gated = gate(x).numpy(), gated_rewards(gate, x, rewards)
    for n in range(3):
        for k in range(2):
            assert gated[n, k].item() == pytest.approx(
                sum(weights[n, a] * rewards[n, k, a].item() for a in range(A))
            )


def test_swapping_the_pair_negates_the_difference():
    gate, x = make_gate(), prompts(8)
    rewards = torch.from_numpy(rng(1).standard_normal((8, 2, A)).astype(np.float32))
    with torch.inference_mode():
        forward, swapped = (
            gated_rewards(gate, x, r) @ torch.tensor([1.0, -1]) for r in (rewards, rewards.flip(1))
        )
    np.testing.assert_allclose(swapped, -forward, rtol=1e-5, atol=1e-6)
    assert (forward.abs() > 1e-3).all()


# ----------------------------------------------------------------------------------------- training


def preferences(n, seed=0, noise=0.0):
    """Prompts (n, D), rewards (n, 2, A), preferred first, and margins (n,).

    Attribute 0 decides where prompt[0] > 0, attribute 1 elsewhere.
    """
    draw = rng(seed)
    x = draw.standard_normal((n, D)).astype(np.float32)
    rewards = draw.standard_normal((n, 2, A)).astype(np.float32)
    gap = rewards[:, 0] - rewards[:, 1]
    decides = np.where(x[:, 0] > 0, gap[:, 0], gap[:, 1]) + noise * draw.logistic(size=n)
    return x, np.where(decides[:, None, None] > 0, rewards, rewards[:, ::-1]), decides


def fit_gate(x, rewards, frozen=LEARNED, seed=0, epochs=12, **settings):
    n = len(x)
    parts = np.arange(n)[: -n // 5], np.arange(n)[-n // 5 :]
    shape = {"hidden": (64, 64), "temperature": 1.0, **settings}
    return train_gate(
        x, np.ascontiguousarray(rewards), parts, frozen, Training(epochs, 3e-3, 32), seed, **shape
    )


def test_the_gate_finds_which_attribute_a_prompt_asks_for():
    """The right attribute depends on the prompt, so no weighting for all prompts can be right."""
    x, rewards, _ = preferences(1600)
    gate, log = fit_gate(x, rewards)
    new, new_rewards, _ = preferences(1000, seed=1)
    weights = predict_gate(gate, new)
    gap = new_rewards[:, 0] - new_rewards[:, 1]
    global_weights = gating.fit_global_weights(rewards, np.arange(1280), np.arange(1280, 1600))
    accuracy = {
        "gate": ((weights * gap).sum(1) > 0).mean(),
        "global": (gap @ global_weights > 0).mean(),
    }
    accuracy |= {"uniform": (gap.sum(1) > 0).mean(), "single": max((gap > 0).mean(0))}
    assert accuracy["gate"] > 0.92
    assert max(accuracy["global"], accuracy["uniform"], accuracy["single"]) < 0.8
    asks = new[:, 0] > 0.3
    assert weights[asks, 0].mean() > 0.8 and weights[new[:, 0] < -0.3, 1].mean() > 0.8
    assert weights[:, 2:].mean() < 0.1
    best = [entry for entry in log if entry["best"]][-1]
    assert best["validation_loss"] == min(entry["validation_loss"] for entry in log)


def test_the_best_epoch_is_the_one_that_is_kept():
    x, rewards, _ = preferences(160, noise=20)
    gate, log = fit_gate(x, rewards, epochs=60)
    held = slice(-160 // 5, None)
    gap = torch.from_numpy(
        (predict_gate(gate, x[held]) * (rewards[held, 0] - rewards[held, 1])).sum(1)
    )
    loss = torch.nn.functional.softplus(-gap * gate.log_scale.exp()).mean().item()
    assert loss == pytest.approx(min(entry["validation_loss"] for entry in log), rel=1e-4)
    assert not log[-1]["best"]


def test_the_same_seed_gives_the_same_gate_and_leaves_the_global_stream_alone():
    x, rewards, _ = preferences(160)
    before = torch.random.get_rng_state()
    states = [fit_gate(x, rewards, seed=seed, dropout=0.5)[0].state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)
    same = [
        all(torch.equal(states[0][k], s[k]) or k == "frozen" for k in states[0]) for s in states
    ]
    assert same == [True, True, False]


def test_frozen_weights_stay_through_training():
    frozen = np.array([np.nan, np.nan, 0.3, np.nan], np.float32)
    x, rewards, _ = preferences(160)
    weights = predict_gate(fit_gate(x, rewards, frozen)[0], x)
    np.testing.assert_array_equal(weights[:, 2], np.full(160, np.float32(0.3)))
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)


def test_the_scale_starts_where_uniform_weights_fit_and_not_below_1():
    x, rewards, _ = preferences(400)
    nothing = Training(1, 1e-12, 400)

    def start(values):
        parts = np.arange(300), np.arange(300, 400)
        return (
            train_gate(x, values, parts, LEARNED, nothing, 0, hidden=(4,))[0].log_scale.exp().item()
        )

    small = np.ascontiguousarray(rewards / 10)
    losses = [
        np.logaddexp(0, -s * (small[:300, 0] - small[:300, 1]).mean(1)).mean()
        for s in SCALES.numpy()
    ]
    assert start(small) == pytest.approx(SCALES[int(np.argmin(losses))].item(), rel=1e-5)
    assert start(small) > 5 * start(np.ascontiguousarray(rewards))
    assert start(np.ascontiguousarray(rewards[:, ::-1])) == pytest.approx(1)


def test_weight_decay_pulls_the_gate_towards_uniform():
    x, rewards, _ = preferences(200)
    spread = {}
    for decay in (0.0, 30.0):
        parts = np.arange(160), np.arange(160, 200)
        settings = Training(8, 3e-3, 16, weight_decay=decay)
        gate, _ = train_gate(
            x, np.ascontiguousarray(rewards), parts, LEARNED, settings, 0, hidden=(32,)
        )
        spread[decay] = predict_gate(gate, x).std(0).mean()
    assert spread[30.0] < 0.5 * spread[0.0]


# ----------------------------------------------------------------------------- attributes, debiased


NAMES = ["helpful", "verbosity", "safe", "clear"]


def attribute_model(penalties=(2.0, 0, -1, 0.5)):
    heads = rng(5).standard_normal((A, D)).astype(np.float32)
    return multi_objective.AttributeModel(heads, np.array(penalties), NAMES, "verbosity")


def test_what_is_standardised_is_the_debiased_score():
    model = attribute_model()
    raw = rng().standard_normal((50, 2, A)) * 3 + 1
    gated = gating.standardise(model, ["helpful", "safe", "clear"], raw)
    by_hand = np.stack(
        [raw[..., 0] - 2 * raw[..., 1], raw[..., 2] + raw[..., 1], raw[..., 3] - 0.5 * raw[..., 1]],
        -1,
    )
    np.testing.assert_allclose(gating.debiased(gated, raw), by_hand)
    centre, spread = by_hand.reshape(-1, 3).mean(0), by_hand.reshape(-1, 3).std(0)
    np.testing.assert_allclose(
        gating.standardised(gated, raw), (by_hand - centre) / spread, rtol=1e-4, atol=1e-5
    )


def test_a_dropped_verbosity_still_debiases_the_others():
    model = attribute_model()
    raw = rng().standard_normal((50, A))
    with_it = gating.standardise(model, NAMES, raw)
    without = gating.standardise(model, ["helpful", "safe"], raw)
    np.testing.assert_array_equal(
        gating.debiased(with_it, raw)[:, [0, 2]], gating.debiased(without, raw)
    )


def test_an_attribute_without_spread_is_refused():
    model = attribute_model()
    with pytest.raises(
        InputError, match="clear: all responses have the same score; give --drop clear"
    ):
        gating.standardise(model, ["helpful", "clear"], np.array([[1.0, 0, 0, 1], [2, 0, 0, 1]]))


@pytest.mark.parametrize(
    ("drop", "freeze", "match"),
    [
        (["length"], {}, "among helpful, verbosity, safe, clear, found 'length'"),
        ([], {"tone": 0.1}, "found 'tone'"),
        (["safe"], {"safe": 0.1}, "safe: an attribute is either dropped or frozen, found both"),
        ([], {"safe": 0.6, "clear": 0.4}, "add up to less than 1, found safe=0.6, clear=0.4"),
        ([], {"safe": -0.1}, "weights of at least 0"),
        (
            ["verbosity", "safe"],
            {"clear": 0.1},
            "at least two attributes whose weights are learned, found 1 of 4",
        ),
    ],
)
def test_attributes_that_cannot_be_dropped_or_frozen(drop, freeze, match):
    with pytest.raises(InputError, match=match):
        gating.choose_attributes(NAMES, drop, freeze)


def test_attributes_after_dropping_and_freezing():
    used, frozen = gating.choose_attributes(NAMES, ["verbosity"], {"safe": 0.25})
    assert used == ["helpful", "safe", "clear"]
    np.testing.assert_array_equal(frozen, [np.nan, np.float32(0.25), np.nan])


# -------------------------------------------------------------------------------------------- split


def test_a_split_keeps_prompts_together_and_has_the_shares():
    groups = rng().integers(300, size=2000)
    split = gating.split_prompts(groups, np.array([]), 0.2, 0.1, seed=6)
    np.testing.assert_array_equal(np.sort(np.concatenate(list(split.values()))), np.arange(2000))
    sides = [set(groups[rows]) for rows in split.values()]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert len(split["held_out"]) == pytest.approx(400, abs=20) and len(
        split["validation"]
    ) == pytest.approx(200, abs=20)
    again = gating.split_prompts(groups, np.array([]), 0.2, 0.1, seed=6)
    assert all(np.array_equal(split[name], again[name]) for name in split)
    assert not np.array_equal(
        split["fit"], gating.split_prompts(groups, np.array([]), 0.2, 0.1, seed=7)["fit"]
    )


def test_prompts_of_the_heads_are_never_held_out_and_validated_on_last():
    groups = np.repeat(np.arange(100), 3)
    split = gating.split_prompts(groups, np.arange(75), 0.2, 0.1, seed=6)
    assert set(groups[split["held_out"]]) <= set(range(75, 100)) and len(split["held_out"]) == 60
    assert set(groups[split["validation"]]) - set(range(75)) == set(range(75, 100)) - set(
        groups[split["held_out"]]
    )
    nothing = gating.split_prompts(groups, np.arange(100), 0.2, 0.1, seed=6)
    assert len(nothing["held_out"]) == 0 and len(nothing["validation"]) == 30


def test_a_single_prompt_cannot_be_split():
    with pytest.raises(InputError, match="found 1 prompts"):
        gating.split_prompts(np.zeros(9, int), np.array([]), 0.2, 0.1, 6)


def record_of_heads(folder, prompts, source):
    groups = {
        "fit": prompts[:2],
        "validation": prompts[2:3],
        "reference": prompts[3:4],
        "held_out": prompts[4:],
    }
    artifacts.write_json(folder / gating.HEADS_SPLIT, groups)
    artifacts.write_json(folder / gating.HEADS_RECORD, {"data": {"source": source}})


def test_prompts_of_the_heads_are_those_of_every_part_but_the_held_out(tmp_path):
    prompts = attribute_data.groups_of(list("abcdef"))
    record_of_heads(tmp_path, prompts, {"prompt_position": "end"})
    data = rated(
        groups=attribute_data.groups_of(list("xyafdz")),
        source={"prompt_position": "end", "dataset": "pairs"},
    )
    seen = gating.prompts_of_heads(tmp_path, data)
    np.testing.assert_array_equal(seen, np.sort(prompts[:4]))
    split = gating.split_prompts(data.groups, seen, 0.5, 0.2, 6)
    description = gating.describe_seen(seen, data.groups, split)
    assert description["told"] == (
        "2 of 6 prompts are among those the attribute heads were fitted on; "
        "none of them is held out"
    )
    assert (description["shared"], description["held_out"]) == (2, 0)
    assert len(split["held_out"]) == 3


@pytest.mark.parametrize(
    ("numbers", "source", "known"),
    [
        ("counted", {"prompt_position": "end"}, False),
        ("hashed", {"prompt_position": "start"}, False),
        ("hashed", {"prompt_position": "end"}, True),
        ("counted", {"prompt_position": "end", "dataset": "rated"}, True),
        ("counted", {}, False),
    ],
)
def test_prompts_are_compared_only_where_both_files_number_them_alike(
    tmp_path, numbers, source, known
):
    of_heads = {} if not source else {"prompt_position": "end", "dataset": "rated"}
    prompts = attribute_data.groups_of(list("abcdef")) if numbers == "hashed" else np.arange(6)
    record_of_heads(tmp_path, prompts, of_heads)
    seen = gating.prompts_of_heads(tmp_path, rated(groups=prompts, source=source))
    assert (seen is not None) == known
    if not known:
        description = gating.describe_seen(seen, prompts, {"held_out": np.arange(2)})
        assert description["shared"] is None and "cannot be told" in description["told"]


# ---------------------------------------------------------------------------------------- baselines


def test_the_best_attribute_and_global_weights_on_the_training_pairs():
    _, rewards, _ = preferences(600)
    assert (
        gating.best_attribute(NAMES, rewards)
        == NAMES[int(np.argmax((rewards[:, 0] > rewards[:, 1]).mean(0)))]
    )
    result = gating.fit_global_weights(rewards, np.arange(500), np.arange(500, 600))
    assert (result[:2] > 5 * np.abs(result[2:])).all()
    swapped = gating.fit_global_weights(
        np.ascontiguousarray(rewards[:, ::-1]), np.arange(500), np.arange(500, 600)
    )
    np.testing.assert_allclose(swapped, -result, atol=1e-3)


def test_accuracy_is_a_mean_over_prompts_with_ties_one_half():
    scores = np.array([[1.0, 0], [0, 1], [2, 2], [1, 0]])
    np.testing.assert_array_equal(
        gating.prompt_accuracy(scores, np.array([8, 8, 3, 5])), [0.5, 1, 0.5]
    )


def test_a_gate_is_compared_with_the_others_prompt_by_prompt():
    margins = {"gate": [1, 1, 1, -1], "uniform": [1, -1, 1, -1]}
    scores = {name: np.stack([np.array(m, float), np.zeros(4)], 1) for name, m in margins.items()}
    result = gating.compare(scores, np.array([0, 1, 2, 3]), 6)
    assert (result["n_pairs"], result["n_prompts"]) == (4, 4)
    assert [result["methods"][name]["accuracy"] for name in margins] == [0.75, 0.5]
    assert (
        result["gate_minus"]["uniform"]["difference"] == 0.25 and "gate" not in result["gate_minus"]
    )
    assert gating.compare({"gate": np.empty((0, 2))}, np.array([], int), 6) is None


def test_weights_are_described_by_mean_spread_and_entropy():
    result = gating.describe_weights(["a", "b"], np.array([[1.0, 0], [0, 1]], np.float32))
    assert result["mean"] == {"a": 0.5, "b": 0.5} and result["sd_between_prompts"] == {
        "a": 0.5,
        "b": 0.5,
    }
    assert result["relative_entropy"] == 0 and result["entropy_of_mean"] == pytest.approx(1)
    same = gating.describe_weights(["a", "b"], np.full((3, 2), 0.5))
    assert same["relative_entropy"] == pytest.approx(1) and same["sd_between_prompts"]["a"] == 0


# -------------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path):
    model = attribute_model()
    multi_objective.save(tmp_path, model, np.ones(A), "ratings")
    gated = gating.standardise(model, ["helpful", "safe", "clear"], rng().standard_normal((50, A)))
    gate = make_gate(np.array([np.nan, 0.25, np.nan], np.float32), temperature=3.0, scale=2.5)
    gated = replace(
        gated,
        gate=gate,
        single="safe",
        global_weights=rng(1).random(3),
        linear_head=rng(2).random(D),
    )
    gating.save(tmp_path, gated)
    return tmp_path, gated


def rated(n=6, pairs=True, **changes):
    shape = (n, 2, D) if pairs else (n, D)
    content = {
        "embeddings": [rng(3).standard_normal(shape).astype(np.float32)],
        "prompt_embeddings": [rng(4).standard_normal((n, D)).astype(np.float32)],
        "groups": attribute_data.groups_of([str(i) for i in range(n)]),
        "ids": [str(i) for i in range(n)],
    }
    return attribute_data.Rated(**{**content, **changes})


def test_a_saved_gate_gives_the_same_rewards(saved):
    folder, gated = saved
    loaded = gating.load(folder, rated())
    for data in (rated(), rated(pairs=False)):
        before, after = (gating.rewards(each, data, np.arange(6)) for each in (gated, loaded))
        assert (
            list(before) == list(after)
            and "attribute helpful" in after
            and "attribute verbosity" not in after
        )
        for method, values in before.items():
            assert values.shape == data.shape[:-1]
            np.testing.assert_array_equal(values, after[method])
    assert loaded.gate.log_scale.exp().item() == pytest.approx(2.5)


def test_the_rewards_of_every_method_by_hand(saved):
    folder, gated = saved
    data = rated()
    result = gating.rewards(gating.load(folder), data, np.array([4, 1]))
    x = data.embeddings[0][[4, 1]].astype(float)
    raw = x @ attribute_model().heads.T
    debiased = raw - np.array([2.0, 0, -1, 0.5]) * raw[..., [1]]
    values = (debiased[..., [0, 2, 3]] - gated.centre) / gated.spread
    weights = predict_gate(gated.gate, data.prompt_embeddings[0][[4, 1]])
    expected = {
        "gate": np.einsum("na,nka->nk", weights, values),
        "uniform": values.mean(-1),
        "best_single": values[..., 1],
        "attribute safe": values[..., 1],
        "global_weights": values @ gated.global_weights,
        "linear_head": x @ gated.linear_head,
    }
    for method, by_hand in expected.items():
        np.testing.assert_allclose(result[method], by_hand, rtol=1e-4, atol=1e-4)


def test_a_gate_is_refused_beside_other_heads(saved):
    folder, _ = saved
    multi_objective.save(folder, attribute_model((1.0, 0, 0, 0)), np.ones(A), "ratings")
    with pytest.raises(
        InputError,
        match="are not those that the gate was trained on; "
        "run studies/interpretable_gating.py again",
    ):
        gating.load(folder)


def test_a_gate_is_refused_for_other_prompts(saved):
    folder, _ = saved
    other = rated(prompt_embeddings=[np.zeros((6, D + 1), np.float32)])
    with pytest.raises(
        InputError, match=f"of {D} dimensions as the gate was trained on, found {D + 1}"
    ):
        gating.load(folder, other)
    with pytest.raises(
        InputError, match="no prompt_embeddings, which the gate reads; prepare the file again"
    ):
        gating.load(folder, rated(prompt_embeddings=None))


def test_an_absent_or_damaged_gate_is_refused(saved):
    folder, _ = saved
    path = folder / gating.GATE
    tensor_files.write_tensors(path, {"x": [np.zeros(3)]}, {"attributes": "[]"})
    with pytest.raises(
        InputError, match="expected a gate of studies/interpretable_gating.py, found another file"
    ):
        gating.load(folder)
    path.unlink()
    with pytest.raises(
        InputError, match="not found; it is written by studies/interpretable_gating.py"
    ):
        gating.load(folder)


def test_the_same_gate_is_the_same_bytes(saved):
    folder, gated = saved
    before = artifacts.sha256(folder / gating.GATE)
    gating.save(folder, gated)
    assert artifacts.sha256(folder / gating.GATE) == before
