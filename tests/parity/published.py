"""Compare features of genuine checkpoints, with random weights, to their own library's.

Models are built by open_clip or transformers from a seed, moved off their special starts, saved
in a published format by the library itself, loaded with `clip_jax.load`, and both towers compared
on the same images and tokens. `python tests/parity/published.py [NAME ...]` prints the table.
"""

import copy
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":
    import conftest  # noqa: F401  (before torchvision is imported)

import open_clip
import transformers
from open_clip.factory import get_model_config
from open_clip.model import convert_weights_to_lp
from safetensors.torch import save_file

import clip_jax

Features = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """One model in one format.

    Attributes:
      name: open_clip's name, or transformers' kind: "clip", "siglip", "metaclip_2".
      form: a key of `SAVERS`.
      layers: depth of both towers; None is the whole depth.
      vocab_size: of the text tower; None is its own.
    """

    name: str
    form: str
    layers: int | None = None
    vocab_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of one case: largest difference of the unit features, smallest cosine."""

    case: Case
    image: float
    text: float
    cosine: float
    seconds: float


def move(model: torch.nn.Module) -> torch.nn.Module:
    """Move every weight, gain and statistic of a model off its start; return the model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("logit_scale", "logit_bias"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.02 * noise.to(parameter.dtype)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(1 + torch.rand(buffer.shape, generator=generator))
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def open_clip_cfg(case: Case) -> dict[str, Any]:
    """Return open_clip's own config, at the case's depth and vocabulary."""
    cfg = copy.deepcopy(get_model_config(case.name))
    if case.layers is not None:
        cfg["text_cfg"]["layers"] = case.layers
        if isinstance(cfg["vision_cfg"].get("layers"), list):
            cfg["vision_cfg"]["layers"] = [case.layers] * 4
        elif "layers" in cfg["vision_cfg"]:
            cfg["vision_cfg"]["layers"] = case.layers
    if case.vocab_size is not None:
        cfg["text_cfg"]["vocab_size"] = case.vocab_size
    return cfg


def open_clip_model(cfg: dict[str, Any]) -> torch.nn.Module:
    """Return the model of a config, without open_clip's look-ups on the network."""
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if cfg.get("custom_text") else open_clip.CLIP
    return move(kind(**{k: v for k, v in cfg.items() if k != "custom_text"}))


def save_open_clip_folder(case: Case, folder: Path) -> tuple[torch.nn.Module, Path, str | None]:
    cfg = open_clip_cfg(case)
    model = open_clip_model(cfg)
    values = {"model_cfg": cfg, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return model, folder, None


def save_open_clip_training(case: Case, folder: Path) -> tuple[torch.nn.Module, Path, str | None]:
    """Save as open_clip's training does from several devices."""
    model = open_clip_model(open_clip_cfg(case))
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(list(model.parameters())[:2])
    wrapper = {"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}
    torch.save(wrapper, folder / "epoch_3.pt")
    return model, folder / "epoch_3.pt", case.name


class Archive(torch.nn.Module):
    """A model's parts under their own names, with the three sizes that OpenAI keeps as buffers."""

    def __init__(self, model: torch.nn.Module, sizes: dict[str, int]):
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, size in sizes.items():
            self.register_buffer(name, torch.tensor(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.input_resolution


def save_openai(case: Case, folder: Path) -> tuple[torch.nn.Module, Path, str | None]:
    """Save as OpenAI published them: TorchScript, weights of products in float16, three sizes."""
    cfg = open_clip_cfg(case)
    model = open_clip_model(cfg)
    convert_weights_to_lp(model)
    sizes = {
        "input_resolution": cfg["vision_cfg"]["image_size"],
        "context_length": cfg["text_cfg"]["context_length"],
        "vocab_size": cfg["text_cfg"]["vocab_size"],
    }
    torch.jit.trace(Archive(model, sizes), torch.zeros(1)).save(folder / "model.pt")
    # OpenAI's own code computes in float32 on a CPU, with the rounded weights. Any name will do.
    return model.float(), folder / "model.pt", "ViT-B-32"


def save_hf(case: Case, folder: Path) -> tuple[torch.nn.Module, Path, str | None]:
    """Save as a folder of transformers, in shards."""
    names = {"clip": "CLIP", "siglip": "Siglip", "metaclip_2": "MetaClip2"}
    text: dict[str, Any] = {} if case.vocab_size is None else {"vocab_size": case.vocab_size}
    if case.vocab_size is not None:
        text["eos_token_id"] = case.vocab_size - 1
    depth = {} if case.layers is None else {"num_hidden_layers": case.layers}
    config = getattr(transformers, f"{names[case.name]}Config")(
        text_config=text | depth, vision_config=depth
    )
    torch.manual_seed(0)
    model = move(getattr(transformers, f"{names[case.name]}Model")(config))
    model.save_pretrained(folder, max_shard_size="100MB")
    return model, folder, None


Saver = Callable[[Case, Path], tuple[torch.nn.Module, Path, str | None]]
SAVERS: dict[str, Saver] = {
    "open_clip folder": save_open_clip_folder,
    "open_clip training": save_open_clip_training,
    "OpenAI archive": save_openai,
    "Hugging Face folder": save_hf,
}


def reference(model: torch.nn.Module, images: torch.Tensor, tokens: torch.Tensor) -> Features:
    """Return the library's own unit features of images and texts."""
    with torch.no_grad():
        if hasattr(model, "encode_image"):
            z = [model.encode_image(images), model.encode_text(tokens)]
        else:
            z = [model.get_image_features(pixel_values=images).pooler_output]
            z.append(model.get_text_features(input_ids=tokens).pooler_output)
        image, text = (torch.nn.functional.normalize(x, dim=-1).numpy() for x in z)
    return image, text


def inputs(clip: Any, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return normalized images [B, H, W, 3], and tokens [B, L] that end at different places."""
    rng = np.random.default_rng(0)
    size, text = clip.config.vision.image_size, clip.config.text
    images = rng.standard_normal((count, size, size, 3)).astype(np.float32)
    tokens = rng.integers(3, min(text.vocab_size, 30_000) - 2, (count, text.context_length))
    for row, end in zip(tokens, (4, 9, text.context_length - 1), strict=True):
        # transformers' own default for SigLIP is outside of its vocabulary.
        row[end] = text.eot_id if text.eot_id < text.vocab_size else 1
        # At the largest id is where open_clip reads; padding is 0.
        row[end + 1 :] = 0
    return images, tokens.astype(np.int32)


def difference(model: torch.nn.Module, clip: Any) -> tuple[float, float, float]:
    """Return the largest image and text difference and smallest cosine of unit features."""
    images, tokens = inputs(clip)
    features = np.asarray(clip.encode_image(images)), np.asarray(clip.encode_text(tokens))
    expected = reference(
        model, torch.from_numpy(images.transpose(0, 3, 1, 2)), torch.from_numpy(tokens).long()
    )
    image, text = (float(np.abs(a - b).max()) for a, b in zip(features, expected, strict=True))
    pairs = zip(features, expected, strict=True)
    cosine = min(float((np.float64(a) * b).sum(-1).min()) for a, b in pairs)
    return image, text, cosine


def compare(case: Case, folder: Path) -> Comparison:
    """Save, load and compare one model."""
    start = time.perf_counter()
    model, path, name = SAVERS[case.form](case, folder)
    clip = clip_jax.load(path, model=name)
    return Comparison(case, *difference(model, clip), time.perf_counter() - start)


# One full-size member of every family, each in a format it is published in.
FULL_SIZE = [
    Case("ViT-B-32-quickgelu", "OpenAI archive"),
    Case("ViT-L-14-quickgelu", "OpenAI archive"),
    Case("RN50-quickgelu", "OpenAI archive"),
    Case("RN50x4-quickgelu", "OpenAI archive"),
    Case("ViT-B-32", "open_clip training"),
    Case("ViT-B-16-plus-240", "open_clip folder"),
    Case("ViT-B-16-SigLIP", "open_clip folder"),
    Case("ViT-B-16-SigLIP2", "open_clip folder"),
    Case("clip", "Hugging Face folder"),
    Case("siglip", "Hugging Face folder"),
    # Reduced depth, full widths.
    Case("ViT-L-14-CLIPA", "open_clip folder", layers=3),
    Case("ViT-H-14-CLIPA-336", "open_clip folder", layers=2),
    Case("ViT-bigG-14", "open_clip folder", layers=2),
    Case("ViT-g-14", "open_clip folder", layers=2),
    Case("ViT-e-14", "open_clip folder", layers=2),
    Case("ViT-M-16-alt", "open_clip folder"),
    Case("ViT-H-14-378-quickgelu", "open_clip folder", layers=2),
    Case("ViT-H-14-worldwide", "open_clip folder", layers=2, vocab_size=50_000),
    Case("ViT-SO400M-16-SigLIP-i18n-256", "open_clip folder", layers=2, vocab_size=32_000),
]


def main() -> None:
    """Print the table of docs/models.md."""
    print("| model | format | depth | image | text | smallest cosine |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for case in [case for case in FULL_SIZE if not sys.argv[1:] or case.name in sys.argv[1:]]:
        with tempfile.TemporaryDirectory() as folder:
            row = compare(case, Path(folder))
        depth = "full" if case.layers is None else str(case.layers)
        print(
            f"| `{case.name}` | {case.form} | {depth} | {row.image:.1e} | {row.text:.1e} "
            f"| {row.cosine:.8f} |",
            flush=True,
        )
        print(f"{case.name}: {row.seconds:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
