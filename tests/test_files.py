"""Files that are whole or not there."""

import errno
import os

import pytest

from clip_jax.errors import UserError
from clip_jax.files import atomic_write, claim_folder, make_folder


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as partial:
        partial.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as partial:
        partial.write_text("tw")
        raise KeyboardInterrupt
    assert path.read_text() == "one"


def test_what_cannot_be_written_is_told_in_a_line_and_leaves_no_rest(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    full = f"^{path} cannot be written \\(No space left on device\\): make room$"
    with pytest.raises(UserError, match=full), atomic_write(path) as partial:
        partial.write_text("tw")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]
    below = path / "b.txt"
    with (
        pytest.raises(UserError, match=f"{below} cannot be written .*: take another place"),
        atomic_write(below),
    ):
        raise AssertionError("not come to")
    with pytest.raises(UserError, match=f"--out {path}/c cannot be made .*; give another"):
        make_folder(path / "c", flag="--out")


def test_two_write_the_same_file_at_once(tmp_path):
    path = tmp_path / "main"
    with atomic_write(path, shared=True) as first:
        first.write_text("first")
        with atomic_write(path, shared=True) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_claimed_once_by_what_it_is_made_of(tmp_path):
    folder, info = tmp_path / "out", {"model": "a", "sizes": (1, 2), "texts": True}
    assert not claim_folder(folder, info, name="info.json", write=False) and not folder.exists()
    assert not claim_folder(folder, info, name="info.json")
    assert claim_folder(folder, info, name="info.json")
    with pytest.raises(UserError, match=r"another sizes \(\[1, 2\], now \[1, 3\]\)"):
        claim_folder(folder, info | {"sizes": (1, 3), "texts": False}, name="info.json")
    moved = info | {"model": "b"}
    assert claim_folder(folder, moved, name="info.json", may_differ=["model"])
    # A field that an earlier version did not write has the value that it had then.
    newer = info | {"seed": 0}
    assert claim_folder(folder, newer, name="info.json", defaults={"seed": 0})
    with pytest.raises(UserError, match=r"another seed \(None, now 0\)"):
        claim_folder(folder, newer, name="info.json")


def test_a_folder_of_others_is_not_claimed(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for folder, text in ((tmp_path, "holds something else"), (tmp_path / "notes.txt", "is a file")):
        with pytest.raises(UserError, match=text):
            claim_folder(folder, {}, name="info.json")
    assert not claim_folder(tmp_path, {}, name="info.json", foreign=["*.npy"])
    (tmp_path / "info.json").write_text("[]")
    with pytest.raises(UserError, match=r"info.json cannot be read: ValueError: not an object"):
        claim_folder(tmp_path, {}, name="info.json")
