"""How commands end: on SIGTERM, on a stream that nobody reads, and on what a killed one left."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from run_tiny import ROOT, command, environment, write_experiment

from clip_jax import errors, files
from clip_jax.errors import EXIT_TERMINATED, Terminated, UserError, run_command
from clip_jax.pretrained.export import new_folder


def start(code, **options):
    """Start Python with a command of these lines, and wait for its first line."""
    program = "import sys, os, time, signal\nfrom clip_jax import errors\n" + textwrap.dedent(code)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def test_sigterm_ends_a_command_with_a_line_and_its_code():
    process = start("""
        def command():
            try:
                print("ready", flush=True)
                time.sleep(600)
            finally:
                print("let go", flush=True)
        errors.run_command(command)
    """)
    process.terminate()
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (EXIT_TERMINATED, b"let go\n")
    assert error.decode().splitlines() == [errors.TERMINATED]


def test_sigterm_ends_a_command_while_it_is_being_imported(tmp_path):
    (tmp_path / "absl.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(600)")
    process = subprocess.Popen(
        [sys.executable, "-m", "clip_jax.main"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_TERMINATED
    assert error.decode().splitlines() == [errors.TERMINATED]


def test_sigterm_ends_a_command_that_is_inside_a_library():
    process = start("""
        import hashlib
        errors.GRACE_SECONDS = 0.1
        def command():
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, in C
        errors.run_command(command)
    """)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_TERMINATED
    assert error.decode().splitlines() == [errors.TERMINATED]


def test_a_handler_that_saves_first_is_given_its_time():
    process = start("""
        errors.GRACE_SECONDS = 0.1
        from clip_jax.training.signals import catch_signals
        def command():
            with catch_signals(lambda line: None) as request:
                print("ready", flush=True)
                while not request.signal:
                    time.sleep(0.01)
                time.sleep(0.5)
                print("saved", flush=True)
            return 7
        errors.run_command(command)
    """)
    process.terminate()
    assert process.communicate(timeout=60)[0] == b"saved\n"
    assert process.returncode == 7


def test_a_command_whose_output_nobody_reads_goes_on(tmp_path):
    done = tmp_path / "done"
    process = start(
        f"""
        def command():
            print("ready", flush=True)
            sys.stdin.readline()
            for i in range(1000):
                print("a line that nobody reads", flush=True)
                print("another", file=sys.stderr, flush=True)
                os.write(1, b"of a library")
            open({str(done)!r}, "w").close()
            return 3
        errors.run_command(command)
    """,
        stdin=subprocess.PIPE,
    )
    process.stdout.close()
    process.stderr.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 3 and done.exists()


def test_a_command_without_streams_runs(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: print("nowhere") or 4)
    assert end.value.code == 4


def test_the_handlers_of_before_are_there_again(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: signal.raise_signal(signal.SIGTERM))
    assert end.value.code == EXIT_TERMINATED
    assert capsys.readouterr().err == f"{errors.TERMINATED}\n"
    assert signal.getsignal(signal.SIGTERM) == before
    assert issubclass(Terminated, KeyboardInterrupt)


def test_what_a_killed_convert_has_left_is_removed(tmp_path, capsys):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    host = os.uname().nodename
    names = {"dead": f"out.part-{host}-{process.pid}", "ours": f"out.part-{host}-{os.getppid()}"}
    names |= {"other": "out.part-elsewhere-1", "another": f"out2.part-{host}-{process.pid}"}
    for name in names.values():
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out") as part:
        (part / "x").write_text("x")
    assert (tmp_path / "out/x").exists() and "is removed" in capsys.readouterr().err
    left = {name for name, path in names.items() if (tmp_path / path).exists()}
    assert left == {"ours", "other", "another"}


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        files.os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}"))
    )
    with files.atomic_write(tmp_path / "a") as partial:
        partial.write_text("x")
    assert synced == [str(tmp_path / "a.partial"), str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be written"):
        patch.setattr(files.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "no disk")))
        with files.atomic_write(tmp_path / "a") as partial:
            partial.write_text("y")
    assert (tmp_path / "a").read_text() == "x"


def start_run(experiment, workdir, *flags):
    """Start a run of a tiny model on one device."""
    line = [sys.executable, "-m", "clip_jax.main", *command(experiment, workdir, *flags)]
    return subprocess.Popen(
        line, cwd=ROOT, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_a_run_ends_with_a_line_before_it_begins_and_when_its_folder_is_gone(tmp_path):
    experiment = write_experiment(tmp_path)
    process = start_run(experiment, tmp_path / "early", "--config.train.steps=100000")
    while not (tmp_path / "early").exists():  # before the first step, which compiles
        time.sleep(0.01)
    process.terminate()
    _, error = process.communicate(timeout=600)
    assert process.returncode == EXIT_TERMINATED, error
    assert error.decode().splitlines()[-1] == errors.TERMINATED
    gone = tmp_path / "gone"
    flags = "--config.train.steps=100000", "--config.checkpoint.every=100"
    process = start_run(experiment, gone, *flags)
    while not (gone / "checkpoints" / "100").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    gone.rename(tmp_path / "elsewhere")  # at once, and between two saves
    _, error = process.communicate(timeout=600)
    assert process.returncode == 2
    lines = [line for line in error.decode().splitlines() if not line.startswith("note:")]
    assert len(lines) == 1 and "was removed while the run went on" in lines[0]
