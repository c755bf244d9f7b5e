"""What a cluster is asked for, and what it is: parts, what makes them, and an executor.

A part is a function of its number alone, whoever makes it and when: files of its own, the same
bytes wherever they are made. So a part whose worker died is made again, and nothing else is.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Part = Any
"""The number of a part, or several values that name it: hashable, and it can be pickled."""


@dataclass(frozen=True)
class PartMaker:
    """What a worker holds: an opened source, and a model where parts need one.

    Attributes:
      info: what the parts are made of; the workers of one pool must agree on it.
      make: writes the files of a part, and returns what the caller wants to know of them.
      folder: where it writes them.
      is_begun: whether that folder is there and was begun for these very parts; asked once, before
        the first part. It raises UserError if the folder was begun for others.
    """

    info: Any
    make: Callable[[Any], Any]
    folder: Path
    is_begun: Callable[[], bool]


def resolve_opener(opener: str) -> Callable[..., PartMaker]:
    """Return the function of "module:function", which opens what a worker holds.

    Workers import it by this name, since a command's own module is called `__main__` where it is
    started. Its options are pickled: plain values, and paths good on every machine.
    """
    module, _, function = opener.partition(":")
    return getattr(importlib.import_module(module), function)


class WorkerLostError(Exception):
    """A worker has died, or cannot work on; its part is made by another."""


@runtime_checkable
class Executor(Protocol):
    """Workers on other machines, each a process of its own.

    A call returns at once with a ticket, and tickets are waited for.
    """

    def worker_count(self, *, uses_devices: bool) -> int:
        """Return how many workers there are to be: one a device, or a core where none is used.

        Raises:
          UserError: no machine has room for one.
        """

    def start(self, opener: str, options: dict[str, Any], *, uses_devices: bool) -> Any:
        """Start a `worker.Worker`; return its handle without waiting for it."""

    def call(self, worker: Any, method: str, *args: Any) -> Any:
        """Call a method of a worker; return a ticket, which is hashable."""

    def wait(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Return tickets that are done; none if there are none after these seconds."""

    def result(self, ticket: Any) -> Any:
        """Return what a call has returned.

        Raises:
          WorkerLostError: the worker died.
          UserError: the worker met a mistake of the user's.
        """

    def stop(self, worker: Any) -> None:
        """End a worker at once."""

    def close(self) -> None:
        """Leave the cluster."""
