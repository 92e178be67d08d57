"""Every save and load of reward models: an MLP's state_dict, the arrays of a linear model, LightGBM's text.

stem.ckpt   MLP: plain state_dict fc1.weight ... fc3.bias, read with weights_only=True
stem.npz    linear models: their arrays and the name of their class
stem.txt    trees: LightGBM's text and its digest

Nothing here unpickles a file that it was given.
"""

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from rewardlib import artifacts
from rewardlib.errors import InputError
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


def save(stem, model):
    """Write a fitted model to stem.ckpt (MLP), stem.npz (linear) or stem.txt (trees). Returns the path.

    ValueError for models without such a form; joblib.dump keeps any of them for files that never
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
        f"{type(model).__name__}: expected a linear model of embeddings or CLF_LGBM, found a model without a "
        "portable form; use joblib.dump"
    )


def is_mlp(path: Path | str) -> bool:
    """Whether `load` reads an MLP from this path."""
    return Path(path).suffix not in (".npz", ".txt")


def save_mlp(path, model):
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


def load(path, input_dim):
    """The model that `save` wrote to `path`; InputError unless it is whole and scores input_dim dimensions."""
    path = Path(path)
    if is_mlp(path):
        return load_mlp(path, input_dim)
    try:
        model = _load_trees(path) if path.suffix == ".txt" else _load_arrays(path)
    except FileNotFoundError:
        raise InputError(f"{path} not found; step 5 writes reward models: run it first") from None
    if model.n_features_in_ != input_dim:
        raise InputError(
            f"{path}: expected a model of {input_dim}-dimensional embeddings, found {model.n_features_in_}; "
            "it was trained on another embedding model"
        )
    return model


def load_mlp(path, input_dim):
    """An MLP from a plain state_dict fc1.weight ... fc3.bias, any hidden sizes; InputError unless it fits input_dim."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} not found; step 5 writes checkpoints: run it first") from None
    except Exception as error:  # damaged files fail inside the unpickler in any way
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: expected a torch checkpoint, found an unreadable file ({reason})"
        ) from None
    names = [f"fc{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")]
    if (
        not isinstance(state, dict)
        or set(state) != set(names)
        or not all(map(torch.is_tensor, state.values()))
    ):
        found = sorted(map(str, state))[:8] if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{path}: expected a state_dict with {', '.join(names)}, found {found}")
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if shapes["fc1.weight"][1:] != (input_dim,):
        raise InputError(
            f"{path}: expected a model of {input_dim}-dimensional embeddings, found fc1.weight of shape "
            f"{shapes['fc1.weight']}; it was trained on another embedding model"
        )
    model = mlp.MLP(input_dim, tuple(state[f"fc{i}.bias"].numel() for i in (1, 2)))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{path}: layers do not fit together ({' '.join(str(error).split())})"
        ) from None
    return model.eval()


def _load_arrays(path):
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged archives fail in zipfile, zlib or numpy in any way
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise InputError(
            f"{path}: expected a saved reward model, found an unreadable file ({reason})"
        ) from None
    kinds = {kind.__name__: kind for kind in ARRAYS}
    kind = kinds.get(str(found.pop("model", None)))
    d = found["coef_"].shape[0] if found.get("coef_", np.zeros(())).ndim == 1 else 0
    shapes = {"coef_": (d,), "center_": (d,), "covariance_": (d, d), "intercept_": (), "alpha_": ()}
    expected = {name: shapes[name] for name in ARRAYS.get(kind, ())}
    if kind is None or {name: array.shape for name, array in found.items()} != expected or not d:
        shown = {name: array.shape for name, array in found.items()}
        raise InputError(
            f"{path}: expected the arrays of one of {', '.join(kinds)}, found {shown}; save it again"
        )
    if not all(array.dtype.kind == "f" and np.isfinite(array).all() for array in found.values()):
        raise InputError(f"{path}: expected finite numbers, found others; fit and save it again")
    model = kind(alpha=float(found["alpha_"]))
    for name, array in found.items():
        setattr(model, name, float(array) if array.ndim == 0 else array)
    model.n_features_in_ = d
    return model


def _load_trees(path):
    """The trees in a text; LightGBM's reader is not made for damaged ones and can hang, so the digest comes first."""
    lightgbm = import_lightgbm()
    text, _, digest = path.read_bytes().rpartition(TREES_END)
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise InputError(
            f"{path}: expected a LightGBM model with its digest, found a damaged or other file; save it again"
        )
    booster = lightgbm.Booster(model_str=text.decode())
    model = CLF_LGBM(n_estimators=booster.num_trees())
    model.booster_, model.n_features_in_ = booster, booster.num_feature()
    return model


class Stored(Sequence):
    """Models on disk, each loaded when it is asked for: one in memory where they are gone through in order."""

    def __init__(self, paths, input_dim):
        self.paths, self.input_dim = paths, input_dim

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return load(self.paths[i], self.input_dim)


def find_checkpoints(patterns):
    """Paths named by one or more paths or globs, in natural order; InputError for a pattern that names none."""
    found = []
    for pattern in patterns:
        matches = (
            [str(pattern)]
            if Path(pattern).is_file()
            else sorted(glob.glob(str(pattern)), key=_natural)
        )
        if not matches:
            raise InputError(
                f"teacher checkpoint {pattern} not found; step 5 writes XPrompt_mlp_... files"
            )
        found += matches
    return [Path(path) for path in dict.fromkeys(found)]


def _natural(text):
    parts = [""]
    for character in text:
        if character.isdecimal() == parts[-1].isdecimal():
            parts[-1] += character
        else:
            parts.append(character)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
