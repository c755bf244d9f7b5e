"""Compiled programs in a folder, so that a run that starts again reads them.

JAX writes such a folder too, but leaves a file that was cut off by a kill or a full disk, which it
then neither reads nor replaces. Here a file is whole or absent and its digest is checked, and what
is wrong with the folder is said in one line: the run goes on without it.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax

from clip_jax.files import check_local
from clip_jax.parallel.distributed import from_first, gather, is_first, print_on_main
from clip_jax.parallel.jax_internals import process_count, use_compilation_cache

MAX_BYTES = 10 * 2**30
"""The most that is left in a folder at a start; what was used last stays."""
MIN_COMPILE_SECONDS = 0.5
"""A program that compiles in less is not worth a file."""
LEFTOVER_SECONDS = 24 * 3600
"""A file that is still being written has changed since; an older one is left by a kill."""
_SUFFIX, _PARTIAL = ".program", ".partial"
_DIGEST_BYTES = hashlib.sha256().digest_size


class ProgramCache:
    """A folder of compiled programs, as JAX's compiler asks for one.

    Attributes:
      folder: where they lie; the processes of a run share it, and JAX lets process 0 write.

    Args:
      folder: see above.
      on_problem: takes one line on the first thing that is wrong with the folder.
    """

    def __init__(self, folder: Path, on_problem: Callable[[str], None]) -> None:
        self.folder = folder
        self._path = folder  # where JAX looks for it
        self._on_problem = on_problem
        self._lock = threading.Lock()
        self._has_problem = False

    def get(self, key: str) -> bytes | None:
        """Return a program; None where there is none, or none that can be read."""
        path = self._file(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._report(f"cannot be read ({error.strerror or error})")
            return None
        digest, program = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(program).digest() != digest:
            self._report(f"has a damaged file, {path.name}; that program is compiled again")
            return None
        with suppress(OSError):  # another run removed it, or may write alone
            os.utime(path)
        return program

    def put(self, key: str, value: bytes) -> None:
        """Write a program, in the place of an older file."""
        path = self._file(key)
        # Another run may be writing the same program.
        partial = path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL}")
        try:
            partial.write_bytes(hashlib.sha256(value).digest() + value)
            os.replace(partial, path)
        except OSError as error:
            self._report(f"takes no program ({error.strerror or error})")
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def prune(self, max_bytes: int = MAX_BYTES) -> None:
        """Remove the files that were not used for the longest time, until the rest fits.

        What kills left half-written goes, too. Other runs may prune at the same time.
        """
        oldest = time.time() - LEFTOVER_SECONDS
        for path in self.folder.glob(f"*{_SUFFIX}.*{_PARTIAL}"):
            with suppress(OSError):  # another run removed it, or may write alone
                if path.stat().st_mtime < oldest:
                    path.unlink()
        files = []
        for path in self.folder.glob("*" + _SUFFIX):
            with suppress(FileNotFoundError):  # another run removed it
                files.append((path.stat(), path))
        files.sort(key=lambda file: file[0].st_mtime)
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in files:
            if total <= max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= stat.st_size

    def _file(self, key: str) -> Path:
        return self.folder / (key + _SUFFIX)

    def _report(self, problem: str) -> None:
        with self._lock:
            is_new, self._has_problem = not self._has_problem, True
        if is_new:
            self._on_problem(f"the folder of compiled programs, {self.folder}, {problem}")


def start_program_cache(folder: str, workdir: Path) -> str:
    """Let JAX keep compiled programs from here on; return the folder, or "" where it keeps none.

    All processes call it. JAX_COMPILATION_CACHE_DIR in the environment comes first: then the folder
    is JAX's own business.

    Args:
      folder: "off", "none" or "" keeps none; "auto" is the user's cache folder, or with several
        processes, whose machines need not share that, a folder in `workdir`.
      workdir: the folder of the run.

    Raises:
      UserError: the folder is a URL.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return os.environ["JAX_COMPILATION_CACHE_DIR"]
    if folder in ("", "off", "none"):
        return ""
    check_local({"config.train.compile_cache": folder})
    path = _auto_folder(workdir) if folder == "auto" else Path(folder).expanduser()
    cache = ProgramCache(path, print_on_main)
    problem = _prepare(cache) if is_first() else ""
    problem = from_first(problem)
    # Every process has to see it.
    if not problem and not all(gather(path.is_dir())):
        problem = "is not there for all processes"
    if problem:
        print_on_main(
            f"the folder of compiled programs, {path}, {problem}: nothing is kept for a next "
            "start; name another with config.train.compile_cache"
        )
        return ""
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    # XLA's own caches would lie in the folder, and its path be in every program's key: of a folder
    # that was moved nothing would be read.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    use_compilation_cache(cache)
    return str(path)


def _auto_folder(workdir: Path) -> Path:
    if process_count() > 1:
        return workdir / "programs"
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "clip_jax" / "programs"


def _prepare(cache: ProgramCache) -> str:
    """Make the folder and remove what is too much; return what is wrong with it."""
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        cache.prune()
    except OSError as error:
        return f"cannot be used ({error.strerror or error})"
    if not os.access(cache.folder, os.W_OK | os.X_OK):
        return "cannot be written to"
    return ""
