"""A few training steps of a tiny model on this process's devices."""

import dataclasses
import math
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax.data.images import Preprocess
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.parallel.mesh import make_mesh, mesh_target, place_batch
from clip_jax.sections import DataSection, ModelSection, OptimSection, TrainSection
from clip_jax.training.device_augment import make_draws
from clip_jax.training.optimizer import make_optimizer, make_schedule
from clip_jax.training.setup import loss_of_section
from clip_jax.training.state import TrainState, init_state, state_shapes
from clip_jax.training.step import TrainStep, make_train_step

STEPS, ROWS = 8, 8
TINY = CLIPConfig(
    16,
    ViTConfig(image_size=32, patch_size=16, width=32, layers=1, heads=2),
    TextConfig(width=32, layers=1, heads=2, context_length=8, vocab_size=64, eot_id=63),
)


@dataclasses.dataclass(frozen=True)
class TrainingSteps:
    """What came of a few steps on one batch.

    Attributes:
      compile_seconds: until the first step was done.
      step_seconds: of a later one, their median.
      first_loss, last_loss: the loss of the first step and the last.
      problems: each a line that says what to do.
    """

    compile_seconds: float
    step_seconds: float
    first_loss: float
    last_loss: float
    problems: tuple[str, ...]


def try_training(devices: Sequence[jax.Device] | None = None) -> TrainingSteps:
    """Train a tiny model on one random batch, split over this process's devices."""
    began = time.perf_counter()
    mesh = make_mesh(data=-1, fsdp=1, tensor=1, devices=devices or jax.local_devices())
    step, state = _make_step(mesh)
    batch = place_batch(_random_batch(ROWS * mesh.size), mesh)
    losses, seconds = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    compile_seconds = time.perf_counter() - began - sum(seconds[1:])
    problems = []
    if not all(map(math.isfinite, losses)) or losses[-1] >= losses[0]:
        problems.append(
            f"the loss of a tiny model on one batch went from {losses[0]:.4g} to {losses[-1]:.4g}, "
            "and it has to fall: report these lines"
        )
    return TrainingSteps(
        compile_seconds, float(np.median(seconds[1:])), losses[0], losses[-1], tuple(problems)
    )


def _make_step(mesh: Mesh) -> tuple[TrainStep, TrainState]:
    model = CLIP(TINY, target=mesh_target(mesh))
    section = TrainSection()
    optim = OptimSection(learning_rate=1e-2, warmup_steps=1)
    schedule = make_schedule(optim, 10 * STEPS)
    optimizer = make_optimizer(schedule, optim)
    shapes = state_shapes(model, optimizer, mesh, section, split_update=False)
    loss_fn = loss_of_section(section, mesh, model.target)
    step = make_train_step(
        model,
        loss_fn,
        optimizer,
        schedule,
        shapes,
        section,
        preprocess=Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        draws=make_draws(ModelSection(), DataSection(), seed=0, patches=0, layers=0, text_layers=0),
    )
    return step, init_state(model, optimizer, shapes, section, seed=0)


def _random_batch(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    size, text = TINY.vision.image_size, TINY.text
    tokens = rng.integers(1, text.eot_id, (rows, text.context_length)).astype(np.int32)
    tokens[:, -1] = text.eot_id
    return {
        "image": rng.integers(0, 256, (rows, size, size, 3)).astype(np.uint8),
        "text": tokens,
        "caption_id": np.arange(rows, dtype=np.uint32),
        "valid": np.ones(rows, bool),
    }
