"""Kinds of values that flags of the interpretable studies take, beside those of rewardlib.cli."""

import argparse

from rewardlib.cli import kinds


def share(text: str) -> float:
    """A number between 0 and 1, both excluded."""
    value = kinds.positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, found {text!r}")
    return value


def probability(text: str) -> float:
    """A number of at least 0 and below 1."""
    value = kinds.non_negative(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(
            f"expected a number of at least 0 and below 1, found {text!r}"
        )
    return value


def named_weight(text: str) -> tuple[str, float]:
    """(name, weight) of NAME=WEIGHT."""
    name, equals, weight = text.rpartition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=WEIGHT, found {text!r}")
    return name, kinds.finite(weight)


def named_file(text: str) -> tuple[str, str]:
    """(name, path) of NAME=FILE."""
    name, equals, path = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, found {text!r}")
    return name, path
