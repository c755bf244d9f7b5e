"""A work folder in a bucket: what is there at any moment is a run that can go on."""

import json
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from clip_jax.errors import EXIT_TERMINATED, UserError
from clip_jax.training import bucket as bucket_module
from clip_jax.training import bucket_lock, bucket_sync
from clip_jax.training.bucket import Bucket, read_manifest
from clip_jax.training.bucket_copy import local_copy
from clip_jax.training.bucket_lock import BucketLock, LockLostError
from clip_jax.training.bucket_sync import BucketSync
from clip_jax.training.bucket_workdir import Session, fetch, local_workdir, scratch_folder

URL = "memory://bucket/runs/mine"


class Killed(BaseException):
    """The process ended here."""


@pytest.fixture(autouse=True)
def empty_bucket(monkeypatch):
    MemoryFileSystem.store.clear()
    monkeypatch.setattr(bucket_lock, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(bucket_sync, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(bucket_sync, "DELETE_SECONDS", 0.0)
    yield
    MemoryFileSystem.store.clear()


class FreeLock:
    """A lock that nobody else wants."""

    lost = ""

    def check(self) -> None:
        pass


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def save(folder: Path, step: int, *, keep: int = 1) -> None:
    """Write a checkpoint as a run does: metrics come before, and old ones go after."""
    metrics = "".join(json.dumps({"step": n, "loss": n / 7}) + "\n" for n in range(1, step + 1))
    write(folder, "metrics.jsonl", metrics)
    for name in ("model/a", "model/d/b", "meta/metadata"):
        write(folder, f"checkpoints/{step}.tmp/{name}", f"{name} of {step}")
    (folder / f"checkpoints/{step}.tmp").rename(folder / f"checkpoints/{step}")
    steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
    for old in steps[:-keep]:
        shutil.rmtree(folder / f"checkpoints/{old}")


def make_sync(folder: Path, place: Path) -> BucketSync:
    bucket = Bucket(URL)
    committed = read_manifest(bucket) or {}
    return BucketSync(bucket, FreeLock(), folder, place / "uploading", committed)


def kill_at_write(monkeypatch, number: int) -> None:
    """End the process before its write or deletion of this number, and before all after it."""
    count, lock = [0], threading.Lock()
    for name in ("write", "put", "remove"):
        method = getattr(Bucket, name)

        def counted(self, *args, _method=method, **kwargs):
            with lock:
                count[0] += 1
                if count[0] >= number:
                    raise Killed
            return _method(self, *args, **kwargs)

        monkeypatch.setattr(Bucket, name, counted)


def fetched(place: Path) -> tuple[Path, list[int]]:
    """Return what another machine gets, and the steps of its checkpoints."""
    bucket, folder = Bucket(URL), place / "fetched"
    shutil.rmtree(folder, ignore_errors=True)
    fetch(bucket, folder, read_manifest(bucket) or {})
    checkpoints = folder / "checkpoints"
    return folder, sorted(
        int(p.name) for p in checkpoints.iterdir()
    ) if checkpoints.exists() else []


@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_any_write_the_bucket_holds_a_run_that_goes_on(tmp_path, monkeypatch, keep):
    number, ends, steps_of_run = 0, [], [10, 20, 30][: keep + 1]
    while not ends:  # until a run is not killed any more
        number += 1
        MemoryFileSystem.store.clear()
        folder = tmp_path / f"{number}" / "mine"
        write(folder, "config.json", "{}")
        with monkeypatch.context() as patched, suppress(Killed):
            kill_at_write(patched, number)
            sync = make_sync(folder, folder.parent)
            for step in steps_of_run:
                save(folder, step, keep=keep)
                sync.upload()
            sync.upload()
            ends.append(number)
        got, steps = fetched(folder.parent)
        for step in steps:
            assert (got / f"checkpoints/{step}/model/d/b").read_text() == f"model/d/b of {step}"
            assert (got / f"checkpoints/{step}/meta/metadata").exists()
            assert (got / "config.json").exists()
        if steps:
            lines = (got / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines][: steps[-1]] == list(
                range(1, steps[-1] + 1)
            )
        # The next process, here or elsewhere, brings the rest, and leaves nothing else behind.
        make_sync(folder, folder.parent).upload()
        again = make_sync(folder, folder.parent)
        again.upload()
        got, steps = fetched(folder.parent)
        here = sorted(int(p.name) for p in (folder / "checkpoints").iterdir())
        assert steps == here
        names = {n for n in Bucket(URL).sizes() if n.startswith("checkpoints/")}
        assert names == {
            path.relative_to(folder).as_posix()
            for path in (folder / "checkpoints").rglob("*")
            if path.is_file()
        }
    assert number > 15


def test_history_never_says_what_the_checkpoints_do_not_know_yet(tmp_path, monkeypatch):
    """A run that leaves its cool-down sets checkpoints aside, and then writes so."""
    for number in range(1, 14):
        MemoryFileSystem.store.clear()
        folder = tmp_path / f"{number}" / "mine"
        write(folder, "history.jsonl", "100 steps\n")
        save(folder, 80, keep=2)
        save(folder, 100, keep=2)
        sync = make_sync(folder, folder.parent)
        sync.upload()
        (folder / "cooled").mkdir()
        (folder / "checkpoints/100").rename(folder / "cooled/100")
        write(folder, "history.jsonl", "100 steps\n200 steps\n")
        with monkeypatch.context() as patched, suppress(Killed):
            kill_at_write(patched, number)
            sync.upload()
        got, steps = fetched(folder.parent)
        assert 80 in steps
        if "200 steps" in (got / "history.jsonl").read_text():
            assert steps == [80]


def test_a_run_that_goes_on_finds_the_best_of_its_steps(tmp_path, monkeypatch):
    for number in range(1, 12):
        MemoryFileSystem.store.clear()
        folder = tmp_path / f"{number}" / "mine"
        write(folder, "best/checkpoints/20/a", "best")
        save(folder, 25)
        with monkeypatch.context() as patched, suppress(Killed):
            kill_at_write(patched, number)
            make_sync(folder, folder.parent).upload()
        got, steps = fetched(folder.parent)
        assert not steps or (got / "best/checkpoints/20/a").exists()


def test_a_checkpoint_that_is_made_again_replaces_the_one_of_its_name(tmp_path):
    folder = tmp_path / "mine"
    save(folder, 10)
    make_sync(folder, tmp_path).upload()
    shutil.rmtree(folder / "checkpoints")
    save(folder, 10)
    write(folder, "checkpoints/10/model/a", "others")
    make_sync(folder, tmp_path).upload()
    got, steps = fetched(tmp_path)
    assert steps == [10]
    assert (got / "checkpoints/10/model/a").read_text() == "others"


def test_what_the_run_deletes_during_an_upload_arrives_whole(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    save(folder, 10)
    sync, write_object = make_sync(folder, tmp_path), Bucket.write

    def slow(self, name, data, **kwargs):
        if name.startswith("checkpoints/10/") and not (folder / "checkpoints/20").exists():
            save(folder, 20)
        write_object(self, name, data, **kwargs)

    monkeypatch.setattr(Bucket, "write", slow)
    monkeypatch.setattr(bucket_sync, "PARALLEL_FILES", 1)
    sync.upload()
    assert not (folder / "checkpoints/10").exists()
    got, steps = fetched(tmp_path)
    assert steps == [10]
    assert (got / "checkpoints/10/meta/metadata").read_text() == "meta/metadata of 10"
    sync.upload()
    assert fetched(tmp_path)[1] == [20]


def test_a_bucket_that_fails_is_told_once_and_loses_nothing(tmp_path, monkeypatch, capsys):
    failing, pipe = threading.Event(), MemoryFileSystem.pipe_file

    def sometimes(self, *args, **kwargs):
        if failing.is_set():
            raise ConnectionError("refused")
        return pipe(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", sometimes)
    monkeypatch.setattr(bucket_sync, "LONGEST_PAUSE", 0.06)
    folder = tmp_path / "mine"
    sync = make_sync(folder, tmp_path)
    failing.set()
    save(folder, 10)
    sync.start()
    wait_until(lambda: sync.failures > 2)
    save(folder, 20)
    assert not sync.finish(0.1)
    failing.clear()
    assert sync.finish(30)
    assert fetched(tmp_path)[1] == [20]
    told = capsys.readouterr().out
    assert told.count("takes no files (ConnectionError: refused): the run goes on") == 1
    assert told.count("takes files again") == 1
    assert f"{sync.failures} tries that failed" in sync.summary()


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_damaged_checkpoint_is_left_out_and_named(tmp_path, capsys):
    folder = tmp_path / "mine"
    save(folder, 10, keep=2)
    save(folder, 20, keep=2)
    make_sync(folder, tmp_path).upload()
    Bucket(URL).write("checkpoints/20/model/a", b"model/a of 2O")
    assert fetched(tmp_path)[1] == [10]
    assert "checkpoints/20 is damaged and left out" in capsys.readouterr().out
    Bucket(URL).remove("checkpoints/10/meta/metadata")
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in memory://.* is whole"):
        fetched(tmp_path)


def test_a_second_run_is_refused_and_a_silent_one_replaced(monkeypatch, capsys):
    monkeypatch.setattr(bucket_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(bucket_lock, "_machine", lambda: "")  # of other machines nothing is known
    lost = threading.Event()
    first = BucketLock(Bucket(URL), lost.set)
    assert first.acquire() == ""
    with pytest.raises(UserError, match=r"in use by process \d+ on .*; wait for it"):
        BucketLock(Bucket(URL), lambda: None).acquire()
    monkeypatch.setattr(BucketLock, "_beat_on", lambda self: None)
    monkeypatch.setattr(bucket_lock, "WATCH_SECONDS", 0.3)
    first._end.set()  # it hangs
    first._thread.join()
    second = BucketLock(Bucket(URL), lambda: None)
    assert second.acquire() == first.token
    assert "waiting 0 s for a sign of life" in capsys.readouterr().out
    first._confirmed = -1e9  # and looks again after a long time
    with pytest.raises(LockLostError, match="process"):
        first.check()
    first.release()
    second.check()
    second.release()
    third = BucketLock(Bucket(URL), lambda: None)
    assert third.acquire() == second.token
    assert list(Bucket(URL).sizes("run.lock")) == ["run.lock/00000003"]


def test_on_one_machine_it_is_known_who_lives(monkeypatch):
    first = BucketLock(Bucket(URL), lambda: None)
    first.acquire()
    with pytest.raises(UserError, match="in use by"):
        BucketLock(Bucket(URL), lambda: None).acquire()
    monkeypatch.setattr(bucket_lock, "_started", lambda pid: "")  # it was killed
    monkeypatch.setattr(BucketLock, "_wait_for", lambda *args: pytest.fail("it waited"))
    assert BucketLock(Bucket(URL), lambda: None).acquire() == first.token


@pytest.mark.parametrize("refuses", [True, False])
def test_a_store_without_conditional_writes_is_told(monkeypatch, capsys, refuses):
    pipe = MemoryFileSystem.pipe_file

    def old_store(self, path, value, mode="overwrite", **kwargs):
        if mode == "create" and refuses:
            raise PermissionError("not implemented")
        return pipe(self, path, value, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", old_store)
    BucketLock(Bucket(URL), lambda: None).acquire()
    assert "has no conditional writes: see that no other run" in capsys.readouterr().out


def kill(session: Session) -> None:
    """Leave a session as a killed process does: nothing is uploaded or released any more."""
    session._sync._lock = DeadLock()
    session._sync._ending.set()
    session._sync._thread.join()
    session._lock._end.set()


class DeadLock:
    """A lock with which nothing is written."""

    lost = "a signal"

    def check(self) -> None:
        raise LockLostError


def test_a_run_goes_on_here_from_its_folder_and_elsewhere_from_the_bucket(tmp_path, monkeypatch):
    here, there = (scratch_folder(URL, str(tmp_path / name)) for name in ("here", "there"))
    for place in (here, there):
        place.mkdir(parents=True)
    monkeypatch.setattr(bucket_lock, "lives", lambda record: False)
    session = Session(URL, here)
    save(here / "mine", 10)
    wait_until(lambda: "checkpoints/10" in read_manifest(Bucket(URL)))
    kill(session)
    save(here / "mine", 20)  # the bucket has not got it
    session = Session(URL, here)
    assert (here / "mine/checkpoints/20").is_dir()
    kill(session)
    with monkeypatch.context() as patched:
        patched.setattr(BucketSync, "start", lambda self: None)
        patched.setattr(BucketSync, "finish", lambda self, seconds: False)
        session = Session(URL, there)
        assert [p.name for p in (there / "mine/checkpoints").iterdir()] == ["10"]
        assert not session.close(0)
    # What another machine has begun since is the run.
    session = Session(URL, here)
    assert [p.name for p in (here / "mine/checkpoints").iterdir()] == ["10"]
    assert session.close(30)


def test_the_command_works_in_a_folder_and_leaves_all_in_the_bucket(tmp_path, monkeypatch, capsys):
    with local_workdir(URL, str(tmp_path / "a")) as local:
        folder = Path(local.path)
        assert folder.name == "mine"
        save(folder, 10)
        with (
            pytest.raises(UserError, match=f"--workdir {URL} is in use"),
            local_workdir(URL, str(tmp_path / "a")),
        ):
            pass
    assert local.exit_code(0) == 0
    assert f"{URL} has all of the run: 1 checkpoints" in capsys.readouterr().out
    with local_workdir(URL + "/", str(tmp_path / "b")) as local:
        assert (Path(local.path) / "checkpoints/10/model/a").exists()
        assert "step" in (Path(local.path) / "metrics.jsonl").read_text()
    monkeypatch.setattr(BucketSync, "finish", lambda self, seconds: False)
    with local_workdir(URL, str(tmp_path / "b")) as local:
        pass
    assert local.exit_code(0) == EXIT_TERMINATED
    with local_workdir(str(tmp_path), "") as local:
        assert local.path == str(tmp_path)


def test_a_folder_that_was_copied_by_hand_is_taken_as_it_is(tmp_path):
    bucket = Bucket(URL)
    bucket.write("checkpoints/10/model/a", b"x")
    bucket.write("config.json", b"{}")
    with local_workdir(URL, str(tmp_path / "a")) as local:
        assert (Path(local.path) / "checkpoints/10/model/a").read_bytes() == b"x"
    assert list(read_manifest(bucket)) == ["checkpoints/10"]


def test_a_run_is_read_while_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "mine"
    for step in (9, 10):
        save(folder, step, keep=2)
    write(folder, "best/checkpoints/7/model/a", "best")
    write(folder, "best/config.json", "{}")
    sync = make_sync(folder, tmp_path)
    sync.upload()
    copy = Path(local_copy(URL + "/"))
    assert copy.name == "mine"
    assert [p.name for p in (copy / "checkpoints").iterdir()] == ["10"]
    got = []
    monkeypatch.setattr(Bucket, "get", _noting(got, Bucket.get))
    write(folder, "metrics.jsonl", "longer")
    sync.upload()
    assert Path(local_copy(URL)) == copy
    assert (copy / "metrics.jsonl").read_text() == "longer"
    assert not any(name.startswith("checkpoints/") for name in got)
    save(folder, 11, keep=2)
    sync.upload()
    newer = Path(local_copy(URL))
    assert [p.name for p in (newer / "checkpoints").iterdir()] == ["11"]
    best = Path(local_copy(f"{URL}/best"))
    assert (best / "checkpoints/7/model/a").read_text() == "best"
    assert not (Path(local_copy(URL, weights=False)) / "checkpoints").exists()
    assert local_copy(str(tmp_path)) == str(tmp_path)
    with pytest.raises(UserError, match="memory://bucket/none holds nothing"):
        local_copy("memory://bucket/none")


def _noting(names, get):
    def noted(self, name, path):
        names.append(name)
        get(self, name, path)

    return noted


def test_a_bucket_that_may_not_be_written_or_is_not_there_ends_in_a_line(tmp_path, monkeypatch):
    def refuse(self, path, *args, **kwargs):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with (
        pytest.raises(UserError, match=r"may not be .*Access Denied; check the address"),
        local_workdir(URL, str(tmp_path)),
    ):
        pass
    monkeypatch.setattr(bucket_module, "START_SECONDS", 0.0)
    with (
        pytest.raises(UserError, match="Protocol not known: nowhere"),
        local_workdir("nowhere://bucket/run", str(tmp_path)),
    ):
        pass


def test_a_replay_gets_the_checkpoint_before_its_step(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for step in (9, 10):
        save(tmp_path / "mine", step, keep=2)
    make_sync(tmp_path / "mine", tmp_path).upload()

    def steps(last):
        folder = Path(local_copy(URL, last=last)) / "checkpoints"
        return [p.name for p in folder.iterdir()] if folder.exists() else []

    assert [steps(last) for last in (10, 9, 8)] == [["10"], ["9"], []]


def test_a_folder_that_is_no_run_is_copied_once_and_again_when_it_is_another(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket, got = Bucket(URL), []
    monkeypatch.setattr(Bucket, "get", _noting(got, Bucket.get))
    for text in (b"first", b"other"):
        bucket.write("model.safetensors", text)
        for _ in range(2):
            assert (Path(local_copy(URL)) / "model.safetensors").read_bytes() == text
    assert len(got) == 2
    assert len(list((scratch_folder(URL) / "copies").iterdir())) == 1
