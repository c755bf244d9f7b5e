"""A work folder of this machine that is copied to a bucket while the run goes on.

A thread uploads what the run has finished writing, so that a bucket that is slow or fails neither
stops nor delays a step: what it did not take is tried again until it does, and at the end the run
waits for it. Of a checkpoint its files go first, then the single files (`metrics.jsonl` holds all
steps up to it by then), and last the manifest that names it. A run that goes on from the bucket is
therefore the run that would have gone on from the disk.
"""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clip_jax.data.formats.remote import answer_of
from clip_jax.training.bucket import (
    MANIFEST_NAME,
    Bucket,
    Files,
    checkpoint_of,
    checkpoints_in,
    file_digest,
    folder_digests,
    manifest_bytes,
    single_files,
)
from clip_jax.training.bucket_lock import BucketLock, LockLostError

POLL_SECONDS = 1.0
FILES_SECONDS = 30.0
"""How often files that grow are uploaded, beside once with each checkpoint."""
LONGEST_PAUSE = 30.0
"""Seconds between two tries while the bucket fails."""
FINISH_SECONDS = 600.0
"""How long the end of a run waits for a bucket that fails."""
PARALLEL_FILES = 8
WHOLE_BYTES = 16 << 20
"""Larger files are not read into memory."""

DELETE_SECONDS = 2.0
"""In so long a deletion that was begun deletes a file."""

_OUR_MISTAKES = (TypeError, AttributeError, NameError)

Identity = tuple[int, int]
"""Inode and time of a folder."""


class BucketSync:
    """Uploads a work folder from a thread of its own.

    Attributes:
      failures: tries that the bucket failed.

    Args:
      bucket: where to.
      lock: of the bucket's folder; nothing is written once it is lost.
      folder: the work folder.
      staging: a folder on the same disk, for the checkpoint that is being uploaded: the run may
        delete it meanwhile.
      committed: the checkpoints that the bucket's manifest names.
    """

    def __init__(
        self,
        bucket: Bucket,
        lock: BucketLock,
        folder: Path,
        staging: Path,
        committed: dict[str, Files],
    ) -> None:
        self._bucket, self._lock = bucket, lock
        self._folder, self._staging = folder, staging
        self._committed = committed
        self._equal: dict[str, Identity] = {}
        self._staged: dict[str, Identity] = {}
        self._sent: tuple[Identity, Files] = ((0, 0), {})
        self._is_clean = False
        self._uploaded: dict[str, tuple[int, int, int]] = {}
        self._next_files = 0.0
        self.failures, self._failing_since = 0, 0.0
        self._bytes_done = self._bytes_left = self._checkpoints_done = 0
        self._ending = threading.Event()
        self._mistake: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="bucket_sync", daemon=True)

    def start(self) -> None:
        """Begin to upload."""
        self._thread.start()

    def finish(self, seconds: float = FINISH_SECONDS) -> bool:
        """Upload what is left, for so long; return whether all is in the bucket.

        Prints how far it is every ten seconds.
        """
        before = self._bytes_done
        began = told = time.monotonic()
        self._ending.set()
        while self._thread.is_alive() and time.monotonic() - began < seconds:
            self._thread.join(0.1)
            if time.monotonic() - told > 10:
                told = time.monotonic()
                self._tell_progress((self._bytes_done - before) / (told - began))
        if self._mistake is not None:
            raise self._mistake
        return not self._thread.is_alive() and not self._lock.lost

    def summary(self) -> str:
        """Return what was uploaded."""
        megabytes = self._bytes_done / 1e6
        tries = f", {self.failures} tries that failed" if self.failures else ""
        return f"{self._checkpoints_done} checkpoints, {megabytes:,.1f} MB{tries}"

    def _tell_progress(self, rate: float) -> None:
        left = f", {self._bytes_left / rate:,.0f} s left" if rate and self._bytes_left else ""
        print(
            f"{self._bucket.url}: uploading, {self._bytes_done / 1e6:,.1f} MB done, "
            f"{self._bytes_left / 1e6:,.1f} MB of a checkpoint to come, {rate / 1e6:,.1f} MB/s"
            f"{left}",
            flush=True,
        )

    def _run(self) -> None:
        pause = POLL_SECONDS
        while True:
            is_last = self._ending.is_set()
            try:
                self.upload(all_files=is_last)
            except LockLostError:
                return
            except _OUR_MISTAKES as error:
                self._mistake = error
                return
            except Exception as error:  # every file system of fsspec has exceptions of its own
                self._failed(error)
                # At the end nobody trains meanwhile: ask more often.
                pause = min(2 * pause, LONGEST_PAUSE / (6 if is_last else 1))
                self._ending.wait(pause) if not is_last else time.sleep(pause)
                continue
            self._succeeded()
            pause = POLL_SECONDS
            if is_last:
                return
            self._ending.wait(POLL_SECONDS)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if not self._failing_since:
            self._failing_since = time.monotonic()
            print(
                f"{self._bucket.url} takes no files ({answer_of(error).text}): the run goes on in "
                f"{self._folder}, and they are tried again",
                flush=True,
            )

    def _succeeded(self) -> None:
        if self._failing_since:
            seconds = time.monotonic() - self._failing_since
            self._failing_since = 0.0
            print(f"{self._bucket.url} takes files again, after {seconds:.0f} s", flush=True)

    def upload(self, *, all_files: bool = True) -> None:
        """Upload what has changed: checkpoints, then files.

        Args:
          all_files: also the files that were uploaded a short while ago.

        Raises:
          LockLostError: another run has the folder.
          Exception: fsspec's own, where the bucket fails; the next call goes on from there.
        """
        if not self._is_clean:  # what an upload that was killed has left
            self._clean()
            self._is_clean = True
        self._remove_gone()
        for name in checkpoints_in(self._folder):
            if not self._is_committed(name):
                self._upload_checkpoint(name)
        self._remove_gone()
        if all_files or time.monotonic() >= self._next_files:
            self._upload_files()

    def _is_committed(self, name: str) -> bool:
        """Return whether the bucket has this very checkpoint."""
        if name not in self._committed:
            return False
        identity = _identity(self._folder / name)
        if identity is not None and self._equal.get(name) != identity:
            # Of an earlier process, or made again under the same name.
            try:
                digests = folder_digests(self._folder / name)
            except FileNotFoundError:  # deleted or moved by the run
                return True
            if digests != self._committed[name]:
                self._commit({n: f for n, f in self._committed.items() if n != name})
                return False
            self._equal[name] = identity
        return True

    def _upload_checkpoint(self, name: str) -> None:
        staged = self._staging / name.replace("/", "-")
        identity = self._stage(name, staged)
        if identity is None:
            return
        if self._sent[0] != identity:
            self._sent = identity, {}
        sent = self._sent[1]
        sizes = {
            path.relative_to(staged).as_posix(): path.stat().st_size
            for path in sorted(staged.rglob("*"))
            if path.is_file()
        }
        self._bytes_left = sum(size for path, size in sizes.items() if path not in sent)

        def put(path: str) -> None:
            sent[path] = self._put(f"{name}/{path}", staged / path)
            self._bytes_left -= sizes[path]

        _all_of(put, [path for path in sizes if path not in sent])
        self._upload_files()
        self._commit({**self._committed, name: sent})
        self._equal[name] = identity
        self._checkpoints_done += 1
        shutil.rmtree(staged)

    def _put(self, name: str, path: Path) -> tuple[int, str]:
        """Upload a file; return the size and the digest of what was sent."""
        if path.stat().st_size > WHOLE_BYTES:  # of arrays: it does not change any more
            size, digest = file_digest(path)
            self._write(lambda: self._bucket.put(name, path), size)
            return size, digest
        data = path.read_bytes()
        self._write(lambda: self._bucket.write(name, data), len(data))
        return len(data), hashlib.sha256(data).hexdigest()

    def _stage(self, name: str, staged: Path) -> Identity | None:
        """Give a whole checkpoint's files a second name; return what tells it from others.

        None is one that the run deletes: Orbax begins to delete one when there is a newer one.
        """
        source, parent = self._folder / name, os.path.dirname(name)

        def newest() -> bool:
            names = [n for n in checkpoints_in(self._folder) if os.path.dirname(n) == parent]
            return bool(names) and names[0] == name

        was_newest = newest()
        identity = _identity(source)
        if identity is None or self._staged.get(name) == identity:
            return identity
        shutil.rmtree(staged, ignore_errors=True)
        try:
            shutil.copytree(source, staged, copy_function=_link_or_copy)
        except (FileNotFoundError, shutil.Error):
            return None
        if not (was_newest and newest()):
            time.sleep(DELETE_SECONDS)
            if _names(source) != _names(staged):
                return None
        if _identity(source) != identity:
            return None
        self._staged = {name: identity}
        return identity

    def _upload_files(self) -> None:
        began = time.monotonic()
        for name in single_files(self._folder):
            path = self._folder / name
            try:
                status = path.stat()
                signature = status.st_ino, status.st_size, status.st_mtime_ns
                if self._uploaded.get(name) == signature:
                    continue
                data = path.read_bytes() if status.st_size <= WHOLE_BYTES else None
            except FileNotFoundError:
                continue
            # What a file says of the checkpoints (`history.jsonl` that a cool-down is undone) was
            # true before it was written: those that are gone leave the bucket first.
            self._remove_gone()
            if data is None:
                self._write(lambda: self._bucket.put(name, path), status.st_size)  # noqa: B023
            else:
                self._write(lambda: self._bucket.write(name, data), len(data))  # noqa: B023
            self._uploaded[name] = signature
        # Files that take long are not sent again and again.
        now = time.monotonic()
        self._next_files = now + max(FILES_SECONDS, 10 * (now - began))

    def _remove_gone(self) -> None:
        """Take the checkpoints out of the bucket that the run has deleted, where newer ones are."""
        here = set(checkpoints_in(self._folder))
        replaced = {os.path.dirname(name) for name in here & self._committed.keys()}
        gone = {name for name in self._committed.keys() - here if os.path.dirname(name) in replaced}
        if gone:
            self._commit({n: files for n, files in self._committed.items() if n not in gone})

    def _commit(self, committed: dict[str, Files]) -> None:
        """Name these checkpoints as the whole ones, then delete the objects of the others."""
        data = manifest_bytes(committed)
        self._write(lambda: self._bucket.write(MANIFEST_NAME, data), len(data))
        gone, self._committed = self._committed.keys() - committed.keys(), committed
        for name in gone:
            self._clean(name)

    def _clean(self, folder: str = "") -> None:
        """Delete the objects of checkpoints below a folder that the manifest does not name."""
        for name in self._bucket.sizes(folder):
            checkpoint = checkpoint_of(name)
            if checkpoint is None:
                continue
            files = self._committed.get(checkpoint, {})
            if name.removeprefix(f"{checkpoint}/") not in files:
                self._lock.check()
                self._bucket.remove(name)

    def _write(self, write: Callable[[], None], size: int) -> None:
        self._lock.check()
        write()
        self._bytes_done += size


def _identity(folder: Path) -> Identity | None:
    """Return what tells a folder from another of its name; None where there is none."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a disk without hard links
        shutil.copy2(source, target)


def _all_of(call: Callable[[str], None], names: list[str]) -> None:
    """Call with each name, several at a time."""
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        for _ in pool.map(call, names):
            pass
