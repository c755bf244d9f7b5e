"""Define what SigLIP's models have in common, wherever their sizes are read."""

import math

from clip_jax.models.vit import ViTConfig

SIGLIP_LOGIT_SCALE = math.log(10.0)  # at the start (Zhai et al. 2023, section 3.2)


def siglip_vit(
    image_size: int,
    patch_size: int,
    width: int,
    layers: int,
    heads: int,
    *,
    mlp_ratio: float,
    activation: str,
    norm_eps: float = 1e-6,
) -> ViTConfig:
    """Return SigLIP's image tower of these sizes, `image_size` and `patch_size` in pixels."""
    return ViTConfig(
        image_size,
        patch_size,
        width,
        layers,
        heads,
        mlp_ratio=mlp_ratio,
        activation=activation,
        norm_eps=norm_eps,
        pool="map",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        project=False,
    )
