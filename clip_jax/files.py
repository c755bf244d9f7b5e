"""Files that are whole or not there: written beside their place, then put into it."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError, short


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


def claim_folder(folder: Path, receipt: Mapping[str, Any], *, name: str) -> None:
    """Make the folder with its receipt, or make sure that its receipt is this one.

    Args:
      receipt: what the folder is made of, by names that the user knows.
      name: of the file.

    Raises:
      UserError: the folder holds something else; the first difference is named.
    """
    path = folder / name
    if not path.exists():
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder} holds something else: name another folder")
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in receipt if old.get(key) != receipt[key]]
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{path} cannot be read: {short(e)}; name another folder") from e
    for key in differing:
        raise UserError(
            f"{folder} was begun with another {key} ({old.get(key)!s:.60}, now"
            f" {receipt[key]!s:.60}): name another folder, or delete it"
        )
