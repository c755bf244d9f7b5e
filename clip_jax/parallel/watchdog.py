"""The end of a run of several processes: an error in one ends them all, with a line in each.

Every process gives signs of life to the coordination service in process 0, which ends the run when
one of them goes silent. A step that takes longer than `Limits.hang` ends its process with every
thread's stack.
"""

import faulthandler
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import jax

from clip_jax.errors import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    Terminated,
    UserError,
    short,
)
from clip_jax.parallel.distributed import FOREVER_MS, gather, is_first
from clip_jax.parallel.jax_internals import coordination_client, process_count, process_index
from clip_jax.parallel.limits import LIMITS, Limits

# Keys of the coordination service: why the run ends, each process's sign of life, and who has read
# the reason.
_END, _ALIVE, _READ = "clip_jax/end", "clip_jax/alive/", "clip_jax/heard/"
_SUCCESS = "well"
_FAREWELL_SECONDS = 5.0
_BEAT_SECONDS = 5.0

_ending = threading.Event()
"""Set when this process has said why it ends, so that its watch has nothing to add."""

_limits = LIMITS


def start(limits: Limits) -> None:
    """Watch this process and the others from now on; they have to have joined."""
    global _limits
    _limits = limits
    _arm()
    threading.Thread(target=_watch, name="clip_jax_watch", daemon=True).start()


def about_to_fail() -> None:
    """Say that this process will end with an error of its own, as all do.

    No other's reason is needed then. A `gather` afterwards makes sure that all have said so before
    the first one ends.
    """
    _ending.set()


def rearm() -> None:
    """Say that this process is alive: the time limit of a step starts again."""
    if process_count() > 1:
        _arm()


def stand_by() -> None:
    """Drop the time limit from here on, for work that may take as long as it takes."""
    faulthandler.cancel_dump_traceback_later()


def _arm() -> None:
    if _limits.hang:
        faulthandler.dump_traceback_later(_limits.hang, exit=True)


@contextmanager
def ending_together() -> Iterator[None]:
    """End all processes on an error in one, with a line in each; wait for all at a good end."""
    if process_count() == 1:
        yield
        return
    try:
        yield
        gather(None)
        if is_first():
            coordination_client().key_value_set(_END, _SUCCESS)
        coordination_client().blocking_key_value_get(_END, FOREVER_MS)
        stand_by()
    except UserError as error:
        _fail(str(error), EXIT_USAGE)
    except Terminated:
        _fail("terminated", EXIT_TERMINATED)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except jax.errors.JaxRuntimeError as error:
        # A collective breaks when a process is gone, before the watch can know which: let it say.
        time.sleep(_limits.heartbeat + 2 * min(_BEAT_SECONDS, _limits.heartbeat))
        traceback.print_exc()
        _fail(short(error), EXIT_ERROR)
    except Exception as error:
        traceback.print_exc()
        _fail(short(error), EXIT_ERROR)


def _fail(reason: str, code: int) -> None:
    """Print the reason, tell the others, and end this process."""
    _ending.set()
    print(f"error: process {process_index()}: {reason}", file=sys.stderr, flush=True)
    _post(f"process {process_index()} failed: {reason}")
    _leave(code)


def _post(reason: str) -> None:
    """Post why the run ends."""
    # It fails where another process ended the run already, or the coordinator is gone.
    with suppress(jax.errors.JaxRuntimeError):
        coordination_client().key_value_set(_END, reason)


def _leave(code: int) -> None:
    """End this process without JAX's farewell, which waits for processes that may hang."""
    with suppress(jax.errors.JaxRuntimeError):
        client = coordination_client()
        client.key_value_set(f"{_READ}{process_index()}", "", True)
        # The messages live in process 0: it stays until all have read them.
        end = time.monotonic() + _FAREWELL_SECONDS
        while is_first() and time.monotonic() < end:
            if len(client.key_value_dir_get(_READ)) == process_count():
                break
            time.sleep(0.05)
    sys.stdout.flush()
    os._exit(code)


def _watch() -> None:
    """Give signs of life, and end this process when another has failed or gone silent."""
    client, beats = coordination_client(), itertools.count()
    interval = min(_BEAT_SECONDS, _limits.heartbeat / 4)
    seen: dict[str, tuple[str, float]] = {}
    while True:
        try:
            client.key_value_set(f"{_ALIVE}{process_index()}", str(next(beats)), True)
            if is_first():
                _post_silent(client.key_value_dir_get(_ALIVE), seen, time.monotonic())
            reason = client.blocking_key_value_get(_END, int(1000 * interval))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            reason = "process 0, the coordinator, cannot be reached any more: it has died"
        if reason == _SUCCESS or _ending.is_set():
            return
        print(f"error: process {process_index()} ends: {reason}", file=sys.stderr, flush=True)
        _leave(EXIT_ERROR)


def _post_silent(
    alive: Sequence[tuple[str, str]], seen: dict[str, tuple[str, float]], now: float
) -> None:
    """End the run when a process's sign of life has not changed for too long."""
    for key, beat in alive:
        if seen.get(key, ("", 0.0))[0] != beat:
            seen[key] = (beat, now)
        elif now - seen[key][1] > _limits.heartbeat:
            index = key.rpartition("/")[2]
            _post(
                f"process {index} of {process_count()} has given no sign of life for "
                f"{_limits.heartbeat} s: it was killed, or its machine is down or cut off"
            )
