"""One kind of error for everything a user can mend, shown as one line with exit code 2."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input from outside (a file, a setting, a model folder). The message is one line: what, where, how to mend."""


def first_line(error: object) -> str:
    """The first line that says something of somebody else's error, which may have many, or none."""
    text = getattr(error, "strerror", None) or str(error)  # an OSError's reason without its number and path
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextmanager
def refusing(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """An error of one of these kinds, any by default, becomes an InputError with this message, in which "…" stands for
    the error's own first line. An InputError stays as it is, unless it is one of them."""
    kinds = kinds or (Exception,)
    try:
        yield
    except kinds as error:
        if isinstance(error, InputError) and InputError not in kinds:
            raise
        raise InputError(message.replace("…", first_line(error))) from None


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help with the description's own lines, and each flag's default."""


TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def truth(text: str) -> bool:
    """What a flag's text says: True for "true", False for "No"; raises ArgumentTypeError for "perhaps"."""
    if text.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return TRUTH[text.lower()]


SWITCH = {"type": truth, "nargs": "?", "const": True, "metavar": "true|false"}  # a flag alone means true


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; an InputError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
