"""Scores of many models in one pass, on one scale; means over members that saw no prompt."""

import numpy as np
import pytest
import torch
from scoring_data import D, K, N, model, responses, rng, state

from rewardlib.data import embeddings
from rewardlib.errors import InputError
from rewardlib.models import aggregation, model_files, scoring
from rewardlib.nets import mlp


def save_models(folder, count=3, **options):
    paths = [folder / f"member_{i}.ckpt" for i in range(count)]
    for i, path in enumerate(paths):
        model_files.save_mlp(path, model(i, **options))
    return paths


# ------------------------------------------------------------------------------------------- scores


def test_members_have_mean_0_and_sd_1_over_the_given_prompts_and_keep_their_order(tmp_path):
    data = responses()
    prompts = np.array([4, 0, 2])
    ensemble = scoring.load(save_models(tmp_path), data, prompts)
    scores = scoring.score(ensemble, data, prompts)
    assert scores.shape == (3, 3, K)
    np.testing.assert_allclose(scores.mean((1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(scores.std((1, 2)), 1, rtol=1e-6)
    for i in range(3):
        raw = np.stack([mlp.predict(model(i), data.embeddings[k][prompts]) for k in range(K)], 1)
        np.testing.assert_allclose(scores[i], (raw - raw.mean()) / raw.std(), atol=1e-5)


def test_the_scale_is_that_of_the_given_prompts_whatever_is_scored(tmp_path):
    data = responses()
    ensemble = scoring.load(save_models(tmp_path), data, np.array([0, 1, 2]))
    every = scoring.score(ensemble, data, np.arange(N))
    np.testing.assert_allclose(every[:, :3], scoring.score(ensemble, data, [0, 1, 2]), atol=1e-6)
    np.testing.assert_allclose(
        scoring.score_rows(ensemble, data.embeddings[1]), every[:, :, 1], atol=1e-5
    )


def test_blocks_do_not_change_scores(tmp_path, monkeypatch):
    data = responses(n=50)
    ensemble = scoring.load(save_models(tmp_path), data, np.arange(50))
    expected = scoring.score(ensemble, data, np.arange(49, -1, -1))
    monkeypatch.setattr(embeddings, "READ_BYTES", 7 * 4 * D)
    np.testing.assert_allclose(
        scoring.score(ensemble, data, np.arange(49, -1, -1)), expected, atol=1e-5
    )
    np.testing.assert_allclose(
        scoring.score(ensemble, data, np.arange(50)), expected[:, ::-1], atol=1e-5
    )


def test_stored_models_score_as_loaded_ones_and_are_read_when_asked_for(tmp_path):
    paths, data = save_models(tmp_path), responses()
    loaded = scoring.load(paths, data, np.arange(N))
    stored = scoring.ScaledEnsemble(model_files.Stored(paths, D), loaded.centre, loaded.spread)
    rows = data.embeddings[0]
    np.testing.assert_array_equal(
        scoring.score_rows(stored, rows), scoring.score_rows(loaded, rows)
    )
    paths[1].unlink()
    assert len(stored.models) == 3 and same_state(stored.models[2], loaded.models[2])
    with pytest.raises(InputError, match=r"member_1\.ckpt not found"):
        scoring.score_rows(stored, rows)


def same_state(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_a_member_that_says_nothing_scores_0(tmp_path):
    torch.save(state(), tmp_path / "a.ckpt")
    data = responses()
    ensemble = scoring.load([tmp_path / "a.ckpt"], data, np.arange(N))
    assert (scoring.score(ensemble, data, np.arange(N)) == 0).all()


def test_a_member_that_scores_nan_is_named(tmp_path):
    paths = save_models(tmp_path)
    broken = model(1).state_dict()
    broken["fc3.bias"][:] = np.nan
    torch.save(broken, paths[1])
    with pytest.raises(
        InputError, match=r"member_1\.ckpt: expected finite scores, found NaN or inf"
    ):
        scoring.load(paths, responses(), np.arange(N))


def test_the_scale_does_not_depend_on_the_order_of_the_prompts(monkeypatch):
    """Step 5 measures the scale, and step 7 does so again for checkpoints named one by one."""
    monkeypatch.setattr(scoring, "SCALE_ROWS", 40)
    data, models = responses(n=50), [model(i) for i in range(3)]
    prompts = rng().permutation(50)[:30]
    centre, spread = scoring.scale(models, data, np.sort(prompts))
    again = scoring.scale(models, data, prompts)
    np.testing.assert_array_equal(again, (centre, spread))
    every = scoring.score_raw(models, data, prompts).astype(float)
    np.testing.assert_allclose(centre, every.mean((1, 2)), atol=0.5 * every.std())
    assert (centre != every.mean((1, 2))).all(), "40 of 90 responses are a sample"
    np.testing.assert_allclose(spread, every.std((1, 2)), rtol=0.5)


def test_members_of_a_record_have_the_scale_that_it_tells(tmp_path):
    data = responses()
    paths = save_models(tmp_path)
    loaded = scoring.load(paths, data, np.arange(N))
    scale = {"centre": loaded.centre.tolist(), "spread": loaded.spread.tolist()}
    record = {"members": [{"file": path.name} for path in paths], "scale": scale}
    ensemble = scoring.load_members(tmp_path, record, D)
    for found in (scoring.score(ensemble, data, [2, 0]), scoring.score(loaded, data, [2, 0])):
        raw = scoring.score_raw(loaded.models, data, [2, 0])
        np.testing.assert_array_equal(found, scoring.on_scale(ensemble, raw))
    by_hand = (raw[1, 0, 2] - loaded.centre[1]) / loaded.spread[1]
    assert scoring.on_scale(ensemble, raw)[1, 0, 2] == pytest.approx(by_hand, rel=1e-6)
    assert scoring.on_scale(ensemble, raw[:, 0, 0]).shape == (3,)


@pytest.mark.parametrize("dtype", mlp.TYPES.values(), ids=mlp.TYPES)
def test_members_are_held_in_the_type_that_they_compute_in(tmp_path, dtype):
    data, paths = responses(), save_models(tmp_path)
    loaded = scoring.load(paths, data, np.arange(N), dtype)
    scale = {"centre": loaded.centre, "spread": loaded.spread}
    record = {"members": [{"file": path.name} for path in paths], "scale": scale}
    for ensemble in (loaded, scoring.load_members(tmp_path, record, D, dtype)):
        assert {member.fc1.weight.dtype for member in ensemble.models} == {dtype}
        stored = scoring.ScaledEnsemble(
            model_files.Stored(paths, D), loaded.centre, loaded.spread, dtype
        )
        np.testing.assert_array_equal(
            scoring.score(ensemble, data, [2, 0]), scoring.score(stored, data, [2, 0])
        )


@pytest.mark.parametrize("dtype", mlp.TYPES.values(), ids=mlp.TYPES)
def test_networks_and_linear_scorers_score_any_responses_in_one_pass(monkeypatch, dtype):
    """Networks compute in `dtype`; the linear scorer sees the embeddings as they are stored."""
    monkeypatch.setattr(embeddings, "READ_BYTES", 3 * 4 * D)
    data, read = responses(n=20), []
    prompts, numbers = rng().integers(20, size=30), rng(1).integers(K, size=30)
    read_blocks = embeddings.Responses.read

    def remember(*args):
        for positions, rows in read_blocks(*args):
            read.extend(positions)
            yield positions, rows

    monkeypatch.setattr(embeddings.Responses, "read", remember)
    weights = np.array([2.0, -1])
    found = scoring.score_at([model(0), weights, model(1)], data, prompts, numbers, dtype)
    assert sorted(read) == list(range(30)), "every response is read once, however many score it"
    rows = np.stack(data.embeddings)[numbers, prompts]
    assert found.shape == (3, 30) and found.dtype == np.float32
    np.testing.assert_allclose(found[1], rows @ weights, rtol=1e-5, atol=1e-5)
    for i, network in ((0, model(0)), (2, model(1))):
        expected = mlp.predict(network, rows, dtype)
        np.testing.assert_allclose(found[i], expected, rtol=1e-2, atol=1e-2)
        assert np.abs(found[i] - mlp.predict(network, rows)).max() < (
            1e-5 if dtype == torch.float32 else 0.02
        )


def test_raw_scores_are_in_the_place_of_their_response():
    data = responses(n=20)
    found = scoring.score_raw([model(0)], data, [7, 3])
    for i, prompt in enumerate((7, 3)):
        for k in range(K):
            expected = mlp.predict(model(0), data.embeddings[k][[prompt]])[0]
            assert found[0, i, k] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_aggregations_by_hand():
    """Two members on one prompt with two responses: means 2, 0; variances 1, 4."""
    found = aggregation.aggregate(np.array([[[1.0, 2.0]], [[3.0, -2.0]]]))
    expected = {
        "mean": [[2, 0]],
        "min": [[1, -2]],
        "uwo": [[2 - 0.5, 0 - 2]],
        "lcb": [[2 - 1, 0 - 2]],
        "first": [[1, 2]],
    }
    assert {name: values.tolist() for name, values in found.items()} == expected


def test_the_member_closest_to_the_mean_is_found():
    signal, noise = rng().standard_normal((2, 40, K))
    others = rng(1).standard_normal((3, 40, K))
    scores = np.stack([signal + noise, others[0], signal, others[1] - signal, others[2]])
    correlation = [np.corrcoef(member.ravel(), scores.mean(0).ravel())[0, 1] for member in scores]
    assert scoring.closest_member(scores) == np.argmax(correlation)
    assert scoring.closest_member(scores[[2, 2, 1]]) == 0


def test_a_member_that_says_nothing_is_never_the_closest():
    scores = rng().standard_normal((3, 20, K))
    scores[0] = 0
    assert scoring.closest_member(scores) in (1, 2)


# -------------------------------------------------------------------------------------- unseen_mean


def correlated(rho, members=6, n=3000, k=2):
    """Member scores of variance 1 with correlation rho between any two."""
    common, own = rng().standard_normal((n, k)), rng(1).standard_normal((members, n, k))
    return np.sqrt(rho) * common + np.sqrt(1 - rho) * own


def test_where_nothing_was_seen_it_is_the_plain_mean():
    scores = correlated(0.5, n=10)
    np.testing.assert_allclose(
        scoring.unseen_mean(scores, np.zeros((6, 10), bool)), scores.mean(0), atol=1e-15
    )


def test_only_members_that_never_saw_the_prompt_count():
    scores = correlated(0.5, n=30)
    seen = rng(2).random((6, 30)) < 0.5
    seen[:, 0] = True
    found = scoring.unseen_mean(scores, seen)
    changed = np.where(seen[:, :, None], 1e6, scores)
    far = scoring.unseen_mean(changed, seen)
    assert np.isnan(found[0]).all() and np.isfinite(found[1:]).all()
    for n in range(1, 30):
        mean = scores[~seen[:, n], n].mean(0)
        share = found[n] / mean
        assert 0 < share[0] <= 1 and share[0] == pytest.approx(share[1])
        np.testing.assert_allclose(far[n], mean * far[n, 0] / mean[0])


@pytest.mark.parametrize("rho", [0.05, 0.5, 0.9])
def test_the_variance_does_not_tell_how_many_members_were_left(rho):
    """Prompts seen by no member, by four and by five of six members.

    The mean over all six has variance rho + (1 - rho) / 6.
    """
    scores = correlated(rho, n=6000)
    seen = np.zeros((6, 6000), bool)
    seen[:4, 2000:] = True
    seen[4, 4000:] = True
    found = scoring.unseen_mean(scores, seen)
    for part in (slice(0, 2000), slice(2000, 4000), slice(4000, 6000)):
        assert found[part].var() == pytest.approx(rho + (1 - rho) / 6, rel=0.08)


def test_out_of_bag_scores_of_one_member_each_are_shrunk_too():
    """Five members, each with its own fold: no prompt is unseen by two of them."""
    scores = correlated(0.4, members=5, n=5000)
    seen = np.arange(5000)[None] % 5 != np.arange(5)[:, None]
    found = scoring.unseen_mean(scores, seen)
    assert found.var() == pytest.approx(0.4 + 0.6 / 5, rel=0.08)
    shrink = found[0] / scores[0, 0]
    np.testing.assert_allclose(found, shrink[0] * scores[np.arange(5000) % 5, np.arange(5000)])


def test_one_member_is_itself_where_it_never_saw_the_prompt():
    scores = correlated(0.5, members=1, n=4)
    found = scoring.unseen_mean(scores, np.array([[True, False, False, True]]))
    np.testing.assert_array_equal(found[1:3], scores[0, 1:3])
    assert np.isnan(found[[0, 3]]).all()


def test_a_member_that_says_nothing_takes_no_prompt_out():
    scores = correlated(0.5, members=4, n=40)
    scores[1] = 0
    seen = np.zeros((4, 40), bool)
    seen[0, :10] = True
    assert np.isfinite(scoring.unseen_mean(scores, seen)).all()
