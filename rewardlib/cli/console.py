"""Parsers whose help shows defaults, and errors in one line."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rewardlib.errors import InputError


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the script, with the default of every flag."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(f"{message}; --help lists the flags")

    parser = Parser(description=doc, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(main: Callable[[], None], name: str) -> None:
    """Call main(). An error ends the process with one line: status 2 for bad input, else 1."""
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


def fail(name: str, message: object, status: int) -> NoReturn:
    print(f"{name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def existing_folder(path: Path, expected: str) -> Path:
    """`path` if it is a folder; InputError otherwise."""
    if not path.is_dir():
        raise InputError(f"{path}: expected {expected}, found no such folder")
    return path
