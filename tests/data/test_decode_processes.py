"""Processes that decode give the rows of threads, bit for bit, and end with the loader."""

import dataclasses
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import data_cases
import numpy as np
import pytest
from data_cases import ToyTokenizer, train_loader
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import decode_processes, decode_worker
from clip_jax.data.batch_buffers import BatchBuffers
from clip_jax.data.dataset import open_sources
from clip_jax.data.decode_processes import DecodeProcesses, RowsRequest
from clip_jax.data.decode_worker import Buffers
from clip_jax.data.filters import FilteredShard
from clip_jax.data.formats import remote
from clip_jax.data.order import AUGMENT_KEY, Uniforms, philox
from clip_jax.data.sample_reader import SampleReader
from clip_jax.data.skip_log import SkipLog
from clip_jax.data.sources import open_shards
from clip_jax.errors import UserError
from clip_jax.sections import DataSection


def worker_pids(loader) -> list[int]:
    """Return the processes that decode, and the one that started them."""
    return loader._reader.worker_pids()


def assert_ended(pids) -> None:
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and not is_zombie(pid) for pid in pids):
        assert time.monotonic() < end, pids
        time.sleep(0.05)


def is_zombie(pid) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


class FailingTokenizer(ToyTokenizer):
    """Fails at one caption, as a mistake of the program does."""

    def __call__(self, texts, context_length=77):
        if "caption 7" in texts:
            raise KeyError("tokenizer")
        return super().__call__(texts, context_length)


def test_rows_order_and_faults_are_those_of_threads(tmp_path):
    """Tar shards read when needed, one of them lost, and a table with a bad sample."""
    paths = data_cases.write_shards(tmp_path, [13, 9, 2, 16, 10])
    image = data_cases.encode(data_cases.make_image("RGB", 12, 10), "PNG")
    (tmp_path / "a.png").write_bytes(image)
    table = tmp_path / "table.jsonl"
    table.write_text('{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png"}\n' * 4)
    pattern = [str(tmp_path / "s-{00000..00004}.tar"), str(table)]
    run = str(tmp_path / "run")
    open_sources(pattern, log=SkipLog(), cached_shards=3, workdir=run)  # counts them
    os.remove(paths[3])

    def take(**changes):
        log = SkipLog()
        sources = open_sources(pattern, log=log, cached_shards=3, workdir=run)
        options = {"crop_scale": (0.3, 1.0), "flip": 0.5, "grayscale": 0.5, "start_step": 2}
        options |= {"captions": ("*=1", "caption=1"), "word_dropout": 0.4, "rand_augment": 2}
        with train_loader(
            *sources, log=log, streams=2, batch_size=40, **(options | changes)
        ) as loader:
            batches = list(itertools.islice(loader, 3))
            pids = worker_pids(loader) if isinstance(loader._reader, DecodeProcesses) else []
        assert_ended(pids)
        return batches, log.counts, sorted(loader.recent), len(pids)

    batches, counts, recent, _ = take(threads=0)
    assert counts.keys() == {"shard_missing", "no_caption"}
    again, again_counts, again_recent, processes = take(threads=4, processes=2)
    assert processes == 3
    for batch, other in zip(again, batches, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
    assert again_counts == counts and again_recent == recent


def test_a_mistake_of_the_program_ends_the_run(tmp_path):
    shards = open_shards(data_cases.write_shards(tmp_path, [16]))
    loader = train_loader(
        shards, tokenizer=FailingTokenizer(), streams=1, processes=2, threads=2, batch_size=16
    )
    with loader:
        with pytest.raises(KeyError, match="tokenizer") as error:
            next(loader)
        assert "test_decode_processes.py" in error.value.__notes__[0]  # the traceback there
        pids = worker_pids(loader)
    assert_ended(pids)


def test_a_killed_process_is_replaced_and_ends_the_run_if_that_is_killed_too(tmp_path, capfd):
    shards = open_shards(data_cases.write_shards(tmp_path, [16]))
    with train_loader(shards, streams=1, processes=2, threads=2, batch_size=16) as loader:
        next(loader)
        rows = np.arange(2)

        def read():
            image = np.empty((2, 8, 8, 3), np.uint8)
            return loader._reader.read(rows, rows, 0, 0, image).key

        keys, first = read(), worker_pids(loader)
        os.kill(first[2], signal.SIGKILL)
        assert_ended(first)
        assert read() == keys
        told = r"has ended with signal 9.*fewer config\.data\.processes need less"
        assert re.search(
            told + "; new ones have taken their place, 1 so far", capfd.readouterr().err
        )
        second = worker_pids(loader)
        assert not set(second) & set(first)
        os.kill(second[1], signal.SIGKILL)
        assert_ended(second)
        for _ in range(2):
            with pytest.raises(UserError, match=told):
                read()
    assert_ended(second)


class SomeBuffers(Buffers):
    def __init__(self, *error):
        self.error = error

    def __getitem__(self, number):
        if self.error:
            raise OSError(*self.error)
        return np.zeros((1, 8, 8, 3), np.uint8)


class UnsendableRows(SampleReader):
    """A reader whose rows cannot be sent."""

    def __init__(self):
        pass

    def read(self, ids, epochs, image, is_wanted):
        return types.SimpleNamespace(text=lambda: None)


def test_no_error_of_a_thread_leaves_the_loader_waiting(monkeypatch):
    request = RowsRequest(np.arange(1), np.zeros(1, int), 0, 0)
    ours, theirs = multiprocessing.Pipe()
    ours.send(request)
    ours.send(request)
    buffers = SomeBuffers(12, "Cannot allocate memory")
    arguments = (theirs, UnsendableRows(), buffers)
    thread = threading.Thread(target=decode_worker.serve, args=arguments)
    thread.start()
    for _ in range(2):  # the thread goes on
        assert ours.poll(20)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            ours.recv().raise_it()
    ours.close()
    thread.join()

    codes = []
    monkeypatch.setattr(decode_worker.os, "_exit", codes.append)
    ours, theirs = multiprocessing.Pipe()
    ours.send(request)
    decode_worker.serve(theirs, UnsendableRows(), SomeBuffers())
    assert codes == [1]


@pytest.mark.slow
def test_the_processes_end_when_the_run_is_killed(tmp_path):
    paths = data_cases.write_shards(tmp_path, [16])
    code = f"""
import os, signal, sys
sys.path[:0] = {[os.path.dirname(data_cases.__file__), os.getcwd()]!r}
from data.test_decode_processes import worker_pids
from data_cases import train_loader
from clip_jax.data.sources import open_shards
loader = train_loader(open_shards({paths!r}), streams=1, threads=2, processes=2)
next(loader)
print(*worker_pids(loader), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3
    assert_ended(pids)


@pytest.mark.slow
def test_remote_shards_are_fetched_once_for_all_processes(tmp_path, monkeypatch):
    paths = data_cases.write_shards(tmp_path, [16] * 4)
    fetched = []
    fetch = remote.fetch
    monkeypatch.setattr(remote, "fetch", lambda url, to: (fetched.append(url), fetch(url, to))[1])
    log = SkipLog()
    (shards,) = open_sources(f"file://{tmp_path}/*.tar", log=log, cached_shards=8)
    options = {"streams": 1, "batch_size": 16, "window": 4}
    with train_loader(shards, log=log, threads=4, processes=2, **options) as loader:
        batches = list(itertools.islice(loader, 4))
    remote.CACHE.close()
    assert not log.counts and len(fetched) == 4
    with train_loader(open_shards(paths), threads=0, **options) as loader:
        for batch in batches:
            np.testing.assert_array_equal(batch["image"], next(loader)["image"])


def test_the_memory_for_decoded_images_is_shared_out(tmp_path, monkeypatch):
    sent = []

    def dumps(setup):
        sent.append(setup.settings.config.cache_bytes)
        raise TypeError("enough")

    monkeypatch.setattr(decode_processes.pickle, "dumps", dumps)
    shards = open_shards(data_cases.write_shards(tmp_path, [4]))
    with pytest.raises(UserError, match="enough"):
        train_loader(shards, streams=1, threads=2, processes=2, cache_bytes=1001)
    assert sent == [500]


def test_what_cannot_be_sent_to_a_process_is_named(tmp_path):
    shards = open_shards(data_cases.write_shards(tmp_path, [4]))
    tokenizer = ToyTokenizer()
    tokenizer.lock = threading.Lock()
    with pytest.raises(UserError, match=r"cannot be sent.*config\.data\.processes to 0"):
        train_loader(shards, tokenizer=tokenizer, streams=1, threads=2, processes=2)
    with pytest.raises(UserError, match=r"config\.data\.processes is 3, above the 2"):
        train_loader(shards, streams=1, threads=2, processes=3)


@pytest.mark.parametrize(
    "threads, cores, processes",
    [
        *((4, 64, 0), (16, 2, 0), (7, 64, 0), (8, 64, 2), (224, 224, 56)),
        *((-1, 7, 0), (-1, 96, 24)),
    ],
)
def test_processes_are_taken_where_there_are_cores_for_them(
    tmp_path, monkeypatch, threads, cores, processes
):
    monkeypatch.setattr(decode_processes, "usable_cores", lambda: cores)
    shards = open_shards(data_cases.write_shards(tmp_path, [4]))
    config = DataSection(threads=threads)
    assert decode_processes.decode_threads(config) == (cores if threads == -1 else threads)
    assert decode_processes.decode_processes(config, shards) == processes
    assert decode_processes.decode_processes(config, [FilteredShard(shards[0])]) == 0
    config = dataclasses.replace(config, processes=3)
    assert decode_processes.decode_processes(config, [FilteredShard(shards[0])]) == 3


def test_as_many_threads_as_cores_give_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_processes, "usable_cores", lambda: 3)
    shards = open_shards(data_cases.write_shards(tmp_path, [9, 7]))
    options = {"streams": 1, "crop_scale": (0.3, 1.0)}
    with (
        train_loader(shards, threads=-1, **options) as ours,
        train_loader(shards, threads=0, **options) as plain,
    ):
        for batch, other in itertools.islice(zip(ours, plain, strict=True), 3):
            for name in other:
                np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
    with pytest.raises(
        UserError, match=r"is 4, above the 3 of config\.data\.threads, one for every"
    ):
        train_loader(shards, threads=-1, processes=4, **options)


def test_data_that_are_filtered_decode_in_processes_where_a_number_asks_for_them(
    tmp_path, monkeypatch
):
    """A shard that is read when it is needed stays one of a tar file, with templates too."""
    monkeypatch.setattr(decode_processes, "usable_cores", lambda: 8)
    data_cases.write_shards(tmp_path, [9, 7])
    data_cases.write_shards(tmp_path, [3], prefix="t")  # repeats the keys of the first
    pattern = f"{tmp_path}/*.tar"

    def take(pattern, processes, **choice):
        log = SkipLog()
        (shards,) = open_sources(pattern, log=log, cached_shards=2, **choice)
        options = {"streams": 1, "threads": 8, "processes": processes}
        with train_loader(shards, log=log, **options) as loader:
            batches = list(itertools.islice(loader, 2))
        return decode_processes.decode_processes(DataSection(threads=-1), shards), batches

    for choice in ({"unique_keys": True}, {"where": "caption!=x"}):
        count, batches = take(pattern, 0, **choice)
        assert count == 0
        for batch, other in zip(take(pattern, 2, **choice)[1], batches, strict=True):
            for name in other:
                np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
    count, batches = take(f"{pattern}#template=a photo of {{}}.", 0)
    assert count == 2


def test_a_buffer_is_used_again_when_nobody_holds_it():
    buffers = BatchBuffers((2, 3, 3, 3))
    number, image = buffers.of_step(0)
    assert buffers.of_step(0)[1] is image and image.shape == (2, 3, 3, 3)
    view = buffers.take(0)[1:]
    del image
    assert buffers.of_step(1)[0] != number  # a view of the first is still held
    view[:] = 7
    del view
    assert buffers.of_step(2)[0] == number


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**63), min_size=2, max_size=2))
def test_uniforms_are_those_of_numpys_generator(seed, where):
    uniforms = Uniforms(seed, AUGMENT_KEY)
    for place in (where, where[::-1]):
        uniforms.move(*place)
        generator = np.random.Generator(philox(seed, AUGMENT_KEY, *place))
        assert [uniforms.random() for _ in range(25)] == [generator.random() for _ in range(25)]
