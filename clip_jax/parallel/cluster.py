"""Joining the processes of a run, which flags or the environment of a cluster name."""

import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from clip_jax.errors import EXIT_USAGE, UserError, short
from clip_jax.parallel import watchdog
from clip_jax.parallel.jax_internals import cluster_kinds, coordinator_address
from clip_jax.parallel.limits import LIMITS, Limits

T = TypeVar("T")

_LATER_SECONDS = 60
"""How much longer JAX's own limits are than ours."""


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    index: int | None = None,
    device_ids: Sequence[int] | None = None,
    limits: Limits = LIMITS,
) -> None:
    """Join the run's other processes, before any device is started; alone, do nothing.

    Without arguments the environment says who they are: JAX knows SLURM, Open MPI, TPU pods and
    Kubernetes jobs.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: their number.
      index: this process's number.
      device_ids: the GPUs of the machine that this process drives; None is all of them, or those
        that JAX gives it.
      limits: how long the processes wait for each other.

    Raises:
      UserError: the arguments are half of what is needed, or the others cannot be reached.
    """
    check_flags(coordinator, processes, index)
    if processes == 1 or (processes is None and detected_processes() < 2):
        return
    if coordinator is not None and device_ids is None:
        device_ids = []  # all of the machine's
    elif device_ids is None and alone_on_its_machine(os.environ):
        # JAX would take one device a process under SLURM and Open MPI; ours drives them all.
        device_ids = []
    # JAX's own notifier would swallow SIGTERM; `signals.py` and the host loop handle it.
    jax.config.update("jax_enable_preemption_service", False)
    joined = threading.Event()
    try:
        if coordinator is not None and index:
            wait_for(coordinator, limits.init)  # JAX's own wait ends in an abort with a stack
        name = "" if processes is None else f" of {processes}"
        give_up = f"not all{name} processes joined within {limits.init} s (--init-seconds)"
        threading.Thread(target=_give_up, args=(joined, limits.init, give_up), daemon=True).start()
        jax.distributed.initialize(
            coordinator,
            processes,
            index,
            device_ids,
            # Ours comes first, with a sentence; JAX's aborts with a stack.
            initialization_timeout=limits.init + _LATER_SECONDS,
            heartbeat_timeout_seconds=limits.heartbeat + _LATER_SECONDS,
        )
    except Exception as error:  # gRPC's, the socket's, a cluster's own
        where = coordinator_address() or coordinator or "unknown"
        raise UserError(
            f"not all processes joined within {limits.init} s (coordinator {where}): start all of "
            f"them, and let them reach process 0 at that port ({short(error)[:300]})"
        ) from None
    finally:
        joined.set()
    watchdog.start(limits)


def _give_up(joined: threading.Event, seconds: float, reason: str) -> None:
    """End the process if the others have not joined in time: it waits in native code for them."""
    if joined.wait(seconds):
        return
    where = coordinator_address() or "unknown"
    line = f"error: {reason}; start all of them, and let them reach process 0 at {where}"
    print(line, file=sys.stderr, flush=True)
    os._exit(EXIT_USAGE)


def check_flags(coordinator: str | None, processes: int | None, index: int | None) -> None:
    """Raise UserError if the flags are half of what is needed, or say what cannot be."""
    given = {"--coordinator": coordinator, "--num-processes": processes, "--process-id": index}
    if processes == 1 and coordinator is None:
        return
    missing = [flag for flag, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UserError(
            f"{', '.join(given)} go together, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; give all three, or none on a cluster"
        )
    if coordinator is None or processes is None or index is None:
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator {coordinator} is not HOST:PORT, such as node0:9876")
    if not 0 <= index < processes:
        raise UserError(
            f"--process-id {index} is not among --num-processes {processes}: they count from 0"
        )


def wait_for(address: str, seconds: float) -> None:
    """Wait until something listens at HOST:PORT.

    Raises:
      OSError: nothing does in time; it is the error of the last try.
    """
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def detected_processes() -> int:
    """Return the number of processes by the cluster's environment; 1 without a cluster."""
    return _ask_cluster(lambda kind: kind.get_process_count(), without=1)


def detected_place() -> tuple[int, int]:
    """Return (this process, processes) by the cluster's environment; (0, 1) without a cluster."""
    return _ask_cluster(
        lambda kind: (kind.get_process_id(), kind.get_process_count()), without=(0, 1)
    )


def _ask_cluster(question: Callable[[Any], T], *, without: T) -> T:
    """Return the answer of the cluster's interface, or `without` where there is no cluster.

    Raises:
      UserError: there is one, and its interface fails.
    """
    for kind in cluster_kinds():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Kubernetes without its package
                if kind.is_env_present():
                    return question(kind)
        except Exception as error:  # whatever the cluster's interface raises
            raise UserError(
                f"this looks like {kind.__name__} and its processes cannot be counted "
                f"({short(error)[:300]}); give --coordinator, --num-processes and --process-id, or "
                "--num-processes 1 for a run by itself"
            ) from None
    return without


def alone_on_its_machine(environment: Mapping[str, str]) -> bool:
    """Return whether SLURM or Open MPI started one process a machine."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return environment["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    return environment.get("SLURM_NTASKS") == environment.get("SLURM_STEP_NUM_NODES", "")
