"""The image towers of timm that open_clip builds its models from, by timm's names, as a table.

Each is as open_clip makes it: with a projection to the shared space, as timm's classifier (with a
bias) or as open_clip's own head. Sources: timm 1.0.31 `models/eva.py`,
`convnext.py`, `fastvit.py`, `vitamin.py`, `vision_transformer.py` and
`vision_transformer_hybrid.py`.
"""

from clip_jax.models.block_form import BlockForm
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.fastvit import FastViTConfig
from clip_jax.models.image_towers import VisionConfig
from clip_jax.models.rotary import RotaryConfig
from clip_jax.models.vit import ViTConfig

# EVA-01 and EVA-02 (Fang et al. 2022, arXiv:2211.07636; Sun et al. 2023, arXiv:2303.15389).
_EVA_FORM = BlockForm(key_bias=False)
_EVA02_E_FORM = BlockForm(norms="behind", key_bias=False)
_EVA02_FORM = BlockForm(mlp="swiglu", inner_norms=True, key_bias=False, rotary=RotaryConfig(16))


def eva(
    image_size: int,
    patch_size: int,
    width: int,
    layers: int,
    heads: int,
    mlp_ratio: float,
    form: BlockForm,
) -> ViTConfig:
    """Return an EVA: no norm before the blocks, which are of a form of their own."""
    return ViTConfig(
        image_size,
        patch_size,
        width,
        layers,
        heads,
        mlp_ratio,
        activation="gelu",
        norm_eps=1e-6,
        pre_norm=False,
        patch_bias=True,
        proj_bias=True,
        form=form,
    )


def pe_core(
    image_size: int,
    patch_size: int,
    width: int,
    layers: int,
    heads: int,
    reference_grid: int,
    *,
    mlp_ratio: float = 4.0,
    class_token: bool = True,
) -> ViTConfig:
    """Return a Perception Encoder (Bolya et al. 2025, arXiv:2504.13181).

    Rotary positions come on top of learned ones, and a MAP head of 8 heads pools all rows.
    """
    rotary = RotaryConfig(reference_grid, 1.0 if class_token else 0.0, "columns first")
    return ViTConfig(
        image_size,
        patch_size,
        width,
        layers,
        heads,
        mlp_ratio,
        activation="gelu",
        pool="map",
        class_token=class_token,
        proj_bias=True,
        pool_heads=8,
        pool_mlp_ratio=4.0,
        form=BlockForm(rotary=rotary),
    )


def vitamin(image_size: int, width: int, layers: int, heads: int, stem: int) -> ViTConfig:
    """Return a ViTamin (Chen et al. 2024, arXiv:2404.02132): convolutions, then a transformer.

    The largest has no learned positions.
    """
    return ViTConfig(
        image_size,
        16,
        width,
        layers,
        heads,
        2.0,
        activation="gelu",
        norm_eps=1e-6,
        pool="average",
        norm_after_pool=True,
        class_token=False,
        pre_norm=False,
        form=BlockForm(mlp="geglu", mlp_norm=True),
        has_positions=width < 1152,
        mbconv_widths=(stem, 2 * stem),
    )


def fastvit_large(depths: tuple[int, ...], width: int) -> FastViTConfig:
    """Return a FastViT of five stages (MobileCLIP 2, Faghri et al. 2025, arXiv:2508.20691)."""
    widths = tuple(width * 2**i for i in range(len(depths)))
    return FastViTConfig(256, depths, widths, 4.0, squeeze_from=len(depths), norm="layer")


TIMM_TOWERS: dict[str, VisionConfig] = {
    "vit_pe_core_tiny_patch16_384": pe_core(384, 16, 192, 12, 3, 24),
    "vit_pe_core_small_patch16_384": pe_core(384, 16, 384, 12, 6, 24),
    "vit_pe_core_base_patch16_224": pe_core(224, 16, 768, 12, 12, 14),
    "vit_pe_core_large_patch14_336": pe_core(336, 14, 1024, 24, 16, 24),
    "vit_pe_core_gigantic_patch14_448": pe_core(
        448, 14, 1536, 50, 16, 32, mlp_ratio=8960 / 1536, class_token=False
    ),
    "eva_giant_patch14_224": eva(224, 14, 1408, 40, 16, 6144 / 1408, _EVA_FORM),
    "eva02_base_patch16_clip_224": eva(224, 16, 768, 12, 12, 4 * 2 / 3, _EVA02_FORM),
    "eva02_large_patch14_clip_224": eva(224, 14, 1024, 24, 16, 4 * 2 / 3, _EVA02_FORM),
    "eva02_large_patch14_clip_336": eva(336, 14, 1024, 24, 16, 4 * 2 / 3, _EVA02_FORM),
    "eva02_enormous_patch14_clip_224": eva(224, 14, 1792, 64, 16, 15360 / 1792, _EVA02_E_FORM),
    "vitamin_small_224": vitamin(224, 384, 14, 6, 64),
    "vitamin_base_224": vitamin(224, 768, 14, 12, 128),
    **{f"vitamin_large_{n}": vitamin(n, 1024, 31, 16, 160) for n in (224, 256, 336, 384)},
    **{f"vitamin_large2_{n}": vitamin(n, 1024, 31, 16, 160) for n in (224, 256, 336, 384)},
    **{f"vitamin_xlarge_{n}": vitamin(n, 1152, 32, 16, 192) for n in (256, 336, 384)},
    # MobileCLIP's: a ViT whose patches are convolved in three stages, and FastViT.
    "vit_base_mci_224": ViTConfig(
        224,
        16,
        768,
        12,
        12,
        activation="gelu",
        norm_eps=1e-6,
        pre_norm=False,
        proj_bias=True,
        patch_stages=(4, 2, 2),
        class_position=False,
    ),
    "vit_large_patch14_clip_224": ViTConfig(
        224, 14, 1024, 24, 16, activation="gelu", proj_bias=True
    ),
    "fastvit_mci0": FastViTConfig(256, (2, 6, 10, 2), (64, 128, 256, 512)),
    "fastvit_mci1": FastViTConfig(256, (4, 12, 20, 4), (64, 128, 256, 512)),
    "fastvit_mci2": FastViTConfig(256, (4, 12, 24, 4), (80, 160, 320, 640)),
    "fastvit_mci3": fastvit_large((2, 12, 24, 4, 2), 96),
    "fastvit_mci4": fastvit_large((2, 12, 24, 4, 4), 128),
    "convnext_tiny": ConvNeXtConfig(224, (3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ConvNeXtConfig(224, (3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ConvNeXtConfig(224, (3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ConvNeXtConfig(224, (3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xlarge": ConvNeXtConfig(224, (3, 3, 27, 3), (256, 512, 1024, 2048)),
    "convnext_xxlarge": ConvNeXtConfig(256, (3, 4, 30, 3), (384, 768, 1536, 3072), norm_eps=1e-5),
}
