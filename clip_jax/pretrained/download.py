"""Fetch a file by its address: broken off, the next call goes on; its digest is checked at the end.

What has come lies in a file of its own beside the target until all of it is there, so a target is
whole or absent. Requests go through `huggingface_hub`'s session, with its proxies and certificates.
"""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import are_progress_bars_disabled, get_session, hf_raise_for_status
from tqdm import tqdm

from clip_jax.errors import UserError, short, write_remedy
from clip_jax.progress_bar import progress_bar

TRIES = 5
"""Requests in a row that bring nothing before a transfer is given up."""
PAUSE = 1.0
"""Seconds before the second try; doubled before each further one."""
LONGEST_PAUSE = 60.0
"""The most that a server may ask to wait before the next try, seconds."""
CHUNK = 1 << 20
BAR_FROM = 1_000_000
"""Bytes from which a transfer has a progress bar."""
RETRIED = (408, 429, 500, 502, 503, 504)
"""Codes of a server that may answer otherwise a moment later."""
PARTIAL = ".clip_jax.incomplete"


@dataclass(frozen=True)
class RemoteFile:
    """A file that can be fetched.

    Attributes:
      url: its address.
      size: its bytes; None where the server does not say.
      digest: in hexadecimal: 64 digits of SHA-256, the first 8 of them, or the 40 of git's blob;
        empty where none is published.
    """

    url: str
    size: int | None
    digest: str


class BrokenOffError(Exception):
    """A transfer that did not succeed within its tries; the message is the last one's reason."""


def room_needed(target: Path, remote: RemoteFile) -> int:
    """Return how many bytes of a file have not come yet; 0 where its size is not known."""
    partial = target.with_name(target.name + PARTIAL)
    there = partial.stat().st_size if partial.is_file() else 0
    return max((remote.size or 0) - there, 0)


def download(
    remote: RemoteFile, target: Path, *, title: str, headers: Mapping[str, str] | None = None
) -> None:
    """Fetch a file; what an earlier call left of it is not fetched again.

    Args:
      remote: the file.
      target: where it shall lie; its folder exists.
      title: what stands before the progress bar.
      headers: of the requests; they do not follow a redirect to another host.

    Raises:
      BrokenOffError: the connection failed; what has come is kept.
      HfHubHTTPError: the server refuses.
      UserError: the disk is full, or what came is not the file.
    """
    partial = target.with_name(target.name + PARTIAL)
    resumed = partial.is_file() and partial.stat().st_size > 0
    _check_room(target, room_needed(target, remote))
    with _open_partial(partial, remote) as growing:
        bar = progress_bar(
            remote.size,
            title,
            "B",
            initial=growing.size,
            shown=not are_progress_bars_disabled() and (remote.size or BAR_FROM) >= BAR_FROM,
            scaled=True,
        )
        with bar:
            _transfer(remote, growing, bar, headers or {})
        growing.sync()
        intact = growing.matches(remote.digest)
    if intact:
        os.replace(partial, target)
        return
    partial.unlink()
    if not resumed:
        raise UserError(
            f"{remote.url} is not what was published: its digest is not {remote.digest:.16}; the "
            "file or the way here is damaged: try again, or from another network"
        )
    # What an earlier call had left was damaged.
    download(remote, target, title=title, headers=headers)


def _check_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(
            f"{target.parent} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are to come: "
            "make room, or let HF_HOME name a folder on another disk"
        )


class _GrowingFile:
    """A file that has come in part, and the digest of what it holds."""

    def __init__(self, file: FileIO, path: Path, remote: RemoteFile) -> None:
        self._file, self._path, self._remote = file, path, remote
        self._begin()
        while chunk := file.read(CHUNK):
            self._hash.update(chunk)
            self.size += len(chunk)
        if remote.size is None or self.size > remote.size:
            self.restart()

    def _begin(self) -> None:
        self.size = 0
        if len(self._remote.digest) == 40 and self._remote.size is not None:
            self._hash: Any = hashlib.sha1(b"blob %d\0" % self._remote.size, usedforsecurity=False)
        else:
            self._hash = hashlib.sha256()

    def restart(self) -> None:
        """Drop what has come."""
        self._file.seek(0)
        self._file.truncate()
        self._begin()

    def write(self, chunk: bytes) -> None:
        """Append what has come.

        Raises:
          UserError: it cannot be written, or is more than the file has.
        """
        if self._remote.size is not None and self.size + len(chunk) > self._remote.size:
            raise UserError(
                f"{self._remote.url} sends more than the {self._remote.size:,} bytes that it "
                "announced: try again, or from another network"
            )
        try:
            left = memoryview(chunk)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._failed(error) from None
        self._hash.update(chunk)
        self.size += len(chunk)

    def sync(self) -> None:
        """Make sure that the disk has it."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> UserError:
        reason = error.strerror or str(error)
        return UserError(
            f"{self._path} cannot be written ({reason}): {write_remedy(reason)}, or let "
            "HF_HOME name a folder on another disk; the next call goes on with what has come"
        )

    def matches(self, digest: str) -> bool:
        """Return whether what has come has this digest, or the digits of it that are given."""
        return self._hash.hexdigest().startswith(digest)


@contextmanager
def _open_partial(path: Path, remote: RemoteFile) -> Iterator[_GrowingFile]:
    try:
        # Not for appending: two processes where locks do not work write the same bytes twice.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written ({error.strerror or error}): give yourself the right "
            "to, or let HF_HOME name another folder"
        ) from None
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        yield _GrowingFile(file, path, remote)


def _transfer(
    remote: RemoteFile, growing: _GrowingFile, bar: tqdm, headers: Mapping[str, str]
) -> None:
    """Ask for what is missing until it has come.

    Raises:
      BrokenOffError: TRIES requests in a row brought nothing.
      HfHubHTTPError: the server refuses.
    """
    failures = 0
    while remote.size is None or growing.size < remote.size:
        if remote.size is None and growing.size:
            growing.restart()  # nobody knows whether more is to come
        before, pause = growing.size, None
        try:
            _receive(remote, growing, bar, headers)
            if remote.size is None or growing.size == remote.size:
                return
            reason = f"{growing.size:,} of {remote.size:,} bytes came"
        except httpx2.RequestError as error:
            reason = short(error)
        except HfHubHTTPError as error:
            code = error.response.status_code
            if code not in RETRIED:
                raise
            reason, pause = f"the server answers {code}", _asked_pause(error.response)
        failures = 1 if remote.size and growing.size > before else failures + 1
        if failures == TRIES:
            raise BrokenOffError(reason)
        time.sleep(PAUSE * 2 ** (failures - 1) if pause is None else pause)


def _asked_pause(response: httpx2.Response) -> float | None:
    """Return the seconds that a busy server asks to wait, within LONGEST_PAUSE."""
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), LONGEST_PAUSE) if re.fullmatch(r"\d{1,9}", asked) else None


def _receive(
    remote: RemoteFile, growing: _GrowingFile, bar: tqdm, headers: Mapping[str, str]
) -> None:
    """Make one request for what is missing, and write what comes."""
    wanted = {**headers, "Accept-Encoding": "identity"}
    if growing.size:
        wanted["Range"] = f"bytes={growing.size}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", remote.url, headers=wanted, timeout=timeout) as response:
        range_start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        start = int(range_start[1]) if response.status_code == 206 and range_start else 0
        if response.status_code == 416 or (response.is_success and start != growing.size):
            # The server has no such part, or sends the whole instead.
            bar.update(-growing.size)
            growing.restart()
            if response.status_code != 200:
                return
        hf_raise_for_status(response)
        for chunk in response.iter_raw():
            growing.write(chunk)
            bar.update(len(chunk))


def has_digest(path: Path, digest: str) -> bool:
    """Return whether a file has this SHA-256, or the first digits of it that are given."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(digest)
