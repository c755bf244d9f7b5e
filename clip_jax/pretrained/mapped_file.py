"""A file of someone else's as read-only memory, and the one way to say what is wrong with it."""

import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from clip_jax.errors import UserError

FETCH_AGAIN = "the file is cut or damaged: fetch it again"


class BadFile(Exception):
    """What is wrong with the file being read; `reading` adds its path."""

    def __init__(self, reason: str, remedy: str = FETCH_AGAIN):
        super().__init__(f"{reason}; {remedy}")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns what goes wrong inside into one line that names `path`.

    Raises:
      UserError: the file cannot be opened, or a reader found it bad.
    """
    try:
        yield
    except BadFile as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def map_file(path: str | Path) -> np.ndarray:
    """The bytes of a file as a read-only array; pages are read when they are first touched."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
        raise BadFile("is not a file", "give the path of a checkpoint file")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # which mmap refuses
            raise BadFile("is empty", "fetch it again")
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def shown(name: object) -> str:
    """A name out of a file, fit for one line of a message: escaped, and cut if it is long."""
    text = str(name)
    if len(text) > 120:
        text = text[:117] + "..."
    return text.encode("unicode_escape").decode("ascii")
