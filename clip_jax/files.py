"""Files that are whole or not there: written beside their place, then put into it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clip_jax.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends well.

    The folder is made where it is not there. Killed in between, an older file stays as it was.

    Raises:
      UserError: it cannot be written: no right to, a full disk, a file where the folder would be.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        # numpy tells of a short write without a reason.
        reason = error.strerror or f"{error}; is the disk full?"
        with suppress(OSError):  # a full disk has better use for the room
            partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({reason})") from error


def make_folder(folder: str | Path, *, flag: str) -> Path:
    """The folder, made where it is not there.

    Raises:
      UserError: it cannot be made; the message begins with the flag that names it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{flag} {folder} cannot be made ({reason}); give another") from None
    return folder
