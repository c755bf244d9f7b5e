"""What a transformer tower holds before its features: every row, and the outputs of its blocks.

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
from clip_jax.models.layer_norm import layer_norm
from clip_jax.models.naflex import ImagePatches, NaFlexConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

TOWERS = {"image": "visual", "text": "text"}
"""The names of the towers' modules."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TowerStates:
    """The rows of one tower, float32.

    Attributes:
      rows_BLD: the last block's. Of a text behind the last layer norm; of an image before it where
        the norm follows the pooling (CLIP), else behind it (SigLIP).
      pooled_BD: the row that is made of them, before the projection to the shared space.
      blocks: the outputs of the blocks that were asked for, each [B, L, D].
      leading_rows: how many rows precede an image's patches.
      is_square: images have one grid, a square; else each has its own (`ImagePatches.grid`).
    """

    rows_BLD: Float[Array, "B L D"]
    pooled_BD: Float[Array, "B D"]
    blocks: tuple[Float[Array, "B L D"], ...]
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
      blocks: numbers of blocks, from 0; -1 is the last.

    Raises:
      UserError: the tower has no blocks, or not those.
    """
    check_choice("tower", tower, TOWERS)
    config = model.config.vision if tower == "image" else model.config.text
    if not isinstance(config, ViTConfig | NaFlexConfig | TextConfig):
        raise UserError(f"this {tower} tower is no transformer: it has no rows and no blocks")
    if isinstance(config, TextConfig) and config.encoder and config.encoder.norms == "after":
        raise UserError(
            "the rows of a text tower like RoBERTa's are not given: it has no last norm"
        )
    layers = config.layers
    for number in blocks:
        if not -layers <= number < layers:
            raise UserError(f"the {tower} tower has {layers} blocks, and none of number {number}")
    numbers = tuple(number % layers for number in blocks)
    whole = model.clone(pool_last_block=False)
    leading_rows = int(getattr(config, "class_token", False))

    def states(variables: Mapping[str, Any], inputs: Array | ImagePatches) -> TowerStates:
        captured = _capture(whole, variables, inputs, tower)

        def block(number: int) -> Array:
            return captured["transformer", f"resblocks_{number}"]

        rows_BLD, pooled_BD = block(layers - 1), None
        if tower == "text":
            norm = variables["params"][TOWERS[tower]]["ln_final"]
            norm_eps = model.config.text.norm_eps
            rows_BLD = layer_norm(rows_BLD, norm["scale"], norm["bias"], norm_eps)
            pooled_BD = captured["ln_final",]
        else:
            last = captured.get(("ln_post",), rows_BLD)
            if last.ndim == 3:
                rows_BLD, last = last, jnp.mean(last[:, leading_rows:], axis=1)
            is_map = isinstance(config, NaFlexConfig) or getattr(config, "pool", "") == "map"
            pooled_BD = captured["attn_pool",] if is_map else last
        rows = (rows_BLD, pooled_BD, *map(block, numbers))
        rows_BLD, pooled_BD, *outputs = (x.astype(jnp.float32) for x in rows)
        is_square = not isinstance(config, NaFlexConfig)
        return TowerStates(rows_BLD, pooled_BD, tuple(outputs), leading_rows, is_square)

    return states


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
