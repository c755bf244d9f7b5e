"""What the real compilers make of our programs, without a device: `docs/compiled.md`.

    python -m benchmarks.compiled --list
    python -m benchmarks.compiled --platform tpu
    python -m benchmarks.compiled b32-v5e l14-h100

Each program is compiled in a process of its own, by the compiler of its devices (`pip install
'clip-jax-research[plan-tpu]'` or `[plan-gpu]`), and its figures are written as soon as they are
there, to docs/compiled.json and, as a table, docs/compiled.md: rows of programs that are not
compiled stay. Whole steps are those of `clip_jax.plan`; towers are the image tower and its gradient
alone.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_jax.files import atomic_write
from clip_jax.planning.compilers import device_platform
from clip_jax.planning.hardware import DEVICES

FOLDER = Path(__file__).parents[1] / "docs"
FIGURES, TABLE = FOLDER / "compiled.json", FOLDER / "compiled.md"


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of the table.

    Attributes:
      title: what it is.
      device, devices: for what it is compiled.
      pairs: those of a device; images for a tower.
      experiment: a file of `experiments/`; empty for a tower.
      fields: of its config.
      note: what they mean, in place of them.
      tower: "ours" or "stock" for the image tower of ViT-B/16 alone.
    """

    title: str
    device: str
    devices: int
    pairs: int
    experiment: str = ""
    fields: tuple[str, ...] = ()
    note: str = ""
    tower: str = ""


BIG = ("model.name=ViT-bigG-14", "mesh.fsdp=64", "model.scan=True")
# Log-normal lengths with a median of 11 tokens, 3 % of them at 77 or more.
WEB = (
    "data.caption_packing=4:0.194,8:0.402,12:0.549,16:0.652,20:0.726,24:0.781,28:0.821,32:0.852,"
    "40:0.896,48:0.924,56:0.943,64:0.956,72:0.966"
)
WEB_NOTE = "captions as on the web, packed"
PROGRAMS = {
    "b16-tower-v5e": Program("ViT-B/16 image tower", "tpu-v5e", 1, 128, tower="ours"),
    "b16-stock-v5e": Program("the same in flax's layers", "tpu-v5e", 1, 128, tower="stock"),
    "b32-v5e": Program("ViT-B/32", "tpu-v5e", 4, 256, "vit_b32"),
    "b32-web-v5e": Program("ViT-B/32", "tpu-v5e", 4, 256, "vit_b32", (WEB,), WEB_NOTE),
    "b16-v5e": Program("ViT-B/16", "tpu-v5e", 4, 128, "vit_b16"),
    "l14-v5p": Program("ViT-L/14", "tpu-v5p", 8, 128, "vit_l14"),
    "l14-scan-v5p": Program("ViT-L/14", "tpu-v5p", 8, 128, "vit_l14", ("model.scan=True",)),
    "rn50-v5e": Program("RN50", "tpu-v5e", 4, 128, "rn50"),
    "bigg14-v5p": Program("ViT-bigG/14", "tpu-v5p", 256, 128, "vit_l14", BIG),
    "b16-tower-h100": Program("ViT-B/16 image tower", "h100", 1, 128, tower="ours"),
    "b16-stock-h100": Program("the same in flax's layers", "h100", 1, 128, tower="stock"),
    "b32-h100": Program("ViT-B/32", "h100", 8, 256, "vit_b32"),
    "b16-h100": Program("ViT-B/16", "h100", 8, 128, "vit_b16"),
    "l14-h100": Program("ViT-L/14", "h100", 8, 128, "vit_l14"),
    "l14-paper-h100": Program("ViT-L/14", "h100", 256, 128, "vit_l14"),
    "rn50-h100": Program("RN50", "h100", 8, 128, "rn50"),
}


def command(program: Program, path: str, more: Sequence[str] = ()) -> list[str]:
    """Return the command that compiles a program, with more flags, and writes its figures there."""
    if program.tower:
        return [
            sys.executable,
            "-m",
            "benchmarks.compiled_tower",
            program.tower,
            program.device,
            path,
        ]
    fields = (f"train.batch_size={program.pairs * program.devices}", *program.fields)
    return [
        *(sys.executable, "-m", "clip_jax.plan"),
        *("--config", f"experiments/{program.experiment}.py"),
        *("--device", program.device, "--devices", str(program.devices)),
        *("--compiler", device_platform(program.device), "--json", path),
        *more,
        *(f"--config.{field}" for field in fields),
    ]


def compile_program(program: Program, more: Sequence[str] = ()) -> dict[str, Any]:
    """Return a program's figures, or under "failed" the line that its process ended with.

    `more`: flags of `clip_jax.plan`.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="clip_jax_compiled_") as folder:
        path = Path(folder) / "figures.json"
        words = command(program, str(path), more)
        done = subprocess.run(words, capture_output=True, text=True)
        seconds = round(time.perf_counter() - start)
        if done.returncode or not path.exists():
            lines = done.stderr.strip().splitlines() or ["no message"]
            reason = next((x for x in reversed(lines) if re.search("[Ee]rror", x)), lines[-1])
            return {"failed": reason.removeprefix("error: ")[:300], "seconds": seconds}
        return {**json.loads(path.read_text(encoding="utf-8")), "seconds": seconds}


def read_figures() -> dict[str, dict[str, Any]]:
    """Return the figures that are there, by the programs' names."""
    return json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}


def write_figures(figures: dict[str, dict[str, Any]]) -> None:
    """Write the figures, and the page that shows them."""
    kept = {name: figures[name] for name in PROGRAMS if name in figures}
    for path, text in ((FIGURES, json.dumps(kept, indent=1)), (TABLE, page(kept))):
        with atomic_write(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")


PAGE = """\
# What the compilers make of it

Written by `make compile-tpu` and `make compile-gpu` (`benchmarks/compiled.py`): XLA's own
compilers, without a device. Whole steps have the paper's settings but for what is named, bfloat16,
77 tokens, 224 pixels; towers are the image tower with its gradient. Nothing here was measured on a
device. Times of TPUs are the compiler's estimate (`docs/planning.md` says what it is and how it is
calibrated). Times of GPUs are a roofline, which no run reaches: half of the peak in products, the
published bandwidth. Collectives are not in the time: "not hidden" is the share of their bytes for
whose time, at the published rates, nothing runs beside (`docs/planning.md`). "Counted" is the share
of the time in instructions that the compiler counted.

| {heads} |
| {rule} |
"""
HEADS = (
    *("program", "on", "pairs a device", "ms a step", "utilization", "temporaries", "in all"),
    *("fits", "counted", "collectives", "not hidden", "compiler"),
)


def page(figures: dict[str, dict[str, Any]]) -> str:
    """Return the page of these figures."""
    rows = [row(PROGRAMS[name], values) for name, values in figures.items()]
    rule = " | ".join("---" for _ in HEADS)
    text = PAGE.format(heads=" | ".join(HEADS), rule=rule) + "\n".join(rows)
    towers = [figures.get(f"b16-{kind}-v5e", {}) for kind in ("tower", "stock")]
    if all(t.get("estimated_seconds") for t in towers):
        ours, stock = (t["estimated_seconds"] for t in towers)
        text += (
            f"\n\nFlax's own layers take {stock / ours:.2f} times as long as our image tower of "
            "ViT-B/16."
        )
    towers = [figures.get(f"b16-{kind}-h100", {}) for kind in ("tower", "stock")]
    if all(t.get("kernels") for t in towers):
        ours, stock = (
            f"{t['kernels']:,} kernels, {t['transposes']} of which move axes, and "
            f"{t['float32_products']} float32 products"
            for t in towers
        )
        text += f"\n\nOn an H100 our image tower of ViT-B/16 is {ours}; in flax's layers {stock}."
    named = [(name, v) for name, v in figures.items() if v.get("estimated_by") == "cycles"]
    steps = [figures.get(name, {}).get("estimated_seconds") for name in ("b32-v5e", "b32-web-v5e")]
    if all(steps):
        text += (
            "\n\nWith captions as on the web, packed (log-normal lengths, a median of 11 tokens, "
            f"3 % at 77), the step of ViT-B/32 takes {steps[1] / steps[0]:.2f} of its time with "
            "77 tokens each."
        )
    for name, values in named:
        text += f"\n\n## {heading(PROGRAMS[name])}\n\n{breakdown(values)}"
    return text


def heading(program: Program) -> str:
    """Return a program's name and devices in words."""
    settings = ", ".join(_settings(program))
    return f"{program.title} on {program.devices} x {program.device}" + (
        f" ({settings})" if settings else ""
    )


def _settings(program: Program) -> list[str]:
    """Return what is different from the experiment, in words or as fields of its config."""
    return [program.note] if program.note else [f"`{field}`" for field in program.fields]


def row(program: Program, values: dict[str, Any]) -> str:
    """Return a row of the table."""
    on = f"{program.devices} x {program.device}"
    title = ", ".join([program.title, *_settings(program)])
    if "failed" in values:
        return f"| {title} | {on} | {program.pairs} | {values['failed']} |" + " |" * 8
    seconds, compiler = values["estimated_seconds"], values["compiler"]
    exchanges = sum(c["times"] for c in values.get("collectives", []))
    hidden = values.get("exposed_collective_share", 0)
    cells = [
        f"{1e3 * seconds:,.1f}" if seconds else "",
        f"{100 * values['utilization']:.1f} %" if seconds else "",
        f"{values['temp_bytes'] / 1e9:.1f} GB" if values["temp_bytes"] else "",
        f"{values['memory_bytes'] / 1e9:.1f} GB",
        "yes" if values["fits"] else "no",
        f"{100 * values['counted_share']:.1f} %" if values.get("counted_share") else "",
        str(exchanges) if exchanges else "",
        f"{100 * hidden:.0f} %" if exchanges else "",
        f"{compiler['name']} {compiler['version']}",
    ]
    return f"| {title} | {on} | {program.pairs} | {' | '.join(cells)} |"


TOWERS = tuple((t, d) for t in ("image", "text") for d in ("forward", "backward"))


def breakdown(values: dict[str, Any]) -> str:
    """Return the estimated milliseconds of a step by part, tower and pass, as a table."""
    parts: dict[str, dict[tuple[str, str], float]] = {}
    for entry in values["breakdown"]:
        cells = parts.setdefault(entry["part"], {})
        place = (entry["tower"], entry["pass"])
        cells[place] = cells.get(place, 0.0) + entry["seconds"]
    lines = [
        "| ms | image, forward | and backward | text, forward | and backward | neither | all |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for part, cells in sorted(parts.items(), key=lambda item: -sum(item[1].values())):
        seconds = [cells.get(place, 0.0) for place in (*TOWERS, ("", ""))]
        figures = [f"{1e3 * s:.1f}" if s else "" for s in (*seconds, sum(cells.values()))]
        lines.append(f"| {part} | {' | '.join(figures)} |")
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="programs to compile; all by default")
    parser.add_argument("--platform", choices=("tpu", "cuda"), help="those of one compiler")
    parser.add_argument("--list", action="store_true", help="name the programs and end")
    parser.add_argument("--missing", action="store_true", help="those that have no figures yet")
    parser.add_argument("--page", action="store_true", help="write the page anew, compile nothing")
    return parser.parse_args(argv)


def main() -> int:
    """Compile the programs that are asked for; return 1 if one failed."""
    args = parse(sys.argv[1:])
    names = args.names or list(PROGRAMS)
    unknown = [name for name in names if name not in PROGRAMS]
    if unknown:
        print(f"error: {unknown[0]!r} is no program; known: {', '.join(PROGRAMS)}", file=sys.stderr)
        return 2
    figures = read_figures()
    if args.platform:
        names = [n for n in names if device_platform(PROGRAMS[n].device) == args.platform]
    if args.missing:
        names = [n for n in names if figures.get(n, {"failed": ""}).keys() & {"failed"}]
    if args.list or args.page:
        if args.page:
            write_figures(figures)
        for name in names if args.list else ():
            print(f"{name:<18}{heading(PROGRAMS[name])}, {PROGRAMS[name].pairs} a device")
        return 0
    failed = 0
    for name in names:
        values = compile_program(PROGRAMS[name])
        failed += "failed" in values
        # Read again: another of these may have written meanwhile.
        write_figures({**read_figures(), name: values})
        print(summary(name, values), flush=True)
    return int(failed > 0)


def summary(name: str, values: dict[str, Any]) -> str:
    """Return one line on a program that was compiled."""
    if "failed" in values:
        return f"{name}: failed after {values['seconds']} s: {values['failed']}"
    if not values["fits"] or not values["estimated_seconds"]:
        return f"{name}: {values['memory_bytes'] / 1e9:.1f} GB, does not fit"
    return (
        f"{name}: {1e3 * values['estimated_seconds']:.1f} ms, {100 * values['utilization']:.1f} %, "
        f"temporaries {values['temp_bytes'] / 1e9:.1f} GB, compiled in {values['seconds']} s"
    )


assert all(program.device in DEVICES for program in PROGRAMS.values())

if __name__ == "__main__":
    sys.exit(main())
