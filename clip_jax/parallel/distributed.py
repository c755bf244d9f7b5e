"""Several processes as one run: who joins, who speaks, what they tell each other, how they end.

A run of one process never gets here: it joins nothing, and every function below is then the plain
thing (`gather` a list of one, `print_on_main` a print). With several, JAX's coordination service,
which lives in process 0, carries small host-side messages; arrays travel by collectives.

How long things may take, all settable on the command line of `clip_jax.main`:
  joining     300 s until all processes have found the coordinator (`--init_seconds`)
  heartbeat    60 s without a sign of life and a process counts as dead (`--heartbeat_seconds`)
  a step     1800 s, and a process that is still in it prints every thread's stack and ends
             (`--hang_seconds`); a first step compiles, which takes minutes for a big model
"""

import dataclasses
import faulthandler
import functools
import itertools
import json
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE, UserError, short
from clip_jax.parallel.cluster import (
    alone_on_its_machine,
    check_flags,
    detected_processes,
    wait_for,
)

# Keys of the coordination service.
_END, _ALIVE, _HEARD = "clip_jax/end", "clip_jax/alive/", "clip_jax/heard/"
_SHARED, _COUNTS = "clip_jax/shared/", "clip_jax/counts/"
_WELL = "well"
_FOREVER_MS = 30 * 24 * 3600 * 1000  # the watch ends a wait for the dead, not a time limit
_FAREWELL_SECONDS = 5.0
_BEAT_SECONDS = 5.0

_rounds = itertools.count()
_ending = threading.Event()
"""Set when this process has said why it ends, so that its watch has nothing to add."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds until a process gives up.

    Attributes:
      init: waiting for all processes to join.
      heartbeat: without a sign of life until a process counts as dead.
      hang: in one step until a process prints its stacks and ends; 0 is never.
    """

    init: int = 300
    heartbeat: int = 60
    hang: int = 1800


_limits = Limits()


def process_index() -> int:
    """This process's number; unlike `jax.process_index` it starts no device."""
    return global_state.process_id


def process_count() -> int:
    """The processes of the run."""
    return global_state.num_processes


def is_first() -> bool:
    """Whether this is process 0, which alone writes files and prints."""
    return process_index() == 0


def print_on_main(text: str) -> None:
    """Print on process 0."""
    if is_first():
        print(text, flush=True)


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    index: int | None = None,
    device_ids: Sequence[int] | None = None,
    limits: Limits = Limits(),
) -> None:
    """Join the run's other processes, before any device is started; alone, do nothing.

    Without arguments the environment says who they are: JAX knows SLURM, Open MPI, TPU pods and
    Kubernetes jobs.

    Raises:
      UserError: the arguments are half of what is needed, or the others cannot be reached.
    """
    global _limits
    check_flags(coordinator, processes, index)
    if processes == 1 or (processes is None and detected_processes() < 2):
        return
    if coordinator is not None and device_ids is None:
        device_ids = []  # all of the machine's
    elif device_ids is None and alone_on_its_machine(os.environ):
        # JAX would take one device a process under SLURM and Open MPI; ours drives them all.
        device_ids = []
    _limits = limits
    # JAX's own notifier would swallow SIGTERM; `signals.py` and the host loop handle it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if coordinator is not None and index:
            wait_for(coordinator, limits.init)  # JAX's own wait ends in an abort with a stack
        jax.distributed.initialize(
            coordinator,
            processes,
            index,
            device_ids,
            initialization_timeout=limits.init,
            # Ours comes first, with a sentence; JAX's aborts with a stack.
            heartbeat_timeout_seconds=limits.heartbeat + 30,
        )
    except Exception as error:  # gRPC's, the socket's, a cluster's own
        where = global_state.coordinator_address or coordinator or "unknown"
        raise UserError(
            f"not all processes joined within {limits.init} s (coordinator {where}): start all of "
            f"them, and let them reach process 0 at that port ({short(error)[:300]})"
        ) from None
    _arm()
    threading.Thread(target=_watch, name="clip_jax_watch", daemon=True).start()


# --- What processes tell each other


def gather(value: Any) -> list[Any]:
    """Every process's value (anything JSON holds), on every process, in their order.

    All have to call it: it ends when the last one has.
    """
    if process_count() == 1:
        return [value]
    client, round_ = _client(), next(_rounds)
    key = f"{_SHARED}{round_}"
    client.key_value_set(f"{key}/{process_index()}", json.dumps(value))
    if is_first():
        keys = [f"{key}/{i}" for i in range(process_count())]
        found = [json.loads(client.blocking_key_value_get(k, _FOREVER_MS)) for k in keys]
        client.key_value_set(f"{key}/all", json.dumps(found))
    return json.loads(client.blocking_key_value_get(f"{key}/all", _FOREVER_MS))


def from_first(value: Any) -> Any:
    """Process 0's value, on every process; all have to call it."""
    return gather(value if is_first() else None)[0]


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
    """The sum of the counts of all parts, on process 0; on the others, their own.

    Nobody waits: what the others told last is taken.
    """
    if process_count() == 1:
        return Counter(counts)
    client = _client()
    client.key_value_set(f"{_COUNTS}{part}", json.dumps(dict(counts)), True)
    if not is_first():
        return Counter(counts)
    told = [Counter(json.loads(text)) for _, text in client.key_value_dir_get(_COUNTS)]
    return sum(told, Counter())


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
        """int32 [processes, numbers]."""
        if process_count() == 1:
            return self._rows
        return np.asarray(self._rows.addressable_data(0))


@functools.cache
def _row_exchange() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """A row on one device of each process, and the program that copies all rows to all."""
    one_each = {d.process_index: d for d in reversed(jax.devices())}
    mesh = Mesh(np.array([one_each[i] for i in range(process_count())]), ("process",))
    to_all = jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, P()))
    return NamedSharding(mesh, P("process")), to_all


def settle(tree: Any) -> Any:
    """Wait for arrays, on CPUs with several processes only.

    There a collective holds a thread of a pool that is as large as the machine has cores: with
    a few programs in flight, each process can fill its pool with collectives that wait for
    programs that the other has not started, for ever.
    """
    if process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(tree)
    return tree


# --- How they end


def about_to_fail() -> None:
    """Say that this process will end with an error of its own, as all do: no other's word is
    needed. A `gather` afterwards makes sure that all have said so before the first one ends."""
    _ending.set()


def rearm() -> None:
    """Say that this process is alive: the time limit of a step starts again."""
    if process_count() > 1:
        _arm()


def stand_by() -> None:
    """No time limit from here on, for work that may take as long as it takes."""
    faulthandler.cancel_dump_traceback_later()


def _arm() -> None:
    if _limits.hang:
        faulthandler.dump_traceback_later(_limits.hang, exit=True)


@contextmanager
def ending_together() -> Iterator[None]:
    """An error in one process ends them all, with a line in each; a good end waits for all."""
    if process_count() == 1:
        yield
        return
    try:
        yield
        gather(None)
        if is_first():
            _client().key_value_set(_END, _WELL)
        _client().blocking_key_value_get(_END, _FOREVER_MS)
        stand_by()
    except UserError as error:
        _fail(str(error), EXIT_USAGE)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except jax.errors.JaxRuntimeError as error:
        # A collective breaks when a process is gone, before the watch can know which: let it say.
        time.sleep(_limits.heartbeat + 2 * min(_BEAT_SECONDS, _limits.heartbeat))
        traceback.print_exc()
        _fail(short(error), EXIT_ERROR)
    except Exception as error:
        traceback.print_exc()
        _fail(short(error), EXIT_ERROR)


def _fail(reason: str, code: int) -> None:
    """Print the reason, tell the others, and end this process."""
    _ending.set()
    print(f"error: process {process_index()}: {reason}", file=sys.stderr, flush=True)
    _post(f"process {process_index()} failed: {reason}")
    _leave(code)


def _post(word: str) -> None:
    # It fails where another process ended the run already, or the coordinator is gone.
    with suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(_END, word)


def _leave(code: int) -> None:
    """End this process without JAX's farewell, which waits for processes that may hang."""
    with suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_HEARD}{process_index()}", "", True)
        # The messages live in process 0: it stays until all have read them.
        end = time.monotonic() + _FAREWELL_SECONDS
        while is_first() and time.monotonic() < end:
            if len(_client().key_value_dir_get(_HEARD)) == process_count():
                break
            time.sleep(0.05)
    sys.stdout.flush()
    os._exit(code)


def _watch() -> None:
    """Give signs of life, and end this process when another has failed or gone silent."""
    client, beats = _client(), itertools.count()
    interval = min(_BEAT_SECONDS, _limits.heartbeat / 4)
    heard: dict[str, tuple[str, float]] = {}
    while True:
        try:
            client.key_value_set(f"{_ALIVE}{process_index()}", str(next(beats)), True)
            if is_first():
                _post_silent(client.key_value_dir_get(_ALIVE), heard, time.monotonic())
            word = client.blocking_key_value_get(_END, int(1000 * interval))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            word = "process 0, the coordinator, cannot be reached any more: it has died"
        if word == _WELL or _ending.is_set():
            return
        print(f"error: process {process_index()} ends: {word}", file=sys.stderr, flush=True)
        _leave(EXIT_ERROR)


def _post_silent(
    alive: Sequence[tuple[str, str]], heard: dict[str, tuple[str, float]], now: float
) -> None:
    """End the run when a process's sign of life has not changed for too long."""
    for key, beat in alive:
        if heard.get(key, ("", 0.0))[0] != beat:
            heard[key] = (beat, now)
        elif now - heard[key][1] > _limits.heartbeat:
            index = key.rpartition("/")[2]
            _post(
                f"process {index} of {process_count()} has given no sign of life for "
                f"{_limits.heartbeat} s: it was killed, or its machine is down or cut off"
            )


def _client() -> Any:
    return global_state.client
