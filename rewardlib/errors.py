"""The exception for input that a user can correct."""


class InputError(Exception):
    """Input that a user can correct.

    The message is one line: what and where, what was expected, what was found, and how to fix it.
    """
