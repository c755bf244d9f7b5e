"""The time between two steps: what the devices wait for."""

import time
from concurrent.futures import Future
from contextlib import closing

import jax.numpy as jnp
import pytest

from clip_jax.training import device_wait
from clip_jax.training.device_wait import DeviceWait


class Clock:
    """A clock that the test moves, and what is there at a time of it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(device_wait.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(device_wait, "_when_ready", lambda future: future.result())

    def fetch(self, wait, start, end):
        self.now = start
        with wait:
            self.now = end

    def dispatch(self, wait, at, *, arrived, ended, called=None):
        """Hand out a step whose rows are there at one time, and which ends at another."""
        self.now = at
        rows, outputs = Future(), Future()
        rows.set_result(arrived)
        outputs.set_result(ended)
        wait.dispatched(at if called is None else called, rows, outputs)
        wait._ended.result(10)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def wait(clock):
    wait = DeviceWait()
    yield wait
    wait.close()


def test_only_the_fetching_after_a_steps_end_is_a_wait(clock, wait):
    clock.fetch(wait, 0.0, 2.0)  # before the first step, whose time is told apart
    clock.dispatch(wait, 5.0, arrived=5.0, ended=10.0)
    clock.fetch(wait, 6.0, 8.0)  # the step still runs
    clock.dispatch(wait, 9.0, arrived=9.0, ended=20.0)
    assert wait.shares() == (0.0, 0.0)
    clock.fetch(wait, 18.0, 24.0)  # it ends on the way
    clock.dispatch(wait, 24.0, arrived=24.0, ended=30.0)
    clock.now = 29.0
    assert wait.shares() == (4 / 20, 0.0)


def test_rows_that_are_still_on_their_way_are_waited_for(clock, wait):
    clock.fetch(wait, 0.0, 0.0)
    clock.dispatch(wait, 0.0, arrived=0.0, ended=10.0)
    clock.fetch(wait, 1.0, 2.0)
    clock.dispatch(wait, 3.0, arrived=8.0, ended=20.0)  # there before the first step ends
    clock.fetch(wait, 11.0, 12.0)
    clock.dispatch(wait, 13.0, arrived=25.0, ended=40.0)  # 5 s after it
    clock.fetch(wait, 14.0, 15.0)
    clock.dispatch(wait, 42.0, arrived=45.0, ended=50.0)  # 2 s of the host's, and 3 s
    clock.now = 50.0
    assert wait.shares() == (8 / 50, 2 / 50)


def test_a_wait_over_a_call_is_told_in_parts(clock, wait):
    clock.fetch(wait, 0.0, 0.0)
    clock.dispatch(wait, 0.0, arrived=0.0, ended=10.0)
    clock.now = 18.0
    assert wait.shares() == (0.0, 0.0)
    clock.dispatch(wait, 10.0, arrived=20.0, ended=24.0)
    clock.now = 22.0
    assert wait.shares() == (1.0, 0.0)  # 4 of the 10 seconds
    clock.now = 34.0
    assert wait.shares() == (6 / 12, 0.0)


def test_what_the_host_does_else_is_its_own_wait(clock, wait):
    clock.fetch(wait, 0.0, 0.0)
    clock.dispatch(wait, 0.0, arrived=0.0, ended=10.0)
    clock.fetch(wait, 12.0, 15.0)  # 2 s before, 3 s of fetching,
    clock.dispatch(wait, 19.0, arrived=19.0, ended=20.0)  # and 4 s behind it
    assert wait.shares() == (3 / 19, 6 / 19)
    wait.pause()  # an evaluation: the devices work
    clock.dispatch(wait, 60.0, arrived=61.0, ended=70.0)
    clock.now = 70.0
    assert wait.shares() == (0.0, 0.0)


def test_what_the_call_takes_is_no_wait(clock, wait):
    clock.fetch(wait, 0.0, 0.0)
    clock.dispatch(wait, 0.0, arrived=0.0, ended=10.0)
    clock.fetch(wait, 1.0, 2.0)
    # Another length is compiled for 20 s; the rows were looked at when that was over.
    clock.dispatch(wait, 32.0, arrived=32.0, ended=40.0, called=12.0)
    clock.now = 40.0
    assert wait.shares() == (0.0, 2 / 40)


def test_the_rows_and_outputs_of_a_real_step():
    with closing(DeviceWait()) as wait:
        with wait:
            rows = jnp.ones((8, 8))
        for _ in range(3):
            wait.dispatched(time.perf_counter(), rows, jnp.dot(rows, rows))
        assert wait._ended.result(10) >= wait.first_step_end.result(10)
        data, host = wait.shares()
    assert 0 <= data <= 1 and 0 <= host <= 1
