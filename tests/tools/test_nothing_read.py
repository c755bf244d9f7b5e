"""A set of which nothing can be used ends a command with one line, and not with success."""

import sys

import pytest
from embedded import toy_encoders
from PIL import Image

from clip_jax.errors import UserError
from clip_jax.tools import data_filter, data_shard, embed


@pytest.fixture
def bad_images(tmp_path):
    """Return a folder of two files that are no images, with captions."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(b"no image")
        (folder / f"{name}.txt").write_text("a caption")
    return folder


def test_embed(bad_images, tmp_path, monkeypatch):
    monkeypatch.setattr("clip_jax.api.load_encoders", lambda model, **load: toy_encoders())
    flags = ["--model", "m", "--data", str(bad_images), "--batch-size", "8"]
    with pytest.raises(UserError, match=r"no image is embedded.*2 not_an_image") as error:
        embed.main([*flags, "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value)
    Image.new("RGB", (20, 20)).save(bad_images / "c.png")
    assert embed.main([*flags, "--out", str(tmp_path / "two")]) == 0


def test_shard(bad_images, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (bad_images / f"{name}.txt").write_text("")
    line = ["shard", str(bad_images), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(UserError, match=r"no sample is written.*2 ") as error:
        data_shard.main()
    assert "\n" not in str(error.value)


def test_filter(bad_images, tmp_path):
    with pytest.raises(UserError, match=r"0 of 2 pairs scored.*2 not_an_image") as error:
        data_filter.filter_set(
            [str(bad_images)], tmp_path / "out", toy_encoders(), batch_size=8, scores_only=True
        )
    assert "\n" not in str(error.value)
