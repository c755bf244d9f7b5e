"""Processes that read, decode and tokenize for the loader, as Python's lock is one a process.

Each thread of the loader waits for one thread of a process, with which it shares a socket. It asks
for a run of rows by their sample ids; the images come in the batch's own memory, which both map,
and the rest through the socket. What a process lacks it asks for meanwhile: a shard that it has not
read from lately, or a file that was fetched. So a process holds only what it reads from, shards'
headers are read once for all of them, and order, rows and errors are those of threads.
"""

import contextlib
import dataclasses
import json
import mmap
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from clip_jax.data.batch_buffers import BatchBuffers, memory_file
from clip_jax.data.dataset import LazyShard
from clip_jax.data.decode_watch import SLICES
from clip_jax.data.formats.remote import open_local
from clip_jax.data.formats.webdataset import TarShard
from clip_jax.data.sample_reader import ReaderSettings, Rows, joined_negatives, no_negatives
from clip_jax.data.shards import ConcatShards, Shard
from clip_jax.data.sources import open_shard
from clip_jax.errors import UserError, note
from clip_jax.sections import DataSection

THREADS_PER_PROCESS = 4
"""Threads that Python's lock does not hold up much: each needs it for a tenth of its time."""
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from clip_jax.data.decode_worker import main; main(sys.argv[2:])"
)
# A process that imports JAX by the way must not reach for the accelerators.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
BEAT_SECONDS = 0.5
"""How often a process gives a sign of life."""
LEAST_SILENCE = 30.0
"""Seconds without one that a loaded machine may need."""
SOON = 60.0
"""Seconds within which new processes that end too end the run."""
_END_SECONDS = 10.0
"""Time that a process has to end after its sockets were closed."""


def decode_threads(config: DataSection) -> int:
    """Return how many threads decode: the config's number, or what -1 stands for on this host."""
    return usable_cores() if config.threads == -1 else config.threads


def decode_processes(config: DataSection, shards: Sequence[Shard]) -> int:
    """Return how many processes decode: the config's number, or what -1 stands for.

    Raises:
      UserError: more processes than threads.
    """
    threads = decode_threads(config)
    if config.processes > threads:
        cores = ", one for every core here" if config.threads == -1 else ""
        raise UserError(
            f"config.data.processes is {config.processes}, above the {threads} of"
            f" config.data.threads{cores}: each process needs a thread"
        )
    if config.processes >= 0:
        return config.processes
    count = processes_for(min(threads, usable_cores()))
    return count if all(_is_tar(shard) for shard in shards) else 0


def processes_for(threads: int) -> int:
    """Return among how many processes so many threads with a core each are shared out."""
    count = threads // THREADS_PER_PROCESS
    return count if count >= 2 else 0


def usable_cores() -> int:
    """Return the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _is_tar(shard: Shard) -> bool:
    if isinstance(shard, LazyShard):
        return shard.shard.partition("#")[0].endswith(".tar")
    return isinstance(shard, TarShard)


def _cached_shards(shards: Sequence[Shard]) -> int:
    """Return how many shards a process keeps: as many as are in this one's memory."""
    limits = [shard.cached_shards for shard in shards if isinstance(shard, LazyShard)]
    return len(shards) - len(limits) + max(limits, default=0)


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """What a process is told at its start.

    Attributes:
      settings: of its reader.
      starts: see `ConcatShards`.
      image_shape: of a batch's images.
      stride: bytes between two batches' buffers.
      cached_shards: most that it keeps.
    """

    settings: ReaderSettings
    starts: Int64[np.ndarray, " n"]
    image_shape: tuple[int, ...]
    stride: int
    cached_shards: int


@dataclasses.dataclass(frozen=True)
class RowsRequest:
    """A run of rows: what they hold, and where in which batch's buffer their images go."""

    ids: Int64[np.ndarray, " rows"]
    epochs: Int64[np.ndarray, " rows"]
    buffer: int
    first_row: int


@dataclasses.dataclass(frozen=True)
class NeedShard:
    """A process asks for a shard; the answer is the shard."""

    number: int


@dataclasses.dataclass(frozen=True)
class OpenShard:
    """The first answer to `NeedShard` if nobody has read it yet: read it yourself, for all."""

    name: str


@dataclasses.dataclass(frozen=True)
class OpenedShard:
    """A shard that a process has read."""

    shard: Shard


@dataclasses.dataclass(frozen=True)
class NeedFile:
    """A process asks for a remote file; the answer is an OSError, or None and a descriptor."""

    url: str


@dataclasses.dataclass(frozen=True)
class Failed:
    """An error that ended a run of rows or the reading of a shard, and its traceback."""

    error: bytes
    trace: str

    @classmethod
    def of(cls, error: Exception) -> "Failed":
        """Return the error as it can be sent; not every exception can."""
        try:
            return cls(pickle.dumps(error), traceback.format_exc())
        except Exception:
            return cls(b"", traceback.format_exc())

    def raise_it(self) -> None:
        """Raise the error as it was raised there."""
        try:
            error = pickle.loads(self.error)
        except Exception:  # an exception that cannot be made from its arguments
            error = RuntimeError("a process that decodes failed")
        error.add_note(self.trace)
        raise error


class HungError(Exception):
    """A process that had these rows gave no sign of life any more, and was killed."""


class Pool:
    """Processes that decode, from their start to their end, and a watch on them.

    Args:
      message: the pickled `WorkerSetup`.
      buffers: the batches' memory.
      processes: their number.
      threads: of all processes together.
      seconds: without a sign of life after which a process hangs, and all are killed.

    Attributes:
      process: the first of them, which started the others.
      idle: connections that nobody uses, each with the number of its process.
      hung: the number of the process that hung, or -1.
      started: when, in seconds of a clock that never goes back.
    """

    def __init__(
        self, message: bytes, buffers: BatchBuffers, *, processes: int, threads: int, seconds: float
    ):
        pairs = [socket.socketpair() for _ in range(threads)]
        theirs = [their.fileno() for _, their in pairs]
        path = [entry or os.getcwd() for entry in sys.path]
        groups = [",".join(map(str, theirs[k::processes])) for k in range(processes)]
        beats_fd = memory_file()
        os.ftruncate(beats_fd, 8 * processes)
        self._beats = np.frombuffer(mmap.mmap(beats_fd, 8 * processes), np.int64)
        fds = [buffers.fd, beats_fd]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, json.dumps(path), *map(str, fds), *groups],
            stdin=subprocess.DEVNULL,
            pass_fds=[*fds, *theirs],
            env=os.environ | _ENVIRONMENT,
        )
        os.close(beats_fd)
        for _, their in pairs:
            their.close()
        self._connections = [Connection(our.detach()) for our, _ in pairs]
        # Neighbors in a batch go to different processes, as the sockets were dealt out to them.
        self.idle: queue.SimpleQueue[tuple[Connection, int]] = queue.SimpleQueue()
        for number, connection in enumerate(self._connections):
            self.idle.put((connection, number % processes))
        self.hung = -1
        self.started = time.monotonic()
        self._closing = threading.Event()
        self._connections[0].send_bytes(message)
        threading.Thread(target=self._watch, args=(seconds,), daemon=True).start()

    def _watch(self, seconds: float) -> None:
        """Kill all processes when one that has begun gives no sign of life for so long."""
        before, silent = self._beats.copy(), np.zeros(len(self._beats), int)
        interval = max(seconds / SLICES, 2 * BEAT_SECONDS)
        while not self._closing.wait(interval):
            now = self._beats.copy()
            silent = np.where((now == before) & (now > 0), silent + 1, 0)
            before = now
            if silent.max() >= SLICES and self.process.poll() is None:
                self.hung = int(np.argmax(silent))
                self._kill()
                self._shut()
                return

    def _shut(self) -> None:
        for connection in self._connections:
            # Closing would not wake a thread that waits for an answer, and another file could get
            # the number of a socket that is in use.
            with (
                contextlib.suppress(OSError),
                socket.socket(fileno=os.dup(connection.fileno())) as end,
            ):
                end.shutdown(socket.SHUT_RDWR)

    def _kill(self) -> None:
        for pid in self.children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End the processes, which they do when their sockets are shut."""
        self._closing.set()
        self._shut()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()

    def children(self) -> list[int]:
        """Return the processes that decode; none where there is no /proc."""
        first = self.process.pid
        try:
            children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        except OSError:
            return []
        return [int(pid) for pid in children]

    def how_it_ended(self) -> str:
        """Return in words how a process ended, which took the others with it, and what to do."""
        try:
            code = self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"signal {abs(code) % 128}" if code < 0 or code > 128 else f"code {code}"
        return (
            f"a process that decodes has ended with {how}: its own lines say why, or the machine is"
            " out of memory (signal 9); fewer config.data.processes need less"
        )


class DecodeProcesses:
    """Reads rows as a `SampleReader` does, but in other processes.

    A process in which an image hangs goes on by another of its threads. One that hangs altogether,
    because a decoder does not let go of Python's lock, is killed with the others, new ones take
    their place, and what it had is read again row by row, to find the image that hangs. Where one
    ends, as when the system kills it for its memory, new ones take their place too, with a line,
    and what it had is read again; the run ends if they end soon as well.

    Args:
      settings: of their readers.
      shards: what the ids count.
      buffers: shared; the images go there.
      processes: their number.
      threads: of all processes together.

    Raises:
      UserError: the tokenizer cannot be sent to another process.
    """

    def __init__(
        self,
        settings: ReaderSettings,
        shards: ConcatShards,
        buffers: BatchBuffers,
        *,
        processes: int,
        threads: int,
    ):
        self._settings = settings
        self._shards = shards
        share = settings.config.cache_bytes // processes
        setup = WorkerSetup(
            dataclasses.replace(
                settings, config=dataclasses.replace(settings.config, cache_bytes=share)
            ),
            shards.starts,
            buffers.shape,
            buffers.stride,
            _cached_shards(shards.shards),
        )
        try:
            message = pickle.dumps(setup)
        except (pickle.PicklingError, TypeError, AttributeError) as e:
            raise UserError(
                f"what decodes cannot be sent to another process ({e}): set config.data.processes"
                " to 0"
            ) from e
        # Longer than a thread is waited for, which leaves the process as it is.
        seconds = max(1.5 * settings.config.decode_seconds, LEAST_SILENCE)
        options = {"processes": processes, "threads": threads}
        self._start = lambda: Pool(message, buffers, seconds=seconds, **options)
        self._pool = self._start()
        self._is_closed = False
        self._replaced = 0
        self._replacing, self._alone = threading.Lock(), threading.Lock()
        self._hung: set[int] = set()

    def read(
        self,
        ids: Int64[np.ndarray, " rows"],
        epochs: Int64[np.ndarray, " rows"],
        buffer: int,
        first_row: int,
        image: UInt8[np.ndarray, "rows H W 3"],
    ) -> Rows:
        """Return the rows of these samples in these epochs.

        Args:
          ids, epochs: one for each row; an id of -1 is padding.
          buffer: the number of the batch's buffer.
          first_row: of this run of rows, in the batch.
          image: the rows' part of that buffer.

        Raises:
          UserError: the process has ended, and so did the one in its place.
        """
        try:
            if self._hung.isdisjoint(ids.tolist()):
                return Rows(image=image, **self._ask(RowsRequest(ids, epochs, buffer, first_row)))
        except HungError:
            pass
        rows = []
        with self._alone:
            for i in range(len(ids)):
                one = slice(i, i + 1)
                request = RowsRequest(ids[one], epochs[one], buffer, first_row + i)
                rows.append(self._read_alone(request, image[one]))
        return joined(rows, image)

    def _read_alone(self, request: RowsRequest, image: UInt8[np.ndarray, "1 H W 3"]) -> Rows:
        """Read one row; where it makes a process hang, return a placeholder that says so."""
        (sample,) = request.ids.tolist()
        try:
            if sample not in self._hung:
                return Rows(image=image, **self._ask(request))
        except HungError:
            self._hung.add(sample)
        image[:] = 0
        shard, i = self._shards.at(sample)
        text = self._settings.tokenizer([""], self._settings.shape.context_length)
        key = f"{shard.name}/{shard.key(i)}"
        why = "decoding had not ended and had stopped its process, which was replaced"
        return Rows(
            image=image,
            text=text,
            caption_id=np.zeros(1, np.uint32),
            valid=np.zeros(1, bool),
            key=[key],
            skipped=[("decode_hung", key, why)],
            negatives=no_negatives(text) if self._settings.config.negatives else None,
        )

    def _ask(self, request: RowsRequest) -> dict[str, Any]:
        """Have a process read rows; return their fields without the images.

        Raises:
          HungError: the process hung.
          UserError: it has ended, and so did the one in its place.
        """
        while True:
            pool = self._pool
            connection, process = pool.idle.get()
            try:
                send(connection, request)
                while not isinstance(answer := connection.recv(), dict):
                    self._give(pool, connection, answer)
                return answer
            except (EOFError, ConnectionError) as e:
                if self._is_closed:
                    raise UserError(pool.how_it_ended()) from e
            finally:
                pool.idle.put((connection, process))
            with self._replacing:
                if self._pool is pool and not self._is_closed:
                    self._replace(pool)
            if process == pool.hung:
                raise HungError

    def _replace(self, pool: Pool) -> None:
        """Start new processes in place of those that hung or ended.

        Raises:
          UserError: they were new themselves, and ended soon.
        """
        if pool.hung < 0:
            how = pool.how_it_ended()
            if self._replaced and time.monotonic() - pool.started < SOON:
                raise UserError(how)
            self._replaced += 1
            note(f"{how}; new ones have taken their place, {self._replaced} so far")
            pool.close()
        self._pool = self._start()

    def _give(self, pool: Pool, connection: Connection, need: object) -> None:
        """Answer what a process asks for while it reads."""
        if isinstance(need, Failed):
            need.raise_it()
        elif isinstance(need, NeedShard):
            shard = self._shards.shards[need.number]
            if isinstance(shard, LazyShard):
                shard = shard.load(lambda name: self._open_there(pool, connection, name))
            send(connection, shard)
        elif isinstance(need, NeedFile):
            try:
                fd = open_local(need.url)
            except OSError as e:
                send(connection, e)
                return
            send(connection, None)
            send_handle(connection, fd, pool.process.pid)
            os.close(fd)
        else:
            raise TypeError(f"a process that decodes sent {need!r}")

    def _open_there(self, pool: Pool, connection: Connection, name: str) -> Shard:
        """Have the process that asks for a shard read its headers, which takes Python's lock."""
        try:
            send(connection, OpenShard(name))
            while not isinstance(answer := connection.recv(), OpenedShard):
                self._give(pool, connection, answer)
            return answer.shard
        except (EOFError, ConnectionError):
            return open_shard(name)  # others wait for it too

    def worker_pids(self) -> list[int]:
        """Return the first process and those that decode, which are known where there is /proc."""
        return [self._pool.process.pid, *self._pool.children()]

    def cpu_seconds(self) -> float:
        """Return the processors' seconds of these processes so far; 0 where there is no /proc."""
        try:
            paths = [Path(f"/proc/{pid}/stat") for pid in self._pool.children()]
            stats = [path.read_text().rpartition(")")[2] for path in paths]
        except OSError:
            return 0.0
        # proc(5): utime and stime are fields 14 and 15; the text begins behind the second.
        ticks = sum(sum(map(int, stat.split()[11:13])) for stat in stats)
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the processes."""
        self._is_closed = True
        with self._replacing:
            self._pool.close()


def joined(rows: Sequence[Rows], image: UInt8[np.ndarray, "rows H W 3"]) -> Rows:
    """Return runs of rows as one, whose images lie in `image` already."""
    return Rows(
        image=image,
        text=np.concatenate([r.text for r in rows]),
        caption_id=np.concatenate([r.caption_id for r in rows]),
        valid=np.concatenate([r.valid for r in rows]),
        key=[key for r in rows for key in r.key],
        skipped=[skipped for r in rows for skipped in r.skipped],
        negatives=joined_negatives(rows),
    )


def send(connection: Connection, message: object) -> None:
    """Send what `Connection.recv` receives; its own `send` makes a pickler in Python."""
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
