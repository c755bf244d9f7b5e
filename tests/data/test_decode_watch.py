"""An image whose decoding hangs is counted and named, and moves no other."""

import ctypes
import threading

import numpy as np
import pytest
from data_cases import encode, make_image, train_loader, write_shards

from clip_jax.data import decode_processes
from clip_jax.data.augment import make_decode
from clip_jax.data.decode_processes import DecodeProcesses
from clip_jax.data.decode_watch import AbandonedError, DecodeWatch, Progress
from clip_jax.data.sample_reader import DECODING, Decoding
from clip_jax.data.sources import open_shards

HANGS = 5
"""The sample that hangs."""
_hangs, _come_back = threading.Event(), threading.Event()


def make_hanging_decode(side, config):
    """Make a decoder that waits for an event at one image."""
    decode = make_decode(side, config)
    hangs = encode(make_image("RGB", 20, 23, seed=HANGS), "PNG")

    def decode_or_hang(data):
        if data == hangs:
            _hangs.set()
            _come_back.wait()
        return decode(data)

    return decode_or_hang


HANGING = Decoding(make_decode=make_hanging_decode)


def take(shards, decoding, batches=6, **section):
    """Take batches of 16 of 32 samples: three epochs."""
    options = {"streams": 2, "crop_scale": (0.3, 1.0), "decode_seconds": 0.2} | section
    loader = train_loader(shards, decoding=decoding, **options)
    with loader:
        found = [next(loader) for _ in range(batches)]
    return found, loader


def assert_same_but_one(batches, others, key):
    for batch, other in zip(batches, others, strict=True):
        assert batch["key"] == other["key"]
        here = np.array([k != key for k in batch["key"]])
        assert other["valid"].all()
        np.testing.assert_array_equal(batch["valid"], here)
        for name in ("image", "text", "caption_id"):
            np.testing.assert_array_equal(batch[name][here], other[name][here], err_msg=name)
            assert not np.any(batch["image"][~here])


@pytest.fixture
def patient(monkeypatch):
    """Give up no thread but the one that hangs, however slow the machine is."""
    abandon = Progress.abandon

    def abandon_what_hangs(progress, row):
        is_abandoned = _hangs.is_set() and abandon(progress, row)
        if is_abandoned:
            _hangs.clear()
        return is_abandoned

    monkeypatch.setattr(Progress, "abandon", abandon_what_hangs)


@pytest.fixture
def shards(tmp_path):
    _come_back.clear()
    _hangs.clear()
    yield open_shards(write_shards(tmp_path, [16, 16]))
    _come_back.set()


def hung_threads():
    """Return the threads that decode; one that is being started is not alive yet."""
    return {x for x in threading.enumerate() if x.name == "decode" and x.is_alive()}


@pytest.mark.parametrize("threads", [0, 1])
def test_a_sample_that_hangs_is_counted_named_and_moves_no_other(shards, patient, threads):
    before = hung_threads()
    batches, loader = take(shards, HANGING, threads=threads)
    others, _ = take(shards, DECODING, threads=threads, decode_seconds=60.0)
    assert_same_but_one(batches, others, "s-00000.tar/000005")
    assert loader.skipped == {"decode_hung": 3}
    assert all("s-00000.tar/000005" in line and "0.2 s" in line for line in loader.recent)
    # It hangs once: in later epochs it is known.
    left = hung_threads() - before
    assert left and all(thread.daemon for thread in left)
    kept = [batch["image"].copy() for batch in batches]
    _come_back.set()
    for thread in left:
        thread.join(timeout=60)
        assert not thread.is_alive()
    # What comes back late writes nothing.
    for batch, image in zip(batches, kept, strict=True):
        np.testing.assert_array_equal(batch["image"], image)


@pytest.mark.slow
def test_in_processes_that_decode_too_and_they_end(shards):
    batches, loader = take(shards, HANGING, threads=4, processes=2, decode_seconds=5.0)
    assert isinstance(loader._reader, DecodeProcesses)
    assert loader._reader._pool.process.returncode == 0  # ended by itself
    others, _ = take(shards, DECODING, threads=2, decode_seconds=60.0)
    assert_same_but_one(batches, others, "s-00000.tar/000005")
    assert loader.skipped == {"decode_hung": 3}


def make_locking_decode(side, config):
    """Make a decoder that does not let go of Python's lock at one image."""
    decode = make_decode(side, config)
    hangs = encode(make_image("RGB", 20, 23, seed=HANGS), "PNG")

    def decode_or_hang(data):
        if data == hangs:
            ctypes.PyDLL(None).sleep(600)
        return decode(data)

    return decode_or_hang


@pytest.mark.slow
def test_a_process_that_hangs_altogether_is_replaced(shards, monkeypatch):
    monkeypatch.setattr(decode_processes, "LEAST_SILENCE", 10.0)
    locking = Decoding(make_decode=make_locking_decode)
    batches, loader = take(shards, locking, threads=4, processes=2, decode_seconds=5.0)
    others, _ = take(shards, DECODING, threads=2, decode_seconds=60.0)
    assert_same_but_one(batches, others, "s-00000.tar/000005")
    assert loader.skipped == {"decode_hung": 3}
    assert all("s-00000.tar/000005" in line and "replaced" in line for line in loader.recent)


def test_a_loader_that_is_closed_waits_for_no_image(shards):
    loader = train_loader(shards, decoding=HANGING, streams=2, threads=1, decode_seconds=1e6)
    reader, done = loader._reader, threading.Event()

    def read():
        reader.read(np.arange(4, 8), np.zeros(4, np.int64))
        done.set()

    threading.Thread(target=read).start()
    loader.close()
    assert done.wait(60)


def test_what_reads_raises_to_whoever_waits():
    def fail(progress):
        raise KeyError("mine")

    watch = DecodeWatch(60.0)
    with pytest.raises(KeyError, match="mine"):
        watch.run(fail, lambda: True)
    progress = Progress()
    progress.begin(3)
    assert not progress.abandon(2)
    progress.end()
    progress.begin(4)
    assert progress.abandon(4)
    with pytest.raises(AbandonedError):
        progress.end()
