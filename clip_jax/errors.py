"""The one error class a user meets, and how commands end on it."""

import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 75  # EX_TEMPFAIL: schedulers take it as "run me again"


class UserError(Exception):
    """A mistake the user can mend: one line that says what is wrong, where, and what to do.

    The commands print it without a traceback and exit with code 2.
    """


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UserError if the value of an option is none of its choices."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def short(error: BaseException) -> str:
    """An exception's kind and text, for a place in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def run_command(command: Callable[[], int]) -> NoReturn:
    """Run a command to its exit code; a UserError becomes one line on stderr and code 2."""
    try:
        code = command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    sys.exit(code)
