"""The end of a run of several processes: an error in one ends them all, with a line in each.

Every process gives signs of life to the coordination service in process 0, which ends the run when
one of them goes silent. A step that takes longer than `Limits.hang` ends its process with every
thread's stack.
"""

import faulthandler
import itertools
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import jax

from clip_jax.errors import EXIT_ERROR, Terminated, UserError, exit_code, short
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

EndCallback = Callable[[int, str], object]
_before_exit: EndCallback | None = None
_last_sign = _last_answer = 0.0
"""When the time limit of a step began, and when process 0 answered last, by `time.monotonic`."""


def start(limits: Limits) -> None:
    """Watch this process and the others from now on; they have to have joined."""
    global _limits, _last_answer
    _limits, _last_answer = limits, time.monotonic()
    _arm()
    threading.Thread(target=_watch, name="clip_jax_watch", daemon=True).start()
    # A process 0 that is stopped answers nothing, and who asks it waits.
    threading.Thread(target=_watch_answers, name="clip_jax_answers", daemon=True).start()


def before_exit(callback: EndCallback | None) -> None:
    """Have this called with the exit code and the reason where another process ends this one."""
    global _before_exit
    _before_exit = callback


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
    global _last_sign
    _last_sign = math.inf
    faulthandler.cancel_dump_traceback_later()


def _arm() -> None:
    global _last_sign
    _last_sign = time.monotonic()
    if _limits.hang:
        # Where not even the watch gets to run: native code that holds Python's lock.
        faulthandler.dump_traceback_later(_limits.hang + 2 * _BEAT_SECONDS, exit=True)


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
        _fail(str(error), exit_code(error))
    except KeyboardInterrupt as error:
        _fail("terminated" if isinstance(error, Terminated) else "interrupted", exit_code(error))
    except jax.errors.JaxRuntimeError as error:
        # A collective breaks when a process is gone, before the watch can know which: let it say.
        time.sleep(_limits.heartbeat + 2 * min(_BEAT_SECONDS, _limits.heartbeat))
        traceback.print_exc()
        _fail(short(error), exit_code(error))
    except Exception as error:
        traceback.print_exc()
        _fail(short(error), exit_code(error))


def _fail(reason: str, code: int) -> None:
    """Print the reason, tell the others, and end this process."""
    _ending.set()
    _end_soon(code)
    print(f"error: process {process_index()}: {reason}", file=sys.stderr, flush=True)
    _post(f"process {process_index()} failed: {reason}")
    _leave(code)


def _end_soon(code: int) -> None:
    """End this process in a while, whatever waits then: a process 0 that is stopped, a disk."""
    timer = threading.Timer(3 * _FAREWELL_SECONDS, os._exit, (code,))
    timer.daemon = True
    timer.start()


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
    global _last_answer
    client, beats = coordination_client(), itertools.count()
    interval = _beat_interval()
    seen: dict[str, tuple[str, float]] = {}
    while True:
        _last_answer = time.monotonic()
        try:
            _end_if_hung()
            client.key_value_set(f"{_ALIVE}{process_index()}", str(next(beats)), True)
            if is_first():
                _post_silent(client.key_value_dir_get(_ALIVE), seen, time.monotonic())
            reason = client.blocking_key_value_get(_END, int(1000 * interval))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            reason = "process 0, the coordinator, cannot be reached any more: it has died"
        if reason == _SUCCESS or _ending.is_set():
            _last_answer = math.inf
            return
        _end(reason)


def _beat_interval() -> float:
    return min(_BEAT_SECONDS, _limits.heartbeat / 4)


def _watch_answers() -> None:
    """End this process when process 0 has not answered for too long."""
    while not _ending.is_set() and _last_answer < math.inf:
        time.sleep(_beat_interval())
        # An answer that nothing ends the run takes an interval by itself.
        if time.monotonic() - _last_answer > _limits.heartbeat + 2 * _beat_interval():
            _end(
                f"process 0, the coordinator, has not answered for {_limits.heartbeat} s "
                "(--heartbeat-seconds): it was stopped, or its machine is down or cut off",
                can_tell=False,
            )


def _end(reason: str, *, can_tell: bool = True) -> None:
    """End this process for a reason that is not its own, with its line and its report."""
    if _ending.is_set():
        return
    _ending.set()
    _end_soon(EXIT_ERROR)
    print(f"error: process {process_index()} ends: {reason}", file=sys.stderr, flush=True)
    if _before_exit is not None:
        # In a thread: a file system that hangs must not keep the process.
        report = threading.Thread(target=_before_exit, args=(EXIT_ERROR, reason), daemon=True)
        report.start()
        report.join(_FAREWELL_SECONDS)
    if can_tell:
        _leave(EXIT_ERROR)
    os._exit(EXIT_ERROR)


def _end_if_hung() -> None:
    """End the run with every thread's stack when a step takes longer than `Limits.hang`."""
    if not _limits.hang or time.monotonic() - _last_sign < _limits.hang or _ending.is_set():
        return
    reason = f"no step was done for {_limits.hang} s (--hang-seconds); its stacks are above"
    faulthandler.dump_traceback(all_threads=True)
    _post(f"process {process_index()} hung: no step was done for {_limits.hang} s")
    _end(reason)


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
