"""Parsers whose help shows defaults, and errors in one line."""

import argparse
import os
import sys

from rewardlib.errors import InputError


def parser(doc):
    """An ArgumentParser whose help is the script's docstring and whose flags show their defaults."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(f"{message}; --help lists the flags")

    made = Parser(description=doc, formatter_class=Help, allow_abbrev=False)
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def run(main, name):
    """Call main(): exit 0 when it returns, 2 with one line for bad input, 1 with one line for anything else."""
    debug = "--debug" in sys.argv
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        if debug:
            raise
        fail(name, error, 2)
    except KeyboardInterrupt:
        fail(name, "interrupted; the same command completes the job", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        fail(name, f"{type(error).__name__}: {error} (--debug shows where)", 1)


def fail(name, message, status):
    print(f"{name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def existing_folder(path, expected):
    """`path` if it is a folder; InputError otherwise."""
    if not path.is_dir():
        raise InputError(f"{path}: expected {expected}, found no such folder")
    return path
