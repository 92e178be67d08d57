"""Names of the kinds of reward models, and the objectives that each can be trained with.

They stand apart from registry.py, which has the classes: the command line checks names in every
process, and has no use for scikit-learn there.
"""

from rewardlib.errors import InputError

OBJECTIVES = {
    "mlp": ("bt", "clf"),
    "linear": ("bt", "clf"),
    "lgbm": ("clf",),
    "laplace": ("bt",),
    "ridge": ("regression",),
}


def check_names(model: str, objective: str) -> None:
    """InputError unless there is such a reward model, and the package it needs is installed."""
    if objective not in OBJECTIVES.get(model, ()):
        known = ", ".join(f"{name} {kind}" for name, kinds in OBJECTIVES.items() for kind in kinds)
        raise InputError(
            f"reward model: expected one of {known}, found {model} {objective}; "
            "change the model or the objective"
        )
    if model == "lgbm" and not has_lightgbm():
        raise InputError("reward model lgbm: the package lightgbm is missing; pip install lightgbm")


def has_lightgbm() -> bool:
    """Whether lightgbm is installed and loads, so that CLF_LGBM can be fitted."""
    try:
        import lightgbm  # noqa: F401
    except ImportError:
        return False
    return True
