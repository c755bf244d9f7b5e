"""The doctor's lines, file and exit code."""

import dataclasses
import json

import jax

from clip_jax.tools import doctor


def test_what_it_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "out" / "doctor.json"
    code = doctor.main(["--folder", str(tmp_path), "--no-training", "--json", str(file)])
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert code == bool(found["problems"])
    assert out.count("PROBLEM") == len(found["problems"])
    for part in (
        "versions",
        "devices     8 cpu",
        "folder",
        "fsync",
        "extras",
        f"jax {jax.__version__}",
    ):
        assert part in out
    assert found["steps"] is None and found["file_system"]["locks"]


def test_a_problem_is_a_line_and_a_code(monkeypatch, capsys):
    healthy = doctor.diagnose(".", train=False)
    sick = dataclasses.replace(healthy, problems=("jax 0.1 is old: pip install jax",))
    monkeypatch.setattr(doctor, "diagnose", lambda *_, **__: sick)
    assert doctor.main([]) == 1
    assert "PROBLEM     jax 0.1 is old: pip install jax" in capsys.readouterr().out
    monkeypatch.setattr(
        doctor, "diagnose", lambda *_, **__: dataclasses.replace(healthy, problems=())
    )
    assert doctor.main([]) == 0


def test_a_step_that_fails_is_told(monkeypatch):
    from clip_jax.diagnosis import training_step

    def fail():
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(training_step, "try_training", fail)
    steps, (line,) = doctor._steps()
    assert steps is None and "RuntimeError: out of luck" in line
