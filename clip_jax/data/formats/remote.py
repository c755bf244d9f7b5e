"""Files by URL, through fsspec: listed there, fetched whole to a bounded folder, read from here.

A shard is fetched once for all the samples that a window takes from it, which is faster than a
request a sample; the name of a member of a shard never becomes a path. A read that fails is tried
again after a growing pause; then the file counts as unreadable for a while, so that its other
samples are passed over at once.
"""

import atexit
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import fsspec

from clip_jax.distribution import install_command
from clip_jax.errors import UserError, short

TRIES = 6
PAUSE = 0.5
"""Seconds before the second try; doubled before each further one."""
LONGEST_PAUSE = 60.0
"""Seconds that a server may ask for before the next try."""
_MISSING, _FORBIDDEN = (404, 410), (401, 403)
PASSED_OVER = 300.0
"""Seconds in which a file that failed is not tried again."""
CACHE_BYTES = 100 << 30

_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3", "http": "http", "https": "http"}

T = TypeVar("T")


class RemoteError(OSError):
    """A remote file that cannot be read after all tries."""

    cause = "shard_unreadable"


def is_url(path: str) -> bool:
    """Return whether fsspec is to read it."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def file_system(url: str, **options: Any) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    Args:
      url: of a file or a folder.
      options: of the file system.

    Raises:
      UserError: the protocol is unknown, or its package is not installed.
    """
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError:
        extra = _EXTRAS.get(protocol)
        fix = install_command(extra) if extra else f"install its package for {protocol}"
        raise UserError(f"{url}: fsspec has no reader for {protocol}:// here; {fix}") from None
    except ValueError as e:
        raise UserError(f"{url}: {e}; give a local path, gs://, s3:// or https://") from None


def with_retries(url: str, call: Callable[[], T]) -> T:
    """Return what a call of fsspec, and of nothing else, returns after up to TRIES tries.

    Raises:
      RemoteError: the last try's error. A file that does not exist or may not be read is not
        tried again; whatever else a server answers is, and a broken connection.
    """
    for attempt in range(TRIES):
        try:
            return call()
        except Exception as e:  # every file system of fsspec has exceptions of its own
            error = e
        answer = answer_of(error)
        if answer.kind == "missing":
            raise RemoteError(f"{url} does not exist") from error
        if answer.kind == "forbidden":
            raise RemoteError(f"{url} may not be read: {answer.text}") from error
        if attempt < TRIES - 1:
            time.sleep(max(PAUSE * 2**attempt, min(answer.wait, LONGEST_PAUSE)))
    raise RemoteError(f"{url} failed {TRIES} times, at last with {answer.text}") from error


class Answer(NamedTuple):
    """What an error of fsspec says of a file.

    Attributes:
      kind: "missing", "forbidden", or "failed": only the last is worth another try.
      text: the server's answer, or what broke.
      wait: the seconds that the server asks to wait.
    """

    kind: str
    text: str
    wait: float = 0.0


def answer_of(error: Exception) -> Answer:
    """Return what an error of fsspec says; every file system has exceptions of its own."""
    status, asked_for = _answer(error)
    last = _causes(error)[-1]
    if status in _MISSING or (status is None and isinstance(error, FileNotFoundError)):
        return Answer("missing", "it does not exist")
    is_refused = isinstance(error, PermissionError) or "Credentials" in type(last).__name__
    if status in _FORBIDDEN or is_refused:
        return Answer("forbidden", short(error))
    return Answer("failed", f"answer {status}" if status else short(last), asked_for)


def _answer(error: BaseException) -> tuple[int | None, float]:
    """Return the status that a server gave, and the seconds that it asks to wait.

    fsspec's HTTP raises FileNotFoundError for a file whose size it cannot ask for, be it that the
    server is overloaded or that the connection broke: the status 0 stands for that. In memory and
    in buckets it is a file that is not there.
    """
    chain = _causes(error)
    for cause in chain:
        status = _status(cause)
        if status is not None:
            headers = getattr(cause, "headers", None) or {}
            wait = str(headers.get("Retry-After", ""))
            return status, float(wait) if wait.isdecimal() else 0.0
    last = chain[-1]
    is_broken = type(last).__module__.startswith("aiohttp") or (
        isinstance(last, OSError) and not isinstance(last, FileNotFoundError)
    )
    return (0 if len(chain) > 1 and is_broken else None), 0.0


def _status(error: BaseException) -> int | None:
    """Return the status that an error of aiohttp, gcsfs or botocore holds."""
    for name in ("status", "code"):
        if isinstance(status := getattr(error, name, None), int):
            return status
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    return metadata.get("HTTPStatusCode")


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error, the one it was raised from, and so on."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def read_whole(path: str, limit: int) -> bytes:
    """Return a small file's bytes, local or remote.

    Raises:
      OSError: it cannot be read, or is longer than `limit`.
    """
    if is_url(path):
        fs, inner = file_system(path)
        data = with_retries(path, lambda: fs.cat_file(inner, start=0, end=limit + 1))
    else:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(f"{path} is longer than {limit} bytes")
    return data


def remote_size(url: str) -> int:
    """Return a remote file's bytes, without fetching it; 0 where the server does not say."""
    fs, inner = file_system(url)
    try:
        return int(with_retries(url, lambda: fs.info(inner)).get("size") or 0)
    except RemoteError:
        return 0


class DiskCache:
    """Files that were fetched or made, up to a number of bytes; the longest unused is deleted.

    A file that is open when it is deleted stays readable to whoever has it open.

    Args:
      limit: bytes of all files.
      parent: where the cache makes its folder; empty is the system's folder of temporary files.
    """

    def __init__(self, limit: int = CACHE_BYTES, parent: str = ""):
        self.limit = limit
        self._parent = parent
        self._folder = ""
        self._files: dict[str, tuple[str, int]] = {}  # path and bytes, in order of use
        self._failed: dict[str, tuple[float, str]] = {}  # when, and why
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._count = 0

    def open(self, name: str, write: Callable[[str], None]) -> int:
        """Return a descriptor of the file `name`, which `write(path)` makes if it does not exist.

        Raises:
          RemoteError: `write` failed a short while ago.
          OSError: `write` failed now.
        """
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            since, reason = self._failed.get(name, (-PASSED_OVER, ""))
            if time.monotonic() - since < PASSED_OVER:
                raise RemoteError(reason)
            path = self._path(name)
            if path is not None:
                try:
                    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    pass  # deleted just now, when another file arrived
            return self._write(name, write)

    def _path(self, name: str) -> str | None:
        with self._lock:
            if name not in self._files:
                return None
            self._files[name] = self._files.pop(name)  # now the newest
            return self._files[name][0]

    def _write(self, name: str, write: Callable[[str], None]) -> int:
        with self._lock:
            if not self._folder:
                parent = self._parent or None
                self._folder = tempfile.mkdtemp(prefix="clip_jax-data-", dir=parent)
                atexit.register(self.close)
            self._count += 1
            path = os.path.join(self._folder, str(self._count))
        try:
            write(path)
        except OSError as e:
            if os.path.exists(path):
                os.remove(path)
            self._failed[name] = time.monotonic(), str(e)
            raise
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with self._lock:
            self._files[name] = path, os.fstat(fd).st_size
            while sum(size for _, size in self._files.values()) > self.limit:
                if len(self._files) == 1:
                    break
                oldest = next(iter(self._files))
                os.remove(self._files.pop(oldest)[0])
        return fd

    def close(self) -> None:
        """Delete the folder."""
        with self._lock:
            folder, self._folder = self._folder, ""
            self._files.clear()
            self._failed.clear()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


CACHE = DiskCache()


def open_local(path: str) -> int:
    """Return a descriptor to read a file, which is fetched first if the path is a URL.

    Raises:
      OSError: it cannot be opened, or (RemoteError) not be fetched.
    """
    if is_url(path):
        return CACHE.open(path, lambda to: fetch(path, to))
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def fetch(url: str, to: str) -> None:
    """Copy a remote file to a local path, and check that all of it has come.

    Raises:
      RemoteError: it has not.
    """
    fs, inner = file_system(url)

    def copy() -> None:
        fs.get_file(inner, to)
        size = fs.info(inner).get("size")
        if size is not None and os.path.getsize(to) != size:
            raise OSError(f"{os.path.getsize(to)} of {size} bytes came")

    with_retries(url, copy)


def list_urls(pattern: str) -> list[str]:
    """Return the files of a folder or a glob, in name order.

    Raises:
      UserError: it cannot be listed.
    """
    fs, inner = file_system(pattern)
    try:
        if any(c in inner for c in "*?["):
            names = with_retries(pattern, lambda: fs.glob(inner))
        else:
            names = with_retries(pattern, lambda: fs.ls(inner, detail=False))
    except RemoteError as e:
        raise UserError(f"{pattern} cannot be listed: {e}; check the address") from e
    return sorted(fs.unstrip_protocol(name) for name in names)
