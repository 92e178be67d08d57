"""Reward-model research on LLM embeddings: what the step scripts and notebooks share."""

import importlib

__version__ = "0.1.0"

# Public names and their modules, imported when first asked for: `import rewardlib` alone loads
# neither torch nor scikit-learn.
PUBLIC = {
    "load_embd_data": "api",
    "pair_annotate": "api",
    "calc_bon": "api",
    "calc_spearmanr": "api",
    "BT_MLP": "models.mlp",
    "CLF_MLP": "models.mlp",
    "BT_Linear": "models.linear",
    "CLF_Linear": "models.linear",
    "BT_Laplace": "models.linear",
    "Regression_Ridge": "models.linear",
    "CLF_LGBM": "models.classifiers",
    "CLF_Any": "models.classifiers",
    "Ensemble": "models.ensemble",
    "InputError": "errors",
}


def __getattr__(name):
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{PUBLIC[name]}"), name)


def __dir__():
    return sorted([*globals(), *PUBLIC])
