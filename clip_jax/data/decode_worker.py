"""The processes that decode for `decode_processes.DecodeProcesses`, which starts the first of them.

That one imports what all need and then becomes as many as are wanted, which so share the memory.
Their threads answer requests for runs of rows until their sockets are closed: when the loader ends,
or its process does, however that may be.
"""

import contextlib
import contextvars
import gc
import mmap
import os
import pickle
import signal
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any, overload

import numpy as np
from jaxtyping import Int64, UInt8

from clip_jax.data.dataset import LostShard
from clip_jax.data.decode_processes import (
    BEAT_SECONDS,
    Failed,
    NeedFile,
    NeedShard,
    OpenedShard,
    OpenShard,
    RowsRequest,
    WorkerSetup,
    send,
)
from clip_jax.data.formats import remote
from clip_jax.data.sample_reader import SampleReader, make_training_reader
from clip_jax.data.shards import ConcatShards, Shard
from clip_jax.data.sources import open_shard
from clip_jax.errors import mute_notes
from clip_jax.host_memory import keep_heap

_connection: contextvars.ContextVar[Connection] = contextvars.ContextVar("connection")
"""The socket of a thread, and of those it starts: what reads a shard asks it for what it lacks."""


class BorrowedShards(Sequence[Shard]):
    """The loader's shards, each asked for when it is needed; the longest unused goes first."""

    def __init__(self, count: int, limit: int):
        self._count, self._limit = count, limit
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._locks: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | Sequence[Shard]:
        if isinstance(number, slice):
            raise TypeError("shards are borrowed one by one")
        with self._lock:
            lock = self._locks.setdefault(number, threading.Lock())
        with lock:  # one thread asks for it, the others wait
            with self._lock:
                shard = self._shards.pop(number, None)
                if shard is not None:
                    self._shards[number] = shard  # now the newest
                    return shard
            shard = _ask(NeedShard(number))
            if isinstance(shard, LostShard):
                return shard  # the loader's process knows when it is to be tried again
            with self._lock:
                self._shards[number] = shard
                while len(self._shards) > self._limit:
                    self._shards.popitem(last=False)
            return shard


class BorrowedFiles(remote.DiskCache):
    """Remote files, fetched by the loader's process for all."""

    def open(self, name: str, write: Callable[[str], None]) -> int:
        """Return a descriptor of a remote file; other files are this process's own."""
        if not remote.is_url(name):
            return super().open(name, write)
        error = _ask(NeedFile(name))
        if error is not None:
            raise error
        return recv_handle(_connection.get())


def _ask(need: NeedShard | NeedFile) -> Any:
    connection = _connection.get()
    send(connection, need)
    while isinstance(answer := connection.recv(), OpenShard):
        try:
            opened: OpenedShard | Failed = OpenedShard(open_shard(answer.name))
        except (EOFError, ConnectionError):
            raise
        except Exception as e:
            opened = Failed.of(e)
        send(connection, opened)
    return answer


_MAPPED_AT_ONCE = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
"""Without the second, Linux's, the first image in each place of each buffer costs each process
37 page faults, which is 60 microseconds: more than all of the loader's work for a pair."""


class Buffers:
    """The batches' memory, mapped buffer by buffer."""

    def __init__(self, fd: int, shape: tuple[int, ...], stride: int):
        self._fd, self._shape, self._stride = fd, shape, stride
        self._buffers: dict[int, UInt8[np.ndarray, "b H W 3"]] = {}

    def __getitem__(self, number: int) -> UInt8[np.ndarray, "b H W 3"]:
        if number not in self._buffers:
            memory = mmap.mmap(
                self._fd, self._stride, flags=_MAPPED_AT_ONCE, offset=number * self._stride
            )
            flat = np.frombuffer(memory, np.uint8, int(np.prod(self._shape)))
            self._buffers[number] = flat.reshape(self._shape)
        return self._buffers[number]


def serve(connection: Connection, reader: SampleReader, buffers: Buffers) -> None:
    """Answer requests until the socket is closed."""
    _connection.set(connection)
    try:
        while True:
            request: RowsRequest = connection.recv()
            send(connection, _answer(request, reader, buffers, connection))
    except (EOFError, ConnectionError):
        return
    except BaseException:  # nobody would answer on this socket, and the loader waits for one
        traceback.print_exc()
        os._exit(1)


def _answer(
    request: RowsRequest, reader: SampleReader, buffers: Buffers, connection: Connection
) -> object:
    """Read a run of rows; return its fields without the images, or what went wrong."""
    last_row = request.first_row + len(request.ids)
    try:
        image = buffers[request.buffer][request.first_row : last_row]
        # While an image is decoded the loader sends nothing: what comes then is its end.
        rows = reader.read(
            request.ids, request.epochs, image, is_wanted=lambda: not connection.poll(0)
        )
    except (EOFError, ConnectionError):
        raise
    except Exception as e:
        return Failed.of(e)
    return {
        name: value for name, value in vars(rows).items() if name != "image" and value is not None
    }


def run_worker(
    connections: Sequence[Connection],
    setup: WorkerSetup,
    fd: int,
    beats: Int64[np.ndarray, " 1"],
) -> None:
    """Serve each of these sockets by a thread, until all are closed; count in `beats` meanwhile."""
    shards = BorrowedShards(len(setup.starts) - 1, setup.cached_shards)
    reader = make_training_reader(setup.settings, ConcatShards(shards, setup.starts))
    buffers = Buffers(fd, setup.image_shape, setup.stride)
    threads = [
        threading.Thread(target=serve, args=(connection, reader, buffers))
        for connection in connections
    ]
    beats += 1  # before a thread can hold Python's lock for ever
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            beats += 1
            thread.join(BEAT_SECONDS)


def main(argv: Sequence[str]) -> None:
    """Fork a process for every argument but the first two, and wait for them.

    Args:
      argv: the descriptors of the buffers' file and of the signs of life, and for every process the
        descriptors of its sockets, with commas. The first of all sockets gives the `WorkerSetup`.
    """
    # Ctrl-C and a scheduler's signal go to all processes; this one ends when its sockets close.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    fd, beats_fd = map(int, argv[:2])
    workers = [[Connection(int(socket)) for socket in group.split(",")] for group in argv[2:]]
    beats = np.frombuffer(mmap.mmap(beats_fd, 8 * len(workers)), np.int64)
    try:
        setup: WorkerSetup = pickle.loads(workers[0][0].recv_bytes())
    except EOFError:
        return
    mute_notes()
    keep_heap()  # a file and an image a pair: pages fresh from the kernel each time cost as much
    remote.CACHE = BorrowedFiles()
    gc.freeze()  # what was imported stays, shared by all
    pids = [_fork(k, workers, setup, fd, beats) for k in range(len(workers))]
    for connection in (c for worker in workers for c in worker):
        connection.close()
    for _ in pids:
        _, status = os.wait()
        if status:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code > 0 else 128 - code)


def _fork(
    k: int,
    workers: Sequence[Sequence[Connection]],
    setup: WorkerSetup,
    fd: int,
    beats: Int64[np.ndarray, " processes"],
) -> int:
    """Fork worker `k`, which never returns; no thread has been started here."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for other, connections in enumerate(workers):
            for connection in connections if other != k else ():
                connection.close()
        run_worker(workers[k], setup, fd, beats[k : k + 1])
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
