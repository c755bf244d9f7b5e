"""Every model of the zoo against the modules that open_clip builds from its own configuration."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

from open_clip.model import CustomTextCLIP  # noqa: E402

from clip_jax.models.clip import CLIPConfig  # noqa: E402
from clip_jax.models.resnet import ResNetConfig  # noqa: E402
from clip_jax.models.text import TextConfig  # noqa: E402
from clip_jax.models.vit import ViTConfig  # noqa: E402
from clip_jax.models.zoo import MODELS, unsupported_reason  # noqa: E402

GOLDEN = json.loads(
    (Path(__file__).parent.parent / "golden/open_clip_parameter_counts.json").read_text()
)
COUNTS = GOLDEN["counts"]
# open_clip's name to ours: see `clip_jax/models/zoo.py`.
OURS = {name: f"{name}-gelu" if re.fullmatch(r"RN\d+(x\d+)?", name) else name for name in COUNTS}


def activation_of(module) -> str:
    """Return our name of an activation's module."""
    if isinstance(module, open_clip.transformer.QuickGELU):
        return "quick_gelu"
    if isinstance(module, timm.layers.activations.GELUTanh):
        return "gelu_tanh"
    return {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]


def resnet_of(visual) -> ResNetConfig:
    """Return the config of open_clip's ResNet, read from its modules."""
    stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    size = int(np.ravel(visual.image_size)[0])
    config = ResNetConfig(size, tuple(map(len, stages)), visual.conv3.out_channels)
    assert visual.attnpool.num_heads == config.heads
    return config


def vit_of(visual, entry: ViTConfig) -> ViTConfig:
    """Return the config of open_clip's ViT, read from its modules, with the `entry`'s mlp_ratio."""
    block = visual.transformer.resblocks[0]
    assert block.mlp.c_fc.out_features == entry.mlp_width
    has_scale = not isinstance(block.ls_1, torch.nn.Identity)
    return ViTConfig(
        image_size=visual.image_size[0],
        patch_size=visual.patch_size[0],
        width=visual.conv1.out_channels,
        layers=len(visual.transformer.resblocks),
        heads=block.attn.num_heads,
        mlp_ratio=entry.mlp_ratio,
        activation=activation_of(block.mlp.gelu),
        norm_eps=block.ln_1.eps,
        pool={"tok": "token", "avg": "average"}[visual.pool_type],
        norm_after_pool=visual.final_ln_after_pool,
        class_token=visual.class_embedding is not None,
        pre_norm=not isinstance(visual.ln_pre, torch.nn.Identity),
        patch_bias=visual.conv1.bias is not None,
        layer_scale=entry.layer_scale if has_scale else None,
        project=visual.proj is not None,
    )


def timm_vit_of(trunk, entry: ViTConfig) -> ViTConfig:
    """Return the config of timm's tower, read from its modules."""
    block, pool = trunk.blocks[0], trunk.attn_pool
    for mlp in (block.mlp, pool.mlp):
        assert mlp.fc1.out_features == entry.mlp_width
        assert activation_of(mlp.act) == activation_of(block.mlp.act)
    assert pool.num_heads == block.attn.num_heads and pool.pos_embed is None
    assert pool.norm.eps == trunk.norm.eps == block.norm1.eps
    identity = torch.nn.Identity
    assert isinstance(trunk.fc_norm, identity) and isinstance(block.attn.q_norm, identity)
    return ViTConfig(
        image_size=trunk.patch_embed.img_size[0],
        patch_size=trunk.patch_embed.patch_size[0],
        width=trunk.embed_dim,
        layers=len(trunk.blocks),
        heads=block.attn.num_heads,
        mlp_ratio=entry.mlp_ratio,
        activation=activation_of(block.mlp.act),
        norm_eps=block.norm1.eps,
        pool=trunk.global_pool,
        class_token=trunk.cls_token is not None,
        pre_norm=not isinstance(trunk.norm_pre, identity),
        patch_bias=trunk.patch_embed.proj.bias is not None,
        layer_scale=None if isinstance(block.ls1, identity) else entry.layer_scale,
        project=not isinstance(trunk.head, identity),
    )


def text_of(model, entry: TextConfig) -> TextConfig:
    """Return the config of open_clip's text tower, read from its modules."""
    text = getattr(model, "text", model)
    pool = text.pool_type if hasattr(text, "pool_type") else text.text_pool_type
    eos_id = text.eos_id if hasattr(text, "eos_id") else text.text_eos_id
    block, width = text.transformer.resblocks[0], text.token_embedding.embedding_dim
    projection = text.text_projection
    assert block.mlp.c_fc.out_features == entry.mlp_width
    ends = {"argmax": text.vocab_size - 1, "eos": eos_id, "last": entry.eot_id}
    return TextConfig(
        width=width,
        layers=len(text.transformer.resblocks),
        heads=block.attn.num_heads,
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        eot_id=ends[pool],
        mlp_ratio=entry.mlp_ratio,
        activation=activation_of(block.mlp.gelu),
        norm_eps=block.ln_1.eps,
        causal=text.attn_mask is not None,
        pool="last" if pool == "last" else "end",
        project=projection is not None,
        proj_bias=isinstance(projection, torch.nn.Linear) and projection.bias is not None,
    )


def config_of(model, entry: CLIPConfig, init_logit_bias: float | None) -> CLIPConfig:
    """Return the entry of the zoo that an open_clip model is, read from its modules."""
    visual = model.visual
    vision: ViTConfig | ResNetConfig
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        vision = resnet_of(visual)
    elif hasattr(visual, "trunk"):
        assert not len(visual.head)
        vision = timm_vit_of(visual.trunk, entry.vision)
    else:
        vision = vit_of(visual, entry.vision)
    text = text_of(model, entry.text)
    bias = None if init_logit_bias is None else float(init_logit_bias)
    return CLIPConfig(entry.embed_dim, vision, text, entry.init_logit_scale, bias)


@pytest.mark.parametrize("name", COUNTS)
def test_an_entry_is_what_open_clip_builds_by_its_name(name):
    """The model has its full size, on a device that holds no numbers."""
    options = open_clip.get_model_config(name)
    make = CustomTextCLIP if options.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        model = make(**options)
    entry = MODELS[OURS[name]]
    assert options["embed_dim"] == entry.embed_dim
    assert config_of(model, entry, options.get("init_logit_bias")) == entry
    image = sum(p.numel() for p in model.visual.parameters())
    others = 1 + (model.logit_bias is not None)
    text = sum(p.numel() for p in model.parameters()) - image - others
    assert [image, text] == COUNTS[name]


def test_every_other_name_of_open_clip_is_refused():
    others = set(open_clip.list_models()) - set(COUNTS) - set(GOLDEN["families"])
    assert others == set(GOLDEN["left_out"])
    assert all(unsupported_reason(name) for name in others)
