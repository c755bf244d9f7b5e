"""Tests that every benchmark runs at a tiny size, and of what can be checked in its numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("open_clip")

ROOT = Path(__file__).parents[2]
TINY = ["--model", "tiny", "--batch", "8", "--repeats", "1", "--warmup", "0"]


def run(folder, name, *arguments):
    """Run a benchmark on the devices a user has; return its JSON file and what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--out", str(folder)],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "XLA_FLAGS"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / f"{name}.json").read_text())
    assert result["machine"]["cores"] > 0 and result["rows"]
    return result, done.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training(tmp_path, dtype):
    result, printed = run(tmp_path, "training", *TINY, "--dtype", dtype)
    assert [row["library"] for row in result["rows"]] == ["clip_jax", "open_clip"]
    # From the same weights, float32 sums in another order; bfloat16 has 8 bits, and autocast
    # rounds at other places than we do.
    assert result["facts"]["loss_difference"] < {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    assert "pairs/s" in printed


def test_encoding(tmp_path):
    result, _ = run(tmp_path, "encoding", *TINY)
    assert len(result["rows"]) == 5
    # Unit features, float32.
    assert max(row["largest difference"] for row in result["rows"]) < 1e-5


def test_families(tmp_path):
    arguments = ["--only", "RN50", "--images", "1", "--texts", "1", "--repeats", "1", "--one-core"]
    (row,) = run(tmp_path, "families", *arguments, "--warmup", "0")[0]["rows"]
    assert row["largest difference"] < 1e-5


def test_gradcache(tmp_path):
    # So many pairs that activations are more than the tiny model's table of tokens.
    rows = run(tmp_path, "gradcache", *TINY, "--batch", "256")[0]["rows"]
    assert abs(float(rows[0]["first loss"]) - float(rows[1]["first loss"])) < 1e-5
    assert rows[1]["memory"] < 0.2


def test_step_parts(tmp_path):
    rows = run(tmp_path, "step_parts", *TINY)[0]["rows"]
    assert rows[-1]["part"] == "whole step" and rows[-1]["share, %"] == 100


def test_loss(tmp_path):
    arguments = ["--rows", "64", "--beyond", "128", "--repeats", "1", "--warmup", "0"]
    rows = run(tmp_path, "loss", *arguments)[0]["rows"]
    values = [float(row["loss"]) for row in rows if row["rows"] == 64]
    # Four forms of one float32 loss of about 4.5.
    assert len(values) == 4 and max(values) - min(values) < 5e-6


def test_tokenizer(tmp_path):
    arguments = ["--captions", "50", "--repeats", "1"]
    assert run(tmp_path, "tokenizer", *arguments)[0]["facts"]["ids_equal"]
