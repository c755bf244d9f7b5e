"""Calls that run in a process of their own and are made as if they were local.

Two libraries in one process share its heap. A step of XLA asks for one block of gigabytes; where
the other's arrays have since been put into the hole that the last step's block left, the kernel
must find and clear fresh pages for it, which can cost as much as the step. No user's process has
two libraries.
"""

import functools
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Calls = dict[str, Callable[[], Any]]
"""Functions by name."""


def in_subprocess(
    make_calls: Callable[..., tuple[Calls, Any]], *arguments: Any
) -> tuple[Calls, Any]:
    """Call `make_calls` in a new process and return what it returns; its calls run there too.

    Args:
      make_calls: a function of a module that returns (calls by name, facts about them).
      arguments: its arguments; they and all results are pickled, so nothing of JAX or PyTorch.

    Raises:
      SystemExit: the process has ended.
    """
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    process = context.Process(target=_serve, args=(child, make_calls, arguments), daemon=True)
    process.start()
    child.close()

    def request(name: str | None) -> Any:
        try:
            parent.send(name)
            return parent.recv()
        except (EOFError, ConnectionError) as error:
            raise SystemExit(
                f"the process of {make_calls.__name__} has ended; see above"
            ) from error

    names, facts = request(None)
    return {name: functools.partial(request, name) for name in names}, facts


def _serve(connection: Connection, make_calls: Callable, arguments: tuple) -> None:
    """Run the calls that the other end names, until it closes; None asks for the names."""
    calls, facts = make_calls(*arguments)
    try:
        while True:
            name = connection.recv()
            connection.send((list(calls), facts) if name is None else calls[name]())
    except EOFError:
        return
