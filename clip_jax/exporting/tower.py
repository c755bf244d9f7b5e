"""One tower of a loaded model as a pure function of its arrays and a batch."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.api import LoadedCLIP
from clip_jax.errors import UserError
from clip_jax.exporting.int8 import SCALE, dequantize, quantize
from clip_jax.exporting.resize import prepare_images
from clip_jax.models.clip import CLIP, unit_length
from clip_jax.models.naflex import NaFlexConfig
from clip_jax.pretrained.trees import from_variables, to_variables
from clip_jax.training.step import normalize_images, unit_range
from clip_jax.typing import Features

Tower = Literal["image", "text"]
MODULES: dict[str, str] = {"image": "visual", "text": "text"}
"""The module of each tower, which its arrays' paths begin with."""


@dataclasses.dataclass(frozen=True, eq=False)
class TowerProgram:
    """What is exported of a tower.

    Attributes:
      clip: the model.
      tower: "image" or "text".
      resizes: images may have any size; else they have the model's.
      arrays: the tower's weights by path and the temperature; of a matrix in int8 its scales too.
    """

    clip: LoadedCLIP
    tower: Tower
    resizes: bool
    arrays: Mapping[str, np.ndarray]

    def __call__(self, arrays: Mapping[str, Any], batch: jax.Array) -> Features:
        """Return unit features of uint8 images [B, H, W, 3], or of int32 token ids [B, L]."""
        clip = self.clip
        # The default target's plain forms run on any device and for any number of rows.
        model = CLIP(clip.config)
        variables = to_variables(dequantize(arrays))
        if self.tower == "image":
            prepare = clip.preprocessing
            if self.resizes:
                batch = prepare_images(batch, clip.config.vision.image_size, prepare)
            batch = normalize_images(unit_range(batch), prepare.mean, prepare.std)
        features: Any = model.apply(variables, batch, method=f"encode_{self.tower}")
        return unit_length(features)

    @property
    def is_int8(self) -> bool:
        """Whether matrices are held in int8."""
        return any(name.endswith(SCALE) for name in self.arrays)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions of the batch, as `jax.export.symbolic_shape` reads them."""
        if self.tower == "text":
            return ("batch", str(self.clip.config.text.context_length))
        size = str(self.clip.config.vision.image_size)
        sides = ("height", "width") if self.resizes else (size, size)
        return ("batch", *sides, "3")

    @property
    def dtype(self) -> Any:
        """The type of the batch's values."""
        return jnp.int32 if self.tower == "text" else jnp.uint8


def tower_program(clip: LoadedCLIP, tower: Tower, *, resizes: bool, int8: bool) -> TowerProgram:
    """Return a tower of a model, ready to export.

    Args:
      resizes: images of any size are prepared inside the program.
      int8: matrices are held in int8 with a scale for each output.

    Raises:
      UserError: the tower takes patches, not pixels.
    """
    if tower == "image" and isinstance(clip.config.vision, NaFlexConfig):
        raise UserError(f"{clip.name} takes patches of any grid: only its text tower is exported")
    arrays = {
        path: array
        for path, array in from_variables(clip.params, clip.batch_stats).items()
        if "/" not in path or path.startswith(MODULES[tower] + "/")
    }
    return TowerProgram(clip, tower, resizes, quantize(arrays) if int8 else arrays)
