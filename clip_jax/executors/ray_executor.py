"""Workers on a Ray cluster: a worker is an actor, and a part a task of one."""

import contextlib
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from clip_jax.distribution import install_command
from clip_jax.errors import Terminated, UserError, short, signal_heard
from clip_jax.executors.parts import WorkerLostError
from clip_jax.executors.worker import Worker, value_of

_CONNECT_SECONDS = 10


class RayExecutor:
    """A Ray cluster that this process has joined.

    Args:
      address: "auto", HOST:PORT of the head, or ray://HOST:PORT of a Ray client's server.
      actors: the number of workers; None is one a GPU, one a machine where there are no GPUs, and
        one a core where parts need no model.
      num_cpus, num_gpus: what a worker takes, as Ray counts it; None is a GPU where there are any.

    Raises:
      UserError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(
        self,
        address: str,
        *,
        actors: int | None,
        num_cpus: float,
        num_gpus: float | None,
    ):
        # The pool says in a line who died; Ray would print paragraphs, and a machine's whole state.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
        try:
            import ray
        except ImportError:
            raise UserError(f"--executor ray needs Ray: {install_command('ray')}") from None
        self._ray: Any = ray
        self._actors, self._num_cpus, self._num_gpus = actors, num_cpus, num_gpus
        _check_reachable(address)
        with _own_sigterm():
            try:
                # Ray's own lines, and those of the workers, would tear the progress bar.
                ray.init(address, log_to_driver=False, logging_level="ERROR")
            except Exception as error:  # whatever Ray raises
                raise _unreachable(address, short(error)) from None
        self._worker_class: Any = ray.remote(Worker)

    def worker_count(self, *, uses_devices: bool) -> int:
        """Return `actors`, or what the machines of the cluster have room for."""
        if self._actors is not None:
            return self._actors
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = self._gpus(uses_devices)
        rooms = [
            min(
                int(node.get("CPU", 0) / self._num_cpus) if self._num_cpus else 10**6,
                int(node.get("GPU", 0) / gpus) if gpus else 10**6,
            )
            for node in nodes
        ]
        if uses_devices and not gpus:
            rooms = [min(room, 1) for room in rooms]  # JAX takes all cores of a machine
        if not sum(rooms):
            raise UserError(
                f"no machine of the cluster has {self._num_cpus:g} CPUs and {gpus:g} GPUs for a "
                "worker: set --num-cpus and --num-gpus, or --actors to wait for such machines"
            )
        return sum(rooms)

    def _gpus(self, uses_devices: bool) -> float:
        if not uses_devices:
            return 0
        if self._num_gpus is not None:
            return self._num_gpus
        return 1 if self._ray.cluster_resources().get("GPU") else 0

    def start(self, opener: str, options: dict[str, Any], *, uses_devices: bool) -> Any:
        """Start an actor; Ray puts it where there is room, on as many machines as it can."""
        return self._worker_class.options(
            num_cpus=self._num_cpus,
            num_gpus=self._gpus(uses_devices),
            scheduling_strategy="SPREAD",
            max_restarts=0,  # another actor takes its place, and the part that it had
        ).remote(opener, options)

    def call(self, worker: Any, method: str, *args: Any) -> Any:
        """Call a method of an actor; the ticket is Ray's reference to the result."""
        return getattr(worker, method).remote(*args)

    def wait(self, tickets: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Return the references that are ready."""
        with _terminated_as_such():
            done, _ = self._ray.wait(list(tickets), num_returns=1, timeout=seconds)
        return done

    def result(self, ticket: Any) -> Any:
        """Return an actor's answer.

        Raises:
          WorkerLostError: its process or machine is gone, or the answer with it.
          UserError: as the worker has raised it, or a worker cannot import this package.
        """
        errors = self._ray.exceptions
        try:
            with _terminated_as_such():
                answer = self._ray.get(ticket)
            return value_of(answer)
        except (errors.RayTaskError, errors.UnserializableException):
            raise  # a mistake of ours, with the worker's traceback
        except (errors.TaskUnschedulableError, errors.ActorUnschedulableError) as error:
            raise UserError(f"Ray has no place for a worker: {short(error)[:300]}") from None
        except errors.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise UserError(
                    "a worker cannot start; every machine of the cluster needs this package: "
                    f"{str(error).strip().splitlines()[-1]:.300}"
                ) from None
            raise WorkerLostError(_reason(error)) from None

    def stop(self, worker: Any) -> None:
        """End an actor at once."""
        with contextlib.suppress(Exception):  # it, or the cluster, may be gone
            self._ray.kill(worker)

    def close(self) -> None:
        """Leave the cluster; it ends what this process has started there."""
        self._ray.shutdown()


def _reason(error: Exception) -> str:
    """Return why an actor died, of the many lines that Ray says."""
    text = " ".join(str(error).split())
    detail = re.search(r"Worker exit type: (\w+) Worker exit detail: ([^.]*)", text)
    if detail is not None:
        return f"{detail[1]}: {detail[2]}"
    # What comes after the actor's class, ids and address.
    text = re.sub(r".*\bip: \S+ ", "", text) or short(error)
    return re.sub(r"\b(actor|[Nn]ode [Ii]d:) [0-9a-f]{16,}\b", r"\1", text)


def _check_reachable(address: str) -> None:
    """Raise UserError if nothing listens there: Ray itself would wait for a minute or abort."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise UserError(
            f"--address {address} is neither auto nor HOST:PORT (6379) nor ray://HOST:PORT (10001)"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from None


def _unreachable(address: str, reason: str) -> UserError:
    where = "on this machine" if address == "auto" else f"at {address}"
    return UserError(
        f"no Ray cluster can be reached {where} ({reason[:300]}): start one with ray start --head, "
        "or name its head by --address HOST:PORT"
    )


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this command's handler of SIGTERM, whose place Ray's takes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _terminated_as_such() -> Iterator[None]:
    """Raise Terminated for the KeyboardInterrupt that Ray makes of any exception of a handler."""
    try:
        yield
    except KeyboardInterrupt:
        if signal_heard.is_set():
            raise Terminated from None
        raise
