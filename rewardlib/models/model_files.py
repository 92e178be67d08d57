"""Files of reward models: every save and every load.

stem.ckpt   MLP: plain state_dict fc1.weight ... fc3.bias, read with weights_only=True
stem.npz    linear models: their arrays and the name of their class
stem.txt    trees: LightGBM's text and the digest of that text

Nothing here unpickles a file.
"""

import glob
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from rewardlib import artifacts
from rewardlib.errors import InputError
from rewardlib.models.base import RewardModel
from rewardlib.models.classifiers import CLF_LGBM, import_lightgbm
from rewardlib.models.linear import BT_Laplace, BT_Linear, CLF_Linear, Regression_Ridge
from rewardlib.nets import mlp

TREES_END = b"\nsha256 "  # between LightGBM's text and its digest
ARRAYS = {
    BT_Linear: ("coef_", "intercept_", "alpha_"),
    CLF_Linear: ("coef_", "intercept_", "alpha_"),
    BT_Laplace: ("coef_", "intercept_", "alpha_", "center_", "covariance_"),
    Regression_Ridge: ("coef_", "intercept_", "alpha_"),
}


# --------------------------------------------------------------------------------------------- save


def save(stem: str | Path, model: mlp.MLP | RewardModel) -> Path:
    """Path of a fitted model, written to stem.ckpt (MLP), stem.npz (linear) or stem.txt (trees).

    ValueError for models that have no such form. joblib.dump saves any model, for files that never
    leave your hands.
    """
    if isinstance(model, mlp.MLP):
        path = Path(f"{stem}.ckpt")
        save_mlp(path, model)
        return path
    check_is_fitted(model)
    if isinstance(model, CLF_LGBM):
        return _save_trees(Path(f"{stem}.txt"), model)
    if type(model) in ARRAYS and getattr(model, "features", None) is None:
        return _save_arrays(Path(f"{stem}.npz"), model)
    raise ValueError(
        f"{type(model).__name__}: expected a linear model of embeddings or CLF_LGBM, found a model "
        "without a portable form; use joblib.dump"
    )


def is_mlp(path: Path | str) -> bool:
    """Whether `load` reads an MLP from this path."""
    return Path(path).suffix not in (".npz", ".txt")


def save_mlp(path: str | Path, model: mlp.MLP) -> None:
    """Write the plain state_dict of an MLP."""
    with artifacts.atomic(path) as file:
        torch.save(model.state_dict(), file)


def _save_trees(path, model):
    text = model.booster_.model_to_string().encode()
    with artifacts.atomic(path) as file:
        file.write(text + TREES_END + hashlib.sha256(text).hexdigest().encode())
    return path


def _save_arrays(path, model):
    arrays = {name: np.asarray(getattr(model, name)) for name in ARRAYS[type(model)]}
    with artifacts.atomic(path) as file:
        np.savez(file, allow_pickle=False, model=np.asarray(type(model).__name__), **arrays)
    return path


# --------------------------------------------------------------------------------------------- load


def load(path: str | Path, input_dim: int) -> mlp.MLP | RewardModel:
    """The model that `save` wrote to `path`.

    InputError unless the file is undamaged and its model scores embeddings of input_dim dimensions.
    """
    path = Path(path)
    if is_mlp(path):
        return load_mlp(path, input_dim)
    try:
        model = _load_trees(path) if path.suffix == ".txt" else _load_arrays(path)
    except FileNotFoundError:
        raise InputError(f"{path} not found; step 5 writes reward models: run it first") from None
    if model.n_features_in_ != input_dim:
        raise InputError(
            f"{path}: expected a model of {input_dim}-dimensional embeddings, found "
            f"{model.n_features_in_}; the model was trained on another embedding model"
        )
    return model


def load_mlp(path: str | Path, input_dim: int) -> mlp.MLP:
    """An MLP from a plain state_dict fc1.weight ... fc3.bias, with hidden layers of any size.

    InputError unless the state_dict fits input_dim.
    """
    state = _read_state(path)
    shape = tuple(state["fc1.weight"].shape)
    if shape[1:] != (input_dim,):
        raise InputError(
            f"{path}: expected a model of {input_dim}-dimensional embeddings, found fc1.weight of "
            f"shape {shape}; the model was trained on another embedding model"
        )
    model = mlp.MLP(input_dim, tuple(state[f"fc{i}.bias"].numel() for i in (1, 2)))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: layers do not fit together ({reason})") from None
    return model.eval()


def _read_state(path):
    """{name: tensor} of the three layers of an MLP; InputError for any other content."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} not found; step 5 writes checkpoints: run it first") from None
    except Exception as error:  # a damaged file can raise anything inside the unpickler
        raise InputError(
            f"{path}: expected a torch checkpoint, found an unreadable file ({_reason(error)})"
        ) from None
    names = [f"fc{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")]
    is_state = isinstance(state, dict) and set(state) == set(names)
    if not is_state or not all(map(torch.is_tensor, state.values())):
        shown = sorted(map(str, state))[:8] if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{path}: expected a state_dict with {', '.join(names)}, found {shown}")
    return state


def _reason(error):
    """First line of an error, up to 100 characters; the type of an error without a message."""
    return (str(error) or type(error).__name__).splitlines()[0][:100]


def _load_arrays(path):
    """A linear model from its arrays, all of which must be there, finite and of fitting shapes."""
    arrays = _read_arrays(path)
    classes = {kind.__name__: kind for kind in ARRAYS}
    kind = classes.get(str(arrays.pop("model", None)))
    d = arrays["coef_"].shape[0] if arrays.get("coef_", np.zeros(())).ndim == 1 else 0
    shapes = {"coef_": (d,), "center_": (d,), "covariance_": (d, d), "intercept_": (), "alpha_": ()}
    expected = {name: shapes[name] for name in ARRAYS.get(kind, ())}
    actual = {name: array.shape for name, array in arrays.items()}
    if kind is None or actual != expected or not d:
        raise InputError(
            f"{path}: expected the arrays of one of {', '.join(classes)}, found {actual}; "
            "save the model again"
        )
    if not all(array.dtype.kind == "f" and np.isfinite(array).all() for array in arrays.values()):
        raise InputError(
            f"{path}: expected finite numbers, found NaN, inf or no numbers; "
            "fit and save the model again"
        )
    model = kind(alpha=float(arrays["alpha_"]))
    for name, array in arrays.items():
        setattr(model, name, float(array) if array.ndim == 0 else array)
    model.n_features_in_ = d
    return model


def _read_arrays(path):
    """{name: array} of an .npz file; InputError for a damaged file or pickled objects."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive can raise anything in zipfile, zlib or numpy
        raise InputError(
            f"{path}: expected a saved reward model, found an unreadable file ({_reason(error)})"
        ) from None


def _load_trees(path):
    """CLF_LGBM from its text.

    The digest is checked first: LightGBM's reader is not made for damaged text and can hang.
    """
    lightgbm = import_lightgbm()
    text, _, digest = path.read_bytes().rpartition(TREES_END)
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise InputError(
            f"{path}: expected a LightGBM model with its digest, found a damaged or other file; "
            "save the model again"
        )
    booster = lightgbm.Booster(model_str=text.decode())
    model = CLF_LGBM(n_estimators=booster.num_trees())
    model.booster_, model.n_features_in_ = booster, booster.num_feature()
    return model


class Stored(Sequence):
    """Models on disk as a sequence that loads each model when it is asked for.

    A loop over the sequence holds one model in memory at a time.
    """

    def __init__(self, paths: Sequence[str | Path], input_dim: int):
        self.paths, self.input_dim = paths, input_dim

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return load(self.paths[i], self.input_dim)


# --------------------------------------------------------------------------------------------- find


def find_checkpoints(patterns: Iterable[str | Path]) -> list[Path]:
    """Paths of the files that the patterns name, those of one pattern in natural order.

    patterns: paths or globs. A file that several patterns name comes once. InputError for a pattern
    that names no file.
    """
    paths = []
    for pattern in patterns:
        # A path that exists is no glob, even with brackets in it.
        if Path(pattern).is_file():
            matches = [str(pattern)]
        else:
            matches = sorted(glob.glob(str(pattern)), key=_natural_key)
        if not matches:
            raise InputError(
                f"teacher checkpoint {pattern} not found; step 5 writes XPrompt_mlp_... files"
            )
        paths += matches
    return [Path(path) for path in dict.fromkeys(paths)]


def _natural_key(text):
    """Sort key that compares runs of digits as numbers, so that member 10 comes after member 9."""
    parts = [""]
    for character in text:
        if character.isdecimal() == parts[-1].isdecimal():
            parts[-1] += character
        else:
            parts.append(character)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
