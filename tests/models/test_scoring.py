"""Checkpoints, scores on one scale, aggregation, out-of-bag means, and the record of step 5."""

import io
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rewardlib import artifacts
from rewardlib.data import embeddings, splits
from rewardlib.errors import InputError
from rewardlib.models import aggregation, model_files, scoring
from rewardlib.nets import mlp
from rewardlib.pipeline import run_record

N, K, D = 6, 3, 2
SHAPES = {
    "fc1.weight": (5, D),
    "fc1.bias": (5,),
    "fc2.weight": (4, 5),
    "fc2.bias": (4,),
    "fc3.weight": (1, 4),
    "fc3.bias": (1,),
}


def rng(seed=0):
    return np.random.default_rng(seed)


def responses(n=N, k=K, d=D, seed=0, digests=None):
    """Random embeddings in memory; the rewards are NaN because no score may depend on them."""
    arrays = list(rng(seed).standard_normal((k, n, d)).astype(np.float32))
    return embeddings.Responses(arrays, np.full((n, k), np.nan), None, np.arange(n), digests or {})


def model(seed=0, d=D, hidden=(5, 4)):
    return mlp.MLP(d, hidden, torch.Generator().manual_seed(seed))


def save_models(folder, count=3, **options):
    paths = [folder / f"member_{i}.ckpt" for i in range(count)]
    for i, path in enumerate(paths):
        model_files.save_mlp(path, model(i, **options))
    return paths


def state(**changed):
    """A state_dict that fits; a changed shape of None leaves the entry out."""
    shapes = {**SHAPES, **{name.replace("_", "."): shape for name, shape in changed.items()}}
    return {name: torch.zeros(shape) for name, shape in shapes.items() if shape is not None}


# -------------------------------------------------------------------------------------- checkpoints


def test_a_plain_state_dict_of_the_published_shape_scores_as_its_layers_do(tmp_path):
    """D -> 1024 -> 512 -> 1 with ReLU, torch.save(dict)."""
    torch.manual_seed(0)
    with torch.no_grad():
        layers = [torch.nn.Linear(8, 1024), torch.nn.Linear(1024, 512), torch.nn.Linear(512, 1)]
        reference = torch.nn.Sequential(
            layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2]
        )
        plain = {
            f"fc{i}.{name}": value
            for i, layer in enumerate(layers, 1)
            for name, value in layer.named_parameters()
        }
        torch.save(plain, tmp_path / "published.ckpt")
        rows = rng().standard_normal((20, 8)).astype(np.float32)
        expected = reference(torch.from_numpy(rows)).squeeze(1).numpy()
    loaded = model_files.load_mlp(tmp_path / "published.ckpt", 8)
    assert not loaded.training
    np.testing.assert_array_equal(mlp.predict(loaded, rows), expected)


def test_what_is_saved_is_a_plain_state_dict_and_comes_back(tmp_path):
    model_files.save_mlp(tmp_path / "a.ckpt", model(3))
    plain = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in plain.items()} == SHAPES
    loaded = model_files.load_mlp(str(tmp_path / "a.ckpt"), D)
    assert all(torch.equal(value, plain[name]) for name, value in loaded.state_dict().items())


def test_saving_leaves_the_random_numbers_and_the_bytes_alone(tmp_path):
    before = torch.get_rng_state()
    for name in ("a.ckpt", "b.ckpt"):
        model_files.save_mlp(tmp_path / name, model(3))
    model_files.load_mlp(tmp_path / "a.ckpt", D)
    assert torch.equal(torch.get_rng_state(), before)
    assert (tmp_path / "a.ckpt").read_bytes() == (tmp_path / "b.ckpt").read_bytes()


def test_half_precision_checkpoints_are_read(tmp_path):
    torch.save(
        {name: value.half() for name, value in model(3).state_dict().items()}, tmp_path / "a.ckpt"
    )
    rows = rng().standard_normal((9, D)).astype(np.float32)
    found = mlp.predict(model_files.load_mlp(tmp_path / "a.ckpt", D), rows)
    np.testing.assert_allclose(found, mlp.predict(model(3), rows), atol=2e-3)


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"a\.ckpt not found; step 5 writes checkpoints"):
        model_files.load_mlp(tmp_path / "a.ckpt", D)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"fc1_weight": (5, 7)},
            r"expected a model of 2-dimensional embeddings, found fc1\.weight of shape \(5, 7\)",
        ),
        ({"fc1_weight": (5,)}, r"expected a model of 2-dim.*found fc1\.weight of shape \(5,\)"),
        ({"fc1_bias": ()}, "layers do not fit together .*fc1.bias"),
        (
            {"fc3_bias": None},
            r"expected a state_dict with fc1\.weight, .* found \['fc1\.bias', 'fc1\.weight'",
        ),
        ({"fc4_bias": (1,)}, r"expected a state_dict with .*'fc4\.bias'"),
        ({"fc2_weight": (4, 6)}, "layers do not fit together .*fc2.weight"),
        ({"fc3_weight": (2, 4), "fc3_bias": (2,)}, "layers do not fit together .*fc3.weight"),
    ],
    ids=["dimension", "1-d weight", "0-d bias", "missing", "one more", "layers", "two outputs"],
)
def test_states_that_do_not_fit(tmp_path, changed, message):
    torch.save(state(**changed), tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=rf"a\.ckpt: {message}"):
        model_files.load_mlp(tmp_path / "a.ckpt", D)


OTHER_THINGS = {
    "list": [1, 2],
    "tensor": torch.zeros(3),
    "empty": {},
    "mixed keys": {1: torch.zeros(1), "a": torch.zeros(1)},
    "numbers": dict.fromkeys(SHAPES, 1.0),
    "nested": {"state_dict": state()},
}


@pytest.mark.parametrize("content", OTHER_THINGS.values(), ids=OTHER_THINGS)
def test_other_things_than_states(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"a\.ckpt: expected a state_dict with"):
        model_files.load_mlp(tmp_path / "a.ckpt", D)


GARBAGE = {
    "empty": b"",
    "text": b"not a checkpoint",
    "zeros": bytes(300),
    "opcodes 1": b"e\x9a\x8f]3\xf3\xcb",
    "opcodes 2": b"h\x19\xc6\x11w+_\xba",
    "opcodes 3": b"\x80\x03}q\x00X\x01\x00\x00\x00aq\x01K\x01sj",
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bytes_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(
        InputError, match=r"a\.ckpt: expected a torch checkpoint, found an unreadable file"
    ):
        model_files.load_mlp(tmp_path / "a.ckpt", D)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_checkpoint(tmp_path, share):
    buffer = io.BytesIO()
    torch.save(state(), buffer)
    (tmp_path / "a.ckpt").write_bytes(buffer.getvalue()[: int(share * buffer.tell())])
    with pytest.raises(InputError, match="expected a torch checkpoint, found an unreadable file"):
        model_files.load_mlp(tmp_path / "a.ckpt", D)


class Planted:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_a_pickled_object_is_refused_and_never_run(tmp_path, modern):
    mark = tmp_path / "ran"
    content = {**state(), "fc1.bias": Planted(mark)}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=modern)
    with pytest.raises(InputError, match="expected a torch checkpoint, found an unreadable file"):
        model_files.load_mlp(tmp_path / "a.ckpt", D)
    assert not mark.exists()
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert mark.exists(), "the planted object does nothing, so the test above shows nothing"


# --------------------------------------------------------------------------------- find_checkpoints


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_globs_come_in_natural_order(tmp_path):
    touch(
        tmp_path, *(f"m_bt_{i}_seed6.ckpt" for i in (0, 1, 2, 9, 10, 11, 100)), "m_bt_1_seed6.json"
    )
    found = model_files.find_checkpoints([tmp_path / "m_bt_*_seed6.ckpt"])
    assert [int(path.name.split("_")[2]) for path in found] == [0, 1, 2, 9, 10, 11, 100]


def test_several_patterns_keep_their_order_and_name_no_file_twice(tmp_path):
    touch(tmp_path, "b.ckpt", "a.ckpt", "c.ckpt")
    found = model_files.find_checkpoints([str(tmp_path / "b.ckpt"), str(tmp_path / "*.ckpt")])
    assert [path.name for path in found] == ["b.ckpt", "a.ckpt", "c.ckpt"]


def test_a_path_with_brackets_in_it_names_itself(tmp_path):
    folder = touch(tmp_path / "run[1]", "a.ckpt")
    assert model_files.find_checkpoints([folder / "a.ckpt"]) == [folder / "a.ckpt"]


def test_a_pattern_without_a_match_is_refused(tmp_path):
    touch(tmp_path, "a.ckpt")
    with pytest.raises(InputError, match=r"teacher checkpoint .*b\*\.ckpt not found"):
        model_files.find_checkpoints([tmp_path / "a.ckpt", tmp_path / "b*.ckpt"])


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


# ----------------------------------------------------------------------------------- names of files

SETTINGS = {
    "rm_model": "mlp",
    "task": "helpful", "pairing": "xprompt", "rm_objective": "bt", "seed": 6, "consider_first_n": 2,
    "n_sample": 8, "n_pairs": 10, "replacement": False, "training_epochs": 2,
    "learning_rate": 0.001, "annotation_quality": 10.0,
}  # fmt: skip


def test_checkpoint_names_follow_the_documented_pattern():
    assert (
        run_record.stem({**SETTINGS, "n_sample": 8}, 3)
        == "XPrompt_mlp_bt_3_seed6_firstn_2_n_8_pair_10_replacement_false_epoch2_lr0.001"
    )
    other = {
        **SETTINGS,
        "pairing": "sameprompt",
        "rm_objective": "clf",
        "consider_first_n": -1,
        "replacement": True,
    }
    name = run_record.stem({**other, "n_sample": 100}, 12)
    assert (
        name
        == "SamePrompt_mlp_clf_12_seed6_firstn_-1_n_100_pair_10_replacement_true_epoch2_lr0.001"
    )
    assert "_bt_seed6_" in run_record.stem({**SETTINGS, "n_sample": 8})
    pattern = (
        r"(X|Same)Prompt_mlp_(bt|clf)_\d+_seed\d+_firstn_-?\d_n_\d+_pair_\d+"
        r"_replacement_(true|false)_epoch\d+_lr\S+"
    )
    assert re.fullmatch(pattern, name)


def test_a_number_has_one_spelling_in_names():
    names = {
        run_record.stem({**SETTINGS, "learning_rate": float(text)})
        for text in ("1e-3", "0.001", "0.0010", ".001")
    }
    assert len(names) == 1


# ------------------------------------------------------------------------------------ which prompts


def split_of(n=20):
    return splits.split_prompts(np.arange(n), 6)


def test_n_sample_is_bounded_by_what_may_be_fitted_on():
    split = split_of(20)
    assert run_record.resolve_n_sample(None, split) == run_record.resolve_n_sample(16, split) == 16
    assert run_record.resolve_n_sample(4, split) == 4
    for wrong in (3, 17):
        with pytest.raises(InputError, match=rf"n_sample: expected 4 to 16 .* found {wrong}"):
            run_record.resolve_n_sample(wrong, split)


def test_student_train_prompts_are_taken_first_and_held_out_ones_never():
    split = split_of(50)
    for n in (4, 10, 11, 40):
        chosen = run_record.choose_prompts(split, n, rng())
        assert len(set(chosen)) == n and (np.diff(chosen) > 0).all()
        assert not set(chosen) & set(split["held_out"])
        assert len(set(chosen) & set(split["student_train"])) == min(n, 10)
    draws = {tuple(run_record.choose_prompts(split, 4, rng(seed))) for seed in range(5)}
    assert len(draws) > 1
    np.testing.assert_array_equal(
        run_record.choose_prompts(split, 4, rng(1)), run_record.choose_prompts(split, 4, rng(1))
    )


def record_of(prompts, folds, validation_folds):
    members = [
        {"file": f"{i}.ckpt", "validation_fold": fold} for i, fold in enumerate(validation_folds)
    ]
    return {"prompts": np.array(prompts), "folds": np.array(folds), "members": members}


def test_a_member_saw_its_prompts_but_not_those_of_its_validation_fold():
    record = record_of([3, 7, 9], [0, 1, 0], [0, 1, 2])
    found = run_record.seen_by_members(record, np.array([9, 7, 5, 3]))
    assert found.tolist() == [
        [False, True, False, False],
        [True, False, False, True],
        [True, True, False, True],
    ]


def test_held_out_prompts_among_the_fitted_ones_are_a_leak():
    split = split_of(20)
    fitted = np.concatenate([split["student_train"], split["held_out"][1:3]])
    run_record.check_split(record_of(split["calibration"], np.zeros(12, int), [0]), split)
    with pytest.raises(
        InputError,
        match=rf"leakage: 2 held-out prompts \(first: {min(fitted[-2:])}\) entered the training",
    ):
        run_record.check_split(record_of(fitted, np.zeros(len(fitted), int), [0]), split)


# ----------------------------------------------------------------------------- the record of step 5


@pytest.fixture
def run(tmp_path):
    """OUTPUT_DIR as step 5 leaves it, and its data of 20 prompts."""
    data, split = (
        responses(n=20, digests={"EMBD-TRAIN-split_0.npy": "12ab", "rewards_split_0.json": "34cd"}),
        split_of(20),
    )
    splits.save(tmp_path, split, 6)
    record = record_of(run_record.choose_prompts(split, 8, rng()), np.arange(8) % 2, [0, 1])
    artifacts.write_json(tmp_path / "orm.json", record)
    work = artifacts.identity(run_record.__file__, SETTINGS, data.digests)
    artifacts.record(
        tmp_path, "step5", {**work, "record": "orm.json"}, ["orm.json", splits.FILE], time.time()
    )
    return tmp_path, data


def test_a_run_is_opened_with_its_split_and_record(run):
    out, data = run
    split, record = run_record.open_run(out, dict(SETTINGS), data)
    assert (
        set(record["prompts"]) >= set(split["student_train"])
        and record["folds"].tolist() == [0, 1] * 4
    )
    assert [member["validation_fold"] for member in record["members"]] == [0, 1]


def test_opening_resolves_n_sample_in_place(run):
    out, data = run
    settings = {**SETTINGS, "n_sample": None}
    with pytest.raises(InputError, match="n_sample 8, not 16"):
        run_record.open_run(out, settings, data)
    assert settings["n_sample"] == 16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 7}, "seed 6, not 7"),
        (
            {"learning_rate": 0.002, "task": "x"},
            "task 'helpful', not 'x'; learning_rate 0.001, not",
        ),
    ],
    ids=["seed", "two"],
)
def test_reward_models_of_other_settings_are_refused(run, changed, message):
    out, data = run
    with pytest.raises(
        InputError, match=f"expected reward models of these settings, found {message}"
    ):
        run_record.open_run(out, {**SETTINGS, **changed}, data)


def test_reward_models_of_other_data_are_refused(run):
    """As many prompts, but other files: prompt 3 of one data set is not prompt 3 of the other.

    So nothing is known of which member was trained on which prompt.
    """
    out, data = run
    other = responses(n=20, seed=1, digests={**data.digests, "rewards_split_0.json": "56ef"})
    with pytest.raises(InputError, match="data.*step 5"):
        run_record.open_run(out, dict(SETTINGS), other)


def test_data_with_another_number_of_prompts_are_refused(run):
    with pytest.raises(
        InputError, match="expected each of 21 prompts once; this split belongs to another data set"
    ):
        run_record.open_run(run[0], dict(SETTINGS), responses(n=21))


def test_without_a_finished_step_5(run):
    out, data = run
    os.remove(out / "manifest.json")
    with pytest.raises(
        InputError, match="no finished reward models; run step 5 with the same settings first"
    ):
        run_record.open_run(out, dict(SETTINGS), data)


def test_a_split_changed_after_step_5_is_a_leak(run):
    out, data = run
    split = split_of(20)
    split["student_train"], split["held_out"] = split["held_out"], split["student_train"]
    splits.save(out, split, 6)
    with pytest.raises(InputError, match="leakage: 4 held-out prompts"):
        run_record.open_run(out, dict(SETTINGS), data)
