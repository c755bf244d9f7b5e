"""Metrics to a service: each line once, under one id, and nothing of the service ends a run."""

import contextlib
import json
import os
import signal
import sqlite3
import struct
import subprocess
from pathlib import Path

import pytest
from service_stand_in import put_stand_in

from clip_jax.errors import EXIT_TERMINATED, UserError
from clip_jax.sections import TrainSection
from clip_jax.training import metrics_service
from clip_jax.training.metrics import MetricsWriter
from clip_jax.training.metrics_service import MetricsService


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    return put_stand_in(tmp_path, monkeypatch)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_run(folder, steps, *, service="trackio", start=None, code=0, final=None):
    """Write the metrics of steps as a run does, and those of its end, and send them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"config": {"seed": 7}}))
    section = TrainSection(report_to=service, report_project="demo")
    with (
        contextlib.closing(MetricsService(section, folder)) as sender,
        contextlib.closing(MetricsWriter(folder, resume_step=start)) as writer,
    ):
        sender.start()
        for step in steps:
            writer.write(step, {"loss": step / 3, "note": "a", "bad": float("nan")})
            if step % 4 == 0:
                writer.write(step, {"eval/acc1": step / 8})
        if final is not None:
            (folder / "eval.json").write_text(json.dumps({"results": final}))
        sender.code = code


def test_a_resumed_run_goes_on_in_the_same_run_and_sends_no_line_twice(stand_in, tmp_path, capfd):
    folder = tmp_path / "mine"
    write_run(folder, range(1, 7), code=EXIT_TERMINATED)
    write_run(folder, range(4, 10), start=3)
    (first, *lines) = read(stand_in)
    begun = [line for line in lines if "project" in line]
    assert begun == [first] and first["resume"] == "allow" and first["seed"] == 7
    assert first["project"] == "demo" and first["name"].startswith("mine-")
    steps = [line for line in lines if "loss" in line]
    assert steps == [{"step": step, "loss": step / 3} for step in range(1, 10)]
    evaluations = [line for line in lines if "eval/acc1" in line]
    assert evaluations == [{"step": step, "eval/acc1": step / 8} for step in (4, 8)]
    assert sum("finished" in line for line in lines) == 2
    out = capfd.readouterr().out
    assert out.count("metrics go to trackio, run mine (") == 2


def test_the_final_evaluation_is_sent_once_with_the_last_step(stand_in, tmp_path):
    folder = tmp_path / "mine"
    figures = {"acc1": 0.5, "undefined": None}
    probes = [{"metrics": {"lp_acc1": shots / 10, "fewshot_k": shots}} for shots in (1.0, 4.0)]
    final = [{"metrics": figures}, *probes]
    write_run(folder, range(1, 4), code=EXIT_TERMINATED, final=[{"metrics": {"acc1": 0.25}}])
    write_run(folder, range(4, 7), start=3, final=final)
    write_run(folder, (), start=6, final=final)
    (sent,) = [line for line in read(stand_in) if "eval/lp_acc1@1" in line]
    assert sent == {
        "step": 6, "eval/acc1": 0.5, "eval/lp_acc1@1": 0.1, "eval/fewshot_k@1": 1.0,
        "eval/lp_acc1@4": 0.4, "eval/fewshot_k@4": 4.0,
    }  # fmt: skip
    assert [x["eval/acc1"] for x in read(stand_in) if "eval/acc1" in x] == [0.5, 0.5]


def test_a_service_that_fails_is_told_once_and_gets_the_rest_later(
    stand_in, tmp_path, monkeypatch, capfd
):
    folder = tmp_path / "mine"
    monkeypatch.setenv("STAND_IN_FAILS", "log")
    write_run(folder, range(1, 4))
    out = capfd.readouterr().out
    assert out.count("\n") == 2  # one says where they go
    assert "trackio takes no metrics (ConnectionError: the service is gone); the run goes on" in out
    monkeypatch.delenv("STAND_IN_FAILS")
    write_run(folder, range(4, 6), start=3)
    assert [line["step"] for line in read(stand_in) if "loss" in line] == [1, 2, 3, 4, 5]


def test_a_service_that_hangs_or_dies_holds_nothing_up(stand_in, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN_FAILS", "init")
    monkeypatch.setattr(metrics_service, "FINISH_SECONDS", 0.1)
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    write_run(tmp_path / "mine", range(1, 3))
    assert "trackio has not taken all metrics yet" in capfd.readouterr().out
    (hung,) = started
    hung.kill()
    hung.wait()

    section = TrainSection(report_to="trackio")
    with contextlib.closing(MetricsService(section, tmp_path / "mine")) as sender:
        sender.start()
        started[1].send_signal(signal.SIGKILL)
        started[1].wait()
        sender.check()
        sender.check()
    assert capfd.readouterr().out.count("has ended with code -9; the run goes on") == 1


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'report_to is "wandb", .*: pip install .*\[wandb\]'):
        MetricsService(TrainSection(report_to="wandb"), tmp_path)


def test_trackio_itself(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    write_run(tmp_path / "mine", range(1, 7), code=EXIT_TERMINATED)
    write_run(tmp_path / "mine", range(4, 10), start=3)
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "demo.db")) as db:
        rows = db.execute("SELECT run_id, step, metrics FROM metrics").fetchall()
    assert len({run for run, *_ in rows}) == 1
    found = [(step, json.loads(numbers)) for _, step, numbers in rows]
    losses = [(step, numbers["loss"]) for step, numbers in found if "loss" in numbers]
    assert losses == [(step, step / 3) for step in range(1, 10)]
    assert [step for step, numbers in found if "eval/acc1" in numbers] == [4, 8]


def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "mine"
    write_run(folder, range(1, 7), service="wandb", code=EXIT_TERMINATED)
    write_run(folder, range(4, 10), service="wandb", start=3)
    runs = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    (state,) = json.loads((folder / "report_to.json").read_text()).values()
    assert [run.name for run in runs] == [f"run-{state['id']}.wandb"] * 2
    assert [wandb_losses(run) for run in runs] == [
        {step: step / 3 for step in range(1, 7)},
        {step: step / 3 for step in range(7, 10)},
    ]


def leveldb_records(data):
    """Yield the records of a log shorter than one of its blocks: checksum, length, type, data."""
    assert len(data) < 32_000
    while data:
        (length,) = struct.unpack("<H", data[4:6])
        assert data[6] == 1  # whole
        yield data[7 : 7 + length]
        data = data[7 + length :]


def wandb_losses(path: os.PathLike) -> dict[int, float]:
    """Return the losses by step of a file of wandb."""
    from wandb.proto.wandb_internal_pb2 import Record

    losses = {}
    for data in leveldb_records(Path(path).read_bytes()[7:]):
        record = Record.FromString(data)
        values = {tuple(item.nested_key) or (item.key,): item for item in record.history.item}
        if ("loss",) in values:
            losses[record.history.step.num] = json.loads(values["loss",].value_json)
    return losses
