"""Share parts out among workers that may die, and show how far all of them have come."""

import functools
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from clip_jax.errors import Terminated, UserError, signal_heard
from clip_jax.executors.parts import Executor, Part, WorkerLostError
from clip_jax.progress_bar import progress_bar

PART_TRIES = 5
"""How many workers a part may cost before it is taken to be what kills them."""
OPEN_TRIES = 20
"""How many workers in a row may die before they have opened what they need."""
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
_GROW_SECONDS = 10.0
_OPENING = object()
"""What a worker does that has no part yet."""


class WorkerPool:
    """Workers of one kind, started when there are parts for them.

    Args:
      executor: where they run.
      opener, options: what each of them opens, see `parts.resolve_opener`.
      uses_devices: whether a worker takes a GPU, where the cluster has any.
    """

    def __init__(
        self,
        executor: Executor,
        opener: str,
        options: dict[str, Any],
        *,
        uses_devices: bool,
    ):
        self._executor = executor
        self._opener, self._options, self._uses_devices = opener, options, uses_devices
        self._calls: dict[Any, tuple[Any, Any]] = {}  # ticket -> (worker, its part or _OPENING)
        self._idle: list[Any] = []
        self._names: dict[Any, str] = {}
        self._info: list[Any] = []
        self._queue: deque[Part] = deque()
        self._deaths: Counter[Part] = Counter()
        self._opening_deaths = 0
        self._say: Callable[[str], object] = functools.partial(print, file=sys.stderr, flush=True)
        self._grow_at = 0.0
        self.lost = 0

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for worker in [*self._idle, *(worker for worker, _ in self._calls.values())]:
            self._executor.stop(worker)

    def info(self) -> Any:
        """Return the info of what workers open; it starts the first of them.

        Raises:
          UserError: a worker met a mistake of the user's, or none can be started.
        """
        if not self._calls and not self._idle:
            self._executor.worker_count(uses_devices=self._uses_devices)  # raises if none fits
            self._start()
        while not self._info:
            self._step()
        return self._info[0]

    def run(
        self,
        rows: Mapping[Part, int],
        missing: Sequence[Part],
        *,
        title: str,
        unit: str = "pair",
        on_part: Callable[[Part, Any], object] = lambda part, value: None,
        progress: bool = True,
    ) -> None:
        """Make the parts that are missing, in their order as far as workers live.

        Args:
          rows: of every part, those that are there too.
          on_part: takes a part and what its maker returned, in the order in which they end.

        Raises:
          UserError: a worker met a mistake of the user's, workers differ in what they opened, or
            a part has cost `PART_TRIES` workers.
        """
        if not missing:
            return
        self._queue.extend(missing)
        open_parts = set(missing)
        initial = sum(rows.values()) - sum(rows[part] for part in missing)
        with progress_bar(sum(rows.values()), title, unit, initial=initial, shown=progress) as bar:
            self._say = _writer(bar) if progress else _silent
            while open_parts:
                self._grow(len(open_parts))
                for part, value in self._step():
                    open_parts.discard(part)
                    on_part(part, value)
                    bar.set_postfix_str(self._state(), refresh=False)
                    bar.update(rows[part])
        self._say = _silent

    def _state(self) -> str:
        """Return how many workers there are, and how many have died."""
        died = f", {self.lost} died" if self.lost else ""
        return f"{len(self._names)} worker{'s' * (len(self._names) != 1)}{died}"

    def _grow(self, parts: int) -> None:
        """Start as many workers as there is room for now: machines may join later."""
        now = time.monotonic()
        if now < self._grow_at:
            return
        self._grow_at = now + _GROW_SECONDS
        wanted = min(self._executor.worker_count(uses_devices=self._uses_devices), parts)
        while len(self._idle) + len(self._calls) < wanted:
            self._start()

    def _start(self) -> None:
        worker = self._executor.start(self._opener, self._options, uses_devices=self._uses_devices)
        self._calls[self._executor.call(worker, "open")] = (worker, _OPENING)

    def _step(self) -> list[tuple[Part, Any]]:
        """Give idle workers parts, wait for an answer; return the parts that were made."""
        while self._queue and self._idle:
            worker, part = self._idle.pop(0), self._queue.popleft()
            self._calls[self._executor.call(worker, "make", part)] = (worker, part)
        made = []
        for ticket in self._wait():
            worker, part = self._calls.pop(ticket)
            try:
                value = self._executor.result(ticket)
            except WorkerLostError as error:
                self._replace(worker, part, str(error))
                continue
            except BaseException:
                self._idle.append(worker)  # it is stopped with the others
                raise
            self._idle.append(worker)
            if part is _OPENING:
                self._opened(worker, *value)
            else:
                self._opening_deaths = 0
                made.append((part, value))
        return made

    def _wait(self) -> Sequence[Any]:
        """Wait for answers; say so when no worker has come for long."""
        start, told = time.monotonic(), False
        while not (done := self._executor.wait(list(self._calls), _POLL_SECONDS)):
            if signal_heard.is_set():
                raise Terminated  # the handler's own may have been raised where Python drops it
            if not told and not self._names and time.monotonic() - start > _PATIENCE_SECONDS:
                self._say(
                    "no worker has been ready for a minute: the cluster has no room, or is slow"
                )
                told = True
        return done

    def _opened(self, worker: Any, name: str, info: Any) -> None:
        """Keep a worker's name and info.

        Raises:
          UserError: the info is not the first worker's.
        """
        self._names[worker] = name
        if not self._info:
            self._info.append(info)
        if info != self._info[0]:
            raise UserError(
                f"{name} reads another model or other data than {next(iter(self._names.values()))} "
                "does: both must lie at the same path on every machine, and be the same"
            )

    def _replace(self, worker: Any, part: Any, reason: str) -> None:
        """Put the part of a worker that died back, and start another worker.

        Raises:
          UserError: too many have died.
        """
        self._executor.stop(worker)
        self.lost += 1
        name = self._names.pop(worker, "a worker")
        reason = " ".join(reason.split())[:300]
        if part is _OPENING:
            self._opening_deaths += 1
            if self._opening_deaths >= OPEN_TRIES:
                raise UserError(
                    f"{OPEN_TRIES} workers in a row died before they had made a part; the last: "
                    f"{reason}"
                )
            self._say(f"{name} died while it started ({reason:.120}); another one is started")
        else:
            self._deaths[part] += 1
            if self._deaths[part] >= PART_TRIES:
                raise UserError(
                    f"part {part} has cost {PART_TRIES} workers; the last: {name}, {reason}"
                )
            self._queue.append(part)
            self._say(f"{name} died ({reason:.120}); its part {part} is made by another")
        self._start()


def _silent(line: str) -> None:
    """Say nothing."""


def _writer(bar: tqdm) -> Callable[[str], object]:
    """Return what prints a line above a bar."""
    return functools.partial(bar.write, file=sys.stderr)
