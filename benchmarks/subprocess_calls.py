"""Calls in a process of their own, taken as if they were here.

Two libraries in one process share its heap. A step of XLA asks for one block of gigabytes; where
the other's arrays have since been put into the hole that the last step's block left, the kernel
must find and clear fresh pages for it, which can cost as much as the step. No user's process has
two libraries.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Calls = dict[str, Callable[[], Any]]


def apart(make: Callable[..., tuple[Calls, Any]], *arguments: Any) -> tuple[Calls, Any]:
    """What `make` returns, made in a new process; the calls run there and return here.

    Args:
      make: a function of a module: (calls by name, what else is to be known of them).
      arguments: of `make`, sent there, as are the results here; nothing of JAX or PyTorch.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
    process.start()
    there.close()

    def ask(name: str | None) -> Any:
        try:
            here.send(name)
            return here.recv()
        except (EOFError, BrokenPipeError) as error:
            raise SystemExit(f"the process of {make.__name__} has ended; see above") from error

    names, about = ask(None)

    def call_of(name: str) -> Callable[[], Any]:
        return lambda: ask(name)

    return {name: call_of(name) for name in names}, about


def _serve(connection: Connection, make: Callable, arguments: tuple) -> None:
    """Answer until nobody asks any more."""
    calls, about = make(*arguments)
    try:
        while True:
            name = connection.recv()
            connection.send((list(calls), about) if name is None else calls[name]())
    except EOFError:
        return
