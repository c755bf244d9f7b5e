"""CLIP in JAX: train a dual encoder from image-text pairs, classify zero-shot, embed::

    import clip_jax
    clip = clip_jax.load("runs/emoji")          # a work folder, or any published checkpoint
    clip = clip_jax.load("ViT-B-32:laion2b_s34b_b79k")  # a published model, fetched by its name
    clip = clip_jax.create("ViT-B/32", seed=0)  # random weights

Importing this starts no device: the heavy parts are imported by the first call.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_jax.distribution import mixed_files
from clip_jax.errors import UserError, end_on_sigterm, note

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh

    from clip_jax.api import LoadedCLIP

# Python says so while it looks for the module of `python -m clip_jax.COMMAND`, whose imports take
# seconds in which a scheduler may end it.
if sys.argv[:1] == ["-m"] and any(arg.startswith("clip_jax.") for arg in sys.orig_argv):
    end_on_sigterm()

__all__ = ["UserError", "create", "list_models", "list_pretrained", "load", "tokenize"]

if (_mixed := mixed_files()) is not None:
    note(_mixed)


def load(
    path: str | Path,
    model: str | None = None,
    *,
    tokenizer: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    mesh: "Mesh | None" = None,
    dtype: str = "float32",
    towers: str = "both",
    adapters: str | Path | None = None,
) -> "LoadedCLIP":
    """Load a model: a run's work folder, a published checkpoint, or a published model by its name.

    Names are open_clip's "model:tag", "hf-hub:owner/name" (and "@revision") and OpenAI's
    "ViT-B/32". Their files are fetched once, to the cache of `huggingface_hub`, and checked.

    OpenAI's `.pt`; open_clip's `.pt`, `.bin` and `.safetensors`; folders of open_clip and Hugging
    Face (CLIP, MetaCLIP 2, SigLIP, SigLIP 2 NaFlex); big_vision's `.npz`; work folders. Nothing in
    a file is run.
    Activation and preprocessing are those the weights were trained with.

    Args:
      path: the file, folder or name. Of a run, its newest undamaged checkpoint is taken.
      model: for files that do not say it: a name of `list_models()`, or "name:tag" of
        `list_pretrained()`, as in "ViT-B-32:metaclip_400m".
      tokenizer: "clip", or the path of a `tokenizer.json` or SentencePiece `.model`, for
        checkpoints that came without one.
      image_size, context_length: other than the checkpoint's; positions are interpolated.
      mesh: places every array by the rules of `clip_jax.parallel.sharding`; None takes the first
        device.
      dtype: "bfloat16" halves the memory of the weights: activations and matrices are bfloat16,
        results float32.
      towers: "image" or "text" loads one tower; the other's arrays are not read.
      adapters: a folder of low-rank adapters in PEFT's files, which are merged in.

    Raises:
      UserError: the path is no checkpoint, is damaged, or holds another model; or a name is none,
        or its files cannot be fetched.
    """
    from clip_jax import api

    return api.load(
        path,
        model,
        tokenizer=tokenizer,
        image_size=image_size,
        context_length=context_length,
        mesh=mesh,
        dtype=dtype,
        towers=towers,
        adapters=adapters,
    )


def create(name: str, seed: int = 0) -> "LoadedCLIP":
    """Make a model of `list_models()` with random weights; nothing is fetched.

    Raises:
      UserError: no model has that name.
    """
    from clip_jax import api

    return api.create(name, seed)


def list_models() -> list[str]:
    """Return the names that `create` and `config.model.name` know.

    >>> "ViT-B/32" in list_models()
    True
    """
    from clip_jax.models import zoo

    return zoo.list_models()


def list_pretrained() -> list[tuple[str, str]]:
    """Return open_clip's published (model, tag) pairs that `load("model:tag")` fetches and loads.

    `load(file, "model:tag")` reads a file of one that is there already.

    >>> ("ViT-B-32", "laion2b_s34b_b79k") in list_pretrained()
    True
    """
    from clip_jax.pretrained import tags

    return tags.list_pretrained()


def tokenize(texts: str | Sequence[str], context_length: int = 77) -> "np.ndarray":
    """Encode texts by CLIP's byte pairs: int32 [batch, context_length]; too long ones are cut.

    >>> tokenize(["a red heart", "pizza"], 6)
    array([[49406,   320,   736,  1936, 49407,     0],
           [49406,  4474, 49407,     0,     0,     0]], dtype=int32)

    Raises:
      UserError: one is no text, or the length is no whole number of at least 2.
    """
    from clip_jax.api_inputs import text_items, whole_number
    from clip_jax.tokenizers import make_tokenizer

    length = whole_number(context_length, "tokenize: context_length")
    return make_tokenizer("clip")(text_items(texts, "tokenize"), length)
