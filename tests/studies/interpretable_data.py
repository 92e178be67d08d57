"""Prepared pairs and attribute heads with known truth, for tests of the interpretable studies.

The first four numbers of each embedding are helpful, safe, verbose and clear; the heads of the
first two add three times the verbosity. A prompt whose embedding begins above 0 asks for the
helpful response, any other prompt for the safe one.
"""

import importlib
import sys

import numpy as np
from conftest import ROOT

from rewardlib import artifacts
from studies.interpretable import attribute_data, gating, multi_objective

NAMES = ["helpful", "safe", "verbosity", "clear"]
PENALTIES = np.array([3.0, 3, 0, 0])
D, D_PROMPT = 6, 5
SOURCE = {"dataset": "made up", "prompt_position": "end"}
QUICK = [
    "--hidden",
    "32",
    "32",
    "--temperature",
    "1",
    "--dropout",
    "0",
    "--learning_rate",
    "0.003",
    "--batch_size",
    "32",
]


def script(name):
    """The module studies/{name}.py."""
    sys.path.insert(0, str(ROOT / "studies"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "studies"))


def make_pairs(path, n=400, seed=0, prompts=None, **changes):
    """Write n pairs, chosen first, and return them as Rated. prompts: n texts; None: all new."""
    rng = np.random.default_rng(seed)
    x, asked = rng.standard_normal((n, 2, D)), rng.standard_normal((n, D_PROMPT))
    gap = x[:, 0] - x[:, 1]
    right = np.where(asked[:, 0] > 0, gap[:, 0], gap[:, 1]) > 0
    x = np.where(right[:, None, None], x, x[:, ::-1])
    content = {
        "embeddings": [x.astype(np.float32)],
        "prompt_embeddings": [asked.astype(np.float32)],
        "groups": attribute_data.groups_of(prompts or [f"{path.stem} {i}" for i in range(n)]),
        "ids": [f"p{i}" for i in range(n)],
        "source": SOURCE,
    }
    rated = attribute_data.Rated(**{**content, **changes})
    attribute_data.write(path, rated)
    return rated


def make_heads(folder, prompts=("of the heads",), penalties=PENALTIES):
    """A model folder as the regression leaves it, with heads that were fitted on `prompts`."""
    folder.mkdir(exist_ok=True)
    heads = np.zeros((len(NAMES), D), np.float32)
    heads[np.arange(4), np.arange(4)] = 1
    heads[:2, 2] = 3
    model = multi_objective.AttributeModel(heads, np.array(penalties), NAMES, "verbosity")
    multi_objective.save(folder, model, np.ones(len(NAMES)), "ratings")
    artifacts.write_json(folder / gating.HEADS_RECORD, {"data": {"source": SOURCE}})
    split = {
        "fit": attribute_data.groups_of(prompts),
        "held_out": attribute_data.groups_of(["held out"]),
    }
    artifacts.write_json(folder / gating.HEADS_SPLIT, split)
    return folder


def make_gate(folder, *flags, **changes):
    """A model folder with a gate, trained on 400 pairs to prompts "train 0" ... "train 399"."""
    make_heads(folder)
    make_pairs(folder / "train.safetensors", **changes)
    flags = [
        "--pairs",
        str(folder / "train.safetensors"),
        "--model_dir",
        str(folder),
        *QUICK,
        "--epochs",
        "12",
        *flags,
    ]
    script("interpretable_gating").main(flags)
    return folder
