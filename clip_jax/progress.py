"""What a run tells while it goes on: process 0 writes and prints, the others only listen."""

import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import jax

from clip_jax import distributed
from clip_jax.config import Config
from clip_jax.data.loader import Loader
from clip_jax.mesh import batch_part
from clip_jax.metrics import (
    MetricsWriter,
    Throughput,
    measure_matmul_flops,
    peak_flops,
    progress_line,
)
from clip_jax.models.flops import train_flops_per_pair
from clip_jax.wiring import Wiring


class Report:
    """What a run tells: a line now and then, `metrics.jsonl`, TensorBoard, and what went wrong.

    Attributes:
      length: tokens a caption of the newest batch, after trimming.
    """

    def __init__(self, config: Config, w: Wiring, steps: int, start: int, folder: Path) -> None:
        self.length = w.model.config.text.context_length
        self._model = w.model.config
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
        self._part = batch_part(w.mesh)[0]

    def step(
        self, step: int, metrics: dict[str, jax.Array], keys: list[str], loader: Loader
    ) -> bool:
        """Take in one step's metrics, waiting for them; False when they are not finite."""
        values = {k: v.item() for k, v in jax.device_get(metrics).items()}
        self._throughput.report(step, time.perf_counter())
        if not values.pop("finite"):
            self._bad = (step, values["loss"], keys)
            return False
        if step % self._every == 0 or step == self._steps:
            values["scale"] = math.exp(values["logit_scale"])
            rate = self._throughput.pairs_per_second
            if rate is not None:
                values["pairs_per_second"] = rate
                values["mfu"] = rate * train_flops_per_pair(self._model, self.length) / self._peak
            skipped = distributed.total(self._part, loader.skipped)
            values |= {f"skipped/{cause}": n for cause, n in skipped.items()}
            if self._writer is not None:
                self._writer.write(step, values)
            left = self._throughput.seconds_left
            distributed.tell(progress_line(step, self._steps, values, rate, left))
        return True

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Write and print what an evaluation during the run found."""
        if self._writer is not None:
            self._writer.write(step, {f"eval/{name}": value for name, value in metrics.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        distributed.tell(f"step {step} evaluated:  {shown}")

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *exc: object) -> None:
        """Flush and close the writers."""
        if self._writer is not None:
            self._writer.close()

    def tell_skipped(self, loader: Loader) -> None:
        """Count the samples that were skipped, in all processes, and name the last of one."""
        last = loader.recent[-1] if loader.recent else ""
        # Processes that load the same part of each batch count once.
        parts = {
            part: told for part, *told in distributed.gather([self._part, loader.skipped, last])
        }
        skipped = sum((Counter(counts) for counts, _ in parts.values()), Counter())
        if skipped:
            counts = ", ".join(f"{n} {cause}" for cause, n in sorted(skipped.items()))
            last = next(text for _, text in parts.values() if text)
            distributed.tell(f"skipped samples: {counts}; the last: {last}")

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
