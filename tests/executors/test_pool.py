"""Parts are all made, once each in what counts, whichever workers die and whenever."""

from pathlib import Path

import pytest
from fake_cluster import FakeCluster
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.errors import UserError
from clip_jax.executors import pool as pool_module
from clip_jax.executors.parts import PartMaker
from clip_jax.executors.pool import OPEN_TRIES, PART_TRIES, WorkerPool

OPENER = f"{__name__}:open_squares"


def open_squares(base=0, broken=None, error=ValueError, begun=True):
    def make(part):
        if part == broken:
            raise error(f"no {part}")
        return base + part**2

    return PartMaker({"base": base}, make, Path("shared"), lambda: begun)


def run(cluster, parts, missing=None, **options):
    made = []
    with WorkerPool(cluster, OPENER, options, uses_devices=True) as pool:
        assert pool.info() == {"base": options.get("base", 0)}
        pool.run(
            dict.fromkeys(parts, 1),
            parts if missing is None else missing,
            title="squares",
            on_part=lambda *made_part: made.append(made_part),
            progress=False,
        )
    return made, pool


@given(
    parts=st.integers(0, 12),
    workers=st.integers(1, 5),
    deaths=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["before", "after"]))),
    seed=st.integers(0, 99),
)
def test_every_part_is_made_whoever_dies(parts, workers, deaths, seed):
    fates = dict(deaths)
    costs = {}

    def dies(method, args, n):
        fate = fates.get(n, "")
        if fate and method == "make":
            costs[args[0]] = costs.get(args[0], 0) + 1
        # One part may not cost all of its tries here.
        return "" if costs.get(next(iter(args), None), 0) >= PART_TRIES else fate

    cluster = FakeCluster(workers, dies, seed)
    made, pool = run(cluster, range(parts), base=7)
    assert sorted(made) == [(n, 7 + n * n) for n in range(parts)]
    assert cluster.started == cluster.stopped  # none is left
    assert pool.lost <= cluster.started <= max(1, min(workers, parts)) + pool.lost


def test_only_missing_parts_are_made_in_their_order():
    cluster = FakeCluster(1)
    made, _ = run(cluster, range(9), missing=[2, 3, 8])
    assert made == [(2, 4), (3, 9), (8, 64)] and cluster.made == 3
    nothing, _ = run(FakeCluster(4), range(9), missing=[])
    assert nothing == []


def test_a_death_costs_the_part_of_the_dead_alone():
    cluster = FakeCluster(3, lambda method, args, n: "before" if n in (7, 9, 12) else "")
    made, pool = run(cluster, range(20))
    assert len(made) == 20 and pool.lost == 3 and cluster.made == 20


def test_a_part_that_kills_its_workers_ends_the_run():
    cluster = FakeCluster(2, lambda method, args, n: "before" if args == (3,) else "")
    with pytest.raises(UserError, match=rf"part 3 has cost {PART_TRIES} workers; the last: .*kill"):
        run(cluster, range(6))
    assert cluster.made == 5  # a part that kills waits behind the others
    assert cluster.started == cluster.stopped


def test_workers_that_never_open_end_the_run():
    with pytest.raises(UserError, match=rf"{OPEN_TRIES} workers in a row died before"):
        run(FakeCluster(2, lambda method, args, n: "before"), range(6))


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_what_another_machine_may_do_better_is_tried_there(error):
    with pytest.raises(UserError, match=f"part 4 has cost .*{error.__name__}: no 4"):
        run(FakeCluster(2), range(6), broken=4, error=error)


def test_mistakes_of_the_user_and_of_ours_end_the_run_at_once():
    cluster = FakeCluster(2)
    with pytest.raises(UserError, match=r"no 0 \(on .+\)"):
        run(cluster, range(6), broken=0, error=UserError)
    assert cluster.started == cluster.stopped == 2
    with pytest.raises(TypeError, match="no 0"):
        run(FakeCluster(2), range(6), broken=0, error=TypeError)


def test_a_folder_that_a_worker_does_not_see_is_named():
    with pytest.raises(UserError, match="shared is not there: --out must lie on a file system"):
        run(FakeCluster(2), range(6), begun=False)


def test_workers_that_read_something_else_are_refused(monkeypatch):
    bases = iter([1, 2])
    monkeypatch.setattr(f"{__name__}.open_squares", lambda: _different(next(bases)))
    with (
        pytest.raises(UserError, match="reads another model or other data than"),
        WorkerPool(FakeCluster(2), OPENER, {}, uses_devices=True) as pool,
    ):
        pool.info()
        pool.run({0: 1, 1: 1}, [0, 1], title="t", progress=False)


def _different(base):
    return PartMaker(base, lambda part: part, Path("shared"), lambda: True)


def test_machines_that_join_later_are_used(monkeypatch):
    monkeypatch.setattr(pool_module, "_GROW_SECONDS", 0.0)
    cluster = FakeCluster(1)

    def dies(method, args, n):
        cluster.workers = 4 if cluster.made >= 3 else 1
        return ""

    cluster.dies = dies
    made, _ = run(cluster, range(20))
    assert len(made) == 20 and cluster.started == cluster.stopped == 4


def test_progress_of_all_workers_is_one_line(capsys):
    cluster = FakeCluster(2, lambda method, args, n: "before" if n == 4 else "")
    with WorkerPool(cluster, OPENER, {}, uses_devices=True) as pool:
        pool.run(dict.fromkeys(range(5), 100), [1, 2, 3, 4], title="squares", unit=" images")
    err = capsys.readouterr().err
    assert "squares" in err and "500/500" in err and "images/s, 2 workers, 1 died]" in err
    assert "died (killed before make" in err and "is made by another" in err
