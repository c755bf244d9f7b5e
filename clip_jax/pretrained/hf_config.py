"""Read and write a model's sizes as the `config.json` of transformers' CLIP and SigLIP families."""

import math
from collections.abc import Mapping
from typing import Any

from clip_jax.errors import UserError, note_unknown, short
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.naflex import NaFlexConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.pretrained.siglip import SIGLIP_LOGIT_SCALE, siglip_vit

HF_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
# The values of transformers for keys that a config leaves out.
_HF_CLIP_TEXT = {
    "vocab_size": 49_408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49_407,
}
_HF_CLIP_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_HF_SIGLIP_TEXT = {
    **_HF_CLIP_TEXT,
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "eos_token_id": 1,
}
_HF_SIGLIP_VISION = {
    **_HF_CLIP_VISION,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
HF_DEFAULTS = {
    "clip": (_HF_CLIP_TEXT, _HF_CLIP_VISION),
    "metaclip_2": (_HF_CLIP_TEXT, _HF_CLIP_VISION),
    "siglip": (_HF_SIGLIP_TEXT, _HF_SIGLIP_VISION),
    "siglip2": (_HF_SIGLIP_TEXT, _HF_SIGLIP_VISION | {"num_patches": 256}),
}

# Settings that are read, and after them those that change no feature of a trained model: how it
# began and was trained, what a call returns, who wrote the file, and the settings of generation
# and classification that every config of transformers may list.
_READ = {"model_type", "projection_dim", "text_config", "vision_config"}
_READ |= {"text_config_dict", "vision_config_dict"}
_READ_TOWER = {*_HF_CLIP_TEXT, *_HF_CLIP_VISION, "projection_size", "num_patches"}
_WITHOUT_EFFECT = {"attention_dropout", "dropout", "initializer_factor", "initializer_range"}
_WITHOUT_EFFECT |= {"logit_scale_init_value", "model_type", "projection_dim", "architectures"}
_WITHOUT_EFFECT |= {"torch_dtype", "dtype", "torchscript", "use_bfloat16", "use_cache"}
_WITHOUT_EFFECT |= {"transformers_version", "auto_map", "tokenizer_class", "attn_implementation"}
_WITHOUT_EFFECT |= {"return_dict", "output_attentions", "output_hidden_states", "output_scores"}
_WITHOUT_EFFECT |= {"return_dict_in_generate", "bos_token_id", "pad_token_id", "sep_token_id"}
_WITHOUT_EFFECT |= {"decoder_start_token_id", "id2label", "label2id", "num_labels", "problem_type"}
_WITHOUT_EFFECT |= {"finetuning_task", "task_specific_params", "prefix", "gradient_checkpointing"}
_WITHOUT_EFFECT |= {"chunk_size_feed_forward", "tf_legacy_loss", "remove_invalid_values"}
_WITHOUT_EFFECT |= {"tie_word_embeddings", "tie_encoder_decoder", "is_encoder_decoder", "name"}
_GENERATION = {"bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample"}
_GENERATION |= {"early_stopping", "encoder_no_repeat_ngram_size", "length_penalty", "max_length"}
_GENERATION |= {"exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"}
_GENERATION |= {"min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams"}
_GENERATION |= {"num_return_sequences", "repetition_penalty", "suppress_tokens", "temperature"}
_GENERATION |= {"top_k", "top_p", "typical_p"}
# Settings that the modules here have at one value alone.
_FIXED = {"num_channels": 3, "vision_use_head": True}


def config_from_hf(config: Mapping[str, Any], where: str) -> CLIPConfig:
    """Return the sizes in a Hugging Face `config.json`.

    Args:
      config: its content.
      where: the file, for messages.

    Raises:
      UserError: another kind of model, or a value that is missing or makes no sense.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in HF_DEFAULTS:
        raise UserError(
            f"{where}: model_type is {kind!r}; supported are {', '.join(sorted(HF_DEFAULTS))}"
        )
    try:
        text, vision = (
            # Old files have some values in `text_config_dict` only, and those win there.
            {**defaults, **(config.get(name) or {}), **(config.get(f"{name}_dict") or {})}
            for name, defaults in zip(
                ("text_config", "vision_config"), HF_DEFAULTS[kind], strict=True
            )
        )
        _check_settings(config, text, vision, where)
        if kind in ("siglip", "siglip2"):
            return _siglip_from_hf(text, vision, where)
        return CLIPConfig(
            embed_dim=int(config.get("projection_dim", 512)),
            vision=ViTConfig(
                image_size=_only(vision["image_size"]),
                patch_size=_only(vision["patch_size"]),
                **_hf_sizes(vision),
            ),
            text=TextConfig(
                context_length=int(text["max_position_embeddings"]),
                vocab_size=int(text["vocab_size"]),
                eot_id=_hf_end_token(text, legacy=kind == "clip"),
                **_hf_sizes(text),
            ),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: the config is damaged ({short(error)})") from None


def _check_settings(
    config: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any], where: str
) -> None:
    """Refuse a setting that no module here has, and say which others are passed over."""
    for name, expected in _FIXED.items():
        if vision.get(name, expected) != expected:
            raise UserError(f"{where}: {name} is {vision[name]!r}, which is not supported")
    harmless = _WITHOUT_EFFECT | _GENERATION
    for settings, known in (
        (config, _READ | harmless),
        (text, _READ_TOWER | harmless),
        (vision, _READ_TOWER | harmless | set(_FIXED)),
    ):
        shown = {k: v for k, v in settings.items() if not k.startswith("_")}
        note_unknown(shown, known, where)


def _only(value: Any) -> int:
    """Return the number that a setting is, or that each of its list is: [224, 224] is 224."""
    values = value if isinstance(value, list | tuple) else [value]
    if len(set(values)) != 1:
        raise ValueError(f"{value} is not one number")
    return int(values[0])


def _hf_end_token(text: Mapping[str, Any], *, legacy: bool) -> int:
    """Return the id at which transformers reads a text.

    In files from before 2023, which have 2 here, that is the largest id.
    """
    eos = _only(text["eos_token_id"])
    return int(text["vocab_size"]) - 1 if legacy and eos == 2 else eos


def _hf_sizes(c: Mapping[str, Any]) -> dict[str, Any]:
    if c["hidden_act"] not in HF_ACTIVATIONS:
        raise UserError(f"the activation {c['hidden_act']!r} is not supported")
    width = int(c["hidden_size"])
    return {
        "width": width,
        "layers": int(c["num_hidden_layers"]),
        "heads": int(c["num_attention_heads"]),
        "mlp_ratio": mlp_ratio(width, int(c["intermediate_size"])),
        "activation": HF_ACTIVATIONS[c["hidden_act"]],
        "norm_eps": float(c["layer_norm_eps"]),
    }


def mlp_ratio(width: int, mlp_width: int) -> float:
    """Return the ratio that gives this very hidden width when multiplied and cut to an integer."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)


def _naflex_from_hf(vision: Mapping[str, Any], where: str) -> NaFlexConfig:
    """Return the image tower of SigLIP 2 that takes grids of any shape."""
    if not vision.get("vision_use_head", True):
        raise UserError(f"{where}: vision_use_head is off, and images would have no features")
    patches, size = int(vision["num_patches"]), int(vision["patch_size"])
    side = math.isqrt(patches)
    if side**2 != patches:
        raise UserError(f"{where}: num_patches is {patches}: its positions are no square")
    return NaFlexConfig(side * size, size, patches, **_hf_sizes(vision))


def _siglip_from_hf(text: Mapping[str, Any], vision: Mapping[str, Any], where: str) -> CLIPConfig:
    tower: ViTConfig | NaFlexConfig
    if "num_patches" in vision:
        tower = _naflex_from_hf(vision, where)
    else:
        sides = _only(vision["image_size"]), _only(vision["patch_size"])
        tower = siglip_vit(*sides, **_hf_sizes(vision))
    embed_dim = int(text.get("projection_size") or text["hidden_size"])
    return CLIPConfig(
        embed_dim=embed_dim,
        vision=tower,
        text=TextConfig(
            context_length=int(text["max_position_embeddings"]),
            vocab_size=int(text["vocab_size"]),
            # Nothing is read at it, and some configs have several or none.
            eot_id=text["eos_token_id"] if isinstance(text["eos_token_id"], int) else 1,
            causal=False,
            pool="last",
            proj_bias=True,
            **_hf_sizes(text),
        ),
        init_logit_scale=SIGLIP_LOGIT_SCALE,
        init_logit_bias=-10.0,
    )


def config_to_hf(config: CLIPConfig) -> dict[str, Any]:
    """Return the `config.json` that makes transformers build this model.

    Raises:
      UserError: transformers has no such model.
    """
    v, t = config.vision, config.text
    if not isinstance(v, ViTConfig) or v.pool == "average":
        raise UserError("transformers has no such image tower in CLIPModel or SiglipModel")
    is_siglip = v.pool == "map"
    if is_siglip != (t.pool == "last" and not t.causal and t.proj_bias):
        raise UserError("transformers has no model with these two towers")
    kind, name = ("siglip", "SiglipModel") if is_siglip else ("clip", "CLIPModel")
    if not is_siglip and t.eot_id == 2:
        raise UserError("transformers reads CLIP texts that end on id 2 at their largest id")
    text = _sizes_to_hf(t) | {
        "vocab_size": t.vocab_size,
        "max_position_embeddings": t.context_length,
        "eos_token_id": t.eot_id,
        "model_type": f"{kind}_text_model",
    }
    vision = _sizes_to_hf(v) | {
        "image_size": v.image_size,
        "patch_size": v.patch_size,
        "model_type": f"{kind}_vision_model",
    }
    values = {
        "architectures": [name],
        "model_type": kind,
        "initializer_factor": 1.0,
        "torch_dtype": "float32",
        "text_config": text,
        "vision_config": vision,
    }
    if is_siglip:
        text["projection_size"] = config.embed_dim
        return values
    text["projection_dim"] = vision["projection_dim"] = config.embed_dim
    return values | {
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.init_logit_scale,
    }


def _sizes_to_hf(c: ViTConfig | TextConfig) -> dict[str, Any]:
    (act,) = [k for k, v in HF_ACTIVATIONS.items() if v == c.activation and k != "gelu_new"]
    return {
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "hidden_act": act,
        "layer_norm_eps": c.norm_eps,
    }
