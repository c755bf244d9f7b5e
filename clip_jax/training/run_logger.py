"""What a run tells while it goes on: process 0 writes and prints, the others only listen."""

import functools
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from clip_jax.data.loader import Loader
from clip_jax.data.skip_log import SkipLog
from clip_jax.files import atomic_write
from clip_jax.parallel import distributed
from clip_jax.parallel.mesh import batch_part
from clip_jax.training.metrics import (
    DataWait,
    MetricsWriter,
    Throughput,
    measure_matmul_flops,
    peak_flops,
    progress_line,
    read_lines_until,
)
from clip_jax.training.setup import RunComponents, pair_flops


class RunLogger:
    """What a run tells: a line now and then, `metrics.jsonl`, TensorBoard, and what went wrong.

    Attributes:
      length: tokens a caption of the newest batch, after trimming.
      waiting: takes the time that is spent on waiting for data.
    """

    def __init__(self, run: RunComponents, steps: int, start: int, folder: Path) -> None:
        config = run.config
        self.length = run.model.config.text.context_length
        self.waiting = DataWait()
        self._pair_flops = functools.partial(pair_flops, run)
        self._steps = steps
        self._every = config.train.log_every
        self._folder = folder
        self._writer = None
        if distributed.is_first():
            self._writer = MetricsWriter(folder, resume_step=start if start else None)
        self._throughput = Throughput(pairs_per_step=config.train.batch_size, steps=steps)
        kind, dtype = jax.devices()[0].device_kind, config.model.dtype
        per_device = peak_flops(kind, dtype) or measure_matmul_flops(dtype)
        # Virtual CPU devices share the one machine that was measured.
        devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
        self._peak = per_device * devices
        self._bad: tuple[int, float, list[str]] | None = None
        self._part, parts = batch_part(run.mesh)
        self._keys = KeyLog(folder, start, self._part, parts) if config.data.log_keys else None

    def step(
        self, step: int, metrics: dict[str, jax.Array], keys: list[str], loader: Loader
    ) -> bool:
        """Take in one step's metrics, waiting for them; False when they are not finite."""
        values = {k: v.item() for k, v in jax.device_get(metrics).items()}
        self._throughput.report(step, time.perf_counter())
        if self._keys is not None:
            self._keys.write(step, keys)
        if not values.pop("finite"):
            self._bad = (step, values["loss"], keys)
            return False
        if step % self._every == 0 or step == self._steps:
            values["data_wait"] = self.waiting.share()
            values["scale"] = math.exp(values["logit_scale"])
            rate = self._throughput.pairs_per_second
            if rate is not None:
                values["pairs_per_second"] = rate
                values["mfu"] = rate * self._pair_flops(self.length) / self._peak
            skipped = distributed.total(self._part, loader.skipped)
            values |= {f"skipped/{cause}": n for cause, n in skipped.items()}
            values |= {f"left_out/{cause}": n for cause, n in loader.excluded.items()}
            if self._writer is not None:
                self._writer.write(step, values)
            left = self._throughput.seconds_left
            distributed.print_on_main(progress_line(step, self._steps, values, rate, left))
        return True

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Write and print what an evaluation during the run found."""
        if self._writer is not None:
            self._writer.write(step, {f"eval/{name}": value for name, value in metrics.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        distributed.print_on_main(f"step {step} evaluated:  {shown}")

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *exc: object) -> None:
        """Flush and close the writers."""
        self.waiting.close()
        for writer in (self._writer, self._keys):
            if writer is not None:
                writer.close()

    def tell_skipped(self, loader: Loader) -> None:
        """Count the samples that were skipped, in all processes, and name the last of one."""
        skipped, _, last = told_of_all(self._part, loader)
        if skipped:
            counts = ", ".join(f"{n} {cause}" for cause, n in sorted(skipped.items()))
            distributed.print_on_main(f"skipped samples: {counts}; the last: {last}")

    def explain_not_finite(self, saved: list[int], checkpoints: Path) -> None:
        """One line on the step that broke; its samples' keys go to `not_finite.json`, those of
        process 1 to `not_finite-1.json` and so on."""
        assert self._bad is not None
        step, loss, keys = self._bad
        which = "" if distributed.is_first() else f"-{distributed.process_index()}"
        path = self._folder / f"not_finite{which}.json"
        path.write_text(json.dumps({"step": step, "loss": str(loss), "keys": keys}, indent=1))
        if not distributed.is_first():
            return
        good = f"step {saved[0]} in {checkpoints}" if saved else "none was saved yet"
        some = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        print(
            f"error: step {step} is not finite (loss {loss}); its batch: {some} (all keys in "
            f"{path}); last good checkpoint: {good}; lower config.optim.learning_rate or set "
            "config.optim.clip_norm",
            file=sys.stderr,
            flush=True,
        )


def told_of_all(part: int, loader: Loader) -> tuple[Counter[str], int, str]:
    """(skipped by cause, rows, the last skipped) of all processes, each of which must call it."""
    last = loader.recent[-1] if loader.recent else ""
    told = distributed.gather([part, loader.skipped, loader.rows, last])
    # Processes that load the same part of each batch count once.
    parts = {part: rest for part, *rest in told}.values()
    skipped = sum((Counter(counts) for counts, _, _ in parts), Counter())
    last = next((text for _, _, text in parts if text), "")
    return skipped, sum(rows for _, rows, _ in parts), last


class SkipLimit:
    """Ends a run of which too much was skipped: in all processes at the same step.

    Args:
      log: knows the limit.
      part: of each batch that this process loads.
    """

    def __init__(self, log: SkipLog, part: int, loader: Loader):
        self._log, self._part, self._loader = log, part, loader
        parts = distributed.gather(part)
        # Of processes that load the same part, the first one's word counts.
        self._speakers = [parts.index(p) for p in sorted(set(parts))]
        self._totals = np.zeros(2, np.int64)

    def check(self, said: np.ndarray) -> None:
        """Take in (skipped, rows) of one batch from every process.

        Raises:
          UserError: it is too much by now.
        """
        self._totals += said[self._speakers].sum(axis=0, dtype=np.int64)
        if self._log.is_too_much(*map(int, self._totals)):
            distributed.about_to_fail()
            raise self._log.too_much(*told_of_all(self._part, self._loader))


class KeyLog:
    """`keys-N.jsonl`, the keys of each step's rows, part N of every batch: {"step": 12, "part": 0,
    "parts": 2, "keys": [...]}. A run that goes on drops the steps that come again."""

    def __init__(self, folder: Path, start: int, part: int, parts: int):
        mine = folder / f"keys-{part}.jsonl"
        # Parts that there were once, and are no more, are the first process's.
        names = [folder / f"keys-{k}.jsonl" for k in range(parts)]
        others = [p for p in folder.glob("keys-*.jsonl") if p not in names and part == 0]
        for path in (mine, *others):
            kept = read_lines_until(path, start)
            with atomic_write(path) as partial:
                partial.write_text("".join(kept), encoding="utf-8")
        self._about = {"part": part, "parts": parts}
        self._file = mine.open("a", encoding="utf-8")

    def write(self, step: int, keys: list[str]) -> None:
        """One line, handed to the operating system at once."""
        self._file.write(json.dumps({"step": step, **self._about, "keys": keys}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
