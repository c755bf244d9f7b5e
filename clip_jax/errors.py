"""The one error class a user meets, and how commands end on it."""

import contextlib
import functools
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

from clip_jax.distribution import mixed_files

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 75  # EX_TEMPFAIL: schedulers take it as "run me again"


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends: whoever lets go on Ctrl-C lets go on it."""


class UserError(Exception):
    """A mistake that the user can correct: a line that says what is wrong, where, and what to do.

    The commands print it without a traceback and exit with code 2.
    """


def write_remedy(reason: str) -> str:
    """Return what to do about a file that cannot be written, from the system's own words for it."""
    if re.search("no space|too large|quota|disk is full|disk full", reason, re.IGNORECASE):
        return "make room"
    if re.search("permission|not permitted|read-only", reason, re.IGNORECASE):
        return "give yourself the right to write there"
    return "take another place"


def exit_code(error: BaseException) -> int:
    """Return the code that a process exits with after an exception."""
    if isinstance(error, UserError):
        return EXIT_USAGE
    if isinstance(error, Terminated):
        return EXIT_TERMINATED
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_ERROR


@functools.cache
def note(message: str) -> None:
    """Print a line on stderr, once in a process: what was done that nobody asked for."""
    if not _muted:
        print(f"note: {plain(message)}", file=sys.stderr, flush=True)


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


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Return a text for a terminal, which would obey its control characters: each as its number.

    Line ends and tabs stay. JSON stays JSON.
    """
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Begin the message of a UserError with where it arose, unless it says so already."""
    try:
        yield
    except UserError as error:
        if where in str(error):
            raise
        raise UserError(f"{where}: {error}") from None


def short(error: BaseException) -> str:
    """Return an exception's type and text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def run_command(command: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its code; a UserError becomes one line on stderr and code 2.

    SIGTERM ends it with a line and `EXIT_TERMINATED`. What nobody reads any more (`| head`) is
    dropped, and the command goes on.
    """
    if (mixed := mixed_files()) is not None:
        note(mixed)  # where the package's own `__init__.py` is the other's
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)
    try:
        with ending_on_sigterm():
            code = command()
    except UserError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr, flush=True)
        code = exit_code(error)
    except KeyboardInterrupt as error:
        line = TERMINATED if isinstance(error, Terminated) else "interrupted"
        print(line, file=sys.stderr, flush=True)
        code = exit_code(error)
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams
    sys.exit(code)


TERMINATED = "terminated; the same command goes on where it can"
GRACE_SECONDS = 10.0
"""How long a process that was told to end may stay in a library's code before it is ended."""

signal_heard = threading.Event()
"""Set by whoever handles a SIGTERM: the main thread runs."""


def end_on_sigterm() -> None:
    """End the process on SIGTERM with a line and `EXIT_TERMINATED`, until a command takes over."""

    def handle(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError, AttributeError, RuntimeError):
            print(TERMINATED, file=sys.stderr, flush=True)
        os._exit(EXIT_TERMINATED)

    signal.signal(signal.SIGTERM, handle)


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` in the main thread on SIGTERM, or end the process if it cannot hear it.

    Python's handlers run between two of its own instructions, and a compilation takes minutes: a
    thread, woken by the signal itself, ends the process then. A handler that takes this one's
    place for a while, to save first, sets `signal_heard`.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        signal_heard.set()
        # A second one ends the process at once.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    def watch() -> None:
        while number := reader.recv(1):
            is_ours = signal.getsignal(signal.SIGTERM) is handle
            if number[0] == signal.SIGTERM and is_ours and not signal_heard.wait(GRACE_SECONDS):
                print(TERMINATED, file=sys.stderr, flush=True)
                os._exit(EXIT_TERMINATED)

    signal_heard.clear()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.signal(signal.SIGTERM, handle)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="sigterm", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, before)
        writer.close()
        watcher.join()
        reader.close()


class LastingStream:
    """A standard stream whose reader may go: what is written then is dropped.

    Args:
      stream: the stream; None where the process began without one.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text."""
        self._do("write", text)
        return len(text)

    def flush(self) -> None:
        """Write what is held back."""
        self._do("flush")

    def _do(self, method: str, *args: str) -> None:
        try:
            if self._stream is not None:
                getattr(self._stream, method)(*args)
        except OSError:
            # The interpreter and libraries in C write there too.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
