"""clip_jax's own training step over a loaded model, built as the trainer builds it."""

import argparse
import ast
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.api import LoadedCLIP
from clip_jax.config import default, resolve
from clip_jax.parallel.mesh import place_batch
from clip_jax.training.setup import RunComponents, build_run, make_step
from clip_jax.training.state import TrainState, init_state, state_shapes
from clip_jax.training.step import TrainStep


class Run(NamedTuple):
    """A training run at its start.

    Attributes:
      components: its mesh, model, optimizer and the layout of its state.
      step: jitted, not compiled yet.
      state: the loaded weights and a fresh optimizer; the step takes its memory.
      batch: its arrays, on the device.
    """

    components: RunComponents
    step: TrainStep
    state: TrainState
    batch: dict[str, jax.Array]


def make_run(
    options: argparse.Namespace,
    loaded: LoadedCLIP,
    images: np.ndarray,
    tokens: np.ndarray,
    **train: Any,
) -> Run:
    """Return a run with AdamW on one batch; `train` overrides fields of `config.train`.

    `options.set` has more overrides: "model.remat=none".
    """
    rows = len(images)
    values = default()
    values.train.update({"steps": 1000, "batch_size": rows} | train)
    values.data.streams = 1
    values.model.dtype = options.dtype
    values.optim.learning_rate = 1e-5
    for text in options.set:
        key, _, value = text.partition("=")
        section, field = key.split(".")
        is_text = isinstance(values[section][field], str)
        values[section][field] = value if is_text else ast.literal_eval(value)
    config = resolve(values)
    parts = build_run(config, config.train.steps)
    # The run's own model with the loaded one's sizes, which are open_clip's.
    model = parts.model.clone(config=loaded.config)
    shapes = state_shapes(model, parts.optimizer, parts.mesh, config.train)
    parts = dataclasses.replace(parts, model=model, shapes=shapes)
    # The step takes its state's memory: the loaded weights stay, it gets a copy.
    params = jax.tree.map(jnp.copy, loaded.params)
    state = init_state(model, parts.optimizer, shapes, config.train, seed=0).replace(params=params)
    # Laid out as the step returns it, or the second call would compile again.
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, shapes))
    batch = {
        "image": images,
        "text": tokens,
        "caption_id": np.arange(rows, dtype=np.uint32),
        "valid": np.ones(rows, bool),
    }
    return Run(parts, make_step(parts), state, place_batch(batch, parts.mesh))


class Stepper:
    """A step that is called over and over on one batch, each time with the state it left."""

    def __init__(self, run: Run, step: Any = None):
        """Start from the run's state; `step` may be its step, compiled already."""
        self.step, self.state, self.batch = step or run.step, run.state, run.batch

    def __call__(self) -> float:
        """Take one step, wait for it, and return the loss."""
        loss = self.dispatch()
        jax.block_until_ready(self.state)
        return float(loss)

    def dispatch(self) -> jax.Array:
        """Take one step without waiting for it, and return the loss that it will have."""
        self.state, metrics = self.step(self.state, self.batch)
        return metrics["loss"]
