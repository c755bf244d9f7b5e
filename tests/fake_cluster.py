"""An executor in this process whose workers die as a test says, for tests without a cluster."""

import itertools
import pickle
import random

from clip_jax.executors.parts import WorkerLostError
from clip_jax.executors.worker import Worker, value_of


class FakeCluster:
    """Runs a call when its ticket is waited for; answers come in an order drawn from `seed`.

    Args:
      workers: how many there are at a time.
      dies: takes (method, args, n-th call in all) and returns "" or "before" or "after": the worker
        dies before it has done the call, or after, when the answer is lost with it.
    """

    def __init__(self, workers=3, dies=lambda method, args, n: "", seed=0):
        self.workers, self.dies, self.rng = workers, dies, random.Random(seed)
        self.tickets = itertools.count()
        self.calls = {}
        self.started = self.stopped = self.made = 0
        self.closed = False
        self.busy = set()

    def worker_count(self, *, uses_devices):
        return self.workers

    def start(self, opener, options, *, uses_devices):
        self.started += 1
        # As another machine gets them.
        return _Handle(Worker(*pickle.loads(pickle.dumps((opener, options)))))

    def call(self, worker, method, *args):
        assert worker.alive and worker not in self.busy, "a worker does one thing at a time"
        self.busy.add(worker)
        ticket = next(self.tickets)
        self.calls[ticket] = (worker, method, args)
        return ticket

    def wait(self, tickets, seconds):
        assert tickets, "nothing is waited for"
        return [self.rng.choice(list(tickets))]

    def result(self, ticket):
        worker, method, args = self.calls.pop(ticket)
        self.busy.discard(worker)
        fate = self.dies(method, args, ticket)
        if fate != "before":
            answer = pickle.loads(pickle.dumps(getattr(worker.inside, method)(*args)))
            self.made += method == "make"
        if fate:
            worker.alive = False
            raise WorkerLostError(f"killed {fate} {method}{args}")
        return value_of(answer)

    def stop(self, worker):
        worker.alive = False
        self.stopped += 1

    def close(self):
        self.closed = True


class _Handle:
    def __init__(self, inside):
        self.inside, self.alive = inside, True
