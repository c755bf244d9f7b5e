"""Ctrl-C and SIGTERM as a request to stop, so that a run can save first."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from clip_jax.errors import signal_heard


class StopRequest:
    """A request to stop.

    Attributes:
      signal: the number of the signal that made it; 0 while none has.
    """

    signal = 0


@contextmanager
def catch_signals(callback: Callable[[str], None]) -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request; a second one ends the process.

    Args:
      callback: takes a line on the signal when it comes.
    """
    request = StopRequest()
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        request.signal = number
        signal_heard.set()
        callback(f"\n{signal.Signals(number).name}: saving after this step, then exiting")
        for s, handler in before.items():
            signal.signal(s, handler)

    for s in before:
        signal.signal(s, handle)
    try:
        yield request
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
