"""Checkpoints that come back, and damaged, foreign or missing ones refused."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring_data import SHAPES, D, model, rng, state

from rewardlib.errors import InputError
from rewardlib.models import model_files
from rewardlib.nets import mlp

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
