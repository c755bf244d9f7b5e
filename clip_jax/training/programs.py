"""The programs of a run: compiled ahead of the call that needs them, timed and counted."""

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from clip_jax.parallel.distributed import print_on_main

COMPILE_AHEAD = ("auto", "all", "none")
"""The choices of what is compiled before it is needed."""

_CACHE_HIT = "/jax/compilation_cache/cache_hits"
_hits = threading.local()


def _count_hit(event: str, **_: Any) -> None:
    """Count, in the thread that compiles, the programs that were read instead."""
    if event == _CACHE_HIT:
        _hits.count = getattr(_hits, "count", 0) + 1


jax.monitoring.register_event_listener(_count_hit)


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program, how long it took to get, and whether it was read from the cache's folder."""

    call: Callable[..., Any]
    seconds: float
    was_read: bool


class ProgramCompiler:
    """Compiles programs now or in a thread beside the run, and counts them.

    It is a context manager: at its end what is not begun is left, and what is begun is waited for,
    because a process cannot leave in the middle of it. An error is told first.

    Attributes:
      programs: those that there are, in the order they were ready.

    Args:
      folder: where JAX keeps programs, for `summary`; empty is nowhere.
    """

    def __init__(self, folder: str) -> None:
        self.programs: list[CompiledProgram] = []
        self._folder = folder
        self._asked = self._prepared = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compile")

    def compile(self, function: Any, *args: Any) -> CompiledProgram:
        """Trace and compile a jitted function for arguments, or shapes, like these."""
        start, hits = time.perf_counter(), getattr(_hits, "count", 0)
        call = function.lower(*args).compile()
        seconds = time.perf_counter() - start
        program = CompiledProgram(call, seconds, getattr(_hits, "count", 0) > hits)
        self.programs.append(program)
        return program

    def prepare(self, name: str, function: Any, *args: Any) -> Future:
        """Compile in the thread, after what was given before, and print a line then."""
        self._asked += 1
        return self._thread.submit(self._prepare, name, function, *args)

    def _prepare(self, name: str, function: Any, *args: Any) -> CompiledProgram:
        program = self.compile(function, *args)
        self._prepared += 1
        how = "read" if program.was_read else "compiled"
        print_on_main(
            f"{how} in {program.seconds:.0f} s: {name} ({self._prepared} of {self._asked} ahead)"
        )
        return program

    def metrics(self) -> dict[str, float]:
        """Return how many programs were compiled and read up to now, and the seconds they took."""
        programs = list(self.programs)
        read = sum(program.was_read for program in programs)
        return {
            "startup/programs_compiled": len(programs) - read,
            "startup/programs_read": read,
            "startup/compile_seconds": sum(program.seconds for program in programs),
        }

    def summary(self) -> str:
        """Return a few words on the programs up to now."""
        compiled, read, seconds = self.metrics().values()
        source = f", {read} read from {self._folder}" if self._folder else ""
        return f"{compiled} programs compiled{source} in {seconds:.1f} s"

    def __enter__(self) -> "ProgramCompiler":
        return self

    def __exit__(self, error: type[BaseException] | None, *exc: object) -> None:
        self._thread.shutdown(wait=error is None, cancel_futures=True)


class ShapedPrograms:
    """A jitted function of (variables, rows), one program for each shape of the rows.

    Called, it is the function. A shape that was not prepared is compiled when it comes, as it is
    where the thread has not begun with it.

    Args:
      function: jitted; the variables always have the same shapes.
      compiler: compiles and counts.
    """

    def __init__(self, function: Any, compiler: ProgramCompiler) -> None:
        self._function = function
        self._compiler = compiler
        self._programs: dict[Any, CompiledProgram] = {}
        self._ahead: dict[Any, Future] = {}

    def prepare(self, name: str, variables: Any, rows: Any) -> None:
        """Compile for `rows` beside what the process does meanwhile.

        Both are shapes with their shardings, as the calls will have them; `name` is for people.
        """
        self._ahead[_key(rows)] = self._compiler.prepare(name, self._function, variables, rows)

    def __call__(self, variables: Any, rows: Any) -> Any:
        """Return what the function returns."""
        key = _key(rows)
        program = self._programs.get(key)
        if program is None:
            ahead = self._ahead.pop(key, None)
            if ahead is None or ahead.cancel():
                program = self._compiler.compile(self._function, variables, rows)
            else:
                program = ahead.result()
            self._programs[key] = program
        return program.call(variables, rows)


def _key(rows: Any) -> Any:
    """Return what tells the programs of a function apart."""
    return tuple((x.shape, x.dtype) for x in jax.tree.leaves(rows))
