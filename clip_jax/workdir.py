"""What a work folder says of itself: `config.json`, enough to load the model without the code
that made it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
VISION_KINDS = {"vit": ViTConfig, "resnet": ResNetConfig, "convnet": ConvNetConfig}


@dataclasses.dataclass(frozen=True)
class Description:
    """A model as a work folder keeps it.

    Attributes:
      model_name: its row of the zoo.
      model: its sizes, the tokenizer's included.
      tokenizer: "clip", or a file in the work folder.
      config: the resolved experiment, as nested dicts.
    """

    model_name: str
    model: CLIPConfig
    tokenizer: str
    config: dict[str, Any]


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
    if tokenizer != "clip":
        target = workdir / TOKENIZER_FILE
        if Path(tokenizer).absolute() != target.absolute():
            shutil.copyfile(tokenizer, target)
        tokenizer = TOKENIZER_FILE
    description = dataclasses.replace(description, tokenizer=tokenizer)
    made = {**dataclasses.asdict(description), "model": model_to_json(description.model)}
    part = workdir / (FILE + ".part")
    part.write_text(json.dumps(made, indent=2) + "\n")
    part.rename(workdir / FILE)
    return description


def read_description(workdir: str | Path) -> Description:
    """The description in a work folder, its tokenizer's path made absolute.

    Raises:
      UserError: the folder or its `config.json` is missing or damaged.
    """
    path = Path(workdir) / FILE
    try:
        values = json.loads(path.read_text())
        tokenizer = values["tokenizer"]
        if tokenizer != "clip":
            tokenizer = str(Path(workdir) / tokenizer)
        return Description(
            model_name=values["model_name"],
            model=model_from_json(values["model"]),
            tokenizer=tokenizer,
            config=values["config"],
        )
    except FileNotFoundError:
        raise UserError(
            f"{workdir} is not a work folder: it has no {FILE}; give the --workdir of a run"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from None
