"""TensorBoard's file of a run, written by the thread that calls.

`tensorboardX.SummaryWriter` writes in a thread of its own: on a full disk that thread ends without
a word, its queue fills, and the next call waits for ever.
"""

import errno
import os
import socket
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c


class TensorBoardFile:
    """A file of scalars. One that cannot be written is told once and dropped.

    Args:
      folder: where the file is made.
      purge_step: TensorBoard forgets what earlier files of the folder say from this step on.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        self._path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file: BinaryIO | None = None
        try:
            self._file = self._path.open("wb", buffering=0)
        except OSError as error:
            self._drop(error)
        self._write(
            Event(file_version="brain.Event:2"),
            Event(step=purge_step, file_version="brain.Event:2"),
            Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)),
        )

    def add_scalars(self, step: int, scalars: dict[str, float]) -> None:
        """Append the numbers of a step."""
        self._write(
            *(Event(step=step, summary=summary.scalar(n, value)) for n, value in scalars.items())
        )

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    def _write(self, *events: Event) -> None:
        if self._file is None or not events:
            return
        records = b"".join(_record(event) for event in events)
        try:
            if self._file.write(records) != len(records):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        print(
            f"{self._path} cannot be written ({error.strerror or error}); the run goes on without "
            "TensorBoard's file",
            flush=True,
        )
        self.close()


def _record(event: Event) -> bytes:
    """Return an event as a TFRecord: its length, that one's checksum, the event, its checksum."""
    event.wall_time = time.time()
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    check_length, check_data = (struct.pack("<I", masked_crc32c(x)) for x in (length, data))
    return length + check_length + data + check_data
