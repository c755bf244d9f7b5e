"""Contrastive losses by name: `make_loss(...) -> LossFn`."""

import functools
from typing import Protocol, runtime_checkable

from jax.sharding import Mesh
from jaxtyping import Array, UInt

from clip_jax.errors import UserError, check_choice
from clip_jax.losses.dense import LossOutput, Negatives, sigmoid_loss, softmax_loss
from clip_jax.losses.tiled import SIGMOID, SOFTMAX, choose_tiling, make_tiled_loss
from clip_jax.typing import Features, Rows, Scalar

__all__ = ["FORMS", "LOSSES", "LossFn", "LossOutput", "Negatives", "make_loss"]

LOSSES = {"softmax": (softmax_loss, SOFTMAX), "sigmoid": (sigmoid_loss, SIGMOID)}
"""By name: the dense definition, and what the walk over tiles needs of the loss."""
FORMS = ("tiled", "dense")
"""The walk over tiles, and the definition."""


@runtime_checkable
class LossFn(Protocol):
    """A loss over the global batch; call it under `jax.jit`, and take gradients outside."""

    def __call__(
        self,
        z_image_BD: Features,
        z_text_BD: Features,
        scale: Scalar,
        bias: Scalar,
        valid_B: Rows,
        caption_id_B: UInt[Array, " B"],
        negatives: Negatives | None = None,
    ) -> LossOutput:
        """Return the loss of unit features and its in-batch accuracies.

        Args:
          z_image_BD, z_text_BD: unit length, float32 or bfloat16; row i of one belongs to row i
            of the other.
          scale: exp(logit_scale), the multiplier of the cosines.
          bias: added to the logits by the sigmoid loss; the softmax loss ignores it (pass 0).
          valid_B: False leaves a row out on both sides and out of the mean.
          caption_id_B: uint32, equal for equal captions; unused unless equal captions are masked.
          negatives: as many more texts as there are rows, negatives of every image.
        """
        ...


def make_loss(
    name: str,
    *,
    mesh: Mesh,
    batch_axes: tuple[str, ...],
    platform: str,
    tile_size: int,
    mask_equal_captions: bool,
    form: str = "tiled",
) -> LossFn:
    """Make a loss function by its name.

    Args:
      name: "softmax" (InfoNCE, CLIP) or "sigmoid" (SigLIP).
      mesh: the devices; rows are sharded over `batch_axes`, further axes hold copies.
      batch_axes: mesh axes whose product shards the batch, in the order of its PartitionSpec.
      platform: of the devices that the program is traced for; the tile rule's.
      tile_size: most rows and most columns of the logits at a time. The batch is split into as few
        tiles as this allows, all of one size: a device's largest temporary is [tile, tile],
        float32. 0 chooses by the batch and the devices: `tiled.choose_tiling`.
      mask_equal_captions: two pairs with one caption are no negatives of each other.
      form: "tiled", or "dense" for the definition, which builds the whole matrix.

    Raises:
      UserError: an unknown name, form or axis, or a negative tile size.
    """
    check_choice("the loss", name, LOSSES)
    check_choice("the form of the loss", form, FORMS)
    missing = [axis for axis in batch_axes if axis not in mesh.axis_names]
    if missing:
        raise UserError(
            f"the loss's batch axes {missing} are not in the mesh {dict(mesh.shape)}: "
            "name axes of the mesh"
        )
    if tile_size < 0:
        raise UserError(f"the loss's tile_size is {tile_size}: take 1 or more, or 0 for the rule")

    dense, tile_loss = LOSSES[name]
    tiling_rule = functools.partial(choose_tiling, tile_size=tile_size)
    tiled = make_tiled_loss(
        tile_loss, mesh=mesh, batch_axes=batch_axes, platform=platform, tiling_rule=tiling_rule
    )

    def loss_fn(
        z_image_BD, z_text_BD, scale, bias, valid_B, caption_id_B, negatives=None
    ) -> LossOutput:
        ids = caption_id_B if mask_equal_captions else None
        if form == "dense":
            rows = {"valid_B": valid_B, "caption_id_B": ids, "negatives": negatives}
            return dense(z_image_BD, z_text_BD, scale, bias, **rows)
        return tiled(z_image_BD, z_text_BD, scale, bias, valid_B, ids, negatives)

    return loss_fn
