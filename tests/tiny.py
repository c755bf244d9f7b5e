"""Models small enough for tests."""

import dataclasses

from clip_jax.models.clip import CLIPConfig
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

TEXT = TextConfig(width=32, layers=3, heads=4, context_length=24, vocab_size=64, eot_id=63)
VIT = CLIPConfig(16, ViTConfig(image_size=32, patch_size=8, width=48, layers=3, heads=4), TEXT)
SHALLOW = dataclasses.replace(
    VIT,
    vision=dataclasses.replace(VIT.vision, layers=2),
    text=dataclasses.replace(TEXT, layers=2),
)
"""The same with a block that keeps all rows and a last one: whole steps compile sooner."""
ONE_LAYER = dataclasses.replace(
    VIT,
    vision=dataclasses.replace(VIT.vision, layers=1),
    text=dataclasses.replace(TEXT, layers=1, context_length=16),
)
"""For whole runs, where the last block alone will do."""
RESNET = CLIPConfig(16, ResNetConfig(image_size=64, layers=(1, 1, 1, 1), width=8), TEXT)
CONVNET = CLIPConfig(16, ConvNetConfig(image_size=32, patch_size=4, features=(16, 32)), TEXT)
# CLIPA: no ln_pre, the mean of the patches, text that sees its padding and is pooled at its end.
CLIPA = CLIPConfig(
    16,
    dataclasses.replace(
        VIT.vision,
        layers=2,
        activation="gelu",
        pool="average",
        norm_after_pool=True,
        pre_norm=False,
    ),
    dataclasses.replace(TEXT, layers=2, activation="gelu", causal=False, pool="last"),
)
# SigLIP: patches alone and their attention pool, no projection of the image, one with a bias of the
# text; here with layer scale as well, which open_clip's ViT-M-16-alt has.
SIGLIP = CLIPConfig(
    48,
    ViTConfig(
        image_size=33,
        patch_size=8,
        width=48,
        layers=2,
        heads=4,
        mlp_ratio=3.7362,
        activation="gelu_tanh",
        norm_eps=1e-6,
        pool="map",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        layer_scale=0.1,
        project=False,
    ),
    dataclasses.replace(
        TEXT,
        layers=2,
        activation="gelu_tanh",
        norm_eps=1e-6,
        causal=False,
        pool="last",
        proj_bias=True,
    ),
    init_logit_bias=-10.0,
)
TINY = {"vit": VIT, "resnet": RESNET, "convnet": CONVNET, "clipa": CLIPA, "siglip": SIGLIP}
