"""The kernels of a profiled training step on a GPU, by time.

    python -m benchmarks.on_gpu --profile FOLDER
    python -m benchmarks.kernels FOLDER

Milliseconds a step of the longest kernels, and of each kind: matrix products, attention, the rest,
copies. `idle` is the part of the profiled time in which the GPU ran nothing.
"""

import collections
import re
from collections.abc import Iterator
from pathlib import Path

from jax.profiler import ProfileData

from benchmarks.interleaved import make_parser, report
from benchmarks.on_gpu import PROFILED_STEPS

KINDS = (
    ("attention", r"fmha|flash|sdpa|cudnn"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|triton_gemm|wgmma"),
    ("convolutions", r"implicit_conv|wgrad|dgrad|conv2d"),
    ("copies", r"memcpy|memset|copy|transpose"),
)
"""(kind, pattern of the kernel's name); what none fits is `fusions`."""


def main(argv: list[str] | None = None) -> None:
    """Print two tables: by kind and by kernel."""
    parser = make_parser(__doc__, warmup=0, repeats=PROFILED_STEPS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--top", type=int, default=40, help="kernels that are listed")
    options = parser.parse_args(argv)
    events = sorted(gpu_events(options.folder))
    if not events:
        raise SystemExit(f"{options.folder} holds no profile of a GPU; see --profile of on_gpu")
    span = max(end for _, end, _ in events) - events[0][0]
    kinds: collections.Counter[str] = collections.Counter()
    names: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for start, end, name in events:
        kinds[kind_of(name)] += end - start
        names[name] += end - start
        calls[name] += 1
    kinds["idle"] = span - busy_time(events)
    scale = 1e6 * PROFILED_STEPS
    report(
        "kernels",
        options,
        [
            {"kind": kind, "ms a step": time / scale, "share, %": 100 * time / span}
            for kind, time in kinds.most_common()
        ],
        step_ms=span / scale,
        kernels_a_step=len(events) / PROFILED_STEPS,
    )
    report(
        "kernels_by_name",
        options,
        [
            {
                "ms a step": time / scale,
                "calls a step": calls[name] / PROFILED_STEPS,
                "kernel": name,
            }
            for name, time in names.most_common(options.top)
        ],
    )


def gpu_events(folder: Path) -> Iterator[tuple[float, float, str]]:
    """Yield (start, end, name), nanoseconds, of everything the GPU ran."""
    for path in folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        yield event.start_ns, event.start_ns + event.duration_ns, event.name


def busy_time(events: list[tuple[float, float, str]]) -> float:
    """Return the time in which at least one of the events, sorted by their starts, ran."""
    total = reached = 0.0
    for start, end, _ in events:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def kind_of(name: str) -> str:
    """Return the kind of a kernel by its name."""
    found = (kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))
    return next(found, "fusions")


if __name__ == "__main__":
    main()
