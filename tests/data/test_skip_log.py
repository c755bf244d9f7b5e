"""What goes wrong outside the images: servers that fail, keys that repeat, a thousand shards."""

import gc
import json
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import data_cases
import numpy as np
import pytest
from data_cases import train_loader
from run_tiny import log as log_file
from run_tiny import start_two, write_experiment

from clip_jax.data.dataset import open_sources
from clip_jax.data.formats import remote
from clip_jax.data.manifest import ShardEntry, write_manifest
from clip_jax.data.skip_log import SkipLog

CUT = -1
"""A body that breaks off."""


def one_epoch(shards, log, batch_size=8):
    """Return every row of one pass: (keys, which of them are valid)."""
    keys, good = [], []
    with train_loader(shards, log=log, batch_size=batch_size, window=8, repeat=False) as loader:
        for batch in loader:
            keys += [key for key in batch["key"] if key]
            good += [valid for key, valid in zip(batch["key"], batch["valid"], strict=True) if key]
    return keys, np.array(good)


def shard_names():
    return [f"s-{i:05d}.tar" for i in range(4)]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve a folder of four shards over HTTP, with errors for a file's first `failures` requests.

    `requests` counts all of them; `answers` says what a failure is: a status, or CUT.
    """
    data_cases.write_shards(tmp_path, [4] * 4)
    failures, requests, lock = Counter(), Counter(), threading.Lock()
    answers = {}

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def do_GET(self):
            name = Path(self.path).name
            with lock:
                requests[name] += self.command == "GET"
                fails = requests[name] <= failures[name]
            answer = answers.get(name, 503)
            if not fails and self.command == "HEAD":
                super().do_HEAD()
            elif not fails:
                super().do_GET()
            elif answer == CUT:
                self.send_response(200)
                self.send_header("Content-Length", "10240")
                self.end_headers()
                self.wfile.write(b"half")
            else:
                self.send_response(answer)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def do_HEAD(self):
            self.do_GET()

        def log_message(self, *args):
            pass

    monkeypatch.setattr(remote, "PAUSE", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        pattern = f"http://127.0.0.1:{http.server_port}/s-{{00000..00003}}.tar"
        failures.answers = answers
        yield pattern, failures, requests
        http.shutdown()
        thread.join()
    remote.CACHE.close()


def test_a_server_that_fails_at_first_loses_nothing(server):
    pattern, failures, requests = server
    failures["s-00001.tar"] = remote.TRIES - 1
    log = SkipLog()
    (shards,) = open_sources(pattern, log=log, cached_shards=8)
    keys, good = one_epoch(shards, log)
    assert len(set(keys)) == 16 and good.all() and not log.shard_counts
    # With the last, good try; each shard is fetched once for all its samples.
    assert requests["s-00001.tar"] == remote.TRIES and requests["s-00002.tar"] == 1


def test_only_missing_and_forbidden_are_what_they_say(server):
    pattern, failures, requests = server
    failures.answers |= dict(zip(shard_names(), (500, 429, CUT, 404), strict=True))
    failures.update(dict.fromkeys(shard_names(), 2))
    log = SkipLog()
    (shards,) = open_sources(pattern, log=log, cached_shards=8)
    assert sum(map(len, shards)) == 12 and log.shard_counts == {"shard_unreadable": 1}
    assert "s-00003.tar does not exist" in log.excluded_shards[0][2]
    assert requests["s-00000.tar"] > 2 and requests["s-00003.tar"] == 1


def test_what_a_size_that_was_not_told_means(server):
    """fsspec takes each answer to a question for a size as a file that is not there."""
    pattern, failures, _ = server
    url = pattern.replace("{00000..00003}", "00000")
    fs, path = remote.file_system(url)
    for answer, message in ((500, "failed 6 times, at last with answer 500"), (403, "may not be")):
        failures.answers["s-00000.tar"] = answer
        failures["s-00000.tar"] = 10**6
        with pytest.raises(remote.RemoteError, match=message):
            remote.with_retries(url, lambda: fs.info(path))


def test_a_file_that_is_not_in_a_bucket_is_asked_for_once():
    """As s3fs, gcsfs and fsspec's memory say it: of an answer 404, or of a key that is missing."""

    class Answer(Exception):
        def __init__(self, **attributes):
            self.__dict__.update(attributes)

    s3 = {"ResponseMetadata": {"HTTPStatusCode": 404}}
    for cause in (Answer(response=s3), Answer(code=404), KeyError("x"), FileNotFoundError("x")):
        calls = []

        def call(cause=cause, calls=calls):
            calls.append(cause)
            raise FileNotFoundError("bucket/x") from cause

        with pytest.raises(remote.RemoteError, match="s3://bucket/x does not exist"):
            remote.with_retries("s3://bucket/x", call)
        assert len(calls) == 1


def test_a_server_that_always_fails_loses_the_shard_and_names_it(server, tmp_path):
    pattern, failures, requests = server
    failures["s-00001.tar"] = 10**6
    log = SkipLog(tmp_path / "skipped.jsonl")
    (shards,) = open_sources(pattern, log=log, cached_shards=8)
    assert [len(shard) for shard in shards] == [4] * 3
    assert log.shard_counts == {"shard_unreadable": 1} and requests["s-00001.tar"] == remote.TRIES
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["name"].endswith("/s-00001.tar") and "503" in line


def test_a_listed_shard_that_a_server_does_not_give_is_passed_over(server, tmp_path):
    """With a manifest nothing is fetched at the start; the fault comes in the middle of a run."""
    pattern, failures, requests = server
    paths = sorted(tmp_path.glob("*.tar"))
    write_manifest(tmp_path, {path.name: ShardEntry(4, path.stat().st_size) for path in paths})
    failures["s-00002.tar"] = 10**6
    log = SkipLog(tmp_path / "skipped.jsonl")
    (shards,) = open_sources(pattern, log=log, cached_shards=8)
    assert not requests.keys() - {"index.json"}
    keys, good = one_epoch(shards, log)
    assert len(keys) == 16 and log.counts == {"shard_unreadable": 4}
    assert {key.partition("/")[0] for key in np.array(keys)[~good]} == {"s-00002.tar"}
    # All tries once, and then the shard's other samples are passed over at once.
    assert requests["s-00002.tar"] == remote.TRIES
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "s-00002.tar"


def test_repeated_keys_and_filtered_samples_are_counted(tmp_path):
    data_cases.write_shards(tmp_path, [4, 3], prefix="a")
    data_cases.write_shards(tmp_path, [5], prefix="b")  # keys 0 to 4 again
    log = SkipLog(tmp_path / "skipped.jsonl")
    (shards,) = open_sources(str(tmp_path), log=log, unique_keys=True, cached_shards=4)
    assert [len(shard) for shard in shards] == [4, 3, 0]
    assert log.excluded == {"duplicate_key": 5}
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"b-00000.tar/{k:06d}" for k in range(5)]
    log = SkipLog()
    (shards,) = open_sources(str(tmp_path), log=log, where="caption==caption 2", cached_shards=4)
    assert sum(map(len, shards)) == 2 and log.excluded == {"filtered": 10}
    assert log.counts.total() == 0


SHARD_DAMAGES = {
    "cut": (lambda data: data[:1500], "shard_damaged"),
    "flipped bit": (lambda data: data[:5] + bytes([data[5] ^ 4]) + data[6:], "shard_damaged"),
    "zero bytes": (lambda data: b"", "shard_damaged"),
    "another type": (lambda data: b"\x1f\x8b" + data[2:], "shard_damaged"),
    "zeros": (lambda data: bytes(len(data)), "shard_changed"),  # an archive without members
}


def test_a_thousand_damaged_shards_lose_their_rows_and_leave_nothing_open(tmp_path):
    """They were whole when the run counted them; 100 others stay whole."""
    (path,) = data_cases.write_shards(tmp_path, [2])
    whole = Path(path).read_bytes()
    Path(path).unlink()
    kinds = [*SHARD_DAMAGES] * 200 + ["good"] * 100
    paths = [tmp_path / f"{k:05d}.tar" for k in range(len(kinds))]
    for path in paths:
        path.write_bytes(whole)
    pattern, run = f"{tmp_path}/{{00000..01099}}.tar", str(tmp_path / "run")
    open_sources(pattern, log=SkipLog(), cached_shards=8, workdir=run)
    for path, kind in zip(paths, kinds, strict=True):
        if kind != "good":
            path.write_bytes(SHARD_DAMAGES[kind][0](whole))
    for path in paths[:7]:
        path.unlink()
    log = SkipLog(tmp_path / "skipped.jsonl")
    (shards,) = open_sources(pattern, log=log, cached_shards=64, workdir=run)
    gc.collect()  # another test's files may wait for it
    files = len(list(Path("/proc/self/fd").iterdir()))
    keys, good = one_epoch(shards, log, batch_size=64)
    assert len(keys) == 2200 and good.sum() == 200
    want = Counter(SHARD_DAMAGES[kind][1] for kind in kinds[7:1000])
    assert log.counts == {cause: 2 * n for cause, n in want.items()} | {"shard_missing": 2 * 7}
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 1000
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= files
    assert len(shards[0]._cache) <= 64


@pytest.mark.slow
def test_two_processes_end_together_on_what_one_of_them_skips(tmp_path):
    """All samples of process 1 are damaged; a shard that both leave out is listed once."""
    experiment = write_experiment(tmp_path / "data", shards=4, samples=24)
    for shard in (2, 3):
        path = tmp_path / f"data/0000{shard}.tar"
        path.write_bytes(path.read_bytes().replace(b"\x89PNG", b"\x89XXX"))
    whole = (tmp_path / "data/00000.tar").read_bytes()
    for k in range(4, 44):  # good ones, so that one lost shard is not too much
        (tmp_path / f"data/{k:05d}.tar").write_bytes(bytes(1024))  # no sample at all
    (tmp_path / "data/00044.tar").write_bytes(whole[:1000])
    flags = ("--config.train.steps=500", f"--config.data.train={tmp_path}/data")
    workdir = tmp_path / "run"
    processes = start_two(experiment, workdir, *flags)
    assert [process.wait(200) for process in processes] == [2, 2]
    for index in range(2):
        lines = log_file(workdir, index).read_text()
        # 8 of each step's 16 rows: more than a tenth of 1,000 with batch 13, and 14 is fetched.
        assert f"error: process {index}: 112 of 224 samples could not be used: 112 not" in lines
    listed = [json.loads(line) for line in (workdir / "skipped.jsonl").read_text().splitlines()]
    assert [Path(line["name"]).name for line in listed] == ["00044.tar"]
    others = (workdir / "skipped-1.jsonl").read_text().splitlines()
    assert len(others) == 48 and all("not_an_image" in line for line in others)
