"""The process of a worker: it opens what it needs once, and makes parts one after the other."""

import os
import socket
from dataclasses import dataclass
from typing import Any

from clip_jax.errors import UserError, mute_notes, short
from clip_jax.executors.parts import Part, PartMaker, WorkerLostError, resolve_opener


@dataclass(frozen=True)
class Answer:
    """What a worker's call returns; an executor gives it to `value_of`.

    Attributes:
      value: of a call that went well.
      user_error: the text of a UserError; empty where there was none.
      lost: why this worker cannot work on; empty where it can.
    """

    value: Any = None
    user_error: str = ""
    lost: str = ""


def value_of(answer: Answer) -> Any:
    """Return the value of an answer, or raise what it says."""
    if answer.user_error:
        raise UserError(answer.user_error)
    if answer.lost:
        raise WorkerLostError(answer.lost)
    return answer.value


class Worker:
    """What runs on another machine. Nothing is opened before the first call."""

    def __init__(self, opener: str, options: dict[str, Any]):
        mute_notes()  # as many times as there are workers, and nobody reads them
        self._opener, self._options = opener, options
        self._maker: PartMaker | None = None
        self._sees_folder = False

    def open(self) -> Answer:
        """Open what parts are made from; answer (name of this worker, info)."""
        return self._answer(lambda: (self._name(), self._opened().info))

    def make(self, part: Part) -> Answer:
        """Make a part; answer what its maker returns."""
        return self._answer(lambda: self._make(part))

    def _make(self, part: Part) -> Any:
        maker = self._opened()
        if not self._sees_folder and not maker.is_begun():
            raise UserError(
                f"{maker.folder} is not there: --out must lie on a file system that all machines "
                "share, at the same path"
            )
        self._sees_folder = True
        return maker.make(part)

    def _opened(self) -> PartMaker:
        if self._maker is None:
            self._maker = resolve_opener(self._opener)(**self._options)
        return self._maker

    def _name(self) -> str:
        return f"{socket.gethostname()}:{os.getpid()}"

    def _answer(self, call: Any) -> Answer:
        try:
            return Answer(call())
        except UserError as error:
            host = socket.gethostname()
            return Answer(user_error=f"{error} (on {host})")
        # A file system that hiccups, or a device that is lost (JAX's errors are RuntimeErrors):
        # another worker may do better. Our own mistakes are neither.
        except (OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, NotImplementedError | RecursionError):
                raise
            return Answer(lost=short(error)[:300])
