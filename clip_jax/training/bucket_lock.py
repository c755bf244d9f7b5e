"""One run at a time in a bucket's folder.

A bucket has no locks, and a process that was killed says nothing. So the holder writes an object of
a number that no one had, `run.lock/00000007`, which stores with conditional writes give to one
alone, and writes it again every few seconds. Whoever comes next waits whether it changes: a holder
that gives no sign of life for a minute while the bucket answers is taken for dead, one on the same
machine whose process is gone at once, and the next number is taken. No clock is compared. A holder
that was cut off looks for a higher number before it writes anything, and ends.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError
from clip_jax.training.bucket import LOCK_DIRNAME, Bucket

BEAT_SECONDS = 15.0
FRESH_SECONDS = 30.0
"""After so long without a sign of life that arrived, the holder looks before it writes."""
WATCH_SECONDS = 60.0
POLL_SECONDS = 2.0


class LockLostError(Exception):
    """Another run has taken the folder."""


class BucketLock:
    """The lock of a bucket's folder.

    Attributes:
      token: of this holder.
      lost: who has taken the folder, if another run has.

    Args:
      bucket: the folder.
      on_lost: called in the lock's thread when another run has taken the folder.
    """

    def __init__(self, bucket: Bucket, on_lost: Callable[[], object]) -> None:
        self._bucket, self._on_lost = bucket, on_lost
        self.token = uuid.uuid4().hex
        self.lost = ""
        self._record = {**describe_holder(), "token": self.token, "beat": 0, "released": False}
        self._number = 0
        self._confirmed = 0.0
        self._end = threading.Event()
        self._mutex = threading.Lock()
        self._thread = threading.Thread(target=self._beat_on, name="bucket_lock", daemon=True)

    def acquire(self) -> str:
        """Take the lock; return the token of the holder before, "" without one.

        Raises:
          UserError: another run has it, or the bucket cannot be written.
        """
        number, record = self._newest()
        if record is not None and not record.get("released"):
            is_alive = lives(record)
            if is_alive:
                self._refuse(record)
            if is_alive is None:
                self._wait_for(number, record)
        self._number = number + 1
        self._take()
        for number in self._bucket.patiently(self._numbers):
            if number < self._number:
                with suppress(Exception):  # a number too many does no harm
                    self._bucket.remove(self._name(number))
        self._confirmed = time.monotonic()
        self._thread.start()
        return str(record.get("token", "")) if record else ""

    def _name(self, number: int) -> str:
        return f"{LOCK_DIRNAME}/{number:08d}"

    def _newest(self) -> tuple[int, dict[str, Any] | None]:
        """Return the highest number, and what its holder says; 0 and None without one."""
        numbers = self._bucket.patiently(self._numbers)
        return (numbers[-1], self._read(numbers[-1])) if numbers else (0, None)

    def _numbers(self) -> list[int]:
        names = [name.rpartition("/")[2] for name in self._bucket.sizes(LOCK_DIRNAME)]
        return sorted(int(name) for name in names if name.isdigit())

    def _read(self, number: int) -> dict[str, Any]:
        data = self._bucket.patiently(lambda: self._bucket.read(self._name(number)))
        with suppress(ValueError):
            record = json.loads(data or b"{}")
            if isinstance(record, dict):
                return record
        return {}

    def _wait_for(self, number: int, record: dict[str, Any]) -> None:
        """Return when a holder has been silent for long enough, or has let go."""
        print(
            f"{self._bucket.url} was last in use by {record.get('holder', 'another process')}, "
            f"which has not said that it ended: waiting {WATCH_SECONDS:.0f} s for a sign of life",
            flush=True,
        )
        end = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            asked = time.monotonic()
            now = self._read(number)
            if now.get("released"):
                return
            if now != record:
                self._refuse(now)
            if time.monotonic() - asked > 2 * POLL_SECONDS:
                # The bucket failed, for the holder too: its silence says nothing.
                end = time.monotonic() + WATCH_SECONDS

    def _refuse(self, record: dict[str, Any]) -> None:
        raise UserError(
            f"--workdir {self._bucket.url} is in use by {record.get('holder', 'another process')}; "
            "wait for it, stop it, or give another"
        )

    def _take(self) -> None:
        """Write the object of this number, which has to be new."""
        name, data = self._name(self._number), json.dumps(self._record).encode()
        try:
            self._bucket.patiently(lambda: _write_new(self._bucket, name, data))
            # Some stores overwrite it all the same.
            is_refused = not self._bucket.patiently(lambda: _write_new(self._bucket, name, data))
        except UserError:  # others know no such request; where nothing can be written it ends here
            self._bucket.patiently(lambda: self._bucket.write(name, data))
            is_refused = False
        if not is_refused:
            print(
                f"{self._bucket.url} has no conditional writes: see that no other run starts there "
                "at the same time",
                flush=True,
            )
            time.sleep(POLL_SECONDS)
        # Of two tries the first may have arrived, and its answer not.
        record = self._read(self._number)
        if record.get("token") != self.token:
            self._refuse(record)

    def check(self) -> None:
        """Make sure that the folder is still this run's, before something is written there.

        Raises:
          LockLostError: it is not.
        """
        if not self.lost and time.monotonic() - self._confirmed > FRESH_SECONDS:
            self._beat()
        if self.lost:
            raise LockLostError(self.lost)

    def _beat(self, *, released: bool = False) -> None:
        """Look for a higher number, and give a sign of life."""
        with self._mutex:
            asked = time.monotonic()
            highest = self._numbers()[-1:]
            if highest and highest[0] > self._number:
                record = json.loads(self._bucket.read(self._name(highest[0])) or b"{}")
                self.lost = str(record.get("holder", "another process"))
                return
            self._record |= {"beat": self._record["beat"] + 1, "released": released}
            data = json.dumps(self._record).encode()
            self._bucket.write(self._name(self._number), data)
            self._confirmed = asked

    def _beat_on(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            with suppress(Exception):  # whoever uploads tells of a bucket that fails
                self._beat()
            if self.lost:
                self._on_lost()
                return

    def release(self) -> None:
        """Let go, so that the next run need not wait; a bucket that fails is left as it is."""
        self._end.set()
        if self._number and not self.lost:
            with suppress(Exception):
                self._beat(released=True)


def _write_new(bucket: Bucket, name: str, data: bytes) -> bool:
    """Write a new object; return False where there is one, which stays."""
    try:
        bucket.write(name, data, new=True)
    except FileExistsError:
        return False
    return True


def describe_holder() -> dict[str, Any]:
    """Return who this process is, for people and for `lives`."""
    return {
        "holder": f"process {os.getpid()} on {socket.gethostname()}",
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def lives(record: dict[str, Any]) -> bool | None:
    """Return whether a holder on this machine still runs; None of one elsewhere."""
    machine, pid = _machine(), record.get("pid")
    if not machine or record.get("machine") != machine or not isinstance(pid, int):
        return None
    return _started(pid) == record.get("started")


def _machine() -> str:
    """Return what processes have in common whose numbers can be compared; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process began; "" where there is none, or one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]
