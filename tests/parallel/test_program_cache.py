"""Compiled programs in a folder: read again, the same to the bit; a bad folder is one line."""

import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.parallel import program_cache
from clip_jax.parallel.jax_internals import use_compilation_cache
from clip_jax.parallel.program_cache import ProgramCache, start_program_cache
from clip_jax.training.programs import ProgramCompiler, ShapedPrograms


@pytest.fixture
def lines():
    return []


@pytest.fixture
def cache(tmp_path, lines):
    return ProgramCache(tmp_path, lines.append)


@pytest.fixture
def without_tests_cache(monkeypatch):
    """Take the tests' own folder away from JAX for the time of a test."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_enable_xla_caches",
    )
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(program_cache, "MIN_COMPILE_SECONDS", 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def test_a_program_is_whole_or_absent(cache, lines, tmp_path):
    assert cache.get("a") is None
    cache.put("a", b"program")
    assert cache.get("a") == b"program" and not lines
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert cache.get("a") is None
    assert len(lines) == 1 and f"has a damaged file, {file.name}" in lines[0]
    # JAX's own cache would leave the damaged one for ever.
    cache.put("a", b"program")
    assert cache.get("a") == b"program" and len(lines) == 1


def test_what_is_wrong_is_said_once(tmp_path, lines):
    (tmp_path / "file").touch()
    cache = ProgramCache(tmp_path / "file", lines.append)
    for _ in range(2):
        cache.put("a", b"program")
        assert cache.get("a") is None
    assert len(lines) == 1 and "takes no program" in lines[0]


def test_what_was_not_used_for_the_longest_time_goes_first(cache, tmp_path):
    for number, name in enumerate("abc"):
        cache.put(name, bytes(68))
        (file,) = tmp_path.glob(f"{name}*")
        os.utime(file, (number, number))
    cache.get("a")
    cache.prune(max_bytes=200)
    assert [name for name in "abc" if cache.get(name)] == ["a", "c"]


def test_what_a_kill_left_goes_after_a_day(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *paths: sys.exit())
    for name in "ab":
        with pytest.raises(SystemExit):
            cache.put(name, bytes(1000))
    monkeypatch.undo()
    (old,) = tmp_path.glob("a*")
    a_day_ago = time.time() - program_cache.LEFTOVER_SECONDS - 60
    os.utime(old, (a_day_ago, a_day_ago))
    cache.put("c", bytes(68))
    # What is being written counts when it is there.
    cache.prune(max_bytes=100)
    assert cache.get("c") and [path.name[0] for path in sorted(tmp_path.iterdir())] == ["b", "c"]


@pytest.mark.parametrize("moment", ["before it is looked at", "after that"])
def test_another_run_removes_a_file_at_the_same_time(cache, tmp_path, monkeypatch, moment):
    cache.put("a", b"program")
    real = Path.stat

    def stat(path, **options):
        result = real(path, **options)
        if path.suffix != ".program":
            return result
        path.unlink()
        return result if moment == "after that" else real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    cache.prune(max_bytes=0)
    assert not list(tmp_path.iterdir())


def test_the_folder_is_the_users_or_the_runs(tmp_path, monkeypatch, capsys, without_tests_cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    user = str(tmp_path / "user/clip_jax/programs")
    assert start_program_cache("auto", tmp_path) == user
    monkeypatch.setattr(program_cache, "process_count", lambda: 2)
    assert start_program_cache("auto", tmp_path) == str(tmp_path / "programs")
    assert capsys.readouterr().out == ""
    (tmp_path / "file").touch()
    assert start_program_cache(str(tmp_path / "file"), tmp_path) == ""
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "cannot be used (File exists)" in out
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert start_program_cache("auto", tmp_path) == "elsewhere"


@pytest.mark.parametrize("name", ["off", "none", ""])
def test_a_word_turns_it_off(name, tmp_path, monkeypatch, without_tests_cache):
    monkeypatch.chdir(tmp_path)
    assert start_program_cache(name, tmp_path) == "" and not list(tmp_path.iterdir())
    if name:
        assert start_program_cache(f"./{name}", tmp_path) == name and (tmp_path / name).is_dir()


def make_step():
    """Return a function that overwrites its state, another one every time."""

    def step(state, rows):
        state = {"x": jnp.sin(state["x"]) + rows.mean(), "n": state["n"] + 1}
        return state, {"loss": jnp.tanh(state["x"]).sum()}

    return jax.jit(step, donate_argnums=0)


def run_steps(compiler, *, ahead=()):
    programs = ShapedPrograms(make_step(), compiler)
    shapes = {
        "x": jax.ShapeDtypeStruct((64,), jnp.float32),
        "n": jax.ShapeDtypeStruct((), jnp.int32),
    }
    for size in ahead:
        programs.prepare(f"{size} rows", shapes, jax.ShapeDtypeStruct((size,), jnp.float32))
    state, losses = {"x": jnp.linspace(0, 1, 64), "n": jnp.zeros((), jnp.int32)}, []
    for size in (3, 5, 3, 5):
        state, metrics = programs(state, jnp.arange(float(size)))
        losses.append(np.asarray(metrics["loss"]))
    return losses


def test_a_program_that_was_read_computes_the_same_bits(tmp_path, capfd, without_tests_cache):
    folder = start_program_cache(str(tmp_path / "programs"), tmp_path)
    results = []
    for number, read in enumerate((0, 2, 1, 2)):
        if number == 2:
            # It is read no more, and whole again afterwards. The folder may be another by then.
            (tmp_path / "programs").rename(tmp_path / "moved")
            folder = start_program_cache(str(tmp_path / "moved"), tmp_path)
            next((tmp_path / "moved").glob("*step*")).write_bytes(b"")
        with ProgramCompiler(folder) as compiler:
            results.append(run_steps(compiler))
        counts = compiler.metrics()
        assert counts["startup/programs_read"] == read
        assert counts["startup/programs_compiled"] == 2 - read
    assert f"0 programs compiled, 2 read from {folder}" in compiler.summary()
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    assert capfd.readouterr().out.count("has a damaged file") == 1


def test_programs_are_there_before_they_are_needed(capsys):
    with ProgramCompiler("") as compiler:
        want = run_steps(compiler)
    # Of three shapes the third never comes; that changes nothing.
    with ProgramCompiler("") as compiler:
        got = run_steps(compiler, ahead=(5, 3, 7))
    np.testing.assert_array_equal(got, want)
    assert 2 <= len(compiler.programs) <= 3
    assert "5 rows (1 of 3 ahead)" in capsys.readouterr().out


def test_an_error_of_a_compiler_is_raised_where_the_program_is_needed():
    @jax.jit
    def broken(state, rows):
        raise ValueError("of our own")

    with ProgramCompiler("") as compiler:
        programs = ShapedPrograms(broken, compiler)
        x = jnp.ones(3)
        programs.prepare("broken", x, x)
        with pytest.raises(ValueError, match="of our own"):
            programs(x, x)


def test_the_cache_is_jaxs_own_place(cache):
    """What `use_compilation_cache` writes to is what the compiler asks."""
    from jax._src import compilation_cache

    before = compilation_cache._cache, compilation_cache._cache_initialized
    try:
        use_compilation_cache(cache)
        assert compilation_cache._get_cache(jax.devices()[0].client) is cache
    finally:
        compilation_cache._cache, compilation_cache._cache_initialized = before
