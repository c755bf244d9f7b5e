"""A run's work folder in a bucket: what lies there, and which of it is whole.

The objects have the names that the files have in a work folder, so that a copy of the bucket's
folder is one. A bucket has no rename: `bucket.json`, one object that is written at once and last,
names the checkpoints that are whole, each file with its size and SHA-256. What it does not name was
left by an upload that was killed, and is never read. Single files (`metrics.jsonl`, `config.json`)
are one object each, which is the old one or the new one.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from clip_jax.data.formats.remote import RemoteError, answer_of, file_system, with_retries
from clip_jax.errors import UserError, short
from clip_jax.files import atomic_write
from clip_jax.pretrained.work_folder import CHECKPOINT_DIRNAME
from clip_jax.training.checkpoint import COOLED_DIRNAME, QUARANTINE_DIRNAME

MANIFEST_NAME = "bucket.json"
LOCK_DIRNAME = "run.lock"
FORMAT = 1
START_SECONDS = 300.0
"""How long a start waits for a bucket that fails."""

LOCAL_DIRNAMES = ("programs", QUARANTINE_DIRNAME)
"""Folders that stay on this machine."""
_CHECKPOINT = re.compile(rf"((?:[^/]+/)?{CHECKPOINT_DIRNAME}/\d+|{COOLED_DIRNAME}/[^/]+)/")

_VERSION_KEYS = ("size", "ETag", "etag", "generation", "mtime", "created", "LastModified")
"""What fsspec's file systems say of an object that is another when it is written again."""

Files = dict[str, tuple[int, str]]
"""The files of a checkpoint: size and SHA-256 by the path in it."""
T = TypeVar("T")


class Bucket:
    """The objects below a URL. An error of a call is fsspec's own; `patiently` waits for an end.

    Attributes:
      url: of the work folder.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # Another process may write there: a listing is as old as its answer.
        self._is_disk = self.url.startswith(("file://", "local://"))
        options = {"auto_mkdir": True} if self._is_disk else {"use_listings_cache": False}
        self._fs, self._root = file_system(self.url, **options)

    def write(self, name: str, data: bytes, *, new: bool = False) -> None:
        """Write an object at once.

        Raises:
          FileExistsError: it was to be new and is not.
        """
        path = f"{self._root}/{name}"
        if self._is_disk and not new:  # where writing is not at once
            with atomic_write(Path(path)) as partial:
                partial.write_bytes(data)
        else:
            self._fs.pipe_file(path, data, mode="create" if new else "overwrite")

    def put(self, name: str, path: Path) -> None:
        """Write a file as an object."""
        self._fs.put_file(str(path), f"{self._root}/{name}")

    def read(self, name: str) -> bytes | None:
        """Return an object; None where there is none."""
        try:
            return self._fs.cat_file(f"{self._root}/{name}")
        except Exception as error:  # every file system of fsspec has exceptions of its own
            if answer_of(error).kind == "missing":
                return None
            raise

    def get(self, name: str, path: Path) -> None:
        """Write an object to a file; its folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(f"{self._root}/{name}", str(path))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the size of every object below a folder, by its name."""
        root = f"{self._root}/{folder}".rstrip("/")
        try:
            found = self._fs.find(root, detail=True)
        except FileNotFoundError:
            return {}
        start = len(self._root) + 1
        return {
            name[start:]: int(info.get("size") or 0)
            for name, info in sorted(found.items())
            if len(name) > start  # of a file, `find` gives the file itself
        }

    def versions(self) -> dict[str, str]:
        """Return what tells each object from what it was before, by its name."""
        start = len(self._root) + 1
        return {
            name[start:]: json.dumps([info.get(key) for key in _VERSION_KEYS], default=str)
            for name, info in sorted(self._fs.find(self._root, detail=True).items())
        }

    def remove(self, name: str) -> None:
        """Delete an object, if there is one."""
        try:
            self._fs.rm_file(f"{self._root}/{name}")
        except Exception as error:
            if answer_of(error).kind != "missing":
                raise

    def patiently(self, call: Callable[[], T], seconds: float = START_SECONDS) -> T:
        """Return what a call returns, which is tried for so long while the bucket fails.

        Raises:
          UserError: it went on failing, or there is no such bucket, or no right to it.
        """
        end, was_told = time.monotonic() + seconds, False
        while True:
            try:
                return with_retries(self.url, call)
            except RemoteError as error:
                cause = error.__cause__
                failed = isinstance(cause, Exception) and answer_of(cause).kind == "failed"
                if not failed or time.monotonic() > end:
                    fix = "" if failed else "; check the address and the rights to it"
                    raise UserError(f"{error}{fix}") from None
                if not was_told:
                    was_told = True
                    print(f"{error}; it is tried for {seconds / 60:.0f} minutes", flush=True)


def read_manifest(bucket: Bucket) -> dict[str, Files] | None:
    """Return the checkpoints that are whole; None where the folder has never said.

    Raises:
      UserError: it cannot be read, or is damaged.
    """
    data = bucket.patiently(lambda: bucket.read(MANIFEST_NAME))
    if data is None:
        return None
    try:
        values = json.loads(data)
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}")
        return {
            name: {path: (int(size), str(digest)) for path, (size, digest) in files.items()}
            for name, files in values["checkpoints"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{bucket.url}/{MANIFEST_NAME} is damaged ({short(error)})") from None


def manifest_bytes(checkpoints: Mapping[str, Files]) -> bytes:
    """Return the manifest that names these checkpoints."""
    values = {"format": FORMAT, "checkpoints": checkpoints}
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def checkpoint_of(name: str) -> str | None:
    """Return the checkpoint that a file is of, such as checkpoints/12; None of other files."""
    match = _CHECKPOINT.match(name)
    return match[1] if match else None


def checkpoints_in(folder: Path) -> list[str]:
    """Return the whole checkpoints in a work folder, in the order in which a bucket gets them.

    Those of the run come last: one that goes on from step 20 finds the best of the steps up to it.
    Of one folder the highest step comes first. Orbax gives a whole checkpoint its number.
    """
    found = [
        path
        for pattern in (CHECKPOINT_DIRNAME, f"*/{CHECKPOINT_DIRNAME}", COOLED_DIRNAME)
        for parent in folder.glob(pattern)
        if parent.relative_to(folder).parts[0] not in LOCAL_DIRNAMES
        for path in parent.iterdir()
        if path.name.partition("-")[0].isdigit()
    ]

    def order(path: Path) -> tuple[bool, int]:
        return path.parent == folder / CHECKPOINT_DIRNAME, -int(path.name.partition("-")[0])

    return [path.relative_to(folder).as_posix() for path in sorted(found, key=order)]


def single_files(folder: Path) -> Iterator[str]:
    """Yield the files of a work folder that are no checkpoint's and are not being written."""
    for parent, folders, files in os.walk(folder):
        place = Path(parent).relative_to(folder)
        skipped = {CHECKPOINT_DIRNAME}
        if not place.parts:
            skipped |= {*LOCAL_DIRNAMES, COOLED_DIRNAME}
        folders[:] = sorted(set(folders) - skipped)
        for name in sorted(files):
            if not name.endswith(".partial") and name != LOCK_DIRNAME:
                yield (place / name).as_posix()


def file_digest(path: Path) -> tuple[int, str]:
    """Return a file's size and SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def folder_digests(folder: Path) -> Files:
    """Return the sizes and digests of all files in a folder."""
    return {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
