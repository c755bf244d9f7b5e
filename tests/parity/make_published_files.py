"""Write tests/golden/published: tiny models by the genuine libraries, and their own features.

    python tests/parity/make_published_files.py

They keep `clip_jax.load` in check where PyTorch is not installed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (before torchvision is imported)
import numpy as np
import published
import torch
import transformers
from open_clip.model import convert_weights_to_lp
from safetensors.torch import save_file

FOLDER = Path(__file__).parent.parent / "golden" / "published"
VOCABULARY, LENGTH, SIZE = 40, 10, 16

OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
        "mlp_ratio": 2.0,
    },
    "text_cfg": {
        "context_length": LENGTH,
        "vocab_size": VOCABULARY,
        "width": 32,
        "heads": 2,
        "layers": 1,
        "mlp_ratio": 2.0,
    },
}
# Heads of 64 features, which is how OpenAI's files are read.
OPENAI: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {
        "context_length": LENGTH,
        "vocab_size": VOCABULARY,
        "width": 64,
        "heads": 1,
        "layers": 1,
    },
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
VISION = {"image_size": SIZE, "patch_size": 8}


def open_clip_folder(folder: Path) -> torch.nn.Module:
    model = published.open_clip_model(OPEN_CLIP)
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}
    values = {"model_cfg": OPEN_CLIP, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(values, indent=1) + "\n")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def openai_file(folder: Path) -> torch.nn.Module:
    model = published.open_clip_model(OPENAI)
    convert_weights_to_lp(model)
    sizes = {"input_resolution": SIZE, "context_length": LENGTH, "vocab_size": VOCABULARY}
    archive = published.Archive(model, sizes)
    torch.jit.trace(archive, torch.zeros(1)).save(folder / "model.pt")
    return model.float()


def hf_folder(folder: Path, kind: str) -> torch.nn.Module:
    text, vision = SIZES | TEXT | {"eos_token_id": VOCABULARY - 1}, SIZES | VISION
    projection = {"projection_dim": 16} if kind == "CLIP" else {}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, **projection
    )
    torch.manual_seed(0)
    model = published.move(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(folder)
    return model


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    makers = {
        "open_clip": open_clip_folder,
        "openai": openai_file,
        "hf_clip": lambda folder: hf_folder(folder, "CLIP"),
        "hf_siglip": lambda folder: hf_folder(folder, "Siglip"),
    }
    rng = np.random.default_rng(0)
    images = rng.standard_normal((3, SIZE, SIZE, 3)).astype(np.float32)
    tokens = rng.integers(1, VOCABULARY - 1, (3, LENGTH)).astype(np.int32)
    for row, end in zip(tokens, (3, 6, LENGTH - 1), strict=True):
        row[end], row[end + 1 :] = VOCABULARY - 1, 0
    arrays = {"images": images, "tokens": tokens}
    for name, make in makers.items():
        folder = FOLDER / name
        folder.mkdir(parents=True)
        model = make(folder)
        image, text = published.reference(
            model, torch.from_numpy(images.transpose(0, 3, 1, 2)), torch.from_numpy(tokens).long()
        )
        arrays |= {f"{name}_image": image, f"{name}_text": text}
    np.savez(FOLDER / "features.npz", **arrays)


if __name__ == "__main__":
    main()
