"""Tests of the search for settings: which it compiles, what it keeps, and what it writes."""

import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from clip_jax.config import default, resolve
from clip_jax.errors import UserError
from clip_jax.planning.candidates import Candidate, is_pruned, make_candidates, parameter_bytes
from clip_jax.planning.compilers import Compiler, device_counts
from clip_jax.planning.hardware import DEVICES
from clip_jax.tools.config_flags import parse as parse_config
from clip_jax.tools.plan import AXES, main
from clip_jax.tools.plan_search import (
    Cache,
    RunSize,
    Search,
    code_digest,
    counts_for_days,
    search_record,
    search_text,
    with_settings,
    write_record,
)

TPU = Compiler("tpu", "libtpu", "0.0.42.1")
V5E = DEVICES["tpu-v5e"]


def config_of(**values):
    c = default()
    c.model.name, c.model.dtype, c.train.steps, c.train.batch_size = (
        "ViT-B/32",
        "bfloat16",
        10,
        2048,
    )
    with c.unlocked():
        c.update_from_flattened_dict(values)
    return resolve(c)


GIGABYTES = {"full": 1, "blocks": 2, "minimal": 6, "dots": 9, "none": 30}
MS = {"full": 230, "blocks": 150, "minimal": 100, "dots": 110, "none": 120}


def fake_compile(calls, interrupt_after=None, memory=16e9):
    """Return a compiler whose memory and time follow from the settings."""

    def compile_(config, device_name, devices, compiler, path, utilization):
        if interrupt_after is not None and len(calls) >= interrupt_after:
            raise KeyboardInterrupt
        calls.append(config)
        m = config.model
        parts = config.train.batch_size // (config.train.microbatch_size or config.train.batch_size)
        size = 1e9 * GIGABYTES[m.remat] * 8 / devices / parts + 2e9 / config.mesh.fsdp
        seconds = (
            MS[m.remat] * (1.0 if parts == 1 else 1.33) * (1.1 if m.scan else 1.0) * 8 / devices
        )
        record = {
            "fits": size <= memory,
            "memory_bytes": size,
            "estimated_seconds": seconds / 1e3 if m.attention == "auto" else seconds / 500,
            "exposed_collective_seconds": 0.001 * config.mesh.fsdp,
            "utilization": 0.5,
            "mesh": {"data": devices // config.mesh.fsdp, "fsdp": config.mesh.fsdp, "tensor": 1},
        }
        path.write_text(json.dumps(record))
        return ""

    return compile_


def search_of(tmp_path, config=None, vary=AXES, **options):
    calls = []
    made = Search(
        config or config_of(),
        "tpu-v5e",
        V5E,
        TPU,
        Cache(tmp_path, TPU, "tpu-v5e", 0.5),
        frozenset(vary),
        parameters=151_000_000,
        compile=fake_compile(calls, **options),
    )
    return made, calls


def enough(best):
    return True


def test_the_quickest_setting_that_fits_comes_first(tmp_path):
    made, calls = search_of(tmp_path)
    found = made.run([8], enough)
    best = found.ranked[0].candidate
    assert (best.remat, best.scan, best.fsdp, best.parts) == ("minimal", False, 1, 1)
    assert [r.seconds for r in found.ranked] == sorted(r.seconds for r in found.ranked)
    assert found.is_complete and not found.failed
    # Two meshes, two forms of the layers, three policies; and the other kernel for the best.
    assert len(calls) == 2 * 2 * 3 + 1
    assert {c.model.attention for c in calls} == {"auto", "xla"}
    assert all(c.model.remat != "full" and not c.train.microbatch_size for c in calls)
    assert {r.candidate.remat for r in found.refused} == {"none"}


def test_what_does_not_fit_spares_what_needs_more(tmp_path):
    # On two devices blocks alone take 8 + 2 GB and the rest more than 16. Of "minimal" and "dots"
    # neither spares the other, and both spare "none".
    made, calls = search_of(tmp_path, vary=("remat",))
    found = made.run([2], enough)
    assert [c.model.remat for c in calls] == ["minimal", "blocks", "dots"]
    assert [r.candidate.remat for r in found.ranked] == ["blocks"]


def test_micro_batches_are_taken_where_the_whole_batch_does_not_fit(tmp_path):
    made, _ = search_of(tmp_path, vary=("remat", "microbatch"), memory=8e9)
    found = made.run([2], enough)
    assert found.ranked[0].candidate.parts == 2 and found.ranked[0].candidate.remat == "blocks"
    assert all(r.candidate.parts == 2 or r.candidate.remat == "full" for r in found.ranked)


def test_each_program_is_compiled_once(tmp_path):
    made, calls = search_of(tmp_path)
    first = made.run([8], enough)
    again, more = search_of(tmp_path)
    assert calls and again.run([8], enough).ranked == first.ranked and not more
    # Another version of the compiler, or of the config, is another program; other data is not.
    assert made.cache.path(config_of(), 8) == made.cache.path(
        config_of(**{"data.train": "x.tar"}), 8
    )
    assert made.cache.path(config_of(), 8) != made.cache.path(
        config_of(**{"optim.name": "lion"}), 8
    )
    newer = Cache(tmp_path, dataclasses.replace(TPU, version="0.0.43"), "tpu-v5e", 0.5)
    assert newer.read(config_of(), 8) is None
    # Its own estimate of a step is the TPU compiler's alone: elsewhere the share is part of a plan.
    other = Cache(tmp_path, TPU, "tpu-v5e", 0.7)
    assert other.path(config_of(), 8) == made.cache.path(config_of(), 8)
    cuda = Compiler("cuda", "jax-cuda12-plugin", "0.10.2")
    shares = {Cache(tmp_path, cuda, "h100", share).path(config_of(), 8) for share in (0.5, 0.7)}
    assert len(shares) == 2
    assert len(code_digest()) == 64


def test_an_interrupted_search_tells_what_it_knows(tmp_path):
    made, calls = search_of(tmp_path, interrupt_after=3)
    found = made.run([8], enough)
    assert not found.is_complete and len(found.ranked) == 3 == len(calls)
    text = search_text(found, config_of(), "tpu-v5e", TPU, RunSize(1, 1e15, 10), None)
    assert "it ended early" in text and "minimal" in text


def test_the_smallest_number_of_devices_that_is_quick_enough(tmp_path):
    config = config_of(**{"train.steps": 864_000})
    size = RunSize(151_000_000, 2048 * 30e9, 864_000)
    counts = counts_for_days(config, "tpu-v5e", V5E, size, 0.6, frozenset(AXES))
    assert counts[0] == 8  # fewer could not at nine tenths of their peak
    made, _ = search_of(tmp_path, config, vary=("remat",))
    found = made.run(counts, lambda best: size.days(best.seconds) <= 0.6)
    # 100 ms on 8 chips are a day, 50 ms on 16 half a day, 1 ms of exchanges each.
    assert {r.devices for r in found.ranked} == {8, 16}
    text = search_text(found, config, "tpu-v5e", TPU, size, 0.6)
    assert "16 x tpu-v5e make the run in 0.51 days" in text
    with pytest.raises(UserError, match="no number of tpu-v5e"):
        counts_for_days(config, "tpu-v5e", V5E, size, 1e-6, frozenset(AXES))


def test_numbers_of_devices_that_the_mesh_and_the_batch_fit():
    size, remat = RunSize(151_000_000, 1.0, 10), frozenset({"remat"})

    def counts(vary=remat, **values):
        return counts_for_days(config_of(**values), "tpu-v5e", V5E, size, 1.0, vary)

    assert counts(**{"mesh.fsdp": 8}) == [8, 16, 32, 64, 128, 256]
    assert counts(frozenset(AXES), **{"mesh.fsdp": 8})[0] == 1
    assert counts(**{"mesh.fsdp": 4, "mesh.tensor": 2})[:2] == [8, 16]
    assert counts(**{"mesh.data": 2, "mesh.fsdp": 4}) == [8]
    assert counts(**{"train.batch_size": 48, "data.streams": 8}) == [1, 2, 4, 8, 16]
    assert counts(**{"train.microbatch_size": 32})[-1] == 32
    with pytest.raises(UserError, match="no number of tpu-v5e that the mesh and the batch fit"):
        counts(**{"mesh.fsdp": 3})


def test_a_failed_compilation_is_told_and_nothing_follows_from_it(tmp_path):
    made, _ = search_of(tmp_path, vary=("remat", "microbatch"), memory=8e9)
    compile_ = made.compile

    def fail_where_most_is_kept(config, device_name, devices, compiler, path, utilization):
        # The machine's own memory ends there, which says nothing of the devices'.
        if config.model.remat == "minimal" and not config.train.microbatch_size:
            return "the compiler was killed"
        return compile_(config, device_name, devices, compiler, path, utilization)

    made.compile = fail_where_most_is_kept
    found = made.run([2], enough)
    assert [(c.remat, c.parts) for c, _, _ in found.failed] == [("minimal", 1)]
    # Without the failure: blocks whole (10 GB) do not fit, and two parts of them do (6 GB).
    assert found.is_complete and found.ranked[0].candidate.parts == 2
    text = search_text(found, config_of(), "tpu-v5e", TPU, RunSize(1, 1e15, 10), None)
    assert "not compiled: 2 devices" in text and "the compiler was killed" in text


def test_a_compiler_that_always_fails_is_not_asked_for_ever(tmp_path):
    calls = []

    def fail(config, *_):
        calls.append(config)
        return "the compiler stumbled"

    made, _ = search_of(tmp_path)
    made.compile = fail
    found = made.run([8, 16], enough)
    assert not found.ranked and not found.is_complete
    assert len(calls) == len(found.failed) == 10 and {n for _, n, _ in found.failed} == {8, 16}
    text = search_text(found, config_of(), "tpu-v5e", TPU, RunSize(1, 1e15, 10), None)
    assert "the compiler stumbled" in text and "nothing was compiled" in text


def test_failures_on_few_devices_say_nothing_of_more(tmp_path):
    made, _ = search_of(tmp_path)
    compile_ = made.compile

    def fail_on_few(config, device_name, devices, *rest):
        return "killed" if devices == 8 else compile_(config, device_name, devices, *rest)

    made.compile = fail_on_few
    found = made.run([8, 16], enough)
    assert len(found.failed) == 5 and {r.devices for r in found.ranked} == {16}
    assert not found.is_complete


def test_parameters_that_cannot_fit_are_not_compiled(tmp_path):
    made, calls = search_of(tmp_path)
    made.parameters = 5_000_000_000
    made.run([8], enough)
    assert calls and all(c.mesh.fsdp == 8 for c in calls)
    whole = Candidate(1, 1, "minimal", False, "auto", 1)
    # Not their moments, which the copies of a model share.
    assert parameter_bytes(100, whole) == 400
    assert parameter_bytes(100, dataclasses.replace(whole, fsdp=8)) == 50


# What ml_collections reads a config file with.
old_loader = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@old_loader
def test_the_result_is_a_config(tmp_path, monkeypatch):
    config = config_of(**{"data.crop_scale": (0.5, 1.0), "optim.name": "lion"})
    made, _ = search_of(tmp_path, config)
    found = made.run([8], enough)
    path = tmp_path / "found.json"
    write_record(str(path), search_record(found, config, 10))
    flags = ["plan", "--config", str(path), "--config.train.steps=20"]
    monkeypatch.setattr("sys.argv", flags)
    given = resolve(parse_config(flags))
    expected = with_settings(config, found.ranked[0].candidate.settings(config))
    assert given == dataclasses.replace(
        expected, train=dataclasses.replace(expected.train, steps=20)
    )
    record = json.loads(path.read_text())
    assert record["ranked"][0]["settings"]["model.remat"] == "minimal"
    assert record["ranked"][0]["days"] == pytest.approx(10 * 0.101 / 86_400)


@old_loader
def test_a_result_without_settings_is_no_config(tmp_path):
    config = config_of()
    made, _ = search_of(tmp_path, config, vary=("remat",), memory=1e9)
    found = made.run([2], enough)
    assert not found.ranked and found.refused
    text = search_text(found, config, "tpu-v5e", TPU, RunSize(1, 1e15, 10), None)
    assert text.endswith("nothing fits; take more devices, or a smaller batch")
    path = tmp_path / "found.json"
    write_record(str(path), search_record(found, config, 10))
    assert json.loads(path.read_text())["config"] is None
    with pytest.raises(UserError, match=r"found\.json holds no settings") as raised:
        parse_config(["plan", "--config", str(path)])
    assert "\n" not in str(raised.value)


def fake_search(monkeypatch, tmp_path, *flags, memory=16e9):
    """Run the command with a compiler that stands for libtpu's; return its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clip_jax.planning.compilers.find_compiler", lambda *_: TPU)
    size = RunSize(151_000_000, 1.0, 864_000)
    monkeypatch.setattr("clip_jax.tools.plan_search.size_of_run", lambda *_: size)
    faked = functools.partial(Search, compile=fake_compile([], memory=memory))
    monkeypatch.setattr("clip_jax.tools.plan_search.Search", faked)
    line = ["plan", "--config", "vit_b32", "--search", "--device", "tpu-v5e", "--vary", "remat"]
    monkeypatch.setattr("sys.argv", [*line, "--cache", str(tmp_path / "cache"), *flags])
    return main()


@old_loader
def test_a_search_that_finds_nothing_says_so(monkeypatch, tmp_path, capsys):
    assert fake_search(monkeypatch, tmp_path, "--devices", "2", memory=1e9) == 1
    out = capsys.readouterr().out
    assert "nothing fits; take more devices" in out
    assert "search.json: no settings to take" in out and "--config" not in out
    assert json.loads((tmp_path / "search.json").read_text())["config"] is None


@old_loader
@pytest.mark.parametrize(("days", "code"), [("0.6", 0), ("0.001", 1)])
def test_a_search_says_whether_the_days_are_enough(monkeypatch, tmp_path, capsys, days, code):
    assert fake_search(monkeypatch, tmp_path, "--days", days) == code
    out = capsys.readouterr().out
    assert ("make the run in 0." in out) == (code == 0)
    assert ("no number of devices that was compiled makes the run in 0.001 days" in out) == (
        code == 1
    )
    assert "search.json: the best settings, which --config takes" in out


def test_candidates_divide_the_devices_and_the_batch():
    config = config_of(**{"train.batch_size": 48, "data.streams": 8})
    made = make_candidates(config, 16, frozenset(AXES))
    for c in made:
        assert 16 % (c.fsdp * c.tensor) == 0 and 48 % (16 // c.tensor) == 0
        assert (48 // c.parts) % (16 // c.tensor) == 0
    assert {(c.fsdp, c.tensor) for c in made} == {(1, 1), (8, 1), (16, 1), (8, 2)}
    assert len(set(made)) == len(made)
    assert not is_pruned(made[0], {})
    # Every mesh and form of the layers once, before anything else of one of them.
    first = {(c.fsdp, c.tensor, c.scan) for c in made[:8]}
    assert len(first) == 8 and {(c.remat, c.parts) for c in made[:8]} == {("minimal", 1)}


def test_the_runs_own_mesh_and_micro_batch_are_candidates():
    own = {"mesh.fsdp": 4, "mesh.tensor": 2, "train.microbatch_size": 16}
    config = config_of(**{"train.batch_size": 48, "data.streams": 8}, **own)
    made = make_candidates(config, 16, frozenset(AXES))
    assert {(c.fsdp, c.tensor) for c in made} == {(1, 1), (8, 1), (16, 1), (8, 2), (4, 2)}
    assert {c.parts for c in made} == {1, 2, 3} and len(set(made)) == len(made)
    # Not on devices that it does not fit.
    assert {(c.fsdp, c.tensor) for c in make_candidates(config, 4, frozenset(AXES))} == {
        *((1, 1), (4, 1))
    }
    whole = make_candidates(config_of(**{"mesh.fsdp": 8}), 8, frozenset(AXES))
    assert len(set(whole)) == len(whole)


def test_what_computes_blocks_again_is_not_tried_where_less_fits():
    config = config_of(**{"train.batch_size": 48, "data.streams": 8})
    made = make_candidates(config, 1, frozenset({"remat", "microbatch"}))
    left = [c for c in made if not is_pruned(c, {made[0]: True})]
    assert [(c.remat, c.parts) for c in left] == [("minimal", 1), ("dots", 1), ("none", 1)]
    left = [c for c in made if not is_pruned(c, {made[0]: False})]
    assert ("blocks", 1) in {(c.remat, c.parts) for c in left}


def test_what_keeps_more_is_not_tried_where_less_does_not_fit():
    config = config_of(**{"train.batch_size": 48, "data.streams": 8})
    made = make_candidates(config, 1, frozenset({"remat"}))
    without = {c.remat: {x.remat for x in made if not is_pruned(x, {c: False})} for c in made}
    # Of "minimal" and "dots" neither always takes less: on H100s ViT-L/14's layers in a loop take
    # 43.0 GB with "minimal" and 36.6 with "dots" (docs/planning.md).
    assert without["minimal"] == {"full", "blocks", "dots"}
    assert without["dots"] == {"full", "blocks", "minimal"}
    assert without["blocks"] == {"full"} and without["none"] == set(without) - {"none"}


def test_numbers_of_devices_that_can_be_had():
    assert device_counts("tpu-v5e")[-1] == 256 and device_counts("h100")[:5] == (1, 2, 4, 8, 16)


@old_loader
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--search takes --devices, or --days"),
        (["--devices", "8", "--days", "5"], "--search takes --devices, or --days"),
        (["--devices", "8", "--vary", "remat,color"], "--vary is 'color'"),
        (["--devices", "0"], "--devices is 0; give how many"),
        (["--devices", "-8"], "--devices is -8; give how many"),
        (["--devices", "8", "--utilization", "5"], "--utilization is 5; it takes"),
        (["--devices", "8", "--top", "-5"], "--top is -5; it takes how many"),
        (["--days", "5", "--pairs", "10"], "--pairs is 10; it takes config.train.batch_size"),
        (["--days", "0", "--pairs", "4e8"], "--days is 0; give how many days"),
        (["--days", "nan", "--pairs", "4e8"], "--days is nan; give how many days"),
        (
            ["--devices", "256", "--config.train.batch_size=1000", "--config.data.streams=8"],
            "batch_size 1000 is not a multiple of .* = 256 devices; the nearest that is: 768",
        ),
        (["--devices", "7", "--vary", "remat"], "batch_size 32768 is not a multiple of .* = 7 dev"),
        (
            ["--devices", "4", "--vary", "remat", "--config.mesh.fsdp=8"],
            "config.mesh asks for 1 x 8 x 1 .* and there are 4",
        ),
        (
            ["--devices", "8", "--vary", "remat", "--config.train.microbatch_size=4"],
            "microbatch_size 4 is not a multiple of .* = 8 devices",
        ),
    ],
)
def test_mistakes_are_one_line(monkeypatch, flags, message):
    line = ["plan", "--config", "experiments/vit_b32.py", "--search", *flags]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(UserError, match=message):
        main()


@old_loader
@pytest.mark.parametrize(
    ("platform", "device", "devices", "message"),
    [
        ("tpu", "tpu-v5e", "3", "a slice of tpu-v5e has one of"),
        ("cuda", "h100", "12", "machines of h100 hold 8"),
    ],
)
def test_devices_that_cannot_be_had_are_refused(monkeypatch, platform, device, devices, message):
    compiler = Compiler(platform, "", "")
    monkeypatch.setattr("clip_jax.planning.compilers.find_compiler", lambda *_: compiler)
    line = ["plan", "--config", "experiments/vit_b32.py", "--search"]
    monkeypatch.setattr("sys.argv", [*line, "--device", device, "--devices", devices])
    with pytest.raises(UserError, match=message):
        main()


@old_loader
@pytest.mark.parametrize(
    ("flags", "place", "message"),
    [
        (["--json"], "", "--json .* is a folder; name a file"),
        (["--json"], "file/x.json", "--json .*file cannot be made"),
        (["--json"], "closed/x.json", "--json .*closed cannot be written to .Permission denied"),
        (["--search", "--json"], "", "--json .* is a folder; name a file"),
        (["--search", "--json"], "closed/x.json", "--json .*closed cannot be written to"),
        (["--search", "--cache"], "file", "--cache .* cannot be made"),
        (["--search", "--cache"], "closed", "--cache .* cannot be written to .Permission denied"),
    ],
)
def test_places_to_write_are_checked_first(monkeypatch, tmp_path, flags, place, message):
    def fail(*_, **__):
        raise AssertionError("it has begun")

    def refuse(dir):
        if Path(dir).is_relative_to(tmp_path / "closed"):
            raise PermissionError(13, "Permission denied")
        return contextlib.nullcontext()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("plan.plan", "plan_search.Search", "plan_search.compile_in_child"):
        monkeypatch.setattr(f"clip_jax.tools.{name}", fail)
    size = RunSize(151_000_000, 1.0, 10)
    monkeypatch.setattr("clip_jax.tools.plan_search.size_of_run", lambda *_: size)
    # Who runs the tests as root may write anywhere.
    monkeypatch.setattr("clip_jax.files.tempfile.TemporaryFile", refuse)
    line = ["plan", "--config", "vit_b32", "--devices", "8", *flags, str(tmp_path / place)]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(UserError, match=message):
        main()


@pytest.mark.slow
def test_the_command_searches_with_the_cpus_compiler(tmp_path):
    found = tmp_path / "found.json"
    line = [
        *(sys.executable, "-m", "clip_jax.plan", "--search", "--compiler", "cpu"),
        *("--config", "experiments/emoji_vit.py", "--config.data.tokenizer=clip"),
        *("--config.eval.data=", "--device", "h100", "--devices", "1", "--vary", "remat"),
        *("--cache", str(tmp_path / "cache"), "--json", str(found)),
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 settings fit, 0 do not" in done.stdout and "published rates" in done.stdout
    assert len(list((tmp_path / "cache" / "plans").glob("*.json"))) == 3
    best = json.loads(found.read_text())["config"]["model"]["remat"]
    shown = [sys.executable, "-m", "clip_jax.main", "--dry-run", "--config", str(found)]
    again = subprocess.run(shown, capture_output=True, text=True)
    assert again.returncode == 0 and f'"remat": "{best}"' in again.stdout, again.stderr
