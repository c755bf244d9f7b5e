"""CLIP in JAX: train a dual encoder from image-text pairs, classify zero-shot, embed.

    import clip_jax
    clip = clip_jax.load("runs/emoji")          # a work folder
    clip = clip_jax.create("ViT-B/32", seed=0)  # random weights

Importing this starts no device: the heavy parts are imported by the first call.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from clip_jax.api import LoadedCLIP

__all__ = ["UserError", "create", "list_models", "load", "tokenize"]


def load(path: str | Path) -> "LoadedCLIP":
    """The model of a work folder, from its newest undamaged checkpoint.

    Raises:
      UserError: the folder is not a work folder, or has no checkpoint.
    """
    from clip_jax import api

    return api.load(path)


def create(name: str, seed: int = 0) -> "LoadedCLIP":
    """A model of `list_models()` with random weights.

    Raises:
      UserError: no model has that name.
    """
    from clip_jax import api

    return api.create(name, seed)


def list_models() -> list[str]:
    """The names `create` and `config.model.name` know."""
    from clip_jax.models import zoo

    return zoo.list_models()


def tokenize(texts: str | Sequence[str], context_length: int = 77) -> "np.ndarray":
    """CLIP's byte-pair encoding: int32 [batch, context_length], too long texts cut."""
    from clip_jax.tokenizers import make_tokenizer

    return make_tokenizer("clip")([texts] if isinstance(texts, str) else texts, context_length)
