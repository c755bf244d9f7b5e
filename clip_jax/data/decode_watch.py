"""Threads that decode under watch: one that hangs is left behind, and what it had is gone on with.

A thread cannot be ended from outside. So whoever wants rows waits for a thread that reads them, and
when that one sits in a single image for too long, waits for it no more.
"""

import contextlib
import contextvars
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable

SLICES = 10
"""Parts in which a time is waited: a process that was stopped meanwhile loses one of them."""
LONGEST_SLICE = 1.0
"""Seconds after which a loader that closes is noticed."""


class AbandonedError(BaseException):
    """Ends a thread for which nobody waits any more, when it comes back."""


class Progress:
    """Which row a thread decodes; whoever waits for it may give it up there.

    Attributes:
      row: that row, or -1 between two of them.
    """

    def __init__(self) -> None:
        self.row = -1
        self._is_abandoned = False
        self._lock = threading.Lock()

    def begin(self, row: int) -> None:
        """Say that decoding a row begins."""
        self.row = row

    def end(self) -> None:
        """Say that it has ended.

        Raises:
          AbandonedError: nobody waits any more: nothing may be written.
        """
        with self._lock:
            self.row = -1
            if self._is_abandoned:
                raise AbandonedError

    def abandon(self, row: int) -> bool:
        """Give the thread up if it still decodes this row; return whether it does."""
        with self._lock:
            self._is_abandoned = self.row == row
            return self._is_abandoned


class _WorkerThread:
    """A thread that calls what it is given, one after the other, until one is abandoned."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="decode", daemon=True).start()

    def call(self, function: Callable[[], object]) -> None:
        """Begin to call it, in a copy of the caller's context."""
        context = contextvars.copy_context()
        self._calls.put(lambda: context.run(function))

    def is_done(self, seconds: float) -> bool:
        """Wait so long for the call to end; raise what it raised."""
        try:
            error = self._answers.get(timeout=seconds)
        except queue.Empty:
            return False
        if error is not None:
            raise error
        return True

    def end(self) -> None:
        """Let the thread end."""
        self._calls.put(None)

    def _serve(self) -> None:
        with contextlib.suppress(AbandonedError):
            while (call := self._calls.get()) is not None:
                self._answers.put(_error_of(call))
                del call  # a thread that waits keeps nothing alive


def _error_of(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except AbandonedError:
        raise
    except BaseException as error:
        return error
    return None


def _end_all(threads: deque[_WorkerThread]) -> None:
    while threads:
        with contextlib.suppress(IndexError):  # another thread was faster
            threads.pop().end()


class DecodeWatch:
    """Calls what reads runs of rows, and waits for it as long as no image takes too long.

    Its threads are kept for the next runs: to start one takes longer than to hand a run to one.

    Attributes:
      seconds: that an image may take.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._is_closed = False
        self._idle: deque[_WorkerThread] = deque()
        weakref.finalize(self, _end_all, self._idle).atexit = False

    def close(self) -> None:
        """Want no rows any more: an image that is being decoded gets a second or two to end."""
        self._is_closed = True
        _end_all(self._idle)

    def run(self, read_rows: Callable[[Progress], None], is_wanted: Callable[[], bool]) -> int:
        """Call it in another thread; return the row at which it hangs, -1 when it is done.

        Whatever it raises is raised here. `is_wanted` says whether anybody wants the rows still.
        """
        progress = Progress()
        try:
            thread = self._idle.pop()
        except IndexError:
            thread = _WorkerThread()
        thread.call(lambda: read_rows(progress))
        try:
            row = self._wait(thread, progress, is_wanted)
        except BaseException:
            thread.end()
            raise
        if row < 0:
            self._idle.append(thread)
            if self._is_closed:
                _end_all(self._idle)
        return row

    def _wait(
        self, thread: _WorkerThread, progress: Progress, is_wanted: Callable[[], bool]
    ) -> int:
        row, waited = -1, 0.0
        seconds = min(self.seconds / SLICES, LONGEST_SLICE)
        while not thread.is_done(seconds):
            if progress.row < 0 or progress.row != row:
                row, waited = progress.row, 0.0
                continue
            waited += seconds
            is_too_long = waited >= self.seconds or self._is_closed or not is_wanted()
            if is_too_long and progress.abandon(row):
                return row
        return -1
