"""Map a file of unknown origin read-only, and report what is wrong with it in one way."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from clip_jax.errors import UserError

FETCH_AGAIN = "the file is cut or damaged: fetch it again"


class BadFileError(Exception):
    """The file being read is not what it should be; `reading` adds its path."""

    def __init__(self, reason: str, remedy: str = FETCH_AGAIN):
        super().__init__(f"{reason}; {remedy}")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong inside into one line that names `path`.

    Raises:
      UserError: the file cannot be opened, or a reader found it bad.
    """
    try:
        yield
    except BadFileError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def map_file(path: str | Path) -> np.ndarray:
    """Return the bytes of a file, uint8 [size], read-only; pages are read when first touched.

    Raises:
      BadFileError: the file is empty, or no regular file.
      OSError: it cannot be opened.
    """
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for its writer
        raise BadFileError("is not a file", "give the path of a checkpoint file")
    if info.st_size == 0:  # which cannot be mapped
        raise BadFileError("is empty", "fetch it again")
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


def shown(name: object) -> str:
    """Return a name out of a file as fits one line of a message: escaped, and cut if long."""
    text = str(name)
    if len(text) > 120:
        text = text[:117] + "..."
    return text.encode("unicode_escape").decode("ascii")
