"""A checkpoint that cannot be written is one line, instead of Orbax's pages of it."""

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError, write_remedy


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Raise UserError where Orbax says that a file of a checkpoint cannot be written."""
    try:
        yield
    except (OSError, ValueError) as error:
        # What was still to be written ends with Python, which tells of its tasks.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        # TensorStore's errors are ValueErrors, whose text ends in the system's own.
        reason = str(error).rpartition(": ")[2].partition(" [os_error")[0]
        reason = " ".join(reason.split())[:200]
        raise UserError(
            f"a checkpoint in {folder} cannot be written ({reason}); those before it stay; "
            f"{write_remedy(reason)} and run the same command again"
        ) from None


@functools.cache
def mute_orbax() -> None:
    """Print nothing of what the threads of a save that failed say.

    The error itself comes to whoever waits for the save. The threads say it again, log it, call an
    event loop that is closed by then, and leave coroutines behind that end with Python.
    """
    # It warns through absl too, about choices that are made here on purpose.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def unraisablehook(args: Any) -> None:
        is_loop = args.exc_type is RuntimeError and str(args.exc_value) == "Event loop is closed"
        is_write = getattr(args.object, "__qualname__", "").startswith("async_serialize")
        if not (is_loop or is_write):
            hook(args)

    sys.unraisablehook = unraisablehook
