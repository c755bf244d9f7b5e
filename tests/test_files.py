"""Files that are whole or not there."""

import errno
import os

import pytest

from clip_jax.errors import UserError
from clip_jax.files import atomic_write, make_folder


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
    full = f"^{path} cannot be written \\(No space left on device\\)$"
    with pytest.raises(UserError, match=full), atomic_write(path) as partial:
        partial.write_text("tw")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]
    below = path / "b.txt"
    with pytest.raises(UserError, match=f"{below} cannot be written"), atomic_write(below):
        raise AssertionError("not come to")
    with pytest.raises(UserError, match=f"--out {path}/c cannot be made .*; give another"):
        make_folder(path / "c", flag="--out")
