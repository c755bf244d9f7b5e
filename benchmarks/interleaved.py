"""Interleaved timing, and the table and JSON file of every benchmark.

The things compared are called one after the other, round by round (A B A B ...), so that whatever
else the machine does falls on all of them. A time is the median of the rounds with its quartiles; a
ratio is the median of the rounds' own ratios, which a slow stretch of the machine leaves alone.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

K = TypeVar("K")

RESULTS_FOLDER = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "torch", "open_clip_torch", "numpy")


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} - {self.high:.4g})"

    def scaled(self, factor: float) -> "Spread":
        """Return the same in another unit."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Spread(self.median * factor, low, high)

    def per(self, amount: float) -> "Spread":
        """Return `amount` over each, of seconds the rate; the quartiles change places."""
        return Spread(amount / self.median, amount / self.high, amount / self.low)


def spread(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles of one or more values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Return the spread of the ratios of two interleaved series, taken round by round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def seconds(call: Callable[[], object]) -> float:
    """Return the seconds of one call, which waits for its own work."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_interleaved(
    calls: Mapping[K, Callable[[], object]], *, warmup: int, repeats: int
) -> dict[K, list[float]]:
    """Return the seconds of every call: `repeats` rounds, after `warmup` that are not counted."""
    times: dict[K, list[float]] = {name: [] for name in calls}
    for round_index in range(warmup + repeats):
        for name, call in calls.items():
            elapsed = seconds(call)
            if round_index >= warmup:
                times[name].append(elapsed)
    return times


def make_parser(docstring: str | None, *, warmup: int, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the flags that all benchmarks take."""
    parser = argparse.ArgumentParser(description=(docstring or "").splitlines()[0])
    parser.add_argument("--warmup", type=int, default=warmup, help="rounds that are not counted")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds that are")
    parser.add_argument("--out", type=Path, default=RESULTS_FOLDER, help="folder of the JSON file")
    return parser


def machine_info() -> dict[str, Any]:
    """Return what the numbers were taken on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": versions,
    }


def processor() -> str:
    """Return the CPU's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def format_cell(value: Any) -> str:
    """Return a value as the table shows it."""
    if isinstance(value, float):
        return f"{value:.7g}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as aligned columns under their keys; a key that a row lacks is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([format_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in pairs).rstrip()
        for pairs in (list(enumerate(zip(line, widths, strict=True))) for line in cells)
    )


def report(
    name: str, options: argparse.Namespace, rows: Sequence[Mapping[str, Any]], **facts: Any
) -> None:
    """Print what was measured, how and on what, and write the same to `<out>/<name>.json`."""
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    machine = machine_info()
    print(f"\n{name}: {machine['processor']}, {machine['cores']} cores, load {machine['load']}")
    print(", ".join(f"{key} {value}" for key, value in machine["packages"].items()))
    print(f"{options.warmup} rounds to warm up, {options.repeats} counted: median (quartiles)")
    for key, value in facts.items():
        print(f"{key.replace('_', ' ')}: {format_cell(value)}")
    print(format_table(rows), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": name, "machine": machine, "settings": settings, "facts": facts}
    text = json.dumps(result | {"rows": list(rows)}, indent=1, default=to_json)
    (options.out / f"{name}.json").write_text(text + "\n")


def to_json(value: Any) -> Any:
    """Return a value that `json` cannot write as one that it can."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)
