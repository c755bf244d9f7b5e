"""The rates of a run, the peaks of devices that they are compared to, and the files of metrics."""

import collections
import json
import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clip_jax.errors import UserError, write_remedy
from clip_jax.files import atomic_write
from clip_jax.training.tensorboard_file import TensorBoardFile


class Peak(NamedTuple):
    """Dense peak of one device, TFLOP/s; None where there is no such unit or no published rate."""

    bfloat16: float | None
    float32: float | None


# Per device as JAX counts them, without structured sparsity: the makers' tables of Ampere and later
# print twice these numbers for 2:4 sparse matrices. float32 is TF32 where a GPU has it, which is
# what JAX uses there by default. Keys are whole words of `jax.Device.device_kind`.
PEAKS = {
    # NVIDIA V100 and T4 datasheets: no bfloat16 and no TF32; vector float32.
    "V100-PCIE": Peak(None, 14.0),
    "V100-SXM2": Peak(None, 15.7),
    "V100-SXM3": Peak(None, 15.7),
    "T4": Peak(None, 8.1),
    "A10": Peak(125.0, 62.5),  # NVIDIA A10 datasheet
    "A40": Peak(149.7, 74.8),  # NVIDIA A40 datasheet
    "A100": Peak(312.0, 156.0),  # NVIDIA A100 datasheet, SXM and PCIe alike
    "L4": Peak(121.0, 60.0),  # NVIDIA L4 datasheet, halved
    "L40": Peak(181.05, 90.5),  # NVIDIA L40 datasheet
    "L40S": Peak(362.05, 183.0),  # NVIDIA L40S datasheet
    "H100": Peak(989.4, 494.7),  # NVIDIA H100 datasheet, SXM, halved
    "H100 PCIe": Peak(756.5, 378.0),  # NVIDIA H100 PCIe product brief, halved
    "H100 NVL": Peak(835.5, 417.5),  # NVIDIA H100 datasheet, NVL, halved
    "GH200": Peak(989.4, 494.7),  # NVIDIA GH200 datasheet, halved
    "H200": Peak(989.4, 494.7),  # NVIDIA H200 datasheet, SXM, halved
    "H200 NVL": Peak(835.5, 417.5),  # NVIDIA H200 datasheet, NVL, halved
    "B200": Peak(2250.0, 1100.0),  # NVIDIA HGX B200, Blackwell datasheet, halved
    # Google Cloud TPU documentation, "system architecture" pages, per chip; none of them publishes
    # a float32 rate. On v2 and v3 JAX counts each of a chip's two cores as a device.
    "TPU v2": Peak(22.5, None),
    "TPU v3": Peak(61.5, None),
    "TPU v4": Peak(275.0, None),
    "TPU v5 lite": Peak(197.0, None),
    "TPU v5e": Peak(197.0, None),
    "TPU v5": Peak(459.0, None),
    "TPU v5p": Peak(459.0, None),
    "TPU v6 lite": Peak(918.0, None),
    "TPU v6e": Peak(918.0, None),
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Return the published dense matrix rate of a device, FLOP/s.

    Args:
      device_kind: as `jax.devices()[0].device_kind` has it, "NVIDIA A100-SXM4-80GB" say.
      dtype: "bfloat16" or "float32".

    Returns:
      The rate, or None where it is not known: another dtype, a device not in `PEAKS`, a slice of a
      GPU (MIG), a CPU (see `measure_matmul_flops`).
    """
    if re.search(r"\bMIG\b", device_kind):
        return None
    keys = [key for key in PEAKS if re.search(rf"\b{re.escape(key)}\b", device_kind)]
    if not keys or dtype not in Peak._fields:
        return None
    tera = getattr(PEAKS[max(keys, key=len)], dtype)
    return None if tera is None else tera * 1e12


def measure_matmul_flops(dtype: str, *, size: int = 768, seconds: float = 0.1) -> float:
    """Measure one square matrix product on the first local device, FLOP/s: the best of many.

    It stands in for a peak where none is published; other work on the machine lowers it. It takes
    about `seconds`, and compiling.
    """
    device = jax.local_devices()[0]
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best, end = math.inf, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return 2 * size**3 / best


class Throughput:
    """Pairs per second and time left, from the times at which steps were done.

    The first step that is reported is where the clock starts: its own duration, compilation
    included, counts nowhere. Rates are over the last `window` reports, so that a pause is forgotten
    again.

    Attributes:
      pairs_per_step: the pairs of a global batch.
      steps: the number of the last step.
    """

    def __init__(self, *, pairs_per_step: int, steps: int, window: int = 50) -> None:
        self.pairs_per_step = pairs_per_step
        self.steps = steps
        self._reports: collections.deque[tuple[int, float]] = collections.deque(maxlen=window + 1)

    def report(self, step: int, now: float) -> None:
        """Take in when a step was done, seconds on any clock; not every step need be reported."""
        self._reports.append((step, now))

    @property
    def steps_per_second(self) -> float | None:
        """The rate; None until two different steps were reported."""
        if len(self._reports) < 2:
            return None
        (step, start), (last, now) = self._reports[0], self._reports[-1]
        return (last - step) / (now - start) if last > step and now > start else None

    @property
    def pairs_per_second(self) -> float | None:
        """The rate over all devices; None until two different steps were reported."""
        rate = self.steps_per_second
        return None if rate is None else rate * self.pairs_per_step

    @property
    def seconds_left(self) -> float | None:
        """The time until step `steps` at the present rate; None until two steps were reported."""
        rate = self.steps_per_second
        return None if rate is None else max(self.steps - self._reports[-1][0], 0) / rate


class MetricsWriter:
    """Writes `metrics.jsonl`, one JSON object a line, and TensorBoard's files beside it.

    A line is {"step": 12, "loss": 4.1, ...} in the order given. Floats are written with every
    digit that distinguishes them, so two runs compare to the last bit. JSON has no NaN: the
    strings "NaN", "Infinity" and "-Infinity" stand for those, and `float()` reads them back.
    Every line is handed to the operating system at once, so killing the process loses none. A line
    that cannot be written, on a full disk say, is left out whole: the first is told, the run goes
    on, and the next is tried again.

    Args:
      workdir: the folder of the files.
      resume_step: the step of the checkpoint that a run is resumed from. Lines with a later step
        are dropped, for those steps come again. None starts the file afresh.

    Raises:
      UserError: a line before the last is not of this program. A last line that was cut off in the
        middle of writing is dropped.
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int | None = None) -> None:
        workdir = Path(workdir)
        self.path = workdir / "metrics.jsonl"
        lines = [] if resume_step is None else read_lines_until(self.path, resume_step)
        with atomic_write(self.path) as partial:
            partial.write_text("".join(lines), encoding="utf-8")
        self._file = self.path.open("ab", buffering=0)
        self._has_warned = False
        self._board = TensorBoardFile(workdir, 0 if resume_step is None else resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line; numbers go to TensorBoard too.

        Args:
          step: the step the numbers belong to.
          metrics: numbers, 0-d arrays (fetched from the device here), strings, or lists and
            dicts of these, by name.
        """
        line = {"step": int(step)} | {name: to_json(value) for name, value in metrics.items()}
        self._append(json.dumps(line, allow_nan=False) + "\n")
        numbers = {
            name: value.item() if hasattr(value, "item") else value
            for name, value in metrics.items()
        }
        # TensorBoard has no use for what is not finite.
        finite = {
            name: number
            for name, number in numbers.items()
            if isinstance(number, int | float) and math.isfinite(number)
        }
        self._board.add_scalars(int(step), finite)

    def _append(self, line: str) -> None:
        data = line.encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(data)
            if written == len(data):
                return
            reason = "the disk is full"
        except OSError as error:
            reason = error.strerror or str(error)
        with suppress(OSError):  # never half a line in the middle
            os.truncate(self._file.fileno(), size)
        if not self._has_warned:
            self._has_warned = True
            print(
                f"{self.path} takes no more lines ({reason}); {write_remedy(reason)}, they are "
                "lost until then"
            )

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._board.close()


def to_json(value: Any) -> Any:
    """Return a value as JSON can hold it: numbers for arrays, strings for non-finite floats."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def read_lines_until(path: Path, step: int) -> list[str]:
    """Return the lines of a metrics file up to and with a step; none if there is no file.

    Raises:
      UserError: a line before the last is not of this program.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    lines_until = []
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("cut off")
            text = line.decode("utf-8")
            line_step = json.loads(text)["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(
                f"{path} line {number} is not one of this program's metrics: "
                "move the file away to go on without the old numbers"
            ) from None
        if line_step <= step:
            lines_until.append(text)
    return lines_until


def progress_line(
    step: int,
    steps: int,
    metrics: Mapping[str, Any],
    pairs_per_s: float | None,
    seconds_left: float | None,
) -> str:
    """Return one line on a run; what is not in `metrics`, or None, is left out.

    `metrics` may hold "loss", "scale", "image_accuracy", "text_accuracy", "learning_rate",
    "mfu", "data_wait" and "host_wait"; accuracies, mfu and the waits are fractions. A wait for the
    host is shown from 5 % on.
    """

    def shown(name: str, form: str, factor: float = 1.0) -> list[str]:
        value = metrics.get(name)
        return [] if value is None else [form.format(factor * float(value))]

    accuracies = [
        *shown("image_accuracy", "i>t {:.1f} %", 100.0),
        *shown("text_accuracy", "t>i {:.1f} %", 100.0),
    ]
    host_wait = metrics.get("host_wait", 0.0)
    parts = [f"step {step:>{len(str(steps))}}/{steps}", f"{100 * step // max(steps, 1)} %"]
    parts += shown("loss", "loss {:.3f}") + shown("scale", "scale {:.1f}")
    parts += [" ".join(["acc", *accuracies])] if accuracies else []
    parts += shown("learning_rate", "lr {:.1e}")
    parts += [] if pairs_per_s is None else [f"{pairs_per_s:,.0f} pairs/s"]
    parts += shown("mfu", "mfu {:.0f} %", 100.0) + shown("data_wait", "data wait {:.0f} %", 100.0)
    parts += shown("host_wait", "host wait {:.0f} %", 100.0) if host_wait >= 0.05 else []
    parts += [] if seconds_left is None else [f"left {format_duration(seconds_left)}"]
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """Return a time as 3:12, 1:02:03, or 2 d 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02}:{seconds:02}" if days or hours else f"{minutes}:{seconds:02}"
    return f"{days} d {text}" if days else text
