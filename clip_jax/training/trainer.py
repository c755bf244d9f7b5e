"""Training: the wiring of a run, then its host loop."""

import dataclasses
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clip_jax.data.dataset import TrainingData, incomplete_samples
from clip_jax.data.loader import Batch, bucket_length
from clip_jax.data.sources import fingerprint
from clip_jax.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED, UserError
from clip_jax.files import make_folder
from clip_jax.parallel import distributed
from clip_jax.parallel.mesh import batch_part, mesh_text, place_batch
from clip_jax.pretrained.work_folder import RunDescription, write_description
from clip_jax.sections import Config
from clip_jax.training.best_checkpoint import Best
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.fingerprint import (
    Fingerprint,
    check_fingerprint,
    complete_fingerprint,
    run_fingerprint,
)
from clip_jax.training.run_logger import RunLogger, SkipLimit
from clip_jax.training.setup import (
    RunComponents,
    attention_kernels,
    build_run,
    make_evaluation,
    make_loader,
    make_step,
    open_data,
    steps_of_run,
)
from clip_jax.training.signals import catch_signals
from clip_jax.training.state import TrainState, init_state, parameter_counts
from clip_jax.training.warm_start import warm_start_state


def train(config: Config, workdir: str) -> int:
    """Train, or go on with the run in `workdir`; the process's exit code.

    Raises:
      UserError: the data, the config or the work folder is not fit for the run.
    """
    if not config.data.train:
        raise UserError("config.data.train is empty; give tar shards, e.g. data/{00000..00009}.tar")
    # First of all: what is wrong with the data is listed there.
    folder = make_workdir(workdir)
    data = open_data(config, workdir)
    pairs = sum(len(shard) for shard in data.shards)
    steps = steps_of_run(config, pairs)
    if steps < 1:
        raise UserError(
            f"config.train.epochs {config.train.epochs:g} over {pairs:,} pairs is not one step of "
            f"config.train.batch_size {config.train.batch_size}; raise the one or lower the other"
        )
    run = build_run(config, steps, workdir)
    check_streams(config.data.streams, batch_part(run.mesh)[1])
    identity = run_fingerprint(
        config, run.model.config, run.tokenizer_spec, data=fingerprint(data.shards), pairs=pairs
    )
    distributed.agree(identity | {"its config": dataclasses.asdict(config)})
    distributed.print_on_main(_summary(run, data, pairs, steps))
    checkpoints = Checkpoints(folder, keep=config.checkpoint.keep)
    try:
        state = restore_or_init(run, checkpoints, identity, folder)
        if distributed.is_first():
            write_description(folder, description_of(run))
        if int(state.step) < steps:
            checkpoints.require_room(state)
        code = train_loop(run, data, state, steps, checkpoints, identity, folder)
    finally:
        checkpoints.close()
    distributed.stand_by()
    return code


def description_of(run: RunComponents) -> RunDescription:
    """What the run's work folder says of it."""
    return RunDescription(
        run.config.model.name,
        run.model.config,
        run.tokenizer_spec,
        run.preprocess,
        config=dataclasses.asdict(run.config),
    )


def check_streams(streams: int, parts: int) -> None:
    """Raises UserError when the processes cannot share the streams evenly."""
    if streams % parts:
        raise UserError(
            f"config.data.streams {streams} is not a multiple of {parts}, the parts of a batch "
            f"that processes load; take {-(-streams // parts) * parts}, or other processes"
        )


def make_workdir(workdir: str) -> Path:
    """The run's folder, made by process 0 where it is not there, and seen by all.

    Raises:
      UserError: it cannot be made, or not be written to, or not be seen.
    """
    folder = Path(workdir)
    if distributed.is_first():
        make_folder(folder, flag="--workdir")
    distributed.gather(None)
    if not folder.is_dir():
        raise UserError(
            f"--workdir {workdir} was made by process 0 and is not there for process "
            f"{distributed.process_index()}; give one on a file system that all machines share"
        )
    if not os.access(folder, os.W_OK):
        raise UserError(f"--workdir {workdir} cannot be written to; give another")
    return folder


def restore_or_init(
    run: RunComponents,
    checkpoints: Checkpoints,
    identity: Fingerprint,
    folder: Path,
) -> TrainState:
    """The newest whole checkpoint's state, or a fresh one, from config.model.init_from if set.

    Raises:
      UserError: the checkpoint belongs to another run, or the one to start from cannot be used.
    """
    meta = checkpoints.latest_meta()
    if meta is not None:
        saved = complete_fingerprint(meta["fingerprint"], folder)
        check_fingerprint(saved, identity, folder)
        restored = checkpoints.restore(run.shapes)
        if restored is not None:
            distributed.print_on_main(f"going on from step {restored[1]['step']} of {folder}")
            return restored[0]
    if run.source is None:
        config = run.config
        return init_state(run.model, run.optimizer, run.shapes, config.train, config.seed)
    distributed.print_on_main(f"starting from {run.source.path}")
    return warm_start_state(
        run.source,
        run.model.config,
        run.optimizer,
        run.shapes,
        run.config,
    )


def _summary(run: RunComponents, data: TrainingData, pairs: int, steps: int) -> str:
    config = run.config
    counts = parameter_counts(run.shapes.params)
    epochs = steps * config.train.batch_size / pairs
    lines = [
        f"{pairs:,} pairs in {len(data.shards)} shards; {steps:,} steps of "
        f"{config.train.batch_size:,} pairs are {epochs:.1f} epochs",
        f"{config.model.name}: image tower {counts['image']:,} parameters, text tower "
        f"{counts['text']:,}; {jax.device_count()} {jax.devices()[0].device_kind} device(s), "
        + mesh_text(run.mesh.shape),
        attention_kernels(run),
    ]
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
    return "\n".join(lines)


def device_part(batch: Batch) -> dict[str, np.ndarray]:
    """What of a batch travels to the device."""
    return {
        "image": batch["image"],
        "text": batch["text"],
        "caption_id": batch["caption_id"],
        "valid": batch["valid"],
    }


@dataclasses.dataclass(frozen=True)
class Placed:
    """A batch on the devices, or on its way: its arrays, keys and trimmed length, and the signal
    that each process was asked to stop by, or 0."""

    arrays: dict[str, jax.Array]
    keys: list[str]
    length: int
    asked: np.ndarray


def announced(
    loader: Iterator[Batch], count: int, announce: Callable[[Batch], distributed.Announcement]
) -> Iterator[tuple[Batch, np.ndarray]]:
    """`count` batches, each with what every process said of it.

    With several processes a batch is fetched and announced before the step of the one before it
    is dispatched, so that the answer is there when its own step is.
    """
    ahead = 0 if distributed.process_count() == 1 else 1
    waiting: deque[tuple[Batch, distributed.Announcement]] = deque()
    for fetched in range(count + ahead):
        if fetched < count:
            batch = next(loader)
            waiting.append((batch, announce(batch)))
        if fetched >= ahead:
            batch, said = waiting.popleft()
            yield batch, said.result()


def evaluated_part(state: TrainState) -> dict[str, Any]:
    """The moving averages where the run keeps them: they are what it is trained for."""
    return state.ema or {"params": state.params, "batch_stats": state.batch_stats}


def train_loop(
    run: RunComponents,
    data: TrainingData,
    state: TrainState,
    steps: int,
    checkpoints: Checkpoints,
    identity: Fingerprint,
    folder: Path,
) -> int:
    """Step until the end, a signal, or a loss that is not finite; the exit code.

    The metrics of a step are read only after the next one is dispatched and the batch after that
    is on its way, so the device never waits for the host. Processes agree on what depends on more
    than the step's number: how long the captions are, whether one of them was asked to stop, and
    how much was skipped.
    """
    start = int(state.step)
    train_step, evaluate = make_step(run), make_evaluation(run)
    config = run.config
    watched = config.eval.best
    with (
        RunLogger(run, steps, start, folder) as report,
        make_loader(run, data, start) as loader,
        catch_signals(distributed.print_on_main) as stop,
        Best(folder, watched, description_of(run)) if watched else nullcontext() as best,
    ):
        limit = SkipLimit(data.log, batch_part(run.mesh)[0], loader)

        def announce(batch: Batch) -> distributed.Announcement:
            text = batch["text"]
            supports_trimming = run.model.config.text.supports_trimming
            length = (
                bucket_length(text, run.tokenizer.eot_id) if supports_trimming else text.shape[1]
            )
            rows = sum(key != "" for key in batch["key"])
            return distributed.Announcement(
                (length, stop.signal, rows - int(batch["valid"].sum()), rows)
            )

        batches = announced(loader, steps - start, announce)

        def place_next() -> Placed | None:
            with report.waiting:
                fetched = next(batches, None)
            if fetched is None:
                return None
            batch, said = fetched
            limit.check(said[:, 2:])
            length = int(said[:, 0].max())
            batch["text"] = batch["text"][:, :length]
            arrays = place_batch(device_part(batch), run.mesh)
            return Placed(arrays, batch["key"], length, said[:, 1])

        pending: tuple[int, dict[str, jax.Array], list[str]] | None = None
        step, bad, stopped, coming = start, False, 0, place_next()
        while coming is not None:
            stopped = int(coming.asked.max())
            if stopped:
                others = [i for i, asked in enumerate(coming.asked) if asked and i]
                if others:
                    name = signal.Signals(stopped).name
                    distributed.print_on_main(
                        f"{name} on process {others[0]}: saving step {step}, then exiting"
                    )
                break
            distributed.rearm()
            state, metrics = train_step(state, coming.arrays)
            report.waiting.dispatched(metrics)
            distributed.settle(metrics)
            step += 1
            now, report.length = (step, metrics, coming.keys), coming.length
            # On its way to the devices while they are busy with the step.
            coming = place_next()
            if pending is not None:
                bad = not report.step(*pending, loader)
            pending = now
            save = step % config.checkpoint.every == 0
            due = evaluate is not None and step % config.eval.every == 0
            if (save or (due and best is not None)) and not bad:
                # Only a state whose own step was finite is worth keeping.
                bad = not report.step(*pending, loader)
                pending = None
            if save and not bad:
                checkpoints.save(state, step, identity)
            # The last state is evaluated after the loop; here only if it may be the best.
            if evaluate is not None and due and not bad and (step < steps or best is not None):
                found = evaluate(evaluated_part(state))
                report.evaluated(step, found)
                if best is not None:
                    try:
                        best.offer(state, step, found, identity)
                    except UserError:  # a metric that is not measured; no step shall be lost for it
                        checkpoints.save(state, step, identity)
                        raise
            if bad:
                break
        if pending is not None and not bad:
            bad = not report.step(*pending, loader)
        report.tell_skipped(loader)
        if bad:
            report.explain_not_finite(checkpoints.steps(), checkpoints.folder)
            return EXIT_ERROR
        checkpoints.save(state, step, identity)
    if step < steps:
        distributed.print_on_main(
            f"saved step {step} of {steps}; the same command goes on from there"
        )
        return EXIT_INTERRUPTED if stopped == signal.SIGINT else EXIT_TERMINATED
    return 0
