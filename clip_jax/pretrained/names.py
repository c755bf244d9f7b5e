"""Name the arrays of each format and how it lays them out, in tables that read both ways.

A row is (path, key, kind). The path is a regular expression over the place of a module in the
parameter tree, the key its replacement: the module's name in the file. The kind says which arrays
a module has, how their names end on either side, and how the file lays them out. The parameter
tree decides which rows apply: each of its arrays must match a row, and so have its place in the
file.

Sources: openai/CLIP `clip/model.py`; open_clip 3.3 `transformer.py`, `modified_resnet.py` and, for
timm's towers, timm's `vision_transformer.py`, `eva.py`, `convnext.py`, `fastvit.py` and
`vitamin.py`; transformers `modeling_clip.py`, `modeling_siglip.py`, `modeling_siglip2.py`,
`modeling_roberta.py` and `modeling_m2m_100.py`; big_vision `models/vit.py` and
`models/proj/image_text/text_transformer.py`.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from clip_jax.errors import UserError

Rows = Sequence[tuple[str, str, str]]


class Place(NamedTuple):
    """The place of one array of the parameter tree in a file.

    Attributes:
      key: the file's name for the array that it is, or is part of.
      layout: how the file lays it out, a key of `layouts.LAYOUTS`.
      part, parts: the file's array holds `parts` equal pieces one after the other; this is number
        `part`.
    """

    key: str
    layout: str
    part: int = 0
    parts: int = 1


# kind -> the tree's name of an array: (what the file adds to the module's name, layout)
_TORCH_BIAS = {"bias": (".bias", "same")}
KINDS: dict[str, dict[str, tuple[str, str]]] = {
    "array": {"": ("", "same")},
    "matrix": {"": (".weight", "linear")},
    "bias": {"": (".bias", "same")},
    "embedding": {"embedding": (".weight", "same")},
    "table": {"": (".weight", "same")},
    "norm": {"scale": (".weight", "same"), **_TORCH_BIAS},
    "batch_norm": {
        "scale": (".weight", "same"),
        **_TORCH_BIAS,
        "mean": (".running_mean", "same"),
        "var": (".running_var", "same"),
    },
    "linear": {"kernel": (".weight", "linear"), **_TORCH_BIAS},
    "conv": {"kernel": (".weight", "conv"), **_TORCH_BIAS},
    # A convolution of patches as a Linear.
    "patches": {"kernel": (".weight", "patches"), **_TORCH_BIAS},
    # Convolutions of single places, which are matrices here, and gains of channels.
    "pointwise": {"kernel": (".weight", "pointwise"), **_TORCH_BIAS},
    "gain": {"gamma": (".gamma", "gain")},
    "heads": {"kernel": (".weight", "heads"), "bias": (".bias", "heads_bias")},
    "heads_bias": {"bias": ("", "heads_bias")},
    "heads_kernel": {"kernel": ("_weight", "heads")},
    "fused_bias": {"bias": ("_bias", "heads_bias")},
    "out": {"kernel": (".weight", "heads_out"), **_TORCH_BIAS},
    # torch.nn.MultiheadAttention keeps query, key and value in one array each.
    "fused": {"kernel": ("_weight", "heads"), "bias": ("_bias", "heads_bias")},
    "fused_linear": {"kernel": (".weight", "heads"), "bias": (".bias", "heads_bias")},
    "fused_kernel": {"kernel": (".weight", "heads")},
    "flax": {
        "kernel": ("/kernel", "same"),
        "bias": ("/bias", "same"),
        "scale": ("/scale", "same"),
        "embedding": ("/embedding", "same"),
    },
}
# kind of a fused module -> which of the letters q, k, v its array holds, in order
FUSED = {
    "fused": "qkv",
    "fused_linear": "qkv",
    "fused_kernel": "qkv",
    "fused_bias": "qkv",
    "fused_kv": "kv",
}
KINDS["fused_kv"] = KINDS["fused_linear"]


def _block(path: str, key: str) -> Rows:
    """Return the rows of a residual block under OpenAI's names."""
    return [
        (rf"{path}/(ln_[12])", rf"{key}.\2", "norm"),
        (rf"{path}/attn/[qkv]_proj", rf"{key}.attn.in_proj", "fused"),
        (rf"{path}/attn/out_proj", rf"{key}.attn.out_proj", "out"),
        (rf"{path}/mlp/(c_fc|c_proj)", rf"{key}.mlp.\2", "linear"),
        (rf"{path}/(ls_[12])/gamma", rf"{key}.\2.gamma", "array"),
    ]


def _block_timm(path: str, key: str) -> Rows:
    return [
        (rf"{path}/ln_([12])", rf"{key}.norm\2", "norm"),
        (rf"{path}/attn/[qkv]_proj", rf"{key}.attn.qkv", "fused_linear"),
        (rf"{path}/attn/out_proj", rf"{key}.attn.proj", "out"),
        (rf"{path}/mlp/c_fc", rf"{key}.mlp.fc1", "linear"),
        (rf"{path}/mlp/c_proj", rf"{key}.mlp.fc2", "linear"),
    ]


def _block_eva(path: str, key: str) -> Rows:
    """Return the rows of EVA-01's blocks and EVA-02's largest, whose keys have no bias."""
    return [
        (rf"{path}/attn/[qkv]_proj", rf"{key}.attn.qkv", "fused_kernel"),
        (rf"{path}/attn/([qv])_proj", rf"{key}.attn.\2_bias", "heads_bias"),
        *_block_timm(path, key),
    ]


def _block_eva02(path: str, key: str) -> Rows:
    """Return the rows of EVA-02's blocks, with a gated MLP and norms inside the branches."""
    return [
        (rf"{path}/attn/([qkv]_proj)", rf"{key}.attn.\2", "heads"),
        (rf"{path}/attn/ln", rf"{key}.attn.norm", "norm"),
        (rf"{path}/mlp/c_gate", rf"{key}.mlp.fc1_g", "linear"),
        (rf"{path}/mlp/c_fc", rf"{key}.mlp.fc1_x", "linear"),
        (rf"{path}/mlp/ln", rf"{key}.mlp.norm", "norm"),
        *_block_timm(path, key),
    ]


def _block_hf(path: str, key: str) -> Rows:
    return [
        (rf"{path}/ln_([12])", rf"{key}.layer_norm\2", "norm"),
        (rf"{path}/attn/([qkv]_proj)", rf"{key}.self_attn.\2", "heads"),
        (rf"{path}/attn/out_proj", rf"{key}.self_attn.out_proj", "out"),
        (rf"{path}/mlp/c_fc", rf"{key}.mlp.fc1", "linear"),
        (rf"{path}/mlp/c_proj", rf"{key}.mlp.fc2", "linear"),
    ]


def _block_flax(path: str, key: str) -> Rows:
    attention = f"{key}/MultiHeadDotProductAttention_0"
    return [
        (rf"{path}/ln_1", f"{key}/LayerNorm_0", "flax"),
        (rf"{path}/ln_2", f"{key}/LayerNorm_1", "flax"),
        (rf"{path}/attn/q_proj", f"{attention}/query", "flax"),
        (rf"{path}/attn/k_proj", f"{attention}/key", "flax"),
        (rf"{path}/attn/v_proj", f"{attention}/value", "flax"),
        (rf"{path}/attn/out_proj", f"{attention}/out", "flax"),
        (rf"{path}/mlp/c_fc", f"{key}/MlpBlock_0/Dense_0", "flax"),
        (rf"{path}/mlp/c_proj", f"{key}/MlpBlock_0/Dense_1", "flax"),
    ]


VISION_BLOCK = r"visual/transformer/resblocks_(\d+)"
TEXT_BLOCK = r"text/transformer/resblocks_(\d+)"

_OPENAI_VISION: Rows = [
    *_block(VISION_BLOCK, r"visual.transformer.resblocks.\1"),
    (r"visual/(class_embedding|positional_embedding|proj)", r"visual.\1", "array"),
    (r"visual/conv1", "visual.conv1", "conv"),
    (r"visual/(ln_pre|ln_post)", r"visual.\1", "norm"),
    # CoCa's attentional pooler, whose keys are wider than its queries.
    (r"visual/attn_pool/query", "visual.attn_pool.query", "array"),
    (r"visual/attn_pool/(ln_[qk])", r"visual.attn_pool.\1", "norm"),
    (r"visual/attn_pool/([qkv]_proj)", r"visual.attn_pool.attn.\1", "heads_kernel"),
    (r"visual/attn_pool/[qkv]_proj", "visual.attn_pool.attn.in_proj", "fused_bias"),
    (r"visual/attn_pool/out_proj", "visual.attn_pool.attn.out_proj", "out"),
]
_RESNET: Rows = [
    (r"visual/(conv[123])", r"visual.\1", "conv"),
    (r"visual/(bn[123])", r"visual.\1", "batch_norm"),
    (r"visual/(layer\d)_(\d+)/(conv[123])", r"visual.\1.\2.\3", "conv"),
    (r"visual/(layer\d)_(\d+)/(bn[123])", r"visual.\1.\2.\3", "batch_norm"),
    (r"visual/(layer\d)_(\d+)/downsample_0", r"visual.\1.\2.downsample.0", "conv"),
    (r"visual/(layer\d)_(\d+)/downsample_1", r"visual.\1.\2.downsample.1", "batch_norm"),
    (r"visual/attnpool/positional_embedding", "visual.attnpool.positional_embedding", "array"),
    (r"visual/attnpool/([qkv]_proj)", r"visual.attnpool.\1", "heads"),
    (r"visual/attnpool/c_proj", "visual.attnpool.c_proj", "out"),
]
_TIMM_PARTS: Rows = [
    (r"visual/class_embedding", "visual.trunk.cls_token", "array"),
    (r"visual/positional_embedding", "visual.trunk.pos_embed", "array"),
    (r"visual/conv1", "visual.trunk.patch_embed.proj", "conv"),
    (r"visual/stem_(\d)", r"visual.trunk.patch_embed.backbone.\1.conv", "conv"),
    (r"visual/ln_pre", "visual.trunk.norm_pre", "norm"),
    (r"visual/ln_post", "visual.trunk.norm", "norm"),
    (r"visual/proj", "visual.trunk.head", "matrix"),
    (r"visual/proj_bias", "visual.trunk.head", "bias"),
    (r"visual/attn_pool/probe", "visual.trunk.attn_pool.latent", "array"),
    (r"visual/attn_pool/attn/q_proj", "visual.trunk.attn_pool.q", "heads"),
    (r"visual/attn_pool/attn/[kv]_proj", "visual.trunk.attn_pool.kv", "fused_kv"),
    (r"visual/attn_pool/attn/out_proj", "visual.trunk.attn_pool.proj", "out"),
    (r"visual/attn_pool/ln", "visual.trunk.attn_pool.norm", "norm"),
    (r"visual/attn_pool/mlp/c_fc", "visual.trunk.attn_pool.mlp.fc1", "linear"),
    (r"visual/attn_pool/mlp/c_proj", "visual.trunk.attn_pool.mlp.fc2", "linear"),
]
_CONVNEXT_BLOCK = r"visual.trunk.stages.\1.blocks.\2"
_CONVNEXT: Rows = [
    (r"visual/stem_conv", "visual.trunk.stem.0", "conv"),
    (r"visual/stem_ln", "visual.trunk.stem.1", "norm"),
    (r"visual/stages_(\d+)/downsample_ln", r"visual.trunk.stages.\1.downsample.0", "norm"),
    (r"visual/stages_(\d+)/downsample_conv", r"visual.trunk.stages.\1.downsample.1", "conv"),
    (r"visual/stages_(\d+)/blocks_(\d+)/conv_dw", f"{_CONVNEXT_BLOCK}.conv_dw", "conv"),
    (r"visual/stages_(\d+)/blocks_(\d+)/ln", f"{_CONVNEXT_BLOCK}.norm", "norm"),
    (r"visual/stages_(\d+)/blocks_(\d+)/mlp/c_fc", f"{_CONVNEXT_BLOCK}.mlp.fc1", "linear"),
    (r"visual/stages_(\d+)/blocks_(\d+)/mlp/c_proj", f"{_CONVNEXT_BLOCK}.mlp.fc2", "linear"),
    (r"visual/stages_(\d+)/blocks_(\d+)/ls/gamma", f"{_CONVNEXT_BLOCK}.gamma", "array"),
    (r"visual/ln_post", "visual.trunk.head.norm", "norm"),
]
_FASTVIT_STAGE, _FASTVIT_BLOCK = r"visual/stages_(\d+)", r"visual/stages_(\d+)/blocks_(\d+)"
_FASTVIT_DOWN = r"visual.trunk.stages.\1.downsample.proj"
_FASTVIT_KEY = r"visual.trunk.stages.\1.blocks.\2"
# As `reparameterize` leaves them.
_FASTVIT: Rows = [
    (r"visual/stem_([01])", r"visual.trunk.stem.\1.reparam_conv", "conv"),
    (r"visual/stem_2", r"visual.trunk.stem.2.reparam_conv", "pointwise"),
    (f"{_FASTVIT_STAGE}/down_conv", f"{_FASTVIT_DOWN}.0.reparam_conv", "conv"),
    (f"{_FASTVIT_STAGE}/down_se/(fc[12])", rf"{_FASTVIT_DOWN}.0.se.\2", "pointwise"),
    (f"{_FASTVIT_STAGE}/down_proj", f"{_FASTVIT_DOWN}.1.reparam_conv", "pointwise"),
    (f"{_FASTVIT_STAGE}/pos_conv", r"visual.trunk.stages.\1.pos_emb.reparam_conv", "conv"),
    (f"{_FASTVIT_BLOCK}/mix_conv", f"{_FASTVIT_KEY}.token_mixer.reparam_conv", "conv"),
    (f"{_FASTVIT_BLOCK}/mlp_conv", f"{_FASTVIT_KEY}.mlp.conv.conv", "conv"),
    (f"{_FASTVIT_BLOCK}/mlp/c_fc", f"{_FASTVIT_KEY}.mlp.fc1", "pointwise"),
    (f"{_FASTVIT_BLOCK}/mlp/c_proj", f"{_FASTVIT_KEY}.mlp.fc2", "pointwise"),
    (f"{_FASTVIT_BLOCK}/ln", f"{_FASTVIT_KEY}.norm", "norm"),
    (f"{_FASTVIT_BLOCK}/attn/[qkv]_proj", f"{_FASTVIT_KEY}.token_mixer.qkv", "fused_kernel"),
    (f"{_FASTVIT_BLOCK}/attn/out_proj", f"{_FASTVIT_KEY}.token_mixer.proj", "out"),
    (f"{_FASTVIT_BLOCK}/ls", f"{_FASTVIT_KEY}.layer_scale", "gain"),
    (f"{_FASTVIT_BLOCK}/ls(_[12])", rf"{_FASTVIT_KEY}.layer_scale\3", "gain"),
    (r"visual/final_conv", "visual.trunk.final_conv.reparam_conv", "conv"),
    (r"visual/final_se/(fc[12])", r"visual.trunk.final_conv.se.\1", "pointwise"),
    (r"visual/proj", "visual.trunk.head.fc", "matrix"),
    (r"visual/proj_bias", "visual.trunk.head.fc", "bias"),
]
# open_clip's own head behind a tower of timm: a matrix, or an MLP.
_HEAD_LINEAR: Rows = [(r"visual/proj", "visual.head.proj", "matrix")]
_HEAD_MLP: Rows = [
    (r"visual/head_fc", "visual.head.mlp.fc1", "linear"),
    (r"visual/proj", "visual.head.mlp.fc2", "matrix"),
]
_VITAMIN_STAGE = r"visual/mbconv/stages_(\d)_(\d)"
_VITAMIN_KEY = r"visual.trunk.patch_embed.backbone.stages.\1.\2"
_VITAMIN: Rows = [
    (rf"{VISION_BLOCK}/mlp/c_gate", r"visual.trunk.blocks.\1.mlp.w0", "linear"),
    (rf"{VISION_BLOCK}/mlp/c_fc", r"visual.trunk.blocks.\1.mlp.w1", "linear"),
    (rf"{VISION_BLOCK}/mlp/c_proj", r"visual.trunk.blocks.\1.mlp.w2", "linear"),
    (rf"{VISION_BLOCK}/ln_mlp", r"visual.trunk.blocks.\1.mlp.norm", "norm"),
    *_block_timm(VISION_BLOCK, r"visual.trunk.blocks.\1"),
    (r"visual/mbconv/(conv[12])", r"visual.trunk.patch_embed.backbone.stem.\1", "conv"),
    (r"visual/mbconv/ln_1", "visual.trunk.patch_embed.backbone.stem.norm1", "norm"),
    (f"{_VITAMIN_STAGE}/ln", f"{_VITAMIN_KEY}.pre_norm", "norm"),
    (f"{_VITAMIN_STAGE}/expand", f"{_VITAMIN_KEY}.conv1_1x1", "pointwise"),
    (f"{_VITAMIN_STAGE}/conv_dw", f"{_VITAMIN_KEY}.conv2_kxk", "conv"),
    (f"{_VITAMIN_STAGE}/project", f"{_VITAMIN_KEY}.conv3_1x1", "pointwise"),
    (f"{_VITAMIN_STAGE}/shortcut", f"{_VITAMIN_KEY}.shortcut.expand", "pointwise"),
    (r"visual/mbconv/ln_2", "visual.trunk.patch_embed.backbone.pool.norm", "norm"),
    (r"visual/mbconv/conv3", "visual.trunk.patch_embed.backbone.pool.proj", "conv"),
    (r"visual/positional_embedding", "visual.trunk.pos_embed", "array"),
    (r"visual/ln_post", "visual.trunk.fc_norm", "norm"),
    *_HEAD_LINEAR,
]
_TRUNK_BLOCK = r"visual.trunk.blocks.\1"
_TIMM_VIT: Rows = [*_block_timm(VISION_BLOCK, _TRUNK_BLOCK), *_TIMM_PARTS]
_TIMM_EVA: Rows = [*_block_eva(VISION_BLOCK, _TRUNK_BLOCK), *_TIMM_PARTS]
_TIMM_EVA02: Rows = [*_block_eva02(VISION_BLOCK, _TRUNK_BLOCK), *_TIMM_PARTS]


def _openai_text(prefix: str, projection: Rows) -> Rows:
    return [
        *_block(TEXT_BLOCK, rf"{prefix}transformer.resblocks.\1"),
        (r"text/positional_embedding", f"{prefix}positional_embedding", "array"),
        (r"text/token_embedding", f"{prefix}token_embedding", "embedding"),
        (r"text/ln_final", f"{prefix}ln_final", "norm"),
        *projection,
    ]


_SCALARS: Rows = [(r"(logit_scale|logit_bias)", r"\1", "array")]
_FLAT_TEXT = _openai_text("", [(r"text/text_projection", "text_projection", "array")])
_NESTED_TEXT = _openai_text("text.", [(r"text/text_projection", "text.text_projection", "array")])
# With a bias the projection is a Linear, its matrix transposed.
_LINEAR_TEXT = _openai_text(
    "text.",
    [
        (r"text/text_projection", "text.text_projection", "matrix"),
        (r"text/text_projection_bias", "text.text_projection", "bias"),
    ],
)
_ROBERTA_KEY = r"text.transformer.encoder.layer.\1"
_ROBERTA_EMBED = "text.transformer.embeddings"
_ROBERTA: Rows = [
    (f"{TEXT_BLOCK}/attn/q_proj", f"{_ROBERTA_KEY}.attention.self.query", "heads"),
    (f"{TEXT_BLOCK}/attn/k_proj", f"{_ROBERTA_KEY}.attention.self.key", "heads"),
    (f"{TEXT_BLOCK}/attn/v_proj", f"{_ROBERTA_KEY}.attention.self.value", "heads"),
    (f"{TEXT_BLOCK}/attn/out_proj", f"{_ROBERTA_KEY}.attention.output.dense", "out"),
    (f"{TEXT_BLOCK}/ln_1", f"{_ROBERTA_KEY}.attention.output.LayerNorm", "norm"),
    (f"{TEXT_BLOCK}/mlp/c_fc", f"{_ROBERTA_KEY}.intermediate.dense", "linear"),
    (f"{TEXT_BLOCK}/mlp/c_proj", f"{_ROBERTA_KEY}.output.dense", "linear"),
    (f"{TEXT_BLOCK}/ln_2", f"{_ROBERTA_KEY}.output.LayerNorm", "norm"),
    (r"text/token_embedding", f"{_ROBERTA_EMBED}.word_embeddings", "embedding"),
    (r"text/positional_embedding", f"{_ROBERTA_EMBED}.position_embeddings", "table"),
    (r"text/token_type_embedding", f"{_ROBERTA_EMBED}.token_type_embeddings", "table"),
    (r"text/ln_embed", f"{_ROBERTA_EMBED}.LayerNorm", "norm"),
    (r"text/proj_fc", "text.proj.0", "linear"),
    (r"text/text_projection", "text.proj.2", "matrix"),
]
_NLLB_KEY = r"text.transformer.layers.\1"
_NLLB: Rows = [
    (f"{TEXT_BLOCK}/attn/([qkv]_proj)", rf"{_NLLB_KEY}.self_attn.\2", "heads"),
    (f"{TEXT_BLOCK}/attn/out_proj", f"{_NLLB_KEY}.self_attn.out_proj", "out"),
    (f"{TEXT_BLOCK}/ln_1", f"{_NLLB_KEY}.self_attn_layer_norm", "norm"),
    (f"{TEXT_BLOCK}/mlp/c_fc", f"{_NLLB_KEY}.fc1", "linear"),
    (f"{TEXT_BLOCK}/mlp/c_proj", f"{_NLLB_KEY}.fc2", "linear"),
    (f"{TEXT_BLOCK}/ln_2", f"{_NLLB_KEY}.final_layer_norm", "norm"),
    (r"text/token_embedding", "text.transformer.embed_tokens", "embedding"),
    (r"text/ln_final", "text.transformer.layer_norm", "norm"),
    (r"text/text_projection", "text.proj", "matrix"),
]

_HF_TEXT: Rows = [
    *_block_hf(TEXT_BLOCK, r"text_model.encoder.layers.\1"),
    (r"text/positional_embedding", "text_model.embeddings.position_embedding", "table"),
    (r"text/token_embedding", "text_model.embeddings.token_embedding", "embedding"),
    (r"text/ln_final", "text_model.final_layer_norm", "norm"),
]
_HF_VISION: Rows = [
    *_block_hf(VISION_BLOCK, r"vision_model.encoder.layers.\1"),
    (r"visual/conv1", "vision_model.embeddings.patch_embedding", "conv"),
    (r"visual/positional_embedding", "vision_model.embeddings.position_embedding", "table"),
    (r"visual/ln_post", "vision_model.post_layernorm", "norm"),
]
_HF_CLIP: Rows = [
    *_HF_TEXT,
    *_HF_VISION,
    (r"text/text_projection", "text_projection", "matrix"),
    (r"visual/class_embedding", "vision_model.embeddings.class_embedding", "array"),
    (r"visual/ln_pre", "vision_model.pre_layrnorm", "norm"),  # transformers spells it so
    (r"visual/proj", "visual_projection", "matrix"),
]
_HF_SIGLIP: Rows = [
    *_HF_TEXT,
    *_HF_VISION,
    (r"text/text_projection", "text_model.head", "matrix"),
    (r"text/text_projection_bias", "text_model.head", "bias"),
    (r"visual/attn_pool/probe", "vision_model.head.probe", "array"),
    (r"visual/attn_pool/attn/[qkv]_proj", "vision_model.head.attention.in_proj", "fused"),
    (r"visual/attn_pool/attn/out_proj", "vision_model.head.attention.out_proj", "out"),
    (r"visual/attn_pool/ln", "vision_model.head.layernorm", "norm"),
    (r"visual/attn_pool/mlp/c_fc", "vision_model.head.mlp.fc1", "linear"),
    (r"visual/attn_pool/mlp/c_proj", "vision_model.head.mlp.fc2", "linear"),
]
_MAP = "params/img/MAPHead_0"
_BIG_VISION: Rows = [
    *_block_flax(VISION_BLOCK, r"params/img/Transformer/encoderblock_\1"),
    *_block_flax(TEXT_BLOCK, r"params/txt/Encoder_0/encoderblock_\1"),
    (r"visual/positional_embedding", "params/img/pos_embedding", "array"),
    (r"visual/conv1", "params/img/embedding", "flax"),
    (r"visual/ln_post", "params/img/Transformer/encoder_norm", "flax"),
    (r"visual/attn_pool/probe", f"{_MAP}/probe", "array"),
    (r"visual/attn_pool/attn/q_proj", f"{_MAP}/MultiHeadDotProductAttention_0/query", "flax"),
    (r"visual/attn_pool/attn/k_proj", f"{_MAP}/MultiHeadDotProductAttention_0/key", "flax"),
    (r"visual/attn_pool/attn/v_proj", f"{_MAP}/MultiHeadDotProductAttention_0/value", "flax"),
    (r"visual/attn_pool/attn/out_proj", f"{_MAP}/MultiHeadDotProductAttention_0/out", "flax"),
    (r"visual/attn_pool/ln", f"{_MAP}/LayerNorm_0", "flax"),
    (r"visual/attn_pool/mlp/c_fc", f"{_MAP}/MlpBlock_0/Dense_0", "flax"),
    (r"visual/attn_pool/mlp/c_proj", f"{_MAP}/MlpBlock_0/Dense_1", "flax"),
    (r"text/positional_embedding", "params/txt/pos_embedding", "array"),
    (r"text/token_embedding", "params/txt/Embed_0", "flax"),
    (r"text/ln_final", "params/txt/Encoder_0/encoder_norm", "flax"),
    (r"text/text_projection", "params/txt/head/kernel", "array"),
    (r"text/text_projection_bias", "params/txt/head/bias", "array"),
    (r"logit_scale", "params/t", "array"),
    (r"logit_bias", "params/b", "array"),
]

# open_clip's names are those of an image tower and those of a text tower.
IMAGE_NAMINGS: dict[str, Rows] = {
    "openai": _OPENAI_VISION,
    "resnet": _RESNET,
    "timm_vit": _TIMM_VIT,
    "timm_eva": _TIMM_EVA,
    "timm_eva02": _TIMM_EVA02,
    "convnext": [*_CONVNEXT, *_HEAD_LINEAR],
    "vitamin": _VITAMIN,
    "fastvit": _FASTVIT,
    "convnext_mlp": [*_CONVNEXT, *_HEAD_MLP],
}
TEXT_NAMINGS: dict[str, Rows] = {
    "flat": _FLAT_TEXT,
    "nested": _NESTED_TEXT,
    "coca": [*_NESTED_TEXT, (r"text/class_embedding", "text.cls_emb", "array")],
    "roberta": _ROBERTA,
    "nllb": _NLLB,
}

NAMINGS: dict[str, Rows] = {
    "openai": [*_OPENAI_VISION, *_FLAT_TEXT, *_SCALARS],
    "openai_resnet": [*_RESNET, *_FLAT_TEXT, *_SCALARS],
    "open_clip_nested": [*_OPENAI_VISION, *_NESTED_TEXT, *_SCALARS],
    "open_clip_nested_resnet": [*_RESNET, *_NESTED_TEXT, *_SCALARS],
    "open_clip_siglip": [*_TIMM_VIT, *_LINEAR_TEXT, *_SCALARS],
    "hf_clip": [*_HF_CLIP, *_SCALARS],
    "hf_siglip": [*_HF_SIGLIP, *_SCALARS],
    "hf_siglip2": [
        (r"visual/conv1", "vision_model.embeddings.patch_embedding", "patches"),
        *_HF_SIGLIP,
        *_SCALARS,
    ],
    "big_vision": _BIG_VISION,
    # A work folder's weights lie under the paths themselves.
    "work_folder": [(r"(.+)", r"\1", "array")],
    **{
        f"{image}+{text}": [*image_rows, *text_rows, *_SCALARS]
        for image, image_rows in IMAGE_NAMINGS.items()
        for text, text_rows in TEXT_NAMINGS.items()
    },
}

# Buffers that hold nothing learned, by the end of their names.
IGNORED = re.compile(
    r"(^|.*\.)(attn_mask|num_batches_tracked|position_ids"
    r"|input_resolution|context_length|vocab_size)$"
)


def find_place(path: str, naming: str) -> Place:
    """Return the place of an array (`visual/ln_post/scale`) in a file of this naming.

    Raises:
      UserError: the naming has no place for it: that library has no such part in its models.
    """
    for module, key, kind in NAMINGS[naming]:
        for leaf, (ending, layout) in KINDS[kind].items():
            match = re.fullmatch(f"{module}/{leaf}" if leaf else module, path)
            if match is None:
                continue
            name = match.expand(key) + ending
            if kind not in FUSED:
                return Place(name, layout)
            letters = FUSED[kind]
            letter = path.split("/")[-2][0]
            return Place(name, layout, letters.index(letter), len(letters))
    raise UserError(f"{path} has no counterpart in the format {naming}: it cannot be stored there")
