"""What a work folder says of itself: `config.json`, enough to load the model without the code
that made it. Weights are checkpoints of a run, or one `model.safetensors` that was converted."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from clip_jax.data.images import OPENAI, Preprocess
from clip_jax.errors import UserError, short
from clip_jax.files import atomic_write
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.pretrained.preprocess import preprocess_from_json, preprocess_to_json
from clip_jax.tokenizers.spec import TokenizerSpec, spec_from_json, spec_to_json

FILE = "config.json"
WEIGHTS = "model.safetensors"
VISION_KINDS = {"vit": ViTConfig, "resnet": ResNetConfig, "convnet": ConvNetConfig}


@dataclasses.dataclass(frozen=True)
class Description:
    """A model as a work folder keeps it.

    Attributes:
      model_name: its row of the zoo.
      model: its sizes, the tokenizer's included.
      tokenizer: its file, where it has one, lies in the work folder; None is none that is known.
      preprocess: how images are made for the model.
      config: the resolved experiment, as nested dicts; empty for a converted model.
    """

    model_name: str
    model: CLIPConfig
    tokenizer: TokenizerSpec | None
    preprocess: Preprocess = OPENAI
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


def model_to_json(config: CLIPConfig) -> dict[str, Any]:
    """The sizes of a model as JSON."""
    (kind,) = (k for k, cls in VISION_KINDS.items() if isinstance(config.vision, cls))
    made = dataclasses.asdict(config)
    made["vision"] = {"kind": kind, **made["vision"]}
    # One form, whether the dict is fresh or was read back: lists instead of tuples.
    return json.loads(json.dumps(made))


def model_from_json(values: dict[str, Any]) -> CLIPConfig:
    """The sizes `model_to_json` wrote.

    Folders written before each tower had its own activation hold one of the whole model.
    """
    vision, text = dict(values["vision"]), dict(values["text"])
    rest = {k: v for k, v in values.items() if k not in ("vision", "text", "activation")}
    cls = VISION_KINDS[vision.pop("kind")]
    vision = {k: tuple(v) if isinstance(v, list) else v for k, v in vision.items()}
    if "activation" in values:
        text["activation"] = values["activation"]
        if cls is ViTConfig:
            vision["activation"] = values["activation"]
    return CLIPConfig(**rest, vision=cls(**vision), text=TextConfig(**text))


def write_description(workdir: Path, description: Description) -> Description:
    """Write `config.json`, and a copy of a tokenizer's file; return what was written."""
    tokenizer = description.tokenizer
    if tokenizer is not None and tokenizer.file is not None:
        target = workdir / f"tokenizer{Path(tokenizer.file).suffix}"
        if Path(tokenizer.file).absolute() != target.absolute():
            shutil.copyfile(tokenizer.file, target)
        tokenizer = dataclasses.replace(tokenizer, file=target.name)
    description = dataclasses.replace(description, tokenizer=tokenizer)
    made = {
        "model_name": description.model_name,
        "model": model_to_json(description.model),
        "tokenizer": None if tokenizer is None else spec_to_json(tokenizer),
        "preprocess": preprocess_to_json(description.preprocess),
        "config": description.config,
    }
    with atomic_write(workdir / FILE) as partial:
        partial.write_text(json.dumps(made, indent=2) + "\n")
    return description


def read_description(workdir: str | Path) -> Description:
    """The description in a work folder, its tokenizer's path made absolute.

    Raises:
      UserError: the folder or its `config.json` is missing or damaged.
    """
    path = Path(workdir) / FILE
    try:
        values = json.loads(path.read_text())
        tokenizer = None
        if values["tokenizer"] is not None:
            tokenizer = spec_from_json(values["tokenizer"], where=f"{path}: tokenizer")
            if tokenizer.file is not None:
                tokenizer = dataclasses.replace(tokenizer, file=str(Path(workdir) / tokenizer.file))
        return Description(
            model_name=values["model_name"],
            model=model_from_json(values["model"]),
            tokenizer=tokenizer,
            preprocess=preprocess_from_json(
                values.get("preprocess", {}), where=f"{path}: preprocess"
            ),
            config=values["config"],
        )
    except FileNotFoundError:
        raise UserError(
            f"{workdir} is not a work folder: it has no {FILE}; give the --workdir of a run"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({short(error)})") from None
