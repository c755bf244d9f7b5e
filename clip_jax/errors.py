"""The one error class a user meets, and how commands end on it."""

import functools
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NoReturn

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 75  # EX_TEMPFAIL: schedulers take it as "run me again"


class UserError(Exception):
    """A mistake that the user can correct: a line that says what is wrong, where, and what to do.

    The commands print it without a traceback and exit with code 2.
    """


@functools.cache
def note(message: str) -> None:
    """Print a line on stderr, once in a process: what was done that nobody asked for."""
    if not _muted:
        print(f"note: {message}", file=sys.stderr, flush=True)


_muted = False


def mute_notes() -> None:
    """Print no notes from now on: the process does again what another has told of."""
    global _muted
    _muted = True


def note_unknown(settings: Mapping[str, Any], known: Container[str], where: str) -> None:
    """Say which settings of a file are not read, and are on; what is off or empty is as absent."""
    unknown = [
        f"{name} = {value!r:.40}"
        for name, value in settings.items()
        if name not in known and value not in (None, False, 0, "", {}, [])
    ]
    if unknown:
        note(f"{where}: settings that are not known are passed over: {', '.join(unknown)}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UserError if the value of an option is none of its choices."""
    if value not in choices:
        known = ", ".join(choice or '""' for choice in choices)
        raise UserError(f"{name} is {value!r}; it must be one of {known}")


def check_counts(counts: Mapping[str, int | None]) -> None:
    """Raise UserError if the number of a flag is below 1; None is a flag that is not given."""
    for flag, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{flag} is {count}; it takes 1 or more")


def short(error: BaseException) -> str:
    """Return an exception's type and text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def run_command(command: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its code; a UserError becomes one line on stderr and code 2."""
    try:
        code = command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    sys.exit(code)
