"""`--workdir s3://bucket/run`: a folder of this machine that stands for one in a bucket.

The run works in a folder on a disk of this machine, and `BucketSync` copies it to the bucket. At a
start the folder goes on as it is if the last run in the bucket was in it; what another machine has
done since is fetched, and is the truth.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from clip_jax.data.formats.remote import is_url
from clip_jax.errors import EXIT_TERMINATED, UserError
from clip_jax.files import atomic_write, check_local, make_folder
from clip_jax.parallel import distributed
from clip_jax.pretrained.work_folder import CHECKPOINT_DIRNAME
from clip_jax.progress_bar import progress_bar
from clip_jax.training.bucket import (
    LOCK_DIRNAME,
    MANIFEST_NAME,
    Bucket,
    Files,
    checkpoint_of,
    checkpoints_in,
    file_digest,
    folder_digests,
    manifest_bytes,
    read_manifest,
)
from clip_jax.training.bucket_lock import BucketLock
from clip_jax.training.bucket_sync import FINISH_SECONDS, PARALLEL_FILES, BucketSync
from clip_jax.training.run_lock import only_run

OWNERS_FILENAME = "owners.json"
SHORT_FINISH_SECONDS = 60.0
"""How long the end of a run that failed waits for a bucket that fails."""


@dataclasses.dataclass
class LocalWorkdir:
    """The folder that a run works in.

    Attributes:
      path: the folder.
      missing: whether something in it could not be brought to where it belongs.
    """

    path: str
    missing: bool = False

    def exit_code(self, code: int) -> int:
        """Return a run's exit code: one that has files left to upload is to be started again."""
        return EXIT_TERMINATED if self.missing and code == 0 else code


@contextlib.contextmanager
def local_workdir(workdir: str, scratch: str = "") -> Iterator[LocalWorkdir]:
    """Yield the folder that a run works in: `workdir` itself, or what stands for one in a bucket.

    All processes call it; process 0 speaks with the bucket. The block ends when the bucket has
    everything, or has failed for long.

    Args:
      workdir: a folder, or the URL of one.
      scratch: where the folders of this machine lie; "" is the user's cache folder.

    Raises:
      UserError: another run has the folder, or it cannot be read or written.
    """
    if not is_url(workdir):
        yield LocalWorkdir(workdir)
        return
    check_local({"--scratch": scratch})
    url = workdir.rstrip("/")
    place = Path(distributed.from_first(str(scratch_folder(url, scratch))))
    distributed.make_shared_folder(place, flag="--scratch")
    with only_run(place, url):
        session, fault = None, None
        if distributed.is_first():
            try:
                session = Session(url, place)
            except UserError as error:
                fault = str(error)
        fault = distributed.from_first(fault)
        if fault:
            raise UserError(fault)
        local = LocalWorkdir(str(place / place_name(url)))
        try:
            yield local
        except BaseException:
            if session is not None:
                session.close(SHORT_FINISH_SECONDS)
            raise
        if session is not None:
            local.missing = not session.close(FINISH_SECONDS)


def scratch_folder(url: str, scratch: str = "") -> Path:
    """Return the folder of this machine that belongs to a URL."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    root = Path(scratch).expanduser() if scratch else Path(cache) / "clip_jax" / "runs"
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return root.absolute() / f"{place_name(url)}-{digest}"


def place_name(url: str) -> str:
    """Return what a run is called: the last part of its URL."""
    return url.rstrip("/").rpartition("/")[2] or "run"


class Session:
    """A run's hold on a bucket's folder, from the lock to the last upload. Process 0 has it.

    Args:
      url: of the folder.
      place: the folder of this machine that belongs to it.

    Raises:
      UserError: another run has the folder, or it cannot be read or written.
    """

    def __init__(self, url: str, place: Path) -> None:
        self._url = url
        self._lock = BucketLock(Bucket(url), lambda: os.kill(os.getpid(), signal.SIGTERM))
        try:
            self._sync = self._begin(place, place / place_name(url))
        except BaseException:
            self._lock.release()
            raise
        self._sync.start()

    def _begin(self, place: Path, folder: Path) -> BucketSync:
        owners, bucket = place / OWNERS_FILENAME, Bucket(self._url)
        # Whichever of the two the bucket names after a kill: the folder is its holder's.
        known = _read_owners(owners)
        _write_owners(owners, [*known, self._lock.token])
        before = self._lock.acquire()
        committed = read_manifest(bucket)
        if committed is None or before not in known or not folder.is_dir():
            committed = _replace(folder, bucket, committed)
            if committed:
                print(f"fetched {self._url} to {folder}", flush=True)
        _write_owners(owners, [self._lock.token])
        shutil.rmtree(place / "uploading", ignore_errors=True)
        return BucketSync(bucket, self._lock, folder, place / "uploading", committed)

    def close(self, seconds: float) -> bool:
        """Upload what is left; return whether all is in the bucket.

        Raises:
          UserError: another run has taken the folder.
        """
        try:
            is_done = self._sync.finish(seconds)
        finally:
            self._lock.release()
        if self._lock.lost:
            raise UserError(
                f"{self._url} was taken by {self._lock.lost}, which saw no sign of life of this "
                "run; nothing more was written there"
            )
        if is_done:
            print(f"{self._url} has all of the run: {self._sync.summary()}", flush=True)
        else:
            print(
                f"{self._url} does not have all of the run ({self._sync.summary()}): the same "
                "command on this machine uploads the rest",
                flush=True,
            )
        return is_done


def _read_owners(path: Path) -> list[str]:
    with contextlib.suppress(OSError, ValueError):
        return [str(token) for token in json.loads(path.read_text())]
    return []


def _write_owners(path: Path, tokens: list[str]) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(tokens))


def _replace(folder: Path, bucket: Bucket, committed: dict[str, Files] | None) -> dict[str, Files]:
    """Put what the bucket has into a folder, in the place of what is there; return what is whole.

    A folder without a manifest was copied there by hand, or is new: what it has is taken as it is.
    """
    partial = folder.with_name(f"{folder.name}.fetching")
    shutil.rmtree(partial, ignore_errors=True)
    fetched = fetch(bucket, partial, committed)
    if committed is None:
        data = manifest_bytes(fetched)
        bucket.patiently(lambda: bucket.write(MANIFEST_NAME, data))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return committed if committed is not None else fetched


def fetch(bucket: Bucket, folder: Path, committed: dict[str, Files] | None) -> dict[str, Files]:
    """Copy a run from a bucket; return its checkpoints that came whole.

    Args:
      bucket: the run's.
      folder: where to; it is made.
      committed: the checkpoints that are whole; None takes all that is there.

    Raises:
      UserError: the bucket fails, the disk does, or no checkpoint of several is whole.
    """
    make_folder(folder, flag="--scratch")
    sizes = {
        name: size
        for name, size in bucket.patiently(bucket.sizes).items()
        if is_wanted(name, committed)
    }
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if free < total:
        raise UserError(
            f"{bucket.url} has {total / 1e6:,.1f} MB and {folder} has room for {free / 1e6:,.1f} "
            "MB; make room, or give another --scratch"
        )
    with (
        progress_bar(total, f"fetch {bucket.url}", "B", scaled=True, shown=bool(sizes)) as bar,
        ThreadPoolExecutor(PARALLEL_FILES) as pool,
    ):
        pending = [pool.submit(_get, bucket, name, folder / name, n) for name, n in sizes.items()]
        try:
            for future in as_completed(pending):
                bar.update(future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if committed is None:
        return {name: folder_digests(folder / name) for name in checkpoints_in(folder)}
    return _verified(bucket, folder, committed)


def _get(bucket: Bucket, name: str, path: Path, size: int) -> int:
    """Fetch a file; return its size.

    Raises:
      UserError: it cannot be fetched, or not be written.
    """

    def get() -> None:
        bucket.get(name, path)
        if path.stat().st_size != size:
            raise OSError(f"{path.stat().st_size} of {size} bytes came")

    bucket.patiently(get)
    return size


def is_wanted(name: str, committed: dict[str, Files] | None) -> bool:
    """Return whether an object is a file of the run: not one that a killed upload has left."""
    if name == MANIFEST_NAME or name.startswith(f"{LOCK_DIRNAME}/"):
        return False
    checkpoint = checkpoint_of(name)
    if checkpoint is None or committed is None:
        return True
    return name.removeprefix(f"{checkpoint}/") in committed.get(checkpoint, {})


def _verified(bucket: Bucket, folder: Path, committed: dict[str, Files]) -> dict[str, Files]:
    """Return the checkpoints whose files are what was uploaded, and delete the others."""
    whole = {}
    for name, files in committed.items():
        damaged = [
            path for path, expected in files.items() if _fault(folder / name / path, expected)
        ]
        if not damaged:
            whole[name] = files
            continue
        fault = _fault(folder / name / damaged[0], files[damaged[0]])
        print(
            f"{bucket.url}/{name} is damaged and left out: {len(damaged)} of {len(files)} files, "
            f"first {damaged[0]}, {fault}",
            flush=True,
        )
        shutil.rmtree(folder / name, ignore_errors=True)
    lost = [name for name in committed if name.startswith(CHECKPOINT_DIRNAME)]
    if lost and not any(name.startswith(CHECKPOINT_DIRNAME) for name in whole):
        raise UserError(
            f"none of the {len(lost)} checkpoints in {bucket.url} is whole; start again in another "
            "--workdir"
        )
    return whole


def _fault(path: Path, expected: tuple[int, str]) -> str:
    """Return what is wrong with a file; "" where nothing is."""
    if not path.is_file():
        return "which is missing"
    size, digest = file_digest(path)
    if size != expected[0]:
        return f"which has {size} of {expected[0]} bytes"
    return "" if digest == expected[1] else "which has other contents"
