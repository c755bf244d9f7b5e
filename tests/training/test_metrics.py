"""Rates of a run, and the files that it writes."""

import contextlib
import json
import math
import resource
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.errors import UserError
from clip_jax.training.metrics import (
    PEAKS,
    MetricsWriter,
    Throughput,
    measure_matmul_flops,
    peak_flops,
    progress_line,
)


@pytest.mark.parametrize(
    ("device_kind", "dtype", "tera"),
    [
        ("Tesla V100-SXM2-16GB", "float32", 15.7),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("Tesla T4", "float32", 8.1),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-PCIE-40GB", "float32", 156),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H100 NVL", "float32", 417.5),
        ("NVIDIA H200", "float32", 494.7),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA B200", "bfloat16", 2250),
        ("TPU v4", "bfloat16", 275),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v5p", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("TPU v4", "float32", None),
        ("cpu", "float32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA A100-SXM4-80GB", "int8", None),
    ],
)
def test_peak_by_device_kind(device_kind, dtype, tera):
    assert peak_flops(device_kind, dtype) == (None if tera is None else tera * 1e12)


@pytest.mark.parametrize("key", PEAKS)
def test_each_row_is_found_by_its_own_name(key):
    assert peak_flops(f"NVIDIA {key}", "float32") == peak_flops(key, "float32")
    for dtype, tera in PEAKS[key]._asdict().items():
        assert peak_flops(key, dtype) == (None if tera is None else tera * 1e12)


def test_measured_rate_is_a_rate():
    rate = measure_matmul_flops("float32", size=128, seconds=0.01)
    assert 1e7 < rate < 1e15  # a wristwatch, and no device there is


def test_throughput_leaves_the_first_step_out():
    throughput = Throughput(pairs_per_step=100, steps=20)
    assert throughput.pairs_per_second is None
    throughput.report(1, 60.0)  # a minute of compiling
    assert throughput.pairs_per_second is None and throughput.seconds_left is None
    throughput.report(2, 60.5)
    throughput.report(5, 62.0)
    assert throughput.steps_per_second == 2
    assert throughput.pairs_per_second == 200
    assert throughput.seconds_left == 7.5


def test_throughput_forgets_a_pause():
    throughput = Throughput(pairs_per_step=1, steps=100, window=2)
    for step, now in [(1, 0.0), (2, 1000.0), (3, 1001.0), (4, 1002.0)]:
        throughput.report(step, now)
    assert throughput.pairs_per_second == 1


def test_throughput_of_a_clock_that_stands_is_unknown():
    throughput = Throughput(pairs_per_step=1, steps=2)
    throughput.report(1, 5.0)
    throughput.report(2, 5.0)
    assert throughput.pairs_per_second is None


def write(workdir, steps, **options):
    with contextlib.closing(MetricsWriter(workdir, **options)) as writer:
        for step in steps:
            writer.write(step, {"loss": jnp.float32(1 / (step + 1)), "rows": 7, "note": "a"})
    return (workdir / "metrics.jsonl").read_bytes()


def test_lines_hold_every_digit_and_valid_json(tmp_path):
    values = {
        "third": np.float32(1 / 3),
        "tenth": 0.1,
        "nan": jnp.float32(np.nan),
        "up": math.inf,
        "down": -math.inf,
        "bad": {"truncated": np.int64(3)},
    }
    with contextlib.closing(MetricsWriter(tmp_path / "new" / "run")) as writer:
        writer.write(3, values)
        text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()  # flushed before close

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(text, parse_constant=refuse)
    assert list(line) == ["step", *values]
    assert line["step"] == 3 and line["tenth"] == 0.1 and line["third"] == float(np.float32(1 / 3))
    assert (line["nan"], line["up"], line["down"]) == ("NaN", "Infinity", "-Infinity")
    assert float(line["down"]) == -math.inf
    assert line["bad"] == {"truncated": 3}


@settings(max_examples=10, deadline=None)
@given(killed=st.integers(0, 9), saved=st.integers(0, 9), cut=st.integers(0, 30))
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path_factory, killed, saved, cut):
    saved = min(saved, killed)
    whole = write(tmp_path_factory.mktemp("whole"), range(1, 11))
    workdir = tmp_path_factory.mktemp("resumed")
    written = write(workdir, range(1, killed + 1))
    # Killed while it wrote the next line, or the machine lost that line's end.
    line = whole.splitlines(keepends=True)[killed]
    (workdir / "metrics.jsonl").write_bytes(written + line[: min(cut, len(line) - 1)])
    assert write(workdir, range(saved + 1, 11), resume_step=saved) == whole


def test_without_resume_the_file_begins_afresh(tmp_path):
    write(tmp_path, range(5))
    assert len(write(tmp_path, range(2)).splitlines()) == 2


def test_a_foreign_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2"):
        MetricsWriter(tmp_path, resume_step=2)


def test_a_disk_that_fills_stops_nothing(tmp_path, capsys):
    """Files may not grow beyond 1,000 bytes for a while, which a write answers as a full disk."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.closing(MetricsWriter(tmp_path)) as writer:
        for step in range(60):
            if step in (10, 40):
                limit = 1000 if step == 10 else unlimited[0]
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
            writer.write(step, {"loss": step / 3})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    lost = sorted(set(range(60)) - set(steps))
    assert steps[:11] == list(range(11)) and steps[-20:] == list(range(40, 60))
    assert lost == list(range(lost[0], 40))
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert any("takes no more lines" in line for line in told)
    assert any("the run goes on without TensorBoard's file" in line for line in told)


def tensorboard_records(path):
    """Return the events of a TFRecord file: length, its checksum, the event, its checksum."""
    data, records = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        records.append(data[12 : 12 + length])
        data = data[16 + length :]
    return records


def test_tensorboard_gets_the_numbers_only(tmp_path):
    write(tmp_path, [4])
    (file,) = tmp_path.glob("events.out.tfevents.*")
    events = b"".join(tensorboard_records(file))
    assert b"loss" in events and b"rows" in events and b"note" not in events


def test_progress_line():
    metrics = {
        "loss": 4.1234,
        "scale": 15.2,
        "image_accuracy": 0.12,
        "text_accuracy": 0.118,
        "learning_rate": 5e-4,
        "mfu": 0.41,
        "data_wait": 0.03,
        "host_wait": 0.049,
    }
    assert progress_line(120, 2000, metrics, 3456.0, 192.0) == (
        "step  120/2000  6 %  loss 4.123  scale 15.2  acc i>t 12.0 % t>i 11.8 %  "
        "lr 5.0e-04  3,456 pairs/s  mfu 41 %  data wait 3 %  left 3:12"
    )
    assert "data wait 3 %  host wait 12 %  left" in progress_line(
        120, 2000, metrics | {"host_wait": 0.12}, 3456.0, 192.0
    )
    assert progress_line(7, 7, {"loss": math.nan}, None, 93784.0) == (
        "step 7/7  100 %  loss nan  left 1 d 2:03:04"
    )
    assert progress_line(1, 3, {}, None, 3599.6) == "step 1/3  33 %  left 1:00:00"
