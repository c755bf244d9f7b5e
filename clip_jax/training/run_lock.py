"""One run at a time in a work folder."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from clip_jax.errors import UserError
from clip_jax.parallel import distributed

LOCK_FILENAME = "run.lock"


@contextlib.contextmanager
def only_run(folder: Path, workdir: str | None = None) -> Iterator[None]:
    """Hold the work folder's lock, which the operating system drops when the process ends.

    Process 0 holds it for all. The file names its holder, and stays. On a file system without
    locks the run goes on, and says so. `workdir` is what the user calls the folder.

    Raises:
      UserError: another run has it, on every process.
    """
    name = workdir or str(folder)
    file, fault = _lock(folder, name) if distributed.is_first() else (None, None)
    try:
        fault = distributed.from_first(fault)
        if fault:
            raise UserError(fault)
        yield
    finally:
        if file is not None:
            os.close(file)


def _lock(folder: Path, name: str) -> tuple[int | None, str | None]:
    """Return the file that is locked, or why there is none: a message if another run has it."""
    path = folder / LOCK_FILENAME
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        print(f"{path} cannot be made ({error.strerror}); see that no other run uses {folder}")
        return None, None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(file, 1000).decode(errors="replace").strip() or "another process"
        os.close(file)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None, (
                f"--workdir {name} is in use by {holder}; wait for it, stop it, or give another"
            )
        print(f"{path} cannot be locked ({error.strerror}); see that no other run uses {folder}")
        return None, None
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file, None
