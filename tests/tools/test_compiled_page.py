"""Tests of the page that `benchmarks.compiled` writes."""

from benchmarks.compiled import HEADS, PROGRAMS, TABLE, command, page, read_figures, summary
from clip_jax.planning.compilers import device_platform
from clip_jax.planning.hardware import DEVICES

FIGURES = {
    "compiler": {"platform": "tpu", "name": "libtpu", "version": "0.0.42"},
    "fits": True,
    "memory_bytes": 9e9,
    "temp_bytes": 8e9,
    "estimated_seconds": 0.1,
    "estimated_by": "cycles",
    "counted_share": 0.999,
    "utilization": 0.45,
    "exposed_collective_share": 0.25,
    "collectives": [{"times": 3}, {"times": 1}],
    "breakdown": [
        {"tower": "image", "pass": "backward", "part": "MLP", "seconds": 0.07},
        {"tower": "", "pass": "", "part": "update", "seconds": 0.03},
    ],
    "seconds": 60,
}
REFUSED = FIGURES | dict.fromkeys(("estimated_seconds", "utilization")) | {"fits": False}


def test_every_program_has_a_compiler_and_a_command():
    for name, program in PROGRAMS.items():
        assert device_platform(program.device) in ("tpu", "cuda") and program.device in DEVICES
        assert "out.json" in command(program, "out.json"), name
    assert "--config.train.batch_size=1024" in command(PROGRAMS["b32-v5e"], "")


def test_the_page_shows_what_there_is():
    text = page(
        {"b32-v5e": FIGURES, "l14-v5p": REFUSED, "rn50-v5e": {"failed": "no", "seconds": 1}}
    )
    rows = [line for line in text.splitlines() if line.startswith("| ViT") or "RN50" in line]
    assert "100.0 | 45.0 % | 8.0 GB | 9.0 GB | yes | 99.9 % | 4 | 25 % | libtpu 0.0.42 |" in rows[0]
    assert "| no |" in rows[1] and rows[2].startswith("| RN50 | 4 x tpu-v5e | 128 | no |")
    assert all(row.count("|") == len(HEADS) + 1 for row in rows[:3])
    assert "| MLP |  | 70.0 |  |  |  | 70.0 |" in text and "## ViT-B/32 on 4 x tpu-v5e" in text
    assert "times as long" in page({"b16-tower-v5e": FIGURES, "b16-stock-v5e": FIGURES})
    kernels = FIGURES | {"kernels": 1200, "transposes": 7, "float32_products": 2}
    text = page({"b16-tower-h100": kernels, "b16-stock-h100": kernels})
    assert "1,200 kernels, 7 of which move axes, and 2 float32 products; in flax's" in text
    assert summary("b32-v5e", FIGURES).startswith("b32-v5e: 100.0 ms, 45.0 %")
    assert "does not fit" in summary("l14-v5p", REFUSED)


def test_the_page_has_the_figures_that_were_written():
    text = TABLE.read_text(encoding="utf-8")
    assert text == page(read_figures()) + "\n", (
        "write it anew: python -m benchmarks.compiled --page"
    )
