"""The machine: its devices, its memory, and what the file system of a folder can do."""

import contextlib
import dataclasses
import fcntl
import os
import platform
import shutil
import tempfile
from pathlib import Path

from clip_jax.files import sync

LEAST_FREE_BYTES = 1 << 30
"""Below so much free space, a checkpoint is not likely to fit."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The host.

    Attributes:
      system: its operating system and processor.
      python: the version of Python.
      cores: the cores that this process may use.
      memory_bytes, free_bytes: in all, and available now; 0 where the system does not say it.
    """

    system: str
    python: str
    cores: int
    memory_bytes: int
    free_bytes: int


@dataclasses.dataclass(frozen=True)
class Devices:
    """JAX's devices in this process.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: what the first one says it is.
      count: how many there are.
      memory_bytes: what one of them lets JAX have; 0 where it does not say it.
      problems: each a line that says what to do.
    """

    platform: str
    kind: str
    count: int
    memory_bytes: int
    problems: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class FileSystem:
    """What a folder's file system can do.

    Attributes:
      folder: the folder, or the nearest above it that exists.
      free_bytes: the space that is left.
      writes, syncs, locks, renames: whether a file could be written, brought onto the disk with its
        folder, locked, and put into another's place.
      problems: each a line that says what to do.
    """

    folder: str
    free_bytes: int
    writes: bool
    syncs: bool
    locks: bool
    renames: bool
    problems: tuple[str, ...]


def look_at_machine() -> Machine:
    """Return what the host is."""
    memory = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                memory[name] = int(value.split()[0]) * 1024
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        memory_bytes=memory.get("MemTotal", 0),
        free_bytes=memory.get("MemAvailable", 0),
    )


def look_at_devices(plugins: bool) -> Devices:
    """Start JAX and return its devices.

    Args:
      plugins: whether a plug-in for other devices than the CPU is installed.
    """
    try:
        import jax

        devices = jax.devices()
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        return Devices("", "", 0, 0, (f"JAX does not start ({reason}); see the versions above",))
    stats: dict[str, int] = {}
    with contextlib.suppress(RuntimeError, NotImplementedError):
        stats = devices[0].memory_stats() or {}
    found = Devices(
        devices[0].platform,
        devices[0].device_kind,
        len(devices),
        stats.get("bytes_limit", 0),
    )
    chosen = os.environ.get("JAX_PLATFORMS", "")
    if plugins and found.platform == "cpu" and not chosen:
        problem = (
            "a plug-in is installed and JAX runs on the CPU: see that the driver is there "
            "(nvidia-smi) and nothing else holds the device; JAX_PLATFORMS=cpu takes the CPU"
        )
        return dataclasses.replace(found, problems=(problem,))
    return found


def look_at_file_system(folder: str | Path) -> FileSystem:
    """Try in a folder what checkpoints and the lock of a run need; nothing stays there.

    A folder that does not exist is not made: the nearest above it is tried.
    """
    place = Path(folder).expanduser().absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    can = dict.fromkeys(("writes", "syncs", "locks", "renames"), False)
    problems: list[str] = []
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".clip_jax_doctor_") as inside:
            can, problems = _try_files(Path(inside))
    except OSError as error:
        problems = [f"{place} cannot be written ({error.strerror}): take another --workdir"]
    if free < LEAST_FREE_BYTES:
        problems.append(f"{place} has {free / 2**30:.1f} GiB left: checkpoints may not fit")
    return FileSystem(str(place), free, **can, problems=tuple(problems))


def _try_files(folder: Path) -> tuple[dict[str, bool], list[str]]:
    """Return what works in the folder, and a line for each thing that does not."""
    path = folder / "file"
    path.write_bytes(b"0" * 4096)
    can = {"writes": True, "syncs": True, "locks": True, "renames": True}
    problems = []

    def attempt(name: str, consequence: str, *actions) -> None:
        try:
            for action in actions:
                action()
        except OSError as error:
            can[name] = False
            problems.append(f"{folder.parent}: {consequence} ({error.strerror})")

    with path.open("rb") as file:
        attempt(
            "locks",
            "no locks, so that nothing keeps a second run out of a work folder; take a local disk",
            lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
        )
    attempt(
        "syncs",
        "no fsync, so that a checkpoint may be lost with the power; take another disk",
        lambda: sync(path),
        lambda: sync(folder),
    )
    attempt(
        "renames",
        "no renaming, which makes a file's change whole; take another disk",
        lambda: path.replace(folder / "other"),
    )
    return can, problems
