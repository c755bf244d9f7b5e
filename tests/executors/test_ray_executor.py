"""What is asked of Ray, and what is made of its answers; a stand-in takes its place."""

import signal
import socket
import sys
import types

import pytest

from clip_jax import errors
from clip_jax.errors import Terminated, UserError
from clip_jax.executors.parts import WorkerLostError
from clip_jax.executors.ray_executor import RayExecutor
from clip_jax.executors.worker import Answer, Worker

DEAD = """The actor died unexpectedly before finishing this task.
\tclass_name: Worker
\tactor_id: 0a
\tip: 10.0.0.7
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker unexpectedly exits with a connection error code 2. End of file. Some more."""


class RayError(Exception):
    pass


class ActorDiedError(RayError):
    def __init__(self, text, actor_init_failed=False):
        super().__init__(text)
        self.actor_init_failed = actor_init_failed


@pytest.fixture
def ray(monkeypatch):
    """A module that takes the place of Ray; `nodes` are the resources of its machines."""
    module = types.ModuleType("ray")
    names = ("RayTaskError", "UnserializableException")
    names += ("TaskUnschedulableError", "ActorUnschedulableError")
    module.exceptions = types.SimpleNamespace(
        RayError=RayError, **{name: type(name, (RayError,), {}) for name in names}
    )
    module.calls = []
    module.resources = []

    def init(address, **options):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # as Ray does
        module.calls.append((address, options))

    module.init = init
    module.remote = lambda cls: module.calls.append(cls)
    module.nodes = lambda: (
        [{"Alive": True, "Resources": r} for r in module.resources]
        + [{"Alive": False, "Resources": {"CPU": 99, "GPU": 99}}]
    )
    module.cluster_resources = lambda: {
        name: sum(r.get(name, 0) for r in module.resources) for name in ("CPU", "GPU")
    }
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


def connect(address="auto", actors=None, num_cpus=1.0, num_gpus=None):
    return RayExecutor(address, actors=actors, num_cpus=num_cpus, num_gpus=num_gpus)


def test_joining_keeps_the_commands_own_handler_and_rays_lines_out(ray):
    before = signal.getsignal(signal.SIGTERM)
    connect()
    assert signal.getsignal(signal.SIGTERM) is before
    assert ray.calls[0] == ("auto", {"log_to_driver": False, "logging_level": "ERROR"})
    assert ray.calls[1] is Worker


GPUS = [{"CPU": 16, "GPU": 8}, {"CPU": 16, "GPU": 4}, {"CPU": 8}]


@pytest.mark.parametrize(
    ("resources", "options", "with_model", "without"),
    [
        (GPUS, {}, 12, 40),  # one a GPU, one a core
        (GPUS, {"num_gpus": 2.0}, 6, 40),
        (GPUS, {"num_gpus": 0.0}, 3, 40),  # one a machine
        (GPUS, {"num_cpus": 8.0}, 4, 5),
        (GPUS, {"actors": 7}, 7, 7),
        ([{"CPU": 4}, {"CPU": 2}], {}, 2, 6),
        ([{"CPU": 4}, {"CPU": 2}], {"num_cpus": 3.0}, 1, 1),
    ],
)
def test_workers_are_as_many_as_there_is_room_for(ray, resources, options, with_model, without):
    ray.resources = resources
    executor = connect(**options)
    assert executor.worker_count(uses_devices=True) == with_model
    assert executor.worker_count(uses_devices=False) == without


def test_a_cluster_without_room_is_one_line(ray):
    ray.resources = [{"CPU": 4}]
    with pytest.raises(UserError, match=r"no machine .* has 8 CPUs and 0 GPUs .*--num-cpus"):
        connect(num_cpus=8.0).worker_count(uses_devices=False)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ActorDiedError(DEAD), WorkerLostError, "^SYSTEM_ERROR: Worker unexpectedly exits with a"),
        (
            ActorDiedError("\tip: 10.0.0.7\nThe actor died because its node has died."),
            WorkerLostError,
            "^The actor died because its node has died",
        ),
        (RayError("the object is lost"), WorkerLostError, "the object is lost"),
        (
            ActorDiedError("x\nModuleNotFoundError: No module named 'clip_jax'", True),
            UserError,
            "every machine of the cluster needs this package: ModuleNotFoundError",
        ),
    ],
)
def test_what_rays_errors_become(ray, error, kind, text):
    ray.get = lambda ticket: (_ for _ in ()).throw(error)
    with pytest.raises(kind, match=text):
        connect().result("ticket")


def test_mistakes_of_ours_stay_what_they_are(ray):
    ray.get = lambda ticket: (_ for _ in ()).throw(ray.exceptions.RayTaskError("TypeError"))
    with pytest.raises(ray.exceptions.RayTaskError):
        connect().result("ticket")
    ray.get = lambda ticket: Answer(user_error="a full disk (on n1)")
    with pytest.raises(UserError, match=r"a full disk \(on n1\)"):
        connect().result("ticket")


def test_a_sigterm_that_ray_made_an_interrupt_of_ends_as_a_sigterm(ray, monkeypatch):
    def wait(*args, **options):
        raise KeyboardInterrupt

    ray.wait = wait
    with pytest.raises(KeyboardInterrupt) as interrupted:
        connect().wait(["ticket"], 1.0)
    assert not isinstance(interrupted.value, Terminated)
    errors.signal_heard.set()
    try:
        with pytest.raises(Terminated):
            connect().wait(["ticket"], 1.0)
    finally:
        errors.signal_heard.clear()


def test_a_cluster_that_cannot_be_reached_is_one_line(ray):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{s.getsockname()[1]}"
        for address in (closed, f"ray://{closed}"):
            with pytest.raises(UserError, match=f"no Ray cluster can be reached at {address}"):
                connect(address)
    with pytest.raises(UserError, match="--address head is neither auto nor HOST:PORT"):
        connect("head")
    ray.init = lambda *args, **options: (_ for _ in ()).throw(ConnectionError("none runs"))
    with pytest.raises(UserError, match=r"on this machine \(ConnectionError: none runs\)"):
        connect()
