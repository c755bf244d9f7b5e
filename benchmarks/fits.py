"""On how few devices each experiment fits, and how long it takes there: `docs/fits.md`.

    python -m benchmarks.fits --list
    python -m benchmarks.fits vit_l14 --device tpu-v5p --device h100
    python -m benchmarks.fits --missing --platform cuda

Each of `experiments/*.py` that is no example for the emoji is compiled with its own batch, whole,
by the compiler of the devices, on the smallest number of them (a power of two) that it fits on:
where the last program's memory says that half as many would do, or that twice as many are needed,
that is compiled next. A batch that 256 do not take whole is compiled in two, four or eight
micro-batches. What was found is written at once, to docs/fits.json and, as a table, docs/fits.md,
and stays there for those that are not compiled.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.compiled import FOLDER, Program, compile_program
from clip_jax.files import atomic_write
from clip_jax.planning.compilers import device_counts, device_platform
from clip_jax.planning.hardware import DEVICES

FIGURES, TABLE = FOLDER / "fits.json", FOLDER / "fits.md"
COLUMNS = ("tpu-v5e", "tpu-v5p", "tpu-v6e", "h100")
PAPER_PAIRS = 400_000_000
MOST = 256
START = 32
USABLE = 0.9
"""The share of a device's memory below which a number of devices is worth a try."""
PARTS = (2, 4, 8)
"""In how many micro-batches a batch is tried that does not fit whole."""
KEPT = (
    "failed",
    "devices",
    "parts",
    "fits",
    "memory_bytes",
    "estimated_seconds",
    "steps",
    "compiler",
)
"""Keys of a cell's figures, where it has them."""
SCAN = ("model.scan=True",)

EXPERIMENTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "rn50": (32_768, PAPER_PAIRS, ()),
    "rn101": (32_768, PAPER_PAIRS, ()),
    "rn50x4": (32_768, PAPER_PAIRS, ()),
    "rn50x16": (32_768, PAPER_PAIRS, ()),
    "rn50x64": (32_768, PAPER_PAIRS, ()),
    "vit_b32": (32_768, PAPER_PAIRS, SCAN),
    "vit_b16": (32_768, PAPER_PAIRS, SCAN),
    "vit_l14": (32_768, PAPER_PAIRS, SCAN),
    "vit_l14_336": (32_768, PAPER_PAIRS, (*SCAN, "model.init_from=")),
    "vit_s16": (1_024, 3_000_000, SCAN),
    "clipa_l16_short": (32_768, PAPER_PAIRS, SCAN),
    "clipa_l16_full": (7_168, PAPER_PAIRS, (*SCAN, "model.init_from=")),
}
"""By experiment: its batch, the pairs of an epoch, and fields that make it compile sooner or stand
for what is not there. Layers in a loop, which are for TPUs alone, take longer there than one by
one, by a quarter for ViT-L/14."""

Compile = Callable[[int], dict[str, Any]]


def smallest(compile_on: Compile, counts: Sequence[int], memory: float, start: int) -> dict:
    """Return the figures on the fewest devices that a program fits on, with their number.

    Args:
      compile_on: returns the figures for so many devices.
      counts: the numbers that there are, rising.
      memory: bytes of a device.
      start: the number to begin with.

    Returns:
      The figures, and "devices"; of the last one tried, where none fits.
    """
    tried: dict[int, dict[str, Any]] = {}
    count = min(counts, key=lambda n: abs(n - start))
    while count not in tried:
        values = tried[count] = compile_on(count) | {"devices": count}
        if "failed" in values:
            return values
        # All but a small part of the memory is proportional to the rows of a device.
        least = values["memory_bytes"] * count / (USABLE * memory)
        if values["fits"]:
            fewer = [n for n in counts if least <= n < count]
            count = min(fewer, default=count)
        else:
            count = min((n for n in counts if n >= max(least, 1.01 * count)), default=counts[-1])
    fitting = [n for n, values in tried.items() if values["fits"]]
    return tried[min(fitting)] if fitting else tried[max(tried)]


def run(name: str, device: str, start: int) -> dict[str, Any]:
    """Return what is kept of an experiment on a kind of device; the search begins at `start`."""
    batch, pairs, fields = EXPERIMENTS[name]
    if device_platform(device) != "tpu":
        fields = tuple(field for field in fields if field not in SCAN)
    counts = [n for n in device_counts(device) if n <= MOST and batch % n == 0]
    counts = [n for n in counts if n & (n - 1) == 0]
    memory = DEVICES[device].memory

    def compile_on(count: int, *more: str) -> dict[str, Any]:
        program = Program(name, device, count, batch // count, name, (*fields, *more))
        return compile_program(program, ("--pairs", str(pairs)))

    values = smallest(compile_on, counts, memory, start)
    if not ("failed" in values or values["fits"]):
        most = counts[-1]
        values = in_parts(
            lambda parts: compile_on(most, f"train.microbatch_size={batch // parts}"),
            values,
            memory,
        )
    kept = {key: values[key] for key in KEPT if key in values}
    kept["exposed_seconds"] = values.get("exposed_collective_seconds")
    return kept | {"fields": [field for field in fields if not field.endswith("=")]}


def in_parts(compile_in: Compile, whole: dict[str, Any], memory: float) -> dict[str, Any]:
    """Return the figures in the fewest micro-batches that fit, with "parts", their number.

    Args:
      compile_in: returns the figures in so many.
      whole: the figures of the whole batch, which does not fit.
      memory: bytes of a device.

    Returns:
      Those of the whole batch, where none fits.
    """
    # At best all of the memory is proportional to the rows.
    for parts in (n for n in PARTS if whole["memory_bytes"] / n <= memory):
        values = compile_in(parts) | {"devices": whole["devices"], "parts": parts}
        if "failed" in values or values["fits"]:
            return values
    return whole


def days(values: dict[str, Any]) -> float | None:
    """Return the days of a run, exchanges that nothing hides included; None if it does not fit."""
    if not values["fits"] or not values["estimated_seconds"]:
        return None
    seconds = values["estimated_seconds"] + (values.get("exposed_seconds") or 0.0)
    return values["steps"] * seconds / 86_400


def read_figures() -> dict[str, dict[str, dict[str, Any]]]:
    """Return what was found, by experiment and device."""
    return json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}


def write_figures(figures: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Write what was found, and the page that shows it."""
    kept = {name: figures[name] for name in EXPERIMENTS if name in figures}
    for path, text in ((FIGURES, json.dumps(kept, indent=1)), (TABLE, page(kept))):
        with atomic_write(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")


PAGE = """\
# On how few devices the experiments fit

Written by `python -m benchmarks.fits`: the fewest devices, of the powers of two, that an experiment
of `experiments/` fits on with its own batch, whole, or, where 256 do not take it so, in
micro-batches (`config.train.microbatch_size`, a third more computation), as the devices' own
compilers have it, and the days of the run there. Nothing here was measured on a device. Times of
TPUs are the compiler's estimate, of transformers with their layers in a loop
(`config.model.scan=True`; one by one, as the experiments have them, they are faster, ViT-L/14 by a
fifth, and take the compiler longer); times of GPUs are a roofline, which no run reaches, of layers
one by one. What `docs/planning.md` says of both holds here; that the devices never wait for data is
taken for granted (`python -m clip_jax.data.bench` says what they need). Runs of the paper's models
are 32 epochs of 400 million pairs, `vit_l14_336` one more, `clipa_l16_short` six; `vit_s16` is 32
of 3 million. With more devices the days fall in proportion, or nearly; for fewer,
`python -m clip_jax.plan --search` finds the settings. The emoji experiments fit on one device of
any kind, and on a laptop. What is empty was not compiled yet; "more than 256" was compiled whole
alone, or does not fit in eight micro-batches either.

"""


def cell(values: dict[str, Any] | None) -> str:
    """Return a cell of the table: devices, and days."""
    if values is None:
        return ""
    if "failed" in values:
        return "failed"
    length = days(values)
    if length is None:
        return f"more than {values['devices']}"
    text = f"{values['devices']}: {length:,.1f} days"
    return f"{text} in {values['parts']} micro-batches" if "parts" in values else text


def page(figures: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the page of these figures."""
    lines = [f"| experiment | batch | {' | '.join(COLUMNS)} |"]
    lines.append("| --- " * (len(COLUMNS) + 2) + "|")
    for name, columns in figures.items():
        cells = " | ".join(cell(columns.get(device)) for device in COLUMNS)
        lines.append(f"| `{name}` | {EXPERIMENTS[name][0]:,} | {cells} |")
    return PAGE + "\n".join(lines)


def sentence(columns: dict[str, dict[str, Any]]) -> str:
    """Return an experiment's figures in words, as its docstring has them."""
    cells = [(device, cell(columns.get(device))) for device in COLUMNS]
    return "; ".join(f"{device.removeprefix('tpu-')} {text}" for device, text in cells if text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="experiments; all by default")
    parser.add_argument("--device", action="append", choices=COLUMNS, help="all by default")
    parser.add_argument("--platform", choices=("tpu", "cuda"), help="devices of one compiler")
    parser.add_argument("--start", type=int, default=START, help="devices to begin with")
    parser.add_argument("--missing", action="store_true", help="those that have no figures yet")
    parser.add_argument("--list", action="store_true", help="print what is known and end")
    return parser.parse_args(argv)


def main() -> int:
    """Compile what is asked for; return 1 if something failed."""
    args = parse(sys.argv[1:])
    unknown = [name for name in args.names if name not in EXPERIMENTS]
    if unknown:
        known = ", ".join(EXPERIMENTS)
        print(f"error: {unknown[0]!r} is no experiment; known: {known}", file=sys.stderr)
        return 2
    figures = read_figures()
    if args.list:
        for name in args.names or EXPERIMENTS:
            print(f"{name:<18}{sentence(figures.get(name, {}))}")
        return 0
    failed = 0
    for name in args.names or EXPERIMENTS:
        for device in args.device or COLUMNS:
            if args.platform not in (None, device_platform(device)):
                continue
            if args.missing and "failed" not in read_figures().get(name, {}).get(
                device, {"failed": ""}
            ):
                continue
            values = run(name, device, args.start)
            failed += "failed" in values
            figures = read_figures()  # another of these may have written meanwhile
            figures.setdefault(name, {})[device] = values
            write_figures(figures)
            print(f"{name} on {device}: {values.get('failed') or cell(values)}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
