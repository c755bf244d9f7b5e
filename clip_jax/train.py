"""Training: the wiring of a run, then its host loop."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clip_jax.checkpoint import Checkpoints, check_fingerprint
from clip_jax.config import Config
from clip_jax.data.loader import Batch, trim_to_bucket
from clip_jax.data.sources import ShardIndex, expand, fingerprint, incomplete, index_shards
from clip_jax.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED, UserError
from clip_jax.evaluate import evaluate_workdir
from clip_jax.mesh import place_batch
from clip_jax.report import Report
from clip_jax.signals import catch_signals
from clip_jax.state import TrainState, init_state, parameter_counts
from clip_jax.tokenizers import tokenizer_spec
from clip_jax.wiring import Wiring, make_loader, make_step, run_fingerprint, wire
from clip_jax.workdir import Description, write_description


def run(config: Config, workdir: str) -> int:
    """Train, or go on with the run in `workdir`, then evaluate; the process's exit code.

    Raises:
      UserError: the data, the config or the work folder is not fit for the run.
    """
    if not config.data.train:
        raise UserError("config.data.train is empty; give tar shards, e.g. data/{00000..00009}.tar")
    indexes = index_shards(expand(config.data.train))
    pairs = sum(len(index) for index in indexes)
    steps = config.train.steps or int(config.train.epochs * pairs / config.train.batch_size)
    if steps < 1:
        raise UserError(
            f"config.train.epochs {config.train.epochs:g} over {pairs:,} pairs is not one step of "
            f"config.train.batch_size {config.train.batch_size}; raise the one or lower the other"
        )
    w = wire(config, steps)
    print(_summary(config, w, indexes, pairs, steps), flush=True)

    identity = run_fingerprint(config, w, fingerprint(indexes), pairs)
    folder = make_workdir(workdir)
    checkpoints = Checkpoints(folder, keep=config.checkpoint.keep)
    try:
        state = restore_or_init(config, w, checkpoints, identity, folder)
        write_description(
            folder,
            Description(
                config.model.name,
                w.model.config,
                tokenizer_spec(config.data.tokenizer),
                config=dataclasses.asdict(config),
            ),
        )
        code = train_loop(config, w, indexes, state, steps, checkpoints, identity, folder)
    finally:
        checkpoints.close()
    if code == 0 and config.eval.data:
        print(evaluate_workdir(workdir), flush=True)
    return code


def make_workdir(workdir: str) -> Path:
    """The run's folder, made where it is not there.

    Raises:
      UserError: it cannot be made, or not be written to.
    """
    folder = Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--workdir {workdir} cannot be made ({reason}); give another") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--workdir {workdir} cannot be written to; give another")
    return folder


def restore_or_init(
    config: Config, w: Wiring, checkpoints: Checkpoints, identity: dict[str, Any], folder: Path
) -> TrainState:
    """The newest whole checkpoint's state, or a fresh one.

    Raises:
      UserError: the checkpoint belongs to another run.
    """
    meta = checkpoints.latest_meta()
    if meta is not None:
        check_fingerprint(meta["fingerprint"], identity, folder)
        restored = checkpoints.restore(w.shapes)
        if restored is not None:
            print(f"going on from step {restored[1]['step']} of {folder}", flush=True)
            return restored[0]
    return init_state(w.model, w.optimizer, w.shapes, config.seed, freeze=config.train.freeze)


def _summary(config: Config, w: Wiring, indexes: list[ShardIndex], pairs: int, steps: int) -> str:
    counts = parameter_counts(w.shapes.params)
    epochs = steps * config.train.batch_size / pairs
    lines = [
        f"{pairs:,} pairs in {len(indexes)} shards; {steps:,} steps of "
        f"{config.train.batch_size:,} pairs are {epochs:.1f} epochs",
        f"{config.model.name}: image tower {counts['image']:,} parameters, text tower "
        f"{counts['text']:,}; {jax.device_count()} {jax.devices()[0].device_kind} device(s), "
        + " x ".join(f"{axis}={n}" for axis, n in w.mesh.shape.items()),
    ]
    lines += [
        f"{len(keys)} samples have {cause.replace('_', ' ')} and are left out, first {keys[0]}"
        for cause, keys in incomplete(indexes).items()
    ]
    return "\n".join(lines)


def device_part(batch: Batch) -> dict[str, np.ndarray]:
    """What of a batch travels to the device."""
    return {
        "image": batch["image"],
        "text": batch["text"],
        "caption_id": batch["caption_id"],
        "ok": batch["ok"],
    }


def train_loop(
    config: Config,
    w: Wiring,
    indexes: list[ShardIndex],
    state: TrainState,
    steps: int,
    checkpoints: Checkpoints,
    identity: dict[str, Any],
    folder: Path,
) -> int:
    """Step until the end, a signal, or a loss that is not finite; the exit code.

    The metrics of a step are read only after the next one is dispatched, so the device never
    waits for the host.
    """
    start = int(state.step)
    train_step = make_step(config, w)
    with (
        Report(config, w, steps, start, folder) as report,
        make_loader(config, w, indexes, start) as loader,
        catch_signals() as stop,
    ):
        pending: tuple[int, dict[str, jax.Array], list[str]] | None = None
        step, bad = start, False
        while step < steps and not stop.signal and not bad:
            batch = next(loader)
            if w.model.config.text.trimmable:
                batch["text"] = trim_to_bucket(batch["text"], w.tokenizer.eot_id)
            arrays = place_batch(device_part(batch), w.mesh)
            state, metrics = train_step(state, arrays)
            step += 1
            if pending is not None:
                bad = not report.step(*pending, loader)
            pending = (step, metrics, batch["key"])
            report.length = batch["text"].shape[1]
            if step % config.checkpoint.every == 0 and not bad:
                # Only a state whose own step was finite is worth keeping.
                bad = not report.step(*pending, loader)
                pending = None
                if not bad:
                    checkpoints.save(state, step, identity)
        if pending is not None and not bad:
            bad = not report.step(*pending, loader)
        report.tell_skipped(loader)
        if bad:
            report.explain_not_finite(checkpoints.steps(), checkpoints.folder)
            return EXIT_ERROR
        checkpoints.save(state, step, identity)
    if step < steps:
        print(f"saved step {step} of {steps}; the same command goes on from there", flush=True)
        return EXIT_INTERRUPTED if stop.signal == signal.SIGINT else EXIT_TERMINATED
    return 0
