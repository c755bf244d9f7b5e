"""The data bench: every pair is counted, and the verdict is the arithmetic that it says."""

import pytest
from data_cases import ToyTokenizer, write_shards

from clip_jax.data.decode_processes import usable_cores
from clip_jax.data.sample_reader import SampleShape
from clip_jax.data.sources import open_shards
from clip_jax.data.stages import PARTS, LoaderSettings, Stage, measure_loader, measure_parts, timed
from clip_jax.errors import UserError
from clip_jax.sections import DataSection
from clip_jax.tools import data_bench as command
from clip_jax.tools.data_bench import (
    ENOUGH,
    BenchResult,
    need_of,
    result_json,
    result_text,
    verdict_of,
)

SETTINGS = LoaderSettings(SampleShape(16, 32), 8, DataSection())
NEED = {"device": "h100", "devices": 2, "dtype": "bfloat16", "utilization": 0.5, "image_size": 0}


def test_work_is_called_in_turn_until_the_time_is_over_and_counted():
    calls = []

    def work(call):
        calls.append(call)
        return 3

    stage = timed("x", work, 0.01)
    assert calls == list(range(len(calls))) and stage.pairs == 3 * len(calls)
    assert stage.seconds >= 0.01 and stage.rate == stage.pairs / stage.seconds
    assert timed("nothing at first", lambda call: call // 5, 0.0).pairs == 1


def test_every_stage_and_the_loader_are_measured(tmp_path):
    shards = open_shards(write_shards(tmp_path, [20, 13], side=30))
    stages = measure_parts(shards, ToyTokenizer(), SETTINGS, seconds=0.01)
    assert [s.name for s in stages] == ["read", "decode and crop", "tokenise", "assemble"]
    assert len(stages) == PARTS and all(s.pairs > 0 for s in stages)
    stage, lengths = measure_loader(shards, ToyTokenizer(), SETTINGS, threads=2, seconds=0.01)
    assert stage.name == "loader, 2 threads"
    assert stage.pairs == 8 * lengths.total()
    assert set(lengths) == {16}  # "caption 12" and the end token


def test_a_set_of_nothing_that_can_be_read(tmp_path):
    shards = open_shards(write_shards(tmp_path, [20]))
    (tmp_path / "s-00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="no sample could be read"):
        measure_parts(shards, ToyTokenizer(), SETTINGS, seconds=0.01)


def test_what_an_accelerator_takes():
    """Two H100s at half of 989.4 TFLOP/s each; the image tower of ViT-B/32 alone has 8.82 GFLOP
    (open_clip's 4.41 GMACs), of which the last of twelve blocks is mostly left out here."""
    need = need_of("ViT-B/32", ToyTokenizer(), 24, **NEED)
    assert need.rate == pytest.approx(989.4e12 / need.flops, rel=1e-12)
    assert 3 * 8.82e9 * 11 / 12 < need.flops < 3 * 1.5 * 8.82e9
    longer = need_of("ViT-B/32", ToyTokenizer(), 77, **NEED)
    assert longer.flops > need.flops
    # A text tower that sees its padding is never trimmed.
    siglip = need_of("ViT-B-16-SigLIP", ToyTokenizer(), 16, **NEED)
    assert siglip.tokens == 64
    for changes, text in (
        ({"device": "h101"}, "--device 'h101' is not known"),
        ({"dtype": "float64"}, "no rate is published"),
    ):
        with pytest.raises(UserError, match=text):
            need_of("ViT-B/32", ToyTokenizer(), 24, **{**NEED, **changes})


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.25, "starves it: it would compute 25.0%"), (1.1, "barely"), (2.5, "2.50 times")],
)
def test_the_verdict_says_plainly_whether_data_starves_it(share, words):
    need = need_of("ViT-B/32", ToyTokenizer(), 24, **NEED)
    slow = Stage("loader, 1 thread", 100, 1000.0, 1.0)
    best = Stage("loader, 2 threads", 1000, 1000 / (share * need.rate), 4.0)
    verdict = verdict_of([slow, best], need)
    assert verdict.rate == pytest.approx(share * need.rate)
    assert verdict.busy == pytest.approx(min(1, share))
    # 4 ms of processors a pair.
    assert verdict.cores == pytest.approx(ENOUGH * need.rate * 0.004)
    assert verdict.threads - 1 < verdict.cores <= verdict.threads
    assert verdict.processes == verdict.threads // 4
    text = result_text(BenchResult((), (slow, best), need, verdict))
    assert words in text and "ViT-B/32 on 2 x h100" in text


def test_the_command(tmp_path):
    write_shards(tmp_path, [40])
    line = [str(tmp_path), "--model", "ViT-B/32", "--image-size", "32", "--batch-size", "8"]
    options = vars(command.parse([*line, "--seconds", "0.01", "--threads", "0,2", "--json"]))
    assert options.pop("json")
    result = command.bench(**options)
    assert [s.name for s in result.loaders] == ["loader, 0 threads", "loader, 2 threads"]
    assert result.need.tokens == 16
    figures = result_json(result)
    assert [list(figures), list(figures["stages"][0])] == [
        ["stages", "need", "verdict"],
        ["name", "pairs_per_second", "cpu_ms"],
    ]
    need = ["model", "device", "devices", "dtype", "utilisation", "tokens", "flops", "rate"]
    assert list(figures["need"]) == need
    assert list(figures["verdict"]) == ["rate", "busy", "cores", "enough", "threads", "processes"]
    assert len(figures["stages"]) == PARTS + 2
    for name, value, text in (
        ("utilization", 1.5, "--utilization is 1.5"),
        ("seconds", 0.0, "--seconds is 0"),
        ("model", "ViT-B/31", "ViT-B/31"),
    ):
        with pytest.raises(UserError, match=text):
            command.bench(**{**options, name: value})
    (tmp_path / "few").mkdir()
    few = write_shards(tmp_path / "few", [5])
    odd = {**options, "source": list(few), "batch_size": 10, "threads": (-1,)}
    (loader,) = command.bench(**odd).loaders
    assert loader.rate > 0  # no field of a config is asked for
    assert loader.name.startswith(f"loader, {usable_cores()} thread")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(bytes(700))
    with pytest.raises(UserError, match="cut or damaged at byte"):
        command.bench(**{**options, "source": [str(cut)]})
    assert command.parse([*line, "--threads", "-1"]).threads == [-1]
    assert command.parse([*line, "--threads", "4,-1"]).threads == [4, -1]
    with pytest.raises(UserError, match="numbers with commas"):
        command.parse([*line, "--threads", "two"])


def test_the_older_spelling_of_a_flag_goes_on_working(capsys):
    for flag in ("--utilization", "--utilisation"):
        assert command.parse(["x.tar", flag, "0.25"]).utilization == 0.25
    assert command.parse(["x.tar"]).utilization == command.UTILIZATION
    with pytest.raises(SystemExit):
        command.parse(["--help"])
    assert "utilisation" not in capsys.readouterr().out
