"""The adapters that a run has trained, by themselves."""

from contextlib import closing
from pathlib import Path

import numpy as np

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.lora import LORA
from clip_jax.models.stack import unstack_layers
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.warm_start import sharded_variable_shapes
from clip_jax.typing import leaves_by_path


def read_run_adapters(
    workdir: str | Path, config: CLIPConfig
) -> tuple[dict[str, np.ndarray], float]:
    """Return the adapters of a run's newest whole checkpoint by path, and their alpha.

    Raises:
      UserError: there is no checkpoint, or the run has no adapters.
    """
    with closing(Checkpoints(workdir, read_only=True)) as checkpoints:
        restored = checkpoints.restore_parts(sharded_variable_shapes(config, None))
    if restored is None or LORA not in restored[0]["params"]:
        raise UserError(f"{workdir} is no run with adapters; set config.train.lora_rank in one")
    variables, meta = restored
    leaves = leaves_by_path(unstack_layers(variables["params"][LORA]))
    alpha = float(meta["fingerprint"]["config.train.lora_alpha"])
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}, alpha
