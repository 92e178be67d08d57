"""Kinds of values that flags take, each refusing others in one line."""

import argparse
import math


def switch(text):
    """1/0, true/false, yes/no."""
    value = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(
        text.lower()
    )
    if value is None:
        raise argparse.ArgumentTypeError(f"expected 1 or 0, found {text!r}")
    return value


def bit(text: str) -> bool:
    """1 or 0."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"expected one of 0 1, found {text!r}")
    return text == "1"


def count(text):
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return value


def count_or_all(text):
    """A whole number of at least 1, or 'all' (None)."""
    return None if text == "all" else count(text)


def finite(text):
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}")
    return value


def word(text):
    """A name that can be part of a file name."""
    if not text or text in (".", "..") or any(character in text for character in "/\\\0\n"):
        raise argparse.ArgumentTypeError(f"expected a name without slashes, found {text!r}")
    return text


def seed(text):
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text!r}")
    return int(text)


def positive(text):
    """A finite number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def non_negative(text):
    """A finite number of at least 0."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, found {text!r}")
    return value


def at_least(least):
    """A whole number of at least `least`."""

    def parse(text):
        value = count(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, found {text!r}")
        return value

    return parse


def probability(text: str) -> float:
    """A number above 0, at most 1."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, found {text!r}")
    return value
