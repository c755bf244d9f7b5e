"""Every model by name: one entry each, as a table to read.

OpenAI's nine models stand under OpenAI's names, then open_clip's native ViT and ResNet and its
SigLIP configurations under open_clip's (`open_clip/model_configs/*.json`, version 3.3).

Two models may differ in their activation alone. `ViT-B/32` is OpenAI's, with QuickGELU;
`ViT-B-32` is open_clip's, with the exact GELU, and `ViT-B-32-quickgelu` the first again. Of the
names both use, `RN50` and its kind, the entry is OpenAI's: so were all published ResNets trained.
Their text tower with the exact GELU, open_clip's JSON of that name, is `RN50-gelu`.
"""

import dataclasses
import difflib
import math

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.text_encoders import TEXT_ENCODERS
from clip_jax.models.timm_towers import TIMM_TOWERS
from clip_jax.models.vit import ViTConfig

# Width, layers, heads, MLP hidden features over the width. The ratios are open_clip's and timm's.
IMAGE_SIZES: dict[str, tuple[int, int, int, float]] = {
    "S": (384, 12, 6, 4.0),
    "M": (512, 12, 8, 4.0),
    "B": (768, 12, 12, 4.0),
    "B-plus": (896, 12, 14, 4.0),
    "L": (1024, 24, 16, 4.0),
    "SO400M": (1152, 27, 16, 3.7362),
    "H": (1280, 32, 16, 4.0),
    "g": (1408, 40, 16, 4.3637),
    "gopt": (1536, 40, 16, 4.0),
    "bigG": (1664, 48, 16, 4.9231),
    "e": (1792, 56, 16, 8.5715),
}

TEXT_256 = TextConfig(256, 10, 4)
TEXT_384 = TextConfig(384, 12, 6)
TEXT_512 = TextConfig(512, 12, 8)
TEXT_640 = TextConfig(640, 12, 10)
TEXT_768 = TextConfig(768, 12, 12)
TEXT_1024 = TextConfig(1024, 12, 16)
TEXT_H = TextConfig(1024, 24, 16)
TEXT_G = TextConfig(1280, 32, 20)
TEXT_E = TextConfig(1280, 36, 20)
TEXT_CONVNEXT_XL = TextConfig(1024, 20, 16)
TEXT_CONVNEXT_D = TextConfig(768, 16, 12)
TEXT_PE_G = TextConfig(1280, 24, 20)

TEXT_XL = TextConfig(1152, 27, 16)
NLLB_600M, NLLB_1B = "facebook/nllb-200-distilled-600M", "facebook/nllb-200-distilled-1.3B"

# MetaCLIP 2's vocabularies: entries and end token.
MT5 = (250_100, 1)
XLM_V = (901_629, 2)

# The text towers of SigLIP, by the size of the image tower.
SIGLIP_TEXT = {
    "B": TextConfig(768, 12, 12),
    "L": TextConfig(1024, 24, 16),
    "SO400M": TextConfig(1152, 27, 16, mlp_ratio=3.7362),
    "gopt": TextConfig(1152, 27, 16, mlp_ratio=3.7362),
}
C4_EN, MC4, GEMMA = 32_000, 250_000, 256_000  # entries of SigLIP's three vocabularies


def vit(size: str, image_size: int, patch_size: int) -> ViTConfig:
    """Return the image tower of CLIP in one of the sizes."""
    width, layers, heads, mlp_ratio = IMAGE_SIZES[size]
    return ViTConfig(image_size, patch_size, width, layers, heads, mlp_ratio)


def clip(
    embed_dim: int, vision: ViTConfig | ResNetConfig, text: TextConfig, activation: str = "gelu"
) -> CLIPConfig:
    """Return CLIP with one activation in both towers (a ResNet has ReLU); open_clip's is GELU."""
    if isinstance(vision, ViTConfig):
        vision = dataclasses.replace(vision, activation=activation)
    return CLIPConfig(embed_dim, vision, dataclasses.replace(text, activation=activation))


def openai(embed_dim: int, vision: ViTConfig | ResNetConfig, text: TextConfig) -> CLIPConfig:
    """Return CLIP with QuickGELU, as OpenAI trained it: open_clip's `quick_gelu`."""
    return clip(embed_dim, vision, text, "quick_gelu")


def worldwide(text: TextConfig, vocabulary: tuple[int, int]) -> TextConfig:
    """Return a text tower with a vocabulary of many languages."""
    vocab_size, eot_id = vocabulary
    return dataclasses.replace(text, vocab_size=vocab_size, eot_id=eot_id)


def clipa(embed_dim: int, vision: ViTConfig, text: TextConfig) -> CLIPConfig:
    """Return a CLIPA (Li et al. 2023): average pooling; short unmasked text, its last row pooled.

    Its ids are those of BERT's vocabulary, whose end token, [SEP], the tokenizer leaves out.
    """
    vision = dataclasses.replace(vision, pool="average", norm_after_pool=True, pre_norm=False)
    text = dataclasses.replace(
        text, context_length=32, vocab_size=32_000, eot_id=102, causal=False, pool="last"
    )
    return clip(embed_dim, vision, text)


def siglip(
    size: str,
    image_size: int,
    patch_size: int,
    vocab_size: int = C4_EN,
    *,
    context_length: int = 64,
    activation: str = "gelu",
    text_activation: str = "gelu",
    project: bool = True,
) -> CLIPConfig:
    """Return a SigLIP (Zhai et al. 2023), as open_clip builds it: timm's image tower, its own text.

    big_vision trained every one with the tanh approximation of GELU, and `transformers` runs them
    so; timm and open_clip use the exact form in some. The entries are open_clip's: a checkpoint's
    own config decides.
    """
    vision = dataclasses.replace(
        vit(size, image_size, patch_size),
        activation=activation,
        norm_eps=1e-6,
        pool="map",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        project=False,
    )
    text = dataclasses.replace(
        SIGLIP_TEXT[size],
        context_length=context_length,
        vocab_size=vocab_size,
        eot_id=1,
        activation=text_activation,
        norm_eps=1e-6,
        causal=False,
        pool="last",
        project=project,
        proj_bias=project,
    )
    # Section 3.2 of the paper: t' = log 10, b = -10.
    return CLIPConfig(vision.width, vision, text, math.log(10), -10.0)


def siglip2(size: str, image_size: int, patch_size: int, activation: str = "gelu") -> CLIPConfig:
    """Return a SigLIP 2 (Tschannen et al. 2025) of a fixed resolution."""
    return siglip(
        size, image_size, patch_size, GEMMA, activation=activation, text_activation="gelu_tanh"
    )


def timm(embed_dim: int, tower: str, text: TextConfig) -> CLIPConfig:
    """Return CLIP with an image tower of timm, and a text tower with the exact GELU."""
    text = dataclasses.replace(text, activation="gelu")
    return CLIPConfig(embed_dim, TIMM_TOWERS[tower], text)


def pe_core(embed_dim: int, tower: str, text: TextConfig, context_length: int = 32) -> CLIPConfig:
    """Return a Perception Encoder (Bolya et al. 2025), whose captions are shorter than CLIP's."""
    text = dataclasses.replace(text, context_length=context_length)
    return timm(embed_dim, f"vit_pe_core_{tower}", text)


def encoder(config: CLIPConfig, name: str) -> CLIPConfig:
    """Return a model with a text encoder of transformers in place of its own text tower."""
    return dataclasses.replace(config, text=TEXT_ENCODERS[name])


def coca(embed_dim: int, vision: ViTConfig, text: TextConfig) -> CLIPConfig:
    """Return the two towers of a CoCa (Yu et al. 2022, arXiv:2205.01917)."""
    vision = dataclasses.replace(vision, pool="queries", pool_heads=8)
    text = dataclasses.replace(text, context_length=76, class_token=True)
    return clip(embed_dim, vision, text)


def mobile(embed_dim: int, tower: str, text: TextConfig) -> CLIPConfig:
    """Return a MobileCLIP (Vasu et al. 2024, arXiv:2311.17049) whose text tower has no mask."""
    return timm(embed_dim, tower, dataclasses.replace(text, causal=False))


def convnext(
    embed_dim: int, image_size: int, size: str, text: TextConfig, head: str = "linear"
) -> CLIPConfig:
    """Return CLIP with a ConvNeXt."""
    config = timm(embed_dim, f"convnext_{size}", text)
    vision = dataclasses.replace(config.vision, image_size=image_size)
    if isinstance(vision, ConvNeXtConfig):
        vision = dataclasses.replace(vision, head=head)
    return dataclasses.replace(config, vision=vision)


RN50 = ResNetConfig(224, (3, 4, 6, 3), 64)
RN101 = ResNetConfig(224, (3, 4, 23, 3), 64)
RN50X4 = ResNetConfig(288, (4, 6, 10, 6), 80)
RN50X16 = ResNetConfig(384, (6, 8, 18, 8), 96)
RN50X64 = ResNetConfig(448, (3, 15, 36, 10), 128)
# ViT-M-16-alt alone has layer scale.
VIT_M_16_ALT = dataclasses.replace(vit("M", 224, 16), layer_scale=1e-4)

MODELS: dict[str, CLIPConfig] = {
    # Sizes of the nine published models: Radford et al. 2021, tables 19 and 20.
    "RN50": openai(1024, RN50, TEXT_512),
    "RN101": openai(512, RN101, TEXT_512),
    "RN50x4": openai(640, RN50X4, TEXT_640),
    "RN50x16": openai(768, RN50X16, TEXT_768),
    "RN50x64": openai(1024, RN50X64, TEXT_1024),
    "ViT-B/32": openai(512, vit("B", 224, 32), TEXT_512),
    "ViT-B/16": openai(512, vit("B", 224, 16), TEXT_512),
    "ViT-L/14": openai(768, vit("L", 224, 14), TEXT_768),
    "ViT-L/14@336px": openai(768, vit("L", 336, 14), TEXT_768),
    # ViT-S (Touvron et al. 2021, DeiT, table 1) with open_clip's text tower of the same width.
    "ViT-S/16": clip(384, vit("S", 224, 16), TEXT_384),
    # For small images on a CPU, such as the embedded emoji.
    "ConvNet-48": CLIPConfig(
        256,
        ConvNetConfig(48, 4, (64, 128, 256)),
        TextConfig(width=128, layers=1, heads=2, context_length=24),
    ),
    # A quarter of its parameters, for distillation.
    "ConvNet-48-S": CLIPConfig(
        64,
        ConvNetConfig(48, 4, (32, 64, 128)),
        TextConfig(width=64, layers=1, heads=1, context_length=24),
    ),
    # One that open_clip and transformers can load when it is exported.
    "ViT-48": CLIPConfig(
        256,
        ViTConfig(48, 8, 128, 2, 2),
        TextConfig(width=128, layers=1, heads=2, context_length=24),
    ),
    # open_clip: ResNet.
    "RN50-quickgelu": openai(1024, RN50, TEXT_512),
    "RN101-quickgelu": openai(512, RN101, TEXT_512),
    "RN50x4-quickgelu": openai(640, RN50X4, TEXT_640),
    "RN50x16-quickgelu": openai(768, RN50X16, TEXT_768),
    "RN50x64-quickgelu": openai(1024, RN50X64, TEXT_1024),
    "RN50-gelu": clip(1024, RN50, TEXT_512),
    "RN101-gelu": clip(512, RN101, TEXT_512),
    "RN50x4-gelu": clip(640, RN50X4, TEXT_640),
    "RN50x16-gelu": clip(768, RN50X16, TEXT_768),
    "RN50x64-gelu": clip(1024, RN50X64, TEXT_1024),
    # open_clip: ViT.
    "ViT-S-32-alt": clip(256, vit("S", 224, 32), TEXT_256),
    "ViT-S-32": clip(384, vit("S", 224, 32), TEXT_384),
    "ViT-S-16-alt": clip(256, vit("S", 224, 16), TEXT_256),
    "ViT-S-16": clip(384, vit("S", 224, 16), TEXT_384),
    "ViT-M-32-alt": clip(384, vit("M", 224, 32), TEXT_384),
    "ViT-M-32": clip(512, vit("M", 224, 32), TEXT_512),
    "ViT-M-16-alt": clip(384, VIT_M_16_ALT, TEXT_384),
    "ViT-M-16": clip(512, vit("M", 224, 16), TEXT_512),
    "ViT-B-32": clip(512, vit("B", 224, 32), TEXT_512),
    "ViT-B-32-quickgelu": openai(512, vit("B", 224, 32), TEXT_512),
    "ViT-B-32-256": clip(512, vit("B", 256, 32), TEXT_512),
    "ViT-B-32-plus-256": clip(640, vit("B-plus", 256, 32), TEXT_640),
    "ViT-B-16": clip(512, vit("B", 224, 16), TEXT_512),
    "ViT-B-16-quickgelu": openai(512, vit("B", 224, 16), TEXT_512),
    "ViT-B-16-plus": clip(640, vit("B-plus", 224, 16), TEXT_640),
    "ViT-B-16-plus-240": clip(640, vit("B-plus", 240, 16), TEXT_640),
    "ViT-L-16": clip(768, vit("L", 224, 16), TEXT_768),
    "ViT-L-16-320": clip(768, vit("L", 320, 16), TEXT_768),
    "ViT-L-14": clip(768, vit("L", 224, 14), TEXT_768),
    "ViT-L-14-quickgelu": openai(768, vit("L", 224, 14), TEXT_768),
    "ViT-L-14-280": clip(768, vit("L", 280, 14), TEXT_768),
    "ViT-L-14-336": clip(768, vit("L", 336, 14), TEXT_768),
    "ViT-L-14-336-quickgelu": openai(768, vit("L", 336, 14), TEXT_768),
    "ViT-H-16": clip(1024, vit("H", 224, 16), TEXT_H),
    "ViT-H-14": clip(1024, vit("H", 224, 14), TEXT_H),
    "ViT-H-14-quickgelu": openai(1024, vit("H", 224, 14), TEXT_H),
    "ViT-H-14-378": clip(1024, vit("H", 378, 14), TEXT_H),
    "ViT-H-14-378-quickgelu": openai(1024, vit("H", 378, 14), TEXT_H),
    "ViT-g-14": clip(1024, vit("g", 224, 14), TEXT_H),
    "ViT-bigG-14": clip(1280, vit("bigG", 224, 14), TEXT_G),
    "ViT-bigG-14-quickgelu": openai(1280, vit("bigG", 224, 14), TEXT_G),
    "ViT-e-14": clip(1280, vit("e", 224, 14), TEXT_E),
    # MetaCLIP 2.
    "ViT-L-14-worldwide": clip(768, vit("L", 224, 14), worldwide(TEXT_768, MT5)),
    "ViT-L-14-worldwide-quickgelu": openai(768, vit("L", 224, 14), worldwide(TEXT_768, MT5)),
    "ViT-H-14-worldwide": clip(1024, vit("H", 224, 14), worldwide(TEXT_H, XLM_V)),
    "ViT-H-14-worldwide-quickgelu": openai(1024, vit("H", 224, 14), worldwide(TEXT_H, XLM_V)),
    "ViT-H-14-worldwide-378": clip(1024, vit("H", 378, 14), worldwide(TEXT_H, XLM_V)),
    "ViT-bigG-14-worldwide": clip(1280, vit("bigG", 224, 14), worldwide(TEXT_G, XLM_V)),
    "ViT-bigG-14-worldwide-378": clip(1280, vit("bigG", 378, 14), worldwide(TEXT_G, XLM_V)),
    # CLIPA.
    "ViT-L-14-CLIPA": clipa(768, vit("L", 224, 14), TEXT_768),
    "ViT-L-14-CLIPA-336": clipa(768, vit("L", 336, 14), TEXT_768),
    "ViT-H-14-CLIPA": clipa(1024, vit("H", 224, 14), TEXT_H),
    "ViT-H-14-CLIPA-336": clipa(1024, vit("H", 336, 14), TEXT_H),
    "ViT-bigG-14-CLIPA": clipa(1280, vit("bigG", 224, 14), TEXT_G),
    "ViT-bigG-14-CLIPA-336": clipa(1280, vit("bigG", 336, 14), TEXT_G),
    # SigLIP.
    "ViT-B-16-SigLIP": siglip("B", 224, 16),
    "ViT-B-16-SigLIP-256": siglip("B", 256, 16),
    "ViT-B-16-SigLIP-384": siglip("B", 384, 16),
    "ViT-B-16-SigLIP-512": siglip("B", 512, 16),
    "ViT-B-16-SigLIP-i18n-256": siglip("B", 256, 16, MC4),
    "ViT-L-16-SigLIP-256": siglip("L", 256, 16),
    "ViT-L-16-SigLIP-384": siglip("L", 384, 16),
    "ViT-SO400M-14-SigLIP": siglip("SO400M", 224, 14, context_length=16),
    "ViT-SO400M-14-SigLIP-378": siglip("SO400M", 378, 14),
    "ViT-SO400M-14-SigLIP-384": siglip("SO400M", 384, 14),
    "ViT-SO400M-16-SigLIP-i18n-256": siglip(
        "SO400M", 256, 16, MC4, activation="gelu_tanh", project=False
    ),
    # SigLIP 2.
    "ViT-B-32-SigLIP2-256": siglip2("B", 256, 32, "gelu_tanh"),
    "ViT-B-16-SigLIP2": siglip2("B", 224, 16),
    "ViT-B-16-SigLIP2-256": siglip2("B", 256, 16),
    "ViT-B-16-SigLIP2-384": siglip2("B", 384, 16),
    "ViT-B-16-SigLIP2-512": siglip2("B", 512, 16),
    "ViT-L-16-SigLIP2-256": siglip2("L", 256, 16),
    "ViT-L-16-SigLIP2-384": siglip2("L", 384, 16),
    "ViT-L-16-SigLIP2-512": siglip2("L", 512, 16, "gelu_tanh"),
    "ViT-SO400M-14-SigLIP2": siglip2("SO400M", 224, 14),
    "ViT-SO400M-14-SigLIP2-378": siglip2("SO400M", 378, 14),
    "ViT-SO400M-16-SigLIP2-256": siglip2("SO400M", 256, 16, "gelu_tanh"),
    "ViT-SO400M-16-SigLIP2-384": siglip2("SO400M", 384, 16, "gelu_tanh"),
    "ViT-SO400M-16-SigLIP2-512": siglip2("SO400M", 512, 16, "gelu_tanh"),
    "ViT-gopt-16-SigLIP2-256": siglip2("gopt", 256, 16, "gelu_tanh"),
    "ViT-gopt-16-SigLIP2-384": siglip2("gopt", 384, 16, "gelu_tanh"),
    # Perception Encoder.
    "PE-Core-T-16-384": pe_core(512, "tiny_patch16_384", TEXT_512),
    "PE-Core-S-16-384": pe_core(512, "small_patch16_384", TEXT_512),
    "PE-Core-B-16": pe_core(1024, "base_patch16_224", TEXT_H),
    "PE-Core-L-14-336": pe_core(1024, "large_patch14_336", TEXT_H),
    "PE-Core-bigG-14-448": pe_core(1280, "gigantic_patch14_448", TEXT_PE_G, 72),
    # EVA.
    "EVA01-g-14": timm(1024, "eva_giant_patch14_224", TEXT_768),
    "EVA01-g-14-plus": timm(1024, "eva_giant_patch14_224", TEXT_H),
    "EVA02-B-16": timm(512, "eva02_base_patch16_clip_224", TEXT_512),
    "EVA02-L-14": timm(768, "eva02_large_patch14_clip_224", TEXT_768),
    "EVA02-L-14-336": timm(768, "eva02_large_patch14_clip_336", TEXT_768),
    "EVA02-E-14": timm(1024, "eva02_enormous_patch14_clip_224", TEXT_H),
    "EVA02-E-14-plus": timm(1024, "eva02_enormous_patch14_clip_224", TEXT_G),
    # MobileCLIP 1 and 2.
    "MobileCLIP-S1": mobile(512, "fastvit_mci1", TEXT_512),
    "MobileCLIP-S2": mobile(512, "fastvit_mci2", TEXT_512),
    "MobileCLIP-B": timm(512, "vit_base_mci_224", TEXT_512),
    "MobileCLIP2-S0": mobile(512, "fastvit_mci0", TEXT_512),
    "MobileCLIP2-S2": mobile(512, "fastvit_mci2", TEXT_512),
    "MobileCLIP2-S3": mobile(768, "fastvit_mci3", TEXT_768),
    "MobileCLIP2-S4": mobile(768, "fastvit_mci4", TEXT_768),
    "MobileCLIP2-B": timm(512, "vit_base_mci_224", TEXT_512),
    "MobileCLIP2-L-14": mobile(768, "vit_large_patch14_clip_224", TEXT_768),
    # ViTamin.
    "ViTamin-S": timm(384, "vitamin_small_224", TEXT_384),
    "ViTamin-S-LTT": timm(768, "vitamin_small_224", TEXT_768),
    "ViTamin-B": timm(512, "vitamin_base_224", TEXT_512),
    "ViTamin-B-LTT": timm(768, "vitamin_base_224", TEXT_768),
    "ViTamin-L": timm(768, "vitamin_large_224", TEXT_768),
    "ViTamin-L-256": timm(768, "vitamin_large_256", TEXT_768),
    "ViTamin-L-336": timm(768, "vitamin_large_336", TEXT_768),
    "ViTamin-L-384": timm(768, "vitamin_large_384", TEXT_768),
    "ViTamin-L2": timm(1024, "vitamin_large2_224", TEXT_H),
    "ViTamin-L2-256": timm(1024, "vitamin_large2_256", TEXT_H),
    "ViTamin-L2-336": timm(1024, "vitamin_large2_336", TEXT_H),
    "ViTamin-L2-384": timm(1024, "vitamin_large2_384", TEXT_H),
    "ViTamin-XL-256": timm(1152, "vitamin_xlarge_256", TEXT_XL),
    "ViTamin-XL-336": timm(1152, "vitamin_xlarge_336", TEXT_XL),
    "ViTamin-XL-384": timm(1152, "vitamin_xlarge_384", TEXT_XL),
    # Text encoders of transformers.
    "roberta-ViT-B-32": encoder(openai(512, vit("B", 224, 32), TEXT_512), "roberta-base"),
    "xlm-roberta-base-ViT-B-32": encoder(
        clip(512, vit("B", 224, 32), TEXT_512), "xlm-roberta-base"
    ),
    "xlm-roberta-large-ViT-H-14": encoder(
        clip(1024, vit("H", 224, 14), TEXT_H), "xlm-roberta-large"
    ),
    "nllb-clip-base": encoder(clip(512, vit("B", 224, 32), TEXT_512), NLLB_600M),
    "nllb-clip-large": encoder(clip(1024, vit("H", 224, 14), TEXT_H), NLLB_1B),
    "nllb-clip-base-siglip": encoder(siglip("B", 384, 16), NLLB_600M),
    "nllb-clip-large-siglip": encoder(siglip("SO400M", 384, 14), NLLB_1B),
    # CoCa, without its captioner.
    "coca_ViT-B-32": coca(512, vit("B", 224, 32), TEXT_512),
    "coca_ViT-L-14": coca(768, vit("L", 224, 14), TEXT_768),
    # ConvNeXt.
    "convnext_tiny": convnext(1024, 224, "tiny", TEXT_512),
    "convnext_small": convnext(512, 224, "small", TEXT_512),
    "convnext_base": convnext(512, 224, "base", TEXT_512),
    "convnext_base_w": convnext(640, 256, "base", TEXT_640),
    "convnext_base_w_320": convnext(640, 320, "base", TEXT_640),
    "convnext_large": convnext(768, 224, "large", TEXT_768),
    "convnext_large_d": convnext(768, 256, "large", TEXT_CONVNEXT_D, "mlp"),
    "convnext_large_d_320": convnext(768, 320, "large", TEXT_CONVNEXT_D, "mlp"),
    "convnext_xlarge": convnext(1024, 256, "xlarge", TEXT_CONVNEXT_XL),
    "convnext_xxlarge": convnext(1024, 256, "xxlarge", TEXT_H),
    "convnext_xxlarge_320": convnext(1024, 320, "xxlarge", TEXT_H),
}

UNSUPPORTED_FAMILIES: dict[str, str] = {
    "coca": "CoCa of other towers than ViT-B-32's and ViT-L-14's",
    "swin": "Swin image towers",
    "vit_": "image towers of timm by their own names",
    "mt5": "mT5 text towers of Hugging Face",
}
"""open_clip's other families: the start of their names, and what they are."""


def unsupported_reason(name: str) -> str | None:
    """Return in one line why a model of open_clip's is not in the zoo; None for any other name."""
    if name in MODELS:
        return None
    for prefix, family in UNSUPPORTED_FAMILIES.items():
        if name.lower().startswith(prefix.lower()):
            return f"{name} is of a family that is not supported: {family}"
    return None


def list_models() -> list[str]:
    """Return the names that `model_config` knows."""
    return list(MODELS)


def model_config(name: str) -> CLIPConfig:
    """Return the sizes of a model by its name.

    >>> model_config("ViT-B/32").embed_dim
    512

    Raises:
      UserError: no model has that name.
    """
    if name in MODELS:
        return MODELS[name]
    reason = unsupported_reason(name)
    if reason is None:
        by_lower = {known.lower(): known for known in MODELS}
        near = [by_lower[n] for n in difflib.get_close_matches(name.lower(), by_lower, n=4)]
        nearest = f"; the nearest are {', '.join(near)}" if near else ""
        reason = f"no model is called {name!r}{nearest}; list_models() has all {len(MODELS)}"
    raise UserError(reason)
