"""Every benchmark runs at a tiny size, and what can be checked of its numbers is right."""

import json

import pytest

pytest.importorskip("open_clip")

from benchmarks import encoding, gradcache, loss, step_parts, tokenizer, training

TINY = ["--model", "tiny", "--batch", "8", "--repeats", "1", "--warmup", "0"]


def run(main, folder, name, *arguments):
    """A benchmark's JSON file."""
    main([*arguments, "--out", str(folder)])
    result = json.loads((folder / f"{name}.json").read_text())
    assert result["machine"]["cores"] > 0 and result["rows"]
    return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training(tmp_path, capsys, dtype):
    result = run(training.main, tmp_path, "training", *TINY, "--dtype", dtype)
    assert [row["library"] for row in result["rows"]] == ["clip_jax", "open_clip"]
    # From the same weights, float32 sums in another order; bfloat16 has 8 bits, and autocast
    # rounds at other places than we do.
    assert result["facts"]["loss_difference"] < {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    assert "pairs/s" in capsys.readouterr().out


def test_encoding(tmp_path):
    result = run(encoding.main, tmp_path, "encoding", *TINY)
    assert len(result["rows"]) == 5
    # Unit features, float32.
    assert max(row["largest difference"] for row in result["rows"]) < 1e-5


def test_gradcache(tmp_path):
    rows = run(gradcache.main, tmp_path, "gradcache", *TINY)["rows"]
    assert abs(float(rows[0]["first loss"]) - float(rows[1]["first loss"])) < 1e-5
    assert rows[1]["activations, MB"] < rows[0]["activations, MB"]


def test_step_parts(tmp_path):
    rows = run(step_parts.main, tmp_path, "step_parts", *TINY)["rows"]
    assert rows[-1]["part"] == "whole step" and rows[-1]["share, %"] == 100


def test_loss(tmp_path):
    arguments = ["--rows", "64", "--beyond", "128", "--repeats", "1", "--warmup", "0"]
    rows = run(loss.main, tmp_path, "loss", *arguments)["rows"]
    values = [float(row["loss"]) for row in rows if row["rows"] == 64]
    # Four forms of one float32 loss of about 4.5.
    assert len(values) == 4 and max(values) - min(values) < 5e-6


def test_tokenizer(tmp_path):
    arguments = ["--captions", "50", "--repeats", "1"]
    assert run(tokenizer.main, tmp_path, "tokenizer", *arguments)["facts"]["ids_equal"]
