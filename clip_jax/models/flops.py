"""Floating-point operations of a model's forward pass, counted by hand.

Matrix products and convolutions only, two operations a multiply-add, as papers and hardware
peaks count them. A training step costs three times its forward pass.
"""

import itertools
from collections.abc import Collection

from clip_jax.models.block_form import BlockForm
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.convnext import HALVING, STEM, ConvNeXtConfig
from clip_jax.models.fastvit import FastViTConfig, fastvit_flops
from clip_jax.models.mbconv import mbconv_flops
from clip_jax.models.naflex import NaFlexConfig
from clip_jax.models.resnet import EXPANSION, ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig


def _blocks(
    length: int,
    width: int,
    mlp_width: int,
    layers: int,
    *,
    pool_last_block: bool,
    form: BlockForm | None = None,
) -> int:
    """Count residual blocks over `length` positions, the last perhaps at the pooled one alone."""
    mlp = (2 if form is None or form.mlp == "plain" else 3) * width * mlp_width
    whole = 2 * length * (4 * width * width + mlp) + 4 * length * length * width
    last = _one_query(length, width, mlp) if pool_last_block else whole
    return (layers - 1) * whole + last


def _one_query(length: int, width: int, mlp: int) -> int:
    """Count attention of one query over `length` positions, and an MLP of `mlp` parameters."""
    # Keys and values everywhere; query, out-projection and MLP once; one row of attention.
    once = 2 * width * width + mlp
    return 2 * (length * 2 * width**2 + once) + 4 * length * width


def _patch_flops(c: ViTConfig) -> int:
    """Count the operations that project all patches, in one convolution or several."""
    if c.mbconv_widths:
        return mbconv_flops(c.image_size, c.mbconv_widths, c.width)
    total, side, fan_in = 0, c.image_size, 3
    sizes = c.patch_stages or (c.patch_size,)
    for i, size in enumerate(sizes):
        side //= size
        width = c.width if i == len(sizes) - 1 else c.width // 4
        total += 2 * side**2 * fan_in * size**2 * width
        fan_in = width
    return total


def _vit(c: ViTConfig, embed_dim: int, num_patches: int | None) -> int:
    """Count the operations of a vision transformer, of which `num_patches` are seen."""
    # All patches are projected before some are left out.
    total = _patch_flops(c)
    patches = c.grid_size**2 if num_patches is None else num_patches
    length = patches + c.class_token
    total += _blocks(
        length,
        c.width,
        c.mlp_width,
        c.layers,
        pool_last_block=c.pool == "token",
        form=c.form,
    )
    if c.pool == "queries":
        # Keys and values of all rows; of the first query what is left.
        total += 4 * length * (c.width + 1) * embed_dim + 4 * embed_dim**2
        return total + 2 * embed_dim**2
    if c.pool == "map":
        total += _one_query(length, c.width, 2 * c.width * c.pool_block.mlp_width)
    return total + 2 * c.width * embed_dim * c.project


def _naflex(c: NaFlexConfig) -> int:
    """Count the operations of a transformer of grids, of an image that has all patches."""
    length, squares = c.max_patches, c.grid_size**2
    total = 2 * length * (3 * c.patch_size**2 + squares) * c.width
    total += _blocks(length, c.width, c.mlp_width, c.layers, pool_last_block=False)
    return total + _one_query(length, c.width, 2 * c.width * c.mlp_width)


def _convnet(c: ConvNetConfig, embed_dim: int) -> int:
    """Count the operations of a convolutional tower."""
    side = c.image_size // c.patch_size
    total = 2 * side**2 * 3 * c.patch_size**2 * c.features[0]
    for fan_in, out in itertools.pairwise(c.features):
        side //= 2
        total += 2 * side**2 * 9 * fan_in * out
    return total + 2 * c.grid_size**2 * c.features[-1] * embed_dim


def _convnext(c: ConvNeXtConfig, embed_dim: int) -> int:
    """Count the operations of a ConvNeXt."""
    side, fan_in = c.image_size // STEM, c.widths[0]
    total = 2 * side**2 * 3 * STEM**2 * fan_in
    for stage, (width, depth) in enumerate(zip(c.widths, c.depths, strict=True)):
        if stage:
            side //= HALVING
            total += 2 * side**2 * HALVING**2 * fan_in * width
        total += depth * 2 * side**2 * (49 * width + 8 * width**2)
        fan_in = width
    hidden = 2 * embed_dim if c.head == "mlp" else 0
    return total + 2 * (fan_in * hidden + (hidden or fan_in) * embed_dim)


def _resnet(c: ResNetConfig, embed_dim: int) -> int:
    """Count the operations of a modified ResNet."""
    side = c.image_size // 2
    half = c.width // 2
    total = 2 * side**2 * 9 * (3 * half + half * half + half * c.width)
    side //= 2
    fan_in = c.width
    for stage, blocks in enumerate(c.layers):
        width = c.width * 2**stage
        out = width * EXPANSION
        for block in range(blocks):
            before = side**2
            if stage > 0 and block == 0:
                side //= 2
            # The stride is a pool behind the 3x3: the first two run at the larger size.
            total += 2 * before * (fan_in * width + 9 * width * width) + 2 * side**2 * width * out
            if block == 0:
                total += 2 * side**2 * fan_in * out
            fan_in = out
    positions = side**2 + 1
    total += 2 * (2 * positions + 1) * fan_in**2 + 4 * positions * fan_in
    return total + 2 * fan_in * embed_dim


def image_flops(config: CLIPConfig, num_patches: int | None = None) -> int:
    """Count the operations that embed one image, of which `num_patches` are seen; None is all."""
    if isinstance(config.vision, ResNetConfig):
        return _resnet(config.vision, config.embed_dim)
    if isinstance(config.vision, ConvNetConfig):
        return _convnet(config.vision, config.embed_dim)
    if isinstance(config.vision, FastViTConfig):
        return fastvit_flops(config.vision, config.embed_dim)
    if isinstance(config.vision, ConvNeXtConfig):
        return _convnext(config.vision, config.embed_dim)
    if isinstance(config.vision, NaFlexConfig):
        return _naflex(config.vision)
    return _vit(config.vision, config.embed_dim, num_patches)


def text_flops(config: CLIPConfig, length: int) -> int:
    """Count the operations that embed one caption of `length` tokens (after trimming)."""
    c: TextConfig = config.text
    length += c.class_token
    is_pooled = c.encoder is None or c.encoder.pool == "first"
    blocks = _blocks(length, c.width, c.mlp_width, c.layers, pool_last_block=is_pooled)
    if c.encoder is not None and c.encoder.projection == "mlp":
        hidden = (c.width + config.embed_dim) // 2
        return blocks + 2 * hidden * (c.width + config.embed_dim)
    return blocks + 2 * c.width * config.embed_dim * c.project


def train_flops_per_pair(
    config: CLIPConfig,
    length: int,
    *,
    num_patches: int | None = None,
    frozen: Collection[str] = (),
    captions: int = 1,
) -> int:
    """Count the operations of a pair's training step; the backward pass is twice the forward.

    What `remat` and micro-batches compute again is not counted: the model needs it no second time.

    Args:
      config: the model.
      length: tokens of the caption (after trimming).
      num_patches: patches of an image that its tower sees; None is all.
      frozen: the towers of which nothing is trained, "image", "text": they have no backward pass.
      captions: the texts of a pair, its negative among them.

    >>> from clip_jax.models.zoo import model_config
    >>> train_flops_per_pair(model_config("ViT-B/32"), 77)
    41343498240
    """
    image, text = image_flops(config, num_patches), text_flops(config, length) * captions
    return image * (1 if "image" in frozen else 3) + text * (1 if "text" in frozen else 3)
