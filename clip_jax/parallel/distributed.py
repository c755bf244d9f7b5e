"""Several processes as one run: which of them this is, and what they exchange.

A run of one process joins nothing, and every function here is then the plain thing (`gather` a list
of one, `print_on_main` a print). With several, JAX's coordination service, which lives in process
0, carries host-side messages; arrays travel by collectives.
"""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.errors import UserError, plain
from clip_jax.files import make_folder
from clip_jax.parallel.jax_internals import (
    coordination_client,
    devices_started,
    process_count,
    process_index,
)

# Keys of the coordination service.
_SHARED, _COUNTS = "clip_jax/shared/", "clip_jax/counts/"
FOREVER_MS = 30 * 24 * 3600 * 1000
"""The watchdog ends a wait for the dead, not a time limit."""

_rounds = itertools.count()


def is_first() -> bool:
    """Return whether this is process 0, which alone writes files and prints."""
    return process_index() == 0


def print_on_main(text: str) -> None:
    """Print on process 0."""
    if is_first():
        print(plain(text), flush=True)


def gather(value: Any) -> list[Any]:
    """Return every process's value (anything JSON holds), in the order of the processes.

    All have to call it: it ends when the last one has. It starts no device, and a value may be many
    megabytes: process 0 forgets it when all have read it.

    Raises:
      UserError: the processes have not joined.
    """
    if process_count() == 1:
        _check_alone()
        return [value]
    client, number = coordination_client(), next(_rounds)
    key = f"{_SHARED}{number}"
    client.key_value_set(f"{key}/{process_index()}", json.dumps(value))
    if is_first():
        keys = [f"{key}/{i}" for i in range(process_count())]
        values = [client.blocking_key_value_get(k, FOREVER_MS) for k in keys]
        # Who takes part in this round has read the answer of the one before.
        if number:
            client.key_value_delete(f"{_SHARED}{number - 1}")
        client.key_value_set(f"{key}/all", f"[{', '.join(values)}]")
    return json.loads(client.blocking_key_value_get(f"{key}/all", FOREVER_MS))


def _check_alone() -> None:
    """Raise UserError if JAX counts several processes (as on a TPU pod) that have not joined."""
    if devices_started() and jax.process_count() > 1:
        raise UserError(
            f"JAX counts {jax.process_count()} processes that have not joined each other; call "
            "jax.distributed.initialize() before anything else"
        )


def from_first(value: Any) -> Any:
    """Return process 0's value, on every process; all have to call it."""
    return gather(value if is_first() else None)[0]


def make_shared_folder(folder: str | Path, *, flag: str) -> Path:
    """Make a folder on process 0, where it is not there, and return it when all processes see it.

    Raises:
      UserError: it cannot be made, or not be seen; the message begins with the flag that names it.
    """
    if is_first():
        make_folder(folder, flag=flag)
    gather(None)
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{flag} {folder} was made by process 0 and is not there for process "
            f"{process_index()}; give one on a file system that all machines share"
        )
    return folder


def agree(named: Mapping[str, Any]) -> None:
    """Check that every process has the same values.

    Raises:
      UserError: one differs; the line names it with both values.
    """
    here = json.loads(json.dumps(dict(named)))
    for index, other in enumerate(gather(here)):
        for name, value in here.items():
            if other.get(name) != value:
                raise UserError(
                    f"process {index} has {name} = {json.dumps(other.get(name))[:80]} and process "
                    f"{process_index()} has {json.dumps(value)[:80]}; start all processes with "
                    "the same command on the same data"
                )


def total(part: int, counts: Mapping[str, int]) -> Counter[str]:
    """Return the sum of the counts of all parts, on process 0; on the others, their own counts.

    Nobody waits: the counts that the others posted last are taken.
    """
    if process_count() == 1:
        return Counter(counts)
    client = coordination_client()
    client.key_value_set(f"{_COUNTS}{part}", json.dumps(dict(counts)), True)
    if not is_first():
        return Counter(counts)
    posted = [Counter(json.loads(text)) for _, text in client.key_value_dir_get(_COUNTS)]
    return sum(posted, Counter())


class Announcement:
    """A row of small integers from every process.

    It is a collective of its own, dispatched before a step that is to run meanwhile, so that
    `result` has nothing to wait for by the time the next step needs it.
    """

    def __init__(self, row: Sequence[int]) -> None:
        self._rows: Any = np.array([row], np.int32)
        if process_count() > 1:
            by_process, to_all = _row_exchange()
            part = jax.device_put(self._rows, jax.local_devices()[0])
            rows = jax.make_array_from_single_device_arrays(
                (process_count(), len(row)), by_process, [part]
            )
            self._rows = settle(to_all(rows))

    def result(self) -> np.ndarray:
        """Return the rows of all processes, int32 [processes, numbers]."""
        if process_count() == 1:
            return self._rows
        return np.asarray(self._rows.addressable_data(0))


@functools.cache
def _row_exchange() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """Return a row on one device of each process, and the program that copies all rows to all."""
    one_each = {d.process_index: d for d in reversed(jax.devices())}
    mesh = Mesh(np.array([one_each[i] for i in range(process_count())]), ("process",))
    to_all = jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, P()))
    return NamedSharding(mesh, P("process")), to_all


def settle(tree: Any) -> Any:
    """Wait for arrays, on CPUs with several processes only; return them.

    There a collective holds a thread of a pool that is as large as the machine has cores: with
    a few programs in flight, each process can fill its pool with collectives that wait for
    programs that the other has not started, for ever.
    """
    if process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(tree)
    return tree
