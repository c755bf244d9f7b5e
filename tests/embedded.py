"""A tiny model in a work folder, and encoders of a few lines, for tests of embeddings."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from data_cases import ToyTokenizer
from tiny import VIT

from clip_jax.embeddings.folder import EmbeddingInfo
from clip_jax.embeddings.write import open_images
from clip_jax.evaluation.encoders import Encoders
from clip_jax.models.clip import CLIP, init_variables
from clip_jax.pretrained.trees import from_variables
from clip_jax.pretrained.work_folder import RunDescription, write_work_folder
from clip_jax.tokenizers import TokenizerSpec, make_tokenizer

SIDE = 12


def write_tiny_model(folder: Path, tokenizer: Path, seed: int = 0) -> Path:
    """Write a work folder with random weights and this SentencePiece tokenizer."""
    spec = TokenizerSpec("sentencepiece", str(tokenizer))
    loaded = make_tokenizer(spec)
    text = dataclasses.replace(VIT.text, vocab_size=loaded.vocab_size, eot_id=loaded.eot_id)
    config = dataclasses.replace(VIT, text=text)
    folder.mkdir(parents=True)
    variables = jax.jit(lambda: init_variables(CLIP(config), seed))()
    write_work_folder(
        folder, RunDescription("tiny", config, spec), from_variables(variables["params"], {})
    )
    return folder


def toy_encoders(dim: int = 8, after: int | None = None) -> Encoders:
    """Make encoders of linear maps; with `after`, images end like a kill after so many batches."""
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(SIDE * SIDE * 3, dim)).astype(np.float32)
    words = rng.normal(size=(100, dim)).astype(np.float32)
    calls = iter(range(10**9) if after is None else range(after))

    def image(images):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return (images.reshape(len(images), -1) / np.float32(255) - np.float32(0.5)) @ pixels

    def text(tokens):
        return (words[tokens] * (tokens > 0)[..., None]).sum(axis=1)

    return Encoders(
        image,
        text,
        ToyTokenizer(),
        image_size=SIDE,
        context_length=16,
        embed_dim=dim,
        scale=100.0,
        name="toy",
        identity="a",
    )


def toy_info(data: str, **changes) -> EmbeddingInfo:
    """Return the info of a folder of `toy_encoders`: parts of 16, batches of 8."""
    samples = sum(map(len, open_images(data)))
    info = EmbeddingInfo(
        "toy", "", "", "toy", "a", 8, data, "f", samples, part_rows=16, batch_size=8
    )
    return dataclasses.replace(info, **changes)
