"""Read and write a checkpoint's preprocessing in the JSON files that go with weights.

Three dialects: this project's (the fields of `Preprocess`), open_clip's `preprocess_cfg`, and
Hugging Face's `preprocessor_config.json`. A file that asks for more than
`clip_jax.data.images.eval_transform` does is refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

from clip_jax.data.images import (
    NAFLEX,
    OPENAI,
    SIGLIP,
    Interpolation,
    Preprocess,
    ResizeMode,
)
from clip_jax.errors import UserError, note_unknown

RESIZE_MODES: tuple[str, ...] = get_args(ResizeMode)
INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)

MAX_PATCHES = 65_535  # a grid's side is stored in two bytes

# Pillow's filter codes, as Hugging Face stores them.
RESAMPLE = {"bilinear": 2, "bicubic": 3}

# The values of a Hugging Face processor for keys that its file leaves out.
HF_CROP: dict[str, Any] = {
    "do_center_crop": True,
    "size": {"shortest_edge": 224},
    "preprocess": OPENAI,
}
HF_SQUASH: dict[str, Any] = {
    "do_center_crop": False,
    "size": {"height": 224, "width": 224},
    "preprocess": SIGLIP,
}
HF_PATCHES: dict[str, Any] = {"preprocess": NAFLEX}
HF_PROCESSORS = {
    "Siglip2ImageProcessor": HF_PATCHES,
    "CLIPImageProcessor": HF_CROP,
    "CLIPFeatureExtractor": HF_CROP,
    "SiglipImageProcessor": HF_SQUASH,
}


# What is read, and what changes no value (the layout of the result, who made it).
_OPEN_CLIP_KNOWN = frozenset(
    {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
)
_HF_KNOWN = frozenset(
    {"image_processor_type", "feature_extractor_type", "processor_class", "do_resize", "size"}
    | {"resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize"}
    | {"image_mean", "image_std", "do_convert_rgb", "data_format", "input_data_format", "device"}
    | {"return_tensors", "default_to_square", "auto_map", "_valid_processor_keys"}
    | {"disable_grouping", "use_fast", "_processor_class", "image_seq_length"}
    | {"max_num_patches", "patch_size"}
)


def preprocess_to_json(preprocess: Preprocess) -> dict[str, Any]:
    """Return the fields as a plain dict that `json` can write."""
    fields = dataclasses.asdict(preprocess)
    return fields | {"mean": list(preprocess.mean), "std": list(preprocess.std)}


def preprocess_from_json(fields: Any, *, where: str = "preprocess") -> Preprocess:
    """Return the settings in a dict of `preprocess_to_json`; fields left out have OPENAI's values.

    Args:
      fields: the values that `json` read.
      where: the file or section, for the messages.

    Raises:
      UserError: it is no dict, has an unknown field, or a value that makes no sense.
    """
    names = {field.name for field in dataclasses.fields(Preprocess)}
    if not isinstance(fields, Mapping) or not set(fields) <= names:
        unknown = sorted(map(str, set(fields) - names)) if isinstance(fields, Mapping) else fields
        raise UserError(f"{where}: {unknown!r:.200} is not among {', '.join(sorted(names))}")
    values = dataclasses.asdict(OPENAI) | dict(fields)
    return Preprocess(
        resize_mode=_one_of(values["resize_mode"], RESIZE_MODES, f"{where}.resize_mode"),
        interpolation=_one_of(values["interpolation"], INTERPOLATIONS, f"{where}.interpolation"),
        mean=_channels(values["mean"], f"{where}.mean", positive=False),
        std=_channels(values["std"], f"{where}.std", positive=True),
        fill=_fill(values["fill"], f"{where}.fill"),
    )


def preprocess_from_open_clip(preprocess_cfg: Any) -> Preprocess:
    """Return the settings in the `preprocess_cfg` of an `open_clip_config.json`.

    As in open_clip, unknown keys are passed over (which is told), missing and null ones take
    OpenAI's values, and "random" interpolation (a training setting) means bicubic. The size is left
    to the model.

    Raises:
      UserError: a value that open_clip itself would refuse, or a size that is not square.
    """
    cfg = _as_dict(preprocess_cfg, "preprocess_cfg")
    cfg = {key: value for key, value in cfg.items() if value is not None}
    note_unknown(cfg, _OPEN_CLIP_KNOWN, "preprocess_cfg")
    _one_of(cfg.get("mode", "RGB"), ("RGB",), "preprocess_cfg.mode")
    if "size" in cfg:
        _side(cfg["size"], "preprocess_cfg.size")
    if cfg.get("interpolation") == "random":
        cfg["interpolation"] = "bicubic"
    fields = {k: cfg[k] for k in ("resize_mode", "interpolation", "mean", "std") if k in cfg}
    fill = {"fill": cfg["fill_color"]} if "fill_color" in cfg else {}
    return preprocess_from_json(fields | fill, where="preprocess_cfg")


def preprocess_to_open_clip(preprocess: Preprocess, image_size: int) -> dict[str, Any]:
    """Return the `preprocess_cfg` that open_clip reads."""
    fields = preprocess_to_json(preprocess)
    return {"size": image_size, "mode": "RGB", "fill_color": fields.pop("fill")} | fields


def preprocess_from_hf(
    preprocessor_config: Any, *, where: str = "preprocessor_config.json"
) -> Preprocess:
    """Return the settings in the `preprocessor_config.json` of a CLIP or SigLIP folder.

    Or in the `image_processor` of its `processor_config.json`; `where` is the file for messages.

    Keys that the file leaves out take the processor's own defaults. The conversion to RGB and the
    crop's offset are those of `clip_jax.data.images`, whatever the file says.

    Raises:
      UserError: it is of another processor, or leaves out a step that CLIP's towers need.
    """
    config = _as_dict(preprocessor_config, where)
    note_unknown(config, _HF_KNOWN, where)
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    name = "CLIPImageProcessor" if name is None else name
    short_name = str(name).removesuffix("Fast").removesuffix("Pil")
    defaults = HF_PROCESSORS[_one_of(short_name, tuple(HF_PROCESSORS), f"{where}: processor")]
    for step in ("do_resize", "do_rescale"):
        if not config.get(step, True):
            raise UserError(
                f"{where}: {step} is off, and images of any size or range cannot be fed"
            )
    factor = config.get("rescale_factor", 1 / 255)
    # The files spell 1/255 with 17 digits, or fewer.
    if not _is_number(factor) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise UserError(f"{where}: rescale_factor is {factor!r:.50}, and only 1/255 is supported")
    family = defaults["preprocess"]
    mean_and_std = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if config.get("do_normalize", True):
        mean_and_std["mean"] = config.get("image_mean", family.mean)
        mean_and_std["std"] = config.get("image_std", family.std)
    resample = config.get("resample", RESAMPLE[family.interpolation])
    names = {code: name for name, code in RESAMPLE.items()}
    interpolation = names[_one_of(resample, tuple(names), f"{where}: resample")]
    fields: dict[str, Any] = {
        "resize_mode": _hf_resize_mode(config, defaults, where),
        "interpolation": interpolation,
    }
    return preprocess_from_json(fields | mean_and_std, where=where)


def patches_from_hf(config: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Return side and number of the patches that a processor's settings ask for.

    Raises:
      UserError: one is no whole number above zero.
    """
    size, count = config.get("patch_size", 16), config.get("max_num_patches", 256)
    for name, value in (("patch_size", size), ("max_num_patches", count)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_PATCHES:
            raise UserError(
                f"{where}: {name} is {value!r:.50}: it must be a whole number from 1 to "
                f"{MAX_PATCHES}"
            )
    return size, count


def preprocess_to_hf(preprocess: Preprocess, image_size: int) -> dict[str, Any]:
    """Return the `preprocessor_config.json` of a CLIP (crop) or SigLIP (squash) folder.

    Raises:
      UserError: the images are padded ("longest") or patches, which neither processor can do.
    """
    if preprocess.resize_mode in ("longest", "patches"):
        raise UserError(
            f'resize_mode "{preprocess.resize_mode}" has no Hugging Face processor: export to '
            "open_clip instead"
        )
    square = {"height": image_size, "width": image_size}
    crop = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": image_size},
        "do_center_crop": True,
        "crop_size": square,
    }
    squash = {"image_processor_type": "SiglipImageProcessor", "size": square}
    return (crop if preprocess.resize_mode == "shortest" else squash) | {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "resample": RESAMPLE[preprocess.interpolation],
        "rescale_factor": 1 / 255,
    }


def _hf_resize_mode(config: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> str:
    """Return "shortest" or "squash", if resize and crop end on the same square."""
    if defaults is HF_PATCHES:
        return "patches"
    size = config.get("size", defaults["size"])
    crops = config.get("do_center_crop", defaults["do_center_crop"])
    if isinstance(size, Mapping) and "shortest_edge" not in size:
        mode, side = "squash", _side([size.get("height"), size.get("width")], f"{where}: size")
    else:
        edge = size["shortest_edge"] if isinstance(size, Mapping) else size
        mode, side = "shortest", _side(edge, f"{where}: size")
        if not crops:
            raise UserError(f"{where}: size has a shortest_edge and do_center_crop is off")
    crop = config.get("crop_size", side)
    if isinstance(crop, Mapping):
        crop = [crop.get("height"), crop.get("width")]
    if crops and _side(crop, f"{where}: crop_size") != side:
        raise UserError(f"{where}: crop_size {crop} differs from the resize to {side}")
    return mode


def _as_dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a JSON object and is {value!r:.80}")
    return dict(value)


def _one_of(value: Any, choices: tuple, where: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int) or value not in choices:
        text = ", ".join(map(str, choices))
        raise UserError(f"{where} is {value!r:.80}: it must be one of {text}")
    return value


def _side(value: Any, where: str) -> int:
    """Return the side of a square, from a number or a pair of equal numbers."""
    sides = value if isinstance(value, list | tuple) else [value]
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not whole or len(sides) not in (1, 2) or len(set(sides)) != 1 or sides[0] < 1:
        raise UserError(f"{where} is {value!r:.80}: only squares are supported")
    return sides[0]


def _is_number(value: Any) -> bool:
    """Return whether it is a finite number below a million, which no mean or deviation reaches."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def _channels(value: Any, where: str, *, positive: bool) -> tuple[float, float, float]:
    """Return three finite numbers; a single one stands for all three, as in open_clip."""
    numbers = value if isinstance(value, list | tuple) else [value] * 3
    good = len(numbers) == 3 and all(_is_number(x) and not (positive and x <= 0) for x in numbers)
    if not good:
        above = " above 0" if positive else ""
        raise UserError(f"{where} is {value!r:.80}: it must be three finite numbers{above}")
    red, green, blue = (float(x) for x in numbers)
    return red, green, blue


def _fill(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 255:
        raise UserError(f"{where} is {value!r:.80}: it must be a whole number from 0 to 255")
    return value
