"""What every benchmark does with its numbers: takes them in turns, prints a table, writes JSON.

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
from typing import Any

RESULTS = Path(__file__).parent / "results"
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
        """In another unit."""
        return Spread(*sorted_first(self.median * factor, self.low * factor, self.high * factor))

    def per(self, amount: float) -> "Spread":
        """`amount` over each: of seconds, the rate; quartiles change places."""
        return Spread(amount / self.median, amount / self.high, amount / self.low)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of one or more values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def sorted_first(median: float, *quartiles: float) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile)."""
    return median, min(quartiles), max(quartiles)


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Of two things that took turns: round by round, then the median."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def seconds(call: Callable[[], object]) -> float:
    """One call, which waits for its own work."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(
    calls: Mapping[str, Callable[[], object]], *, warmup: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of every call, `repeats` rounds after `warmup` rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            took = seconds(call)
            if turn >= warmup:
                times[name].append(took)
    return times


def arguments(about: str | None, *, warmup: int, repeats: int) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--warmup", type=int, default=warmup, help="rounds that are not counted")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds that are")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": found,
    }


def processor() -> str:
    """The CPU's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cell(value: Any) -> str:
    """A value as the table shows it."""
    if isinstance(value, float):
        return f"{value:.7g}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned columns under the first one's keys; a key that a row lacks is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in pairs).rstrip()
        for pairs in (list(enumerate(zip(line, widths, strict=True))) for line in cells)
    )


def report(
    name: str, options: argparse.Namespace, rows: Sequence[Mapping[str, Any]], **facts: Any
) -> None:
    """Prints what was measured, how and on what, and writes the same to `<out>/<name>.json`."""
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    where = machine()
    print(f"\n{name}: {where['processor']}, {where['cores']} cores, load {where['load']}")
    print(", ".join(f"{key} {value}" for key, value in where["packages"].items()))
    print(f"{options.warmup} rounds to warm up, {options.repeats} counted: median (quartiles)")
    for key, value in facts.items():
        print(f"{key.replace('_', ' ')}: {cell(value)}")
    print(table(rows), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    whole = {"benchmark": name, "machine": where, "settings": settings, "facts": facts}
    text = json.dumps(whole | {"rows": list(rows)}, indent=1, default=plain)
    (options.out / f"{name}.json").write_text(text + "\n")


def plain(value: Any) -> Any:
    """What `json` cannot write by itself."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)
