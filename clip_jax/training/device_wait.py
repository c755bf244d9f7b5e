"""How long a run's devices wait between two steps, and for what."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class DeviceWait:
    """The shares of time in which the devices had nothing to do, for want of data or of the host.

    Between the end of a step and the call that hands out the next they wait for data while the
    batch is fetched, and for the host while it does anything else; behind the call, for data that
    is still on its way. What the call itself takes is not counted: the devices may begin within it,
    or a program may be compiled. What happens beside a running step costs nothing. It is a context
    manager around the fetching of a batch.

    Attributes:
      first_step_end: when the first step was done, on the clock of `time.perf_counter`.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="step_end")
        self.first_step_end: Future[float] | None = None
        self._ended: Future[float] | None = None
        self._counts = False
        self._fetch_start = self._fetch_end = self._since = time.perf_counter()
        self._data = self._host = 0.0
        self._told = (0.0, 0.0)

    def __enter__(self) -> "DeviceWait":
        self._fetch_start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._fetch_end = time.perf_counter()

    def dispatched(self, called: float, rows: Any, outputs: Any) -> None:
        """Take in that a step was handed to the devices.

        Args:
          called: when it was, on the clock of `time.perf_counter`.
          rows: arrays of its batch that come from the host, and not from the devices themselves.
          outputs: arrays that are there when it is done.
        """
        now = time.perf_counter()
        before = self._ended if self._counts else None
        self._ended = self._pool.submit(
            self._follow, before, self._fetch_start, self._fetch_end, called, now, rows, outputs
        )
        self._counts = True
        if self.first_step_end is None:
            # Behind the call, which compiles the step.
            self.first_step_end, self._since = self._ended, now

    def _follow(
        self,
        before: Future[float] | None,
        fetch_start: float,
        fetch_end: float,
        called: float,
        returned: float,
        rows: Any,
        outputs: Any,
    ) -> float:
        """Account for the time since the step before; return when this one ended."""
        arrived = _when_ready(rows)
        if before is not None:
            free = before.result()  # there: this thread has followed it
            fetching = max(0.0, fetch_end - max(free, fetch_start))
            self._data += fetching + max(0.0, arrived - max(free, returned))
            self._host += max(0.0, called - free - fetching)
        return _when_ready(outputs)

    def pause(self) -> None:
        """Leave out the time up to the next step: the devices have something else to do."""
        self._counts = False

    def shares(self) -> tuple[float, float]:
        """Return the shares for want of data and of the host, in 0..1, since the call before.

        The first call's are since the first step was handed out. A wait is known when it is over:
        what of it is longer than the time since the call before is left for the next one.
        """
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        data = min(self._data - self._told[0], seconds)
        host = min(self._host - self._told[1], seconds)
        self._since, self._told = now, (self._told[0] + data, self._told[1] + host)
        return data / seconds, host / seconds

    def close(self) -> None:
        """End the thread, which may be waiting for a step."""
        self._pool.shutdown(wait=False)


def _when_ready(arrays: Any) -> float:
    jax.block_until_ready(arrays)
    return time.perf_counter()
