"""Files that are whole or absent, and folders that say what they are made of."""

import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError, short, write_remedy

GIT_LFS = b"version https://git-lfs"
"""How the text begins that Git LFS leaves in the place of a file that was not fetched."""


def check_fetched(path: str | Path) -> None:
    """Raise UserError if a local file is a pointer of Git LFS, or a web page that a server gave."""
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(64)
        if re.match(rb"\s*<(!doctype html|html)", head.lower()):
            raise UserError(f"{path} is a web page and holds no data: fetch the file again")
        if head.startswith(GIT_LFS):
            raise UserError(
                f"{path} is a pointer of Git LFS and holds no data: `git lfs pull` fetches the file"
            )


@contextmanager
def atomic_write(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of `path` when the block ends well.

    The folder is made if it does not exist. After a kill, and after a loss of power, an older file
    is as it was or the new one is whole: it is on the disk before it takes the name.

    Args:
      path: of the file.
      shared: another process may write the same file at the same time, so each has a partial file
        of its own. What a killed one leaves is not written over by the next.

    Raises:
      UserError: it cannot be written: no permission, a full disk, a file in the folder's place, a
        URL.
    """
    check_local({"the file": path})
    suffix = f".{uuid.uuid4().hex[:12]}.partial" if shared else ".partial"
    partial = path.with_name(path.name + suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync(partial)
        os.replace(partial, path)
        with suppress(OSError):  # some file systems have no folders to wait for
            sync(path.parent)
    except OSError as error:
        # numpy reports a short write without a reason.
        reason = error.strerror or f"{error}; is the disk full?"
        with suppress(OSError):  # a full disk has better use for the room
            partial.unlink(missing_ok=True)
        remedy = write_remedy(reason)
        raise UserError(f"{path} cannot be written ({reason}): {remedy}") from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+")
"""How a URL begins, as a text or as a path, which has one of its two slashes."""


def check_local(paths: Mapping[str, str | Path | None], *, is_read: bool = False) -> None:
    """Raise UserError if the path of an option is a URL; None is an option that is not given.

    `is_read`: it is read there, not written.
    """
    for name, path in paths.items():
        if path is not None and (match := _URL.match(str(path))):
            url = f"{match[1]}://{str(path)[match.end() :]}"
            if is_read:
                raise UserError(
                    f"{name} {url} is in a bucket, and it is read from a disk of this machine: "
                    "copy it there, and name the copy"
                )
            raise UserError(
                f"{name} {url} is in a bucket, and it is written to a disk of this machine: name a "
                "place there, and copy it to the bucket"
            )


def absolute_model(model: str) -> str:
    """Return a model's path, good in any current folder, or its name as it is."""
    return os.path.abspath(model) if os.path.exists(model) else model


def make_folder(folder: str | Path, *, flag: str) -> Path:
    """Return the folder, made if it does not exist.

    Raises:
      UserError: it cannot be made, or is a URL; the message begins with the flag that names it.
    """
    check_local({flag: folder})
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{flag} {folder} cannot be made ({reason}); give another") from None
    return folder


def check_writable(path: str | Path, *, flag: str) -> None:
    """Check that a file can be written, before the work whose result it holds; its folder is made.

    Raises:
      UserError: it cannot; the message begins with the flag that names it.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file, {path / 'out.json'} say")
    check_folder_writable(make_folder(path.parent, flag=flag), flag=flag)


def check_folder_writable(folder: Path, *, flag: str) -> None:
    """Raise UserError if no file can be made in a folder; the message begins with the flag."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = write_remedy(reason)
        raise UserError(f"{flag} {folder} cannot be written to ({reason}): {remedy}") from None


def claim_folder(
    folder: Path,
    build_info: Mapping[str, Any],
    *,
    name: str,
    write: bool = True,
    may_differ: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    foreign: Sequence[str] = ("*",),
) -> bool:
    """Return whether a folder was begun with this build info; a new one gets it now.

    Args:
      build_info: what the folder is made of: JSON values under names that the user knows.
      name: the file of the build info.
      write: False leaves a new folder as it is.
      may_differ: the names of values that need not agree.
      defaults: the values of names that files of earlier versions lack.
      foreign: glob patterns of what makes a folder without that file somebody else's.

    Raises:
      UserError: the folder holds something else (the first difference is named), or the file
        cannot be written.
    """
    path = folder / name
    if not path.exists():
        if folder.is_file():
            raise UserError(f"{folder} is a file: name a folder")
        if any(True for pattern in foreign for _ in folder.glob(pattern)):
            raise UserError(f"{folder} holds something else: name another folder")
        if write:
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(build_info, indent=1) + "\n", encoding="utf-8")
        return False
    try:
        on_disk = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(on_disk, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {short(e)}; name another folder") from e
    on_disk = {**(defaults or {}), **on_disk}
    wanted = json.loads(json.dumps(build_info))  # tuples become lists, as in the file
    for key, value in wanted.items():
        if key not in may_differ and on_disk.get(key) != value:
            raise UserError(
                f"{folder} was begun with another {key} ({on_disk.get(key)!s:.60}, now"
                f" {value!s:.60}): name another folder, or delete it"
            )
    return True
