"""The one exception that means: the user can mend this."""


class InputError(Exception):
    """Input that a user can mend. The message names what, where, expected, found and the fix, in one line."""
