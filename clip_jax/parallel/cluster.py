"""Who the processes of a run are: what the flags and a cluster's environment say of it."""

import socket
import time
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

from jax._src import clusters

from clip_jax.errors import UserError, short

T = TypeVar("T")


def wait_for(address: str, seconds: float) -> None:
    """Until something listens at HOST:PORT; its last OSError when nothing does in time."""
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


def check_flags(coordinator: str | None, processes: int | None, index: int | None) -> None:
    """Raises UserError where the flags are half of what is needed, or say what cannot be."""
    given = {"--coordinator": coordinator, "--num_processes": processes, "--process_id": index}
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
            f"--process_id {index} is not among --num_processes {processes}: they count from 0"
        )


def detected_processes() -> int:
    """The processes that the cluster's environment speaks of; 1 without a cluster."""
    return _ask_cluster(lambda kind: kind.get_process_count(), alone=1)


def detected_place() -> tuple[int, int]:
    """(this process, processes) by the cluster's environment; (0, 1) without a cluster."""
    return _ask_cluster(
        lambda kind: (kind.get_process_id(), kind.get_process_count()), alone=(0, 1)
    )


def _ask_cluster(question: Callable[[type[clusters.ClusterEnv]], T], *, alone: T) -> T:
    """What the cluster's interface answers; `alone` without a cluster."""
    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
    for kind in kinds:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Kubernetes without its package
                if kind.is_env_present():
                    return question(kind)
        except Exception as error:  # whatever the cluster's interface raises
            raise UserError(
                f"this looks like {kind.__name__} and its processes cannot be counted "
                f"({short(error)[:300]}); give --coordinator, --num_processes and --process_id, or "
                "--num_processes 1 for a run by itself"
            ) from None
    return alone


def alone_on_its_machine(environment: Mapping[str, str]) -> bool:
    """Whether SLURM or Open MPI started one process a machine."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return environment["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    return environment.get("SLURM_NTASKS") == environment.get("SLURM_STEP_NUM_NODES", "")
