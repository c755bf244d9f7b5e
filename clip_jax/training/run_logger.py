"""What a run prints and writes while it goes on: process 0 does, the others only take part."""

import functools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from clip_jax.data.caption_packing import CaptionPacking
from clip_jax.data.dataset import TrainingData, incomplete_samples
from clip_jax.data.decode_processes import decode_processes, decode_threads
from clip_jax.data.loader import Loader
from clip_jax.data.shards import Shard
from clip_jax.files import atomic_write
from clip_jax.parallel import distributed
from clip_jax.parallel.mesh import batch_part, mesh_text
from clip_jax.sections import DataSection
from clip_jax.training.checkpoint import replay_hint
from clip_jax.training.device_wait import DeviceWait
from clip_jax.training.exit_report import ExitReport
from clip_jax.training.metrics import (
    MetricsWriter,
    Throughput,
    measure_matmul_flops,
    peak_flops,
    progress_line,
    read_lines_until,
)
from clip_jax.training.metrics_service import MetricsService
from clip_jax.training.programs import ProgramCompiler
from clip_jax.training.rates import rate_lines, rate_table, trains_all
from clip_jax.training.setup import (
    RunComponents,
    attention_kernels,
    pair_flops,
)
from clip_jax.training.skip_limit import gather_skipped
from clip_jax.training.state import parameter_counts
from clip_jax.training.unpacked_steps import UnpackedSteps


def print_summary(run: RunComponents, data: TrainingData, *, pairs: int, steps: int) -> None:
    """Print what a run is about to do, and what of its data is left out."""
    config = run.config
    counts = parameter_counts(run.shapes.params)
    epochs = steps * config.train.batch_size / pairs
    lines = [
        f"{pairs:,} pairs in {len(data.shards)} shards, "
        f"{decoding_text(config.data, data.shards)}; {steps:,} steps of "
        f"{config.train.batch_size:,} pairs are {epochs:.1f} epochs",
        f"{config.model.name}: image tower {counts['image']:,} parameters, text tower "
        f"{counts['text']:,}; {jax.device_count()} {jax.devices()[0].device_kind} device(s), "
        + mesh_text(run.mesh.shape),
        attention_kernels(run),
    ]
    if not trains_all(config.train):
        table = rate_table(run.shapes.params, config.train)
        lines += rate_lines(table, config.optim.learning_rate)
    if run.distiller is not None:
        names = ", ".join(f"{x.name} ({x.embed_dim} features)" for x in run.distiller.infos)
        stored = config.distill.features
        source = f"their features are read from {stored}" if stored else "computed beside the step"
        lines.append(f"teachers: {names}; {source}")
    if run.caption_packing is not None:
        packing = run.caption_packing
        lines.append(
            f"captions of {packing.captions} pairs on a device packed into {packing}, "
            f"{packing.rows_per_caption:.1f} a caption"
        )
    lines += [
        f"shards left out: {n} {cause.replace('_', ' ')}, listed in skipped.jsonl"
        for cause, n in data.log.shard_counts.items()
    ]
    lines += [
        f"samples left out: {n:,} {cause.replace('_', ' ')}"
        for cause, n in data.log.excluded.items()
        if n
    ]
    lines += [
        f"{count} samples have {cause.replace('_', ' ')} and are left out, first {first}"
        for cause, (count, first) in incomplete_samples(data.shards).items()
    ]
    distributed.print_on_main("\n".join(lines))


def decoding_text(config: DataSection, shards: Sequence[Shard]) -> str:
    """Return how many threads and processes of this host decode."""
    threads, processes = decode_threads(config), decode_processes(config, shards)
    text = f"decoded by {threads} thread" + "s" * (threads != 1)
    return text + (f" in {processes} process" + "es" * (processes != 1)) * (processes > 0)


class RunLogger:
    """Writes a line now and then, `metrics.jsonl` and TensorBoard's files, and what went wrong.

    Attributes:
      device_wait: takes the time in which the devices wait.
      steps: the number of the last step.
      folder: the work folder.

    Args:
      run: the parts of the run.
      start: the step that it starts after.
      compiler: counts the programs.
      began: when the process, or the call that trains, began, on the clock of
        `time.perf_counter`.
      exit_report: gets the metrics of every step.
      service: is started, and sends what is written.
    """

    def __init__(
        self,
        run: RunComponents,
        steps: int,
        start: int,
        folder: Path,
        *,
        compiler: ProgramCompiler,
        began: float,
        exit_report: ExitReport,
        service: MetricsService,
    ) -> None:
        config = run.config
        self._compiler, self._began = compiler, began
        self._exit_report = exit_report
        self._startup: dict[str, float] | None = None
        self._unpacked: UnpackedSteps | None = None
        if run.caption_packing is not None:
            self._unpacked = UnpackedSteps(
                run.caption_packing, run.model.config.text.context_length
            )
        self.device_wait = DeviceWait()
        self._pair_flops = functools.partial(pair_flops, run)
        self.steps = steps
        self._every = config.train.log_every
        self.folder = folder
        self._writer = None
        if distributed.is_first():
            self._writer = MetricsWriter(folder, resume_step=start if start else None)
        self._service = service
        service.start()
        self._throughput = Throughput(pairs_per_step=config.train.batch_size, steps=steps)
        kind, dtype = jax.devices()[0].device_kind, config.model.dtype
        per_device = peak_flops(kind, dtype) or measure_matmul_flops(dtype)
        # Virtual CPU devices share the one machine that was measured.
        devices = 1 if run.model.target.platform == "cpu" else jax.device_count()
        self._peak = per_device * devices
        self._not_finite: tuple[int, float, list[str]] | None = None
        self._part, parts = batch_part(run.mesh)
        self._keys = KeyLog(folder, start, self._part, parts) if config.data.log_keys else None

    def log_step(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        keys: list[str],
        length: int | CaptionPacking,
        loader: Loader,
    ) -> bool:
        """Read one step's metrics, waiting for them; return whether they are finite.

        Every `config.train.log_every` steps, and for the last one, they are written and printed.
        `length`: tokens of a caption, after trimming; or how captions were packed.
        """
        values = {k: v.item() for k, v in jax.device_get(metrics).items()}
        self._throughput.report(step, time.perf_counter())
        self._exit_report.step(step, values)
        startup = self._report_startup() if self._startup is None else self._startup
        if self._keys is not None:
            self._keys.write(step, keys)
        if self._unpacked is not None:
            self._unpacked.count(length)
        if not values.pop("finite"):
            self._not_finite = (step, values["loss"], keys)
            return False
        if step % self._every == 0 or step == self.steps:
            # Once: they are of the start.
            values, self._startup = values | startup, {}
            values["data_wait"], values["host_wait"] = self.device_wait.shares()
            values["scale"] = math.exp(values["logit_scale"])
            rate = self._throughput.pairs_per_second
            if rate is not None:
                values["pairs_per_second"] = rate
                values["mfu"] = rate * self._pair_flops(length) / self._peak
            line = None
            if self._unpacked is not None:
                values["unpacked"], line = self._unpacked.report()
            skipped = distributed.total(self._part, loader.skipped)
            values |= {f"skipped/{cause}": n for cause, n in skipped.items()}
            values |= {f"left_out/{cause}": n for cause, n in loader.excluded.items()}
            if self._writer is not None:
                self._writer.write(step, values)
                self._service.check()
            left = self._throughput.seconds_left
            distributed.print_on_main(progress_line(step, self.steps, values, rate, left))
            if line is not None:
                distributed.print_on_main(line)
        return True

    @property
    def not_finite_step(self) -> int:
        """The step that was not finite; 0 where all were."""
        return 0 if self._not_finite is None else self._not_finite[0]

    def _report_startup(self) -> dict[str, float]:
        """Print how long it took to the end of the first step; return that and what it went into.

        They are in `metrics.jsonl` with the first line that the process writes.
        """
        end = self.device_wait.first_step_end
        seconds = (end.result() if end else time.perf_counter()) - self._began
        self._startup = {"startup/first_step_seconds": seconds, **self._compiler.metrics()}
        distributed.print_on_main(
            f"first step done {seconds:.1f} s after the start; {self._compiler.summary()}"
        )
        return self._startup

    def log_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Write and print the metrics of an evaluation during the run."""
        if self._writer is not None:
            self._writer.write(step, {f"eval/{name}": value for name, value in metrics.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        distributed.print_on_main(f"step {step} evaluated:  {shown}")

    def __enter__(self) -> "RunLogger":
        return self

    def __exit__(self, *exc: object) -> None:
        """Flush and close the writers."""
        self.device_wait.close()
        for writer in (self._writer, self._keys):
            if writer is not None:
                writer.close()

    def print_skipped(self, loader: Loader) -> None:
        """Print the samples that all processes skipped, by cause, and the last of one process."""
        skipped, _, last = gather_skipped(self._part, loader)
        if skipped:
            counts = ", ".join(f"{n} {cause}" for cause, n in sorted(skipped.items()))
            distributed.print_on_main(f"skipped samples: {counts}; the last: {last}")

    def report_not_finite(self, saved: list[int], checkpoints: Path) -> None:
        """Print one line on the step that was not finite, and write the keys of its samples.

        They go to `not_finite.json`, those of process 1 to `not_finite-1.json` and so on.

        Args:
          saved: the steps of the checkpoints, newest first.
          checkpoints: their folder.
        """
        if self._not_finite is None:
            return
        step, loss, keys = self._not_finite
        which = "" if distributed.is_first() else f"-{distributed.process_index()}"
        path = self.folder / f"not_finite{which}.json"
        path.write_text(json.dumps({"step": step, "loss": str(loss), "keys": keys}, indent=1))
        if not distributed.is_first():
            return
        good = f"step {saved[0]} in {checkpoints}" if saved else "none was saved yet"
        some = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        print(
            f"error: step {step} is not finite (loss {loss}); its batch: {some} (all keys in "
            f"{path}); last good checkpoint: {good}; lower config.optim.learning_rate or set "
            f"config.optim.clip_norm; {replay_hint(self.folder, step)}",
            file=sys.stderr,
            flush=True,
        )


class KeyLog:
    """Writes `keys-N.jsonl`, the keys of each step's rows, part N of every batch.

    A line is {"step": 12, "part": 0, "parts": 2, "keys": [...]}. A run that is resumed drops the
    steps that come again.
    """

    def __init__(self, folder: Path, start: int, part: int, parts: int) -> None:
        own_path = folder / f"keys-{part}.jsonl"
        # Parts that there were once, and are no more, are the first process's.
        names = [folder / f"keys-{k}.jsonl" for k in range(parts)]
        others = [p for p in folder.glob("keys-*.jsonl") if p not in names and part == 0]
        for path in (own_path, *others):
            lines = read_lines_until(path, start)
            with atomic_write(path) as partial:
                partial.write_text("".join(lines), encoding="utf-8")
        self._about = {"part": part, "parts": parts}
        self._file = own_path.open("a", encoding="utf-8")

    def write(self, step: int, keys: list[str]) -> None:
        """Write one line, handed to the operating system at once."""
        self._file.write(json.dumps({"step": step, **self._about, "keys": keys}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
