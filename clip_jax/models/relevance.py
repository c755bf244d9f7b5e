"""Where in an image the cosine with a caption comes from.

The measure is gradient-weighted attention (Chefer et al. 2021, arXiv:2103.15679) of the attention
that is computed last: the weight that a head gives a patch, times what the cosine gains as the
weight grows; what lowers the cosine is cut off, and heads are summed. Weights need not be held for
it. A value enters through its weights alone, y = sum_j w_j v_j, so that w_j dc/dw_j =
v_j . dc/dv_j: values and their gradients are enough, whatever computes the attention. The
convolutional towers have no attention; their last feature map, times its gradient, stands for it.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.models.clip import CLIP, CLIPConfig, unit_length
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.fastvit import FastViTConfig
from clip_jax.models.naflex import NaFlexConfig
from clip_jax.models.resnet import ResNetConfig


@runtime_checkable
class RelevanceFn(Protocol):
    """A pure function, which can be jitted."""

    def __call__(
        self, variables: Mapping[str, Any], images_BHWC: Array, z_text_BD: Array
    ) -> Float[Array, "B h w"]:
        """Return what each place of the grid adds to the cosine of each image and its text.

        Args:
          variables: the model's.
          images_BHWC: normalized images.
          z_text_BD: unit features, one for each image.
        """
        ...


def captured_module(config: CLIPConfig) -> tuple[tuple[str, ...], int]:
    """Return the path of the module whose output is captured, and the rows before its patches."""
    vision = config.vision
    if isinstance(vision, ResNetConfig):
        return ("visual", "attnpool", "v_proj"), 1  # the mean of all places
    if isinstance(vision, ConvNetConfig):
        return ("visual", f"bn{len(vision.features)}"), 0
    if isinstance(vision, ConvNeXtConfig | FastViTConfig):
        return ("visual", f"stages_{len(vision.depths) - 1}"), 0
    if isinstance(vision, NaFlexConfig) or vision.pool == "map":
        leading_rows = int(getattr(vision, "class_token", False))
        return ("visual", "attn_pool", "attn", "v_proj"), leading_rows
    if vision.pool == "queries":
        return ("visual", "attn_pool", "v_proj"), int(vision.class_token)
    last = f"resblocks_{vision.layers - 1}"
    return ("visual", "transformer", last, "attn", "v_proj"), int(vision.class_token)


def make_relevance(model: CLIP) -> RelevanceFn:
    """Make the relevance map of a model; its blocks must stand by themselves (`scan` False)."""
    path, leading_rows = captured_module(model.config)
    side = model.config.vision.grid_size

    def forward(
        variables: Mapping[str, Any], images_BHWC: Array, perturbation: Array | None = None
    ) -> tuple[Array, Array]:
        """Return image features, and the captured output before `perturbation` was added to it."""
        captured: list[Array] = []

        def intercept(
            call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
        ) -> Any:
            y = call(*args, **kwargs)
            if context.module.path != path or context.method_name != "__call__":
                return y
            captured.append(y)
            return y if perturbation is None else y + perturbation

        with nn.intercept_methods(intercept):
            z_BD: Any = model.apply(variables, images_BHWC, method="encode_image")
        return z_BD, captured[0]

    def relevance(
        variables: Mapping[str, Any], images_BHWC: Array, z_text_BD: Array
    ) -> Float[Array, "B h w"]:
        output = jax.eval_shape(forward, variables, images_BHWC)[1]

        def sum_of_cosines(perturbation: Array) -> tuple[Array, Array]:
            z_BD, y = forward(variables, images_BHWC, perturbation)
            # Images do not meet, so the sum's gradient is that of each image's own cosine.
            return jnp.sum(unit_length(z_BD) * z_text_BD), y

        zeros = jnp.zeros(output.shape, output.dtype)
        gradient, y = jax.grad(sum_of_cosines, has_aux=True)(zeros)
        gain = jnp.maximum(jnp.sum((y * gradient).astype(jnp.float32), axis=-1), 0)
        batch = gain.shape[0]
        if path[-1] == "v_proj":  # [B, L, N]: a gain for each head
            gain = jnp.sum(gain, axis=-1)[:, leading_rows:]
        return gain.reshape(batch, side, side)

    return relevance
