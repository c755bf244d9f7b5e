"""This project's folder of a model that was converted: `config.json` and one weights file."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from clip_jax.models.clip import CLIPConfig
from clip_jax.pretrained.layouts import own_arrays
from clip_jax.pretrained.load import array_shapes
from clip_jax.pretrained.safetensors_file import read_safetensors
from clip_jax.pretrained.workdir import FILE


def is_work_folder(path: str | Path) -> bool:
    """Whether a folder's `config.json` is ours, not Hugging Face's."""
    try:
        values = json.loads((Path(path) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Absent: another format. Damaged: named by whoever reads it next.
        return (Path(path) / "checkpoints").is_dir()
    return isinstance(values, dict) and "model_name" in values


def read_weights(path: Path, config: CLIPConfig) -> dict[str, Callable[[], np.ndarray]]:
    """Our own weights file by path, each array read when it is asked for.

    Raises:
      UserError: the file is damaged or holds another model.
    """
    return own_arrays(read_safetensors(path), array_shapes(config), str(path))
