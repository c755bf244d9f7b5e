"""Read and write a model's sizes as open_clip's `model_cfg` (open_clip 3.3, `model.py`).

A setting that the modules here do not have is refused by name, never passed over: it would change
the numbers.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from clip_jax.errors import UserError, short
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.convnext import ConvNeXtConfig
from clip_jax.models.fastvit import FastViTConfig
from clip_jax.models.image_towers import VisionConfig
from clip_jax.models.naflex import NaFlexConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import EncoderForm, TextConfig
from clip_jax.models.text_encoders import TEXT_ENCODERS
from clip_jax.models.timm_towers import TIMM_TOWERS
from clip_jax.models.vit import ViTConfig
from clip_jax.pretrained.open_clip_naming import is_timm
from clip_jax.pretrained.siglip import SIGLIP_LOGIT_SCALE, siglip_vit

# Settings that change nothing in a trained model's features.
_TRAINING_ONLY = {"patch_dropout", "output_tokens", "timm_model_pretrained", "timm_drop"}
_TRAINING_ONLY |= {"timm_drop_path", "attn_pooler_queries", "attn_pooler_heads"}
# Settings of the tokenizer.
_TOKENIZING = {"hf_tokenizer_name", "tokenizer_kwargs", "pad_id"}
_TOKENIZING |= {"hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}
_TOKENIZER_KWARGS = {"clean", "strip_sep_token"}
# Settings of the whole model; those that change no feature of a trained one (the scale's value is
# among the arrays, CoCa's captioner is left out) are in the second line.
_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias"}
_MODEL |= {"init_logit_scale", "custom_text", "multimodal_cfg", "output_dict", "cast_dtype"}
_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
_VISION |= {"ls_init_value", "no_ln_pre", "final_ln_after_pool", "pool_type"}
_VISION |= {"act_kwargs", "norm_kwargs", "attentional_pool"}
_TIMM = {"image_size", "timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "eos_id"}
_TEXT |= {"no_causal_mask", "pool_type", "proj_bias", "proj_type", "act_kwargs", "norm_kwargs"}
_TEXT |= {"embed_cls"}
_ENCODER = {"hf_model_name", "context_length", "vocab_size"}

# timm's image towers of SigLIP: width, layers, heads, mlp_ratio.
_SIGLIP_SIZES = {
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "so400m": (1152, 27, 16, 3.7362),
    "giantopt": (1536, 40, 16, 4.0),
}
# Which of them timm builds with the tanh form of GELU.
_SIGLIP_TANH = re.compile(
    r"vit_(base_patch32_siglip_256|large_patch16_siglip_512|so400m_patch16_siglip_\d+"
    r"|giantopt_patch16_siglip_\d+)"
)


def config_from_open_clip(cfg: Mapping[str, Any], where: str) -> CLIPConfig:
    """Return the sizes in a `model_cfg`.

    Args:
      cfg: the dict, as in `open_clip_config.json` or open_clip's `model_configs/`.
      where: the file, for messages.

    Raises:
      UserError: a setting that no module here has, or a value that is missing or makes no sense.
    """
    try:
        vision, text = dict(cfg["vision_cfg"]), dict(cfg["text_cfg"])
        _refuse_others(cfg, _MODEL, "model_cfg", where)
        for tower, section in (vision, "vision_cfg"), (text, "text_cfg"):
            _refuse_others(tower.get("act_kwargs") or {}, {"approximate"}, section, where)
            _refuse_others(tower.get("norm_kwargs") or {}, {"eps"}, section, where)
        _refuse_others(text.get("tokenizer_kwargs") or {}, _TOKENIZER_KWARGS, "text_cfg", where)
        quick = bool(cfg.get("quick_gelu", False))
        bias = cfg.get("init_logit_bias")
        return CLIPConfig(
            embed_dim=int(cfg["embed_dim"]),
            vision=_vision(vision, quick, where),
            text=_text(text, quick, where),
            init_logit_scale=SIGLIP_LOGIT_SCALE if bias is not None else math.log(1 / 0.07),
            init_logit_bias=None if bias is None else float(bias),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: the model_cfg is damaged ({short(error)})") from None


def _refuse_others(cfg: Mapping[str, Any], known: set[str], section: str, where: str) -> None:
    for key, value in cfg.items():
        # What is off or empty is as good as absent.
        if key not in known and value not in (None, False, 0, 0.0, {}, "", "learnable", "default"):
            raise UserError(f"{where}: {section} has {key} = {value!r}, which is not supported")


def _activation(quick: bool, act_kwargs: Mapping[str, Any] | None) -> str:
    if quick:
        return "quick_gelu"
    return "gelu_tanh" if (act_kwargs or {}).get("approximate") == "tanh" else "gelu"


def _vision(v: dict[str, Any], quick: bool, where: str) -> VisionConfig:
    image_size = v.get("image_size", 224)
    if isinstance(image_size, list | tuple):
        if len(set(image_size)) != 1:
            raise UserError(f"{where}: images of {image_size} pixels are not square")
        image_size = image_size[0]
    if v.get("timm_model_name"):
        return _timm_vision(v, int(image_size), where)
    _refuse_others(v, _VISION | _TRAINING_ONLY, "vision_cfg", where)
    width = int(v.get("width", 768))
    layers = v.get("layers", 12)
    if isinstance(layers, list | tuple):
        one, two, three, four = (int(n) for n in layers)
        return ResNetConfig(int(image_size), (one, two, three, four), width)
    pool = {"tok": "token", "avg": "average"}.get(v.get("pool_type", "tok"))
    queries = v.get("attentional_pool")
    if pool is None or (queries and (queries is not True or pool != "token")):
        shown = {key: v.get(key) for key in ("pool_type", "attentional_pool")}
        raise UserError(f"{where}: vision_cfg has {shown}, which is not supported")
    pooling: dict[str, Any] = {"pool": pool}
    if queries:
        pooling = {
            "pool": "queries",
            "pool_heads": int(v.get("attn_pooler_heads", 8)),
            "pool_queries": int(v.get("attn_pooler_queries", 256)),
        }
    return ViTConfig(
        image_size=int(image_size),
        patch_size=int(v.get("patch_size", 16)),
        width=width,
        layers=int(layers),
        heads=width // int(v.get("head_width", 64)),
        mlp_ratio=float(v.get("mlp_ratio", 4.0)),
        activation=_activation(quick, v.get("act_kwargs")),
        norm_eps=float((v.get("norm_kwargs") or {}).get("eps", 1e-5)),
        **pooling,
        norm_after_pool=bool(v.get("final_ln_after_pool", False)),
        pre_norm=not v.get("no_ln_pre", False),
        layer_scale=v.get("ls_init_value"),
    )


def _timm_vision(v: dict[str, Any], image_size: int, where: str) -> VisionConfig:
    """Return the image tower of timm's name.

    Where it has positions it has timm's image size, whatever the config says: as in open_clip.
    """
    name = str(v["timm_model_name"])
    tower = TIMM_TOWERS.get(name)
    if tower is None:
        return _siglip_vision(v, image_size, where)
    _refuse_others(v, _TIMM | _TRAINING_ONLY, "vision_cfg", where)
    if isinstance(tower, ConvNeXtConfig) and v.get("timm_proj") == "mlp":
        tower = dataclasses.replace(tower, head="mlp")
    asked = {key: v.get(key) or "" for key in _timm_head(tower)}
    if asked != _timm_head(tower):
        raise UserError(f"{where}: {name} of timm is not supported with {asked}")
    if isinstance(tower, ViTConfig):
        return tower
    return dataclasses.replace(tower, image_size=image_size)


def _timm_head(tower: VisionConfig) -> dict[str, str]:
    """Return open_clip's pooling and projection of a tower of `TIMM_TOWERS`."""
    if isinstance(tower, ConvNeXtConfig):
        return {"timm_pool": "", "timm_proj": tower.head}
    if isinstance(tower, FastViTConfig):
        return {"timm_pool": "avg", "timm_proj": ""}
    assert isinstance(tower, ViTConfig)
    if tower.mbconv_widths:
        return {"timm_pool": "", "timm_proj": "linear"}
    return {"timm_pool": tower.pool, "timm_proj": ""}


def _siglip_vision(v: dict[str, Any], image_size: int, where: str) -> ViTConfig:
    name = str(v["timm_model_name"])
    match = re.fullmatch(r"vit_(\w+)_patch(\d+)_siglip_(\d+)", name)
    if match is None or match[1] not in _SIGLIP_SIZES or v.get("timm_pool") != "map":
        raise UserError(f"{where}: the image tower {name} of timm is not supported")
    if v.get("timm_proj", "linear") not in ("none", "", None):
        raise UserError(f"{where}: vision_cfg has timm_proj = {v['timm_proj']!r}, not supported")
    _refuse_others(v, _TIMM | _TRAINING_ONLY, "vision_cfg", where)
    width, layers, heads, mlp_ratio = _SIGLIP_SIZES[match[1]]
    return siglip_vit(
        image_size,
        int(match[2]),
        width,
        layers,
        heads,
        mlp_ratio=mlp_ratio,
        activation="gelu_tanh" if _SIGLIP_TANH.fullmatch(name) else "gelu",
    )


def _text(t: dict[str, Any], quick: bool, where: str) -> TextConfig:
    if t.get("hf_model_name"):
        return _encoder(t, where)
    _refuse_others(t, _TEXT | _TOKENIZING | _TRAINING_ONLY, "text_cfg", where)
    pool = {"argmax": "end", "eos": "end", "last": "last"}.get(t.get("pool_type", "argmax"))
    if pool is None:
        raise UserError(f"{where}: text_cfg has pool_type = {t['pool_type']!r}, not supported")
    vocab_size = int(t.get("vocab_size", 49_408))
    if pool == "last":
        # Read nowhere in the tower: BERT's [SEP] in CLIPA, and SigLIP's end token.
        eot_id = 102 if (t.get("tokenizer_kwargs") or {}).get("strip_sep_token") else 1
    else:
        # "argmax" reads at the largest id, which is the end token's.
        eot_id = int(t.get("eos_id", 2)) if t.get("pool_type") == "eos" else vocab_size - 1
    return TextConfig(
        width=int(t.get("width", 512)),
        layers=int(t.get("layers", 12)),
        heads=int(t.get("heads", 8)),
        context_length=int(t.get("context_length", 77)),
        vocab_size=vocab_size,
        eot_id=eot_id,
        mlp_ratio=float(t.get("mlp_ratio", 4.0)),
        activation=_activation(quick, t.get("act_kwargs")),
        norm_eps=float((t.get("norm_kwargs") or {}).get("eps", 1e-5)),
        causal=not t.get("no_causal_mask", False),
        pool=pool,
        project=t.get("proj_type", "linear") != "none",
        proj_bias=bool(t.get("proj_bias", False)),
        class_token=bool(t.get("embed_cls", False)),
    )


def _encoder(t: dict[str, Any], where: str) -> TextConfig:
    """Return the text tower of a name of transformers, as open_clip pools and projects it."""
    name = str(t["hf_model_name"])
    if name not in TEXT_ENCODERS:
        raise UserError(f"{where}: the text tower {name} is not supported")
    _refuse_others(t, _ENCODER | _TOKENIZING, "text_cfg", where)
    config = TEXT_ENCODERS[name]
    assert config.encoder is not None
    given = t.get("hf_pooler_type") or "mean_pooler", t.get("hf_proj_type", "mlp")
    if given != _encoder_head(config.encoder):
        raise UserError(f"{where}: the text tower {name} is not supported with {given}")
    return dataclasses.replace(config, context_length=int(t.get("context_length", 77)))


def _encoder_head(form: EncoderForm) -> tuple[str, str]:
    """Return open_clip's pooling and projection of a text encoder."""
    pooler = {"mean": "mean_pooler", "first": "cls_pooler"}[form.pool]
    return pooler, form.projection


def config_to_open_clip(config: CLIPConfig) -> dict[str, Any]:
    """Return the `model_cfg` that makes open_clip build this model.

    Raises:
      UserError: open_clip has no such image tower.
    """
    v, t = config.vision, config.text
    cfg: dict[str, Any] = {"embed_dim": config.embed_dim}
    # An encoder of transformers has its own activation.
    quick = {t.activation == "quick_gelu"} if t.encoder is None else set()
    if isinstance(v, ViTConfig) and not is_timm(v):
        quick.add(v.activation == "quick_gelu")
    if True in quick:
        cfg["quick_gelu"] = True
    bias = config.init_logit_bias
    if bias is not None:
        cfg["init_logit_bias"] = int(bias) if bias == int(bias) else bias
    if isinstance(v, ResNetConfig):
        vision: dict[str, Any] = {
            "image_size": v.image_size,
            "layers": list(v.layers),
            "width": v.width,
            "patch_size": None,
        }
    elif _has_trunk(v):
        vision = _timm_to_open_clip(v)
        cfg["custom_text"] = True
    elif isinstance(v, ViTConfig) and v.pool == "map":
        vision = _siglip_to_open_clip(v)
        cfg["custom_text"] = True
    elif isinstance(v, ViTConfig):
        if len(quick) > 1:
            raise UserError("open_clip has one activation for both towers, and this model has two")
        vision = {
            "image_size": v.image_size,
            "layers": v.layers,
            "width": v.width,
            "head_width": v.width // v.heads,
            "mlp_ratio": v.mlp_ratio,
            "patch_size": v.patch_size,
        }
        if v.layer_scale is not None:
            vision["ls_init_value"] = v.layer_scale
        if not v.pre_norm:
            vision["no_ln_pre"] = True
        if v.pool == "average":
            vision |= {"pool_type": "avg", "final_ln_after_pool": v.norm_after_pool}
        if v.norm_eps != 1e-5:
            vision["norm_kwargs"] = {"eps": v.norm_eps}
    elif isinstance(v, NaFlexConfig):
        raise UserError("open_clip has no such image tower: convert it to a work folder instead")
    else:
        raise UserError("open_clip has no such convolutional image tower; train a ViT or a ResNet")
    return cfg | {"vision_cfg": vision, "text_cfg": _text_to_open_clip(t)}


def _has_trunk(v: VisionConfig) -> bool:
    """Return whether an image tower is one of `TIMM_TOWERS`."""
    if isinstance(v, ViTConfig):
        return is_timm(v) and v.project
    return isinstance(v, ConvNeXtConfig | FastViTConfig)


def _timm_to_open_clip(v: VisionConfig) -> dict[str, Any]:
    sizes: dict[str, Any] = {} if isinstance(v, ViTConfig) else {"image_size": v.image_size}
    if isinstance(v, ConvNeXtConfig):
        sizes["head"] = v.head
    names = [
        name
        for name, tower in TIMM_TOWERS.items()
        if type(tower) is type(v) and dataclasses.replace(tower, **sizes) == v
    ]
    if not names:
        raise UserError("open_clip has no image tower of timm of these sizes")
    # Of one at several sizes, the name that has this one.
    name = next((n for n in names if TIMM_TOWERS[n].image_size == v.image_size), names[0])
    return {
        "image_size": v.image_size,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        **_timm_head(v),
    }


def _siglip_to_open_clip(v: ViTConfig) -> dict[str, Any]:
    sizes = (v.width, v.layers, v.heads, v.mlp_ratio)
    names = [name for name, entry in _SIGLIP_SIZES.items() if entry == sizes]
    name = f"vit_{names[0] if names else '?'}_patch{v.patch_size}_siglip_{v.image_size}"
    tanh = bool(_SIGLIP_TANH.fullmatch(name))
    if not names or tanh != (v.activation == "gelu_tanh"):
        raise UserError("open_clip has no SigLIP image tower of these sizes and activation")
    return {
        "image_size": v.image_size,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }


def _encoder_to_open_clip(t: TextConfig) -> dict[str, Any]:
    """Return the `text_cfg` of an encoder of transformers."""
    for name, config in TEXT_ENCODERS.items():
        if dataclasses.replace(config, context_length=t.context_length) == t:
            assert t.encoder is not None
            pooler, projection = _encoder_head(t.encoder)
            return {
                "hf_model_name": name,
                "hf_tokenizer_name": name,
                "hf_pooler_type": pooler,
                "hf_proj_type": projection,
                "context_length": t.context_length,
            }
    raise UserError("open_clip has no text tower of transformers of these sizes")


def _text_to_open_clip(t: TextConfig) -> dict[str, Any]:
    if t.encoder is not None:
        return _encoder_to_open_clip(t)
    if t.class_token:
        raise UserError(
            "open_clip builds CoCa with a captioner, which is left out here; convert it to a work "
            "folder instead"
        )
    cfg: dict[str, Any] = {
        "context_length": t.context_length,
        "vocab_size": t.vocab_size,
        "width": t.width,
        "heads": t.heads,
        "layers": t.layers,
    }
    if t.mlp_ratio != 4.0:
        cfg["mlp_ratio"] = t.mlp_ratio
    if not t.causal:
        cfg["no_causal_mask"] = True
    if t.pool == "last":
        cfg["pool_type"] = "last"
        if t.eot_id == 102:
            cfg["tokenizer_kwargs"] = {"strip_sep_token": True}
    elif t.eot_id != t.vocab_size - 1:
        cfg |= {"pool_type": "eos", "eos_id": t.eot_id}
    if t.proj_bias:
        cfg["proj_bias"] = True
    if not t.project:
        cfg["proj_type"] = "none"
    if t.norm_eps != 1e-5:
        cfg["norm_kwargs"] = {"eps": t.norm_eps}
    if t.activation == "gelu_tanh":
        cfg["act_kwargs"] = {"approximate": "tanh"}
    return cfg
