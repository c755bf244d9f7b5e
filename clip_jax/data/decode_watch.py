"""Threads that decode under watch: one that hangs is left behind, and what it had is gone on with.

A thread cannot be ended from outside. So whoever wants rows waits for a thread that reads them, and
when that one sits in a single image for too long, waits for it no more.
"""

import contextvars
import threading
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


class DecodeWatch:
    """Calls what reads runs of rows, and waits for it as long as no image takes too long.

    Attributes:
      seconds: that an image may take.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._is_closed = False

    def close(self) -> None:
        """Want no rows any more: an image that is being decoded gets a second or two to end."""
        self._is_closed = True

    def run(self, read_rows: Callable[[Progress], None], is_wanted: Callable[[], bool]) -> int:
        """Call it in a thread of its own; return the row at which it hangs, -1 when it is done.

        Whatever it raises is raised here. `is_wanted` says whether anybody wants the rows still.
        """
        progress, done = Progress(), threading.Event()
        errors: list[BaseException] = []

        def call() -> None:
            try:
                read_rows(progress)
            except AbandonedError:
                pass
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(call,), name="decode", daemon=True).start()
        row = self._wait(done, progress, is_wanted)
        if errors:
            raise errors.pop()
        return row

    def _wait(
        self, done: threading.Event, progress: Progress, is_wanted: Callable[[], bool]
    ) -> int:
        row, waited = -1, 0.0
        seconds = min(self.seconds / SLICES, LONGEST_SLICE)
        while not done.wait(seconds):
            if progress.row < 0 or progress.row != row:
                row, waited = progress.row, 0.0
                continue
            waited += seconds
            is_too_long = waited >= self.seconds or self._is_closed or not is_wanted()
            if is_too_long and progress.abandon(row):
                return row
        return -1
