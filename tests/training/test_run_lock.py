"""A work folder has one run at a time, and a killed one leaves it free."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from clip_jax.errors import UserError
from clip_jax.training.run_lock import only_run


def test_another_process_is_named_and_its_end_frees_the_folder(tmp_path):
    code = (
        "import sys, time, pathlib; from clip_jax.training.run_lock import only_run\n"
        f"with only_run(pathlib.Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(UserError, match=rf"in use by process {other.pid} on .*; wait for it"),
            only_run(tmp_path),
        ):
            pass
        other.kill()
    with only_run(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / "run.lock").read_text()
    with only_run(tmp_path):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_run(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().out
