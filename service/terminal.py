"""What every command shares: exit codes, how a result and an error are told, the command that resumes."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from clients.errors import PersynError

EXIT_FAILED, EXIT_SOME_FAILED = 1, 3
"""Beside 0 for done, and 2 for wrong usage, which typer sets."""


def show(result: Mapping[str, Any], as_json: bool, lines: Sequence[str]) -> None:
    """Print the result as JSON, or its lines for people."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for line in lines:
        print(line)


def reason(error: PersynError | OSError) -> str:
    """An error in one line."""
    if isinstance(error, PersynError):
        return error.message
    text = " ".join((error.strerror or str(error) or type(error).__name__).split())
    return f"{error.filename}: {text}" if error.filename is not None else text


def stopped() -> NoReturn:
    """End the command after Ctrl-C, with the command that resumes it."""
    print(f"stopped; what is finished is kept. Resume with:\n  {command_line()}", file=sys.stderr)
    sys.exit(EXIT_FAILED)


def command_line() -> str:
    """The command line as it was given, to be pasted into a shell."""
    return shlex.join(["persyn", *sys.argv[1:]])
