"""What a tower holds before its features: every row, and the outputs of its blocks.

The tower runs as it always does, but for its last block, which is computed for all rows; the
outputs of its modules are captured on the way.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.errors import UserError, check_choice
from clip_jax.models.clip import CLIP
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.fastvit import FastViTConfig
from clip_jax.models.image_towers import VisionConfig
from clip_jax.models.layer_norm import layer_norm
from clip_jax.models.layers import gelu
from clip_jax.models.naflex import ImagePatches, NaFlexConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.text_encoder import mean_of_seen
from clip_jax.models.vit import ViTConfig

TOWERS = {"image": "visual", "text": "text"}
"""The names of the towers' modules."""
Transformers = ViTConfig | NaFlexConfig | TextConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TowerStates:
    """The rows of one tower, float32.

    Attributes:
      rows_BLD: the last block's. Of a text behind the last layer norm; of an image before it where
        the norm follows the pooling (CLIP), else behind it (SigLIP). Of convolutions the places of
        the last feature map, line by line.
      pooled_BD: the row that is made of them, before the projection to the shared space; of a
        ResNet, whose pooling projects, its features.
      blocks: the outputs of the blocks (of convolutions: stages) that were asked for, each
        [B, L, D].
      leading_rows: how many rows precede an image's patches.
      is_square: images have one grid, a square; else each has its own (`ImagePatches.grid`).
    """

    rows_BLD: Float[Array, "B L D"]
    pooled_BD: Float[Array, "B _"]
    blocks: tuple[Float[Array, "B _ _"], ...]
    leading_rows: int = dataclasses.field(default=0, metadata={"static": True})
    is_square: bool = dataclasses.field(default=True, metadata={"static": True})

    def grid(self, rows_BLD: Float[Array, "B L D"] | None = None) -> Float[Array, "B h w D"]:
        """Return an image's patches as they lie in it, of `rows_BLD` or of a block.

        Raises:
          UserError: images have grids of their own.
        """
        if not self.is_square:
            raise UserError(
                "these images have grids of their own: rows[i, : h * w].reshape(h, w, -1) is one's"
            )
        rows_BLD = self.rows_BLD if rows_BLD is None else rows_BLD
        patches_BlD = rows_BLD[:, self.leading_rows :]
        batch, count, width = patches_BlD.shape
        side = round(count**0.5)
        return patches_BlD.reshape(batch, side, side, width)


@runtime_checkable
class StatesFn(Protocol):
    """A pure function, which can be jitted."""

    def __call__(self, variables: Mapping[str, Any], inputs: Array | ImagePatches) -> TowerStates:
        """Return the states of normalized images [B, H, W, 3] or patches, or of tokens [B, L]."""
        ...


def make_states(model: CLIP, tower: str, blocks: Sequence[int]) -> StatesFn:
    """Make the function of one tower's states.

    Args:
      model: its blocks must stand by themselves (`scan` False).
      tower: a name of `TOWERS`.
      blocks: numbers of blocks, from 0; -1 is the last. Of a tower of convolutions, of stages.

    Raises:
      UserError: the tower has no such blocks.
    """
    check_choice("tower", tower, TOWERS)
    config = model.config.vision if tower == "image" else model.config.text
    paths = block_paths(config)
    for number in blocks:
        if not -len(paths) <= number < len(paths):
            what = "blocks" if isinstance(config, Transformers) else "stages"
            raise UserError(
                f"the {tower} tower has {len(paths)} {what}, and none of number {number}"
            )
    whole = model.clone(pool_last_block=False)
    leading_rows = int(getattr(config, "class_token", False)) if tower == "image" else 0
    is_square = not isinstance(config, NaFlexConfig)

    def states(variables: Mapping[str, Any], inputs: Array | ImagePatches) -> TowerStates:
        captured = _capture(whole, variables, inputs, tower)
        rows_BLD = _rows(captured[paths[-1]])
        if isinstance(config, TextConfig):
            params = variables["params"][TOWERS[tower]]
            assert not isinstance(inputs, ImagePatches)
            rows_BLD, pooled_BD = _text_states(config, params, inputs, rows_BLD, captured)
        elif isinstance(config, Transformers):
            rows_BLD, pooled_BD = _image_states(config, rows_BLD, captured)
        else:
            rows_BLD, pooled_BD = _map_states(config, rows_BLD, captured)
        asked = (_rows(captured[paths[number]]) for number in blocks)
        rows_BLD, pooled_BD, *outputs = (
            x.astype(jnp.float32) for x in (rows_BLD, pooled_BD, *asked)
        )
        return TowerStates(rows_BLD, pooled_BD, tuple(outputs), leading_rows, is_square)

    return states


def block_paths(config: VisionConfig | TextConfig) -> list[tuple[str, ...]]:
    """Return the paths of a tower's blocks, or of what a convolutional one's stages end on."""
    if isinstance(config, ResNetConfig):
        return [(f"layer{i}_{count - 1}",) for i, count in enumerate(config.layers, 1)]
    if isinstance(config, ConvNetConfig):
        return [(f"bn{i}",) for i in range(1, len(config.features) + 1)]
    if isinstance(config, ConvNeXtConfig | FastViTConfig):
        return [(f"stages_{i}",) for i in range(len(config.depths))]
    return [("transformer", f"resblocks_{i}") for i in range(config.layers)]


def _rows(x: Array) -> Array:
    """Return the places of a feature map as rows, line by line; rows as they are."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _text_states(
    config: TextConfig, params: Mapping[str, Any], tokens_BL: Array, rows_BLD: Array, captured: Any
) -> tuple[Array, Array]:
    """Return all rows of a text behind the last norm, and the one that is made of them."""
    form = config.encoder
    if form is not None and form.norms == "after":
        # Its blocks end on their norms.
        if form.pool == "first":
            return rows_BLD, rows_BLD[:, 0]
        return rows_BLD, mean_of_seen(rows_BLD, tokens_BL != form.pad_id)
    norm = params["ln_final"]
    rows_BLD = layer_norm(rows_BLD, norm["scale"], norm["bias"], config.norm_eps)
    return rows_BLD, captured["ln_final",]


def _image_states(
    config: ViTConfig | NaFlexConfig, rows_BLD: Array, captured: Any
) -> tuple[Array, Array]:
    """Return all rows of an image transformer, and the one that is made of them."""
    last = captured.get(("ln_post",), rows_BLD)
    if last.ndim == 3:
        leading_rows = int(getattr(config, "class_token", False))
        rows_BLD, last = last, jnp.mean(last[:, leading_rows:], axis=1)
    is_map = isinstance(config, NaFlexConfig) or config.pool == "map"
    return rows_BLD, captured["attn_pool",] if is_map else last


def _map_states(config: VisionConfig, rows_BLD: Array, captured: Any) -> tuple[Array, Array]:
    """Return the places of the last feature map, and the row that is made of them."""
    if isinstance(config, FastViTConfig):
        rows_BLD = gelu(_rows(captured["final_se",]))
        return rows_BLD, jnp.mean(rows_BLD, axis=1)
    pooled = "attnpool" if isinstance(config, ResNetConfig) else "ln_post"
    return rows_BLD, captured[pooled,]


def _capture(
    model: CLIP, variables: Mapping[str, Any], inputs: Array | ImagePatches, tower: str
) -> dict[tuple[str, ...], Array]:
    """Run a tower; return the outputs of its modules by their paths inside it."""
    captured: dict[tuple[str, ...], Array] = {}
    root = TOWERS[tower]

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = call(*args, **kwargs)
        path = context.module.path
        if context.method_name == "__call__" and path[:1] == (root,) and len(path) > 1:
            captured[path[1:]] = y
        return y

    with nn.intercept_methods(intercept):
        model.apply(variables, inputs, method=f"encode_{tower}")
    return captured
