"""A folder as transformers writes SigLIP 2 NaFlex, small and with random weights."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from clip_jax.pretrained.export import HF_SIGLIP_RANKS, with_ranks
from clip_jax.pretrained.hf_config import config_from_hf
from clip_jax.pretrained.layouts import export_arrays
from clip_jax.pretrained.trees import array_shapes

SIDE, POSITIONS, PATCHES = 4, 9, 12
"""Pixels of a patch's side, learned positions, and patches of an image."""
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 2}
CONFIG = {
    "model_type": "siglip2",
    "text_config": {**_SIZES, "vocab_size": 300, "max_position_embeddings": 8},
    "vision_config": {**_SIZES, "num_patches": POSITIONS, "patch_size": SIDE},
}
PROCESSOR = {
    "image_processor_type": "Siglip2ImageProcessor",
    "patch_size": SIDE,
    "max_num_patches": PATCHES,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "resample": 2,
}


def write_naflex(folder: Path, **changes: object) -> Path:
    """Write the folder; `changes` are of the processor's settings."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shapes = array_shapes(config_from_hf(CONFIG, "test"))
    arrays = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    tensors = with_ranks(export_arrays(arrays, "hf_siglip2"), HF_SIGLIP_RANKS)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | changes))
    return folder
