"""Load or create a model for notebooks and commands: `encode_image`, `encode_text`, `classify`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from clip_jax.data.images import OPENAI, Preprocess, eval_transform
from clip_jax.errors import UserError
from clip_jax.evaluation.encoders import Encoders, mesh_encoders
from clip_jax.evaluation.zero_shot import class_embeddings
from clip_jax.models.clip import CLIP, CLIPConfig, init_variables, unit_length
from clip_jax.models.relevance import make_relevance
from clip_jax.models.zoo import model_config
from clip_jax.parallel.mesh import device_target, make_mesh
from clip_jax.pretrained.load import tokenizer_family
from clip_jax.pretrained.resize import resize_checkpoint
from clip_jax.pretrained.tags import family_preprocess
from clip_jax.sections import EvalSection
from clip_jax.tokenizers import TokenizerSpec, make_tokenizer, spec_digest, tokenizer_from_file
from clip_jax.training.checkpoint import tree_digests
from clip_jax.training.step import make_encoders, normalize_images, unit_range
from clip_jax.training.warm_start import (
    place_arrays,
    read_source,
    restore_run,
    sharded_variable_shapes,
)
from clip_jax.typing import Tokenizer

TEXT_BATCH = 256


class LoadedCLIP:
    """A model, its parameters, its tokenizer and its preprocessing.

    Attributes:
      name: of the zoo's entry, or of the file.
      config: the sizes of both towers.
      params: the parameter pytree, float32.
      batch_stats: a ResNet's running statistics; empty for a ViT.
      preprocessing: how images are made for it.
      tokenizer_spec: which tokenizer it was trained with; None where that is not known.
      tokenizer: captions to ids; None where it is not known.
    """

    def __init__(
        self,
        name: str,
        config: CLIPConfig,
        variables: Mapping[str, Any],
        *,
        tokenizer_spec: TokenizerSpec | None = None,
        preprocessing: Preprocess = OPENAI,
    ) -> None:
        self.name = name
        self.config = config
        self.params = variables["params"]
        self.batch_stats = variables.get("batch_stats", {})
        self.preprocessing = preprocessing
        self.tokenizer_spec = tokenizer_spec
        self.tokenizer = None if tokenizer_spec is None else make_tokenizer(tokenizer_spec)
        model = CLIP(config, target=device_target(jax.devices()[0]))
        self._encode_image, self._encode_text = make_encoders(model, preprocessing)
        self._unit_length = jax.jit(unit_length)
        self._relevance = jax.jit(make_relevance(model))

    def known_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
          UserError: the checkpoint came without one.
        """
        if self.tokenizer is None:
            raise UserError(
                f"{self.name} came without its tokenizer; give load(..., tokenizer=) the path of "
                "its tokenizer.json or SentencePiece .model"
            )
        return self.tokenizer

    @property
    def logit_scale(self) -> jax.Array:
        """The logarithm of the scale (of the inverse temperature) as it is stored, a scalar."""
        return self.params["logit_scale"]

    @property
    def scale(self) -> float:
        """The factor exp(logit_scale) that multiplies cosines to give logits."""
        return float(jnp.exp(self.logit_scale))

    @property
    def _variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}

    def preprocess(self, images: Image.Image | Sequence[Image.Image]) -> np.ndarray:
        """Prepare PIL images as the model takes them: uint8 [batch, height, width, 3].

        They stay uint8 until `encode_image` normalizes them on the device.
        """
        if isinstance(images, Image.Image):
            images = [images]
        size = self.config.vision.image_size
        return np.stack([eval_transform(image, size, self.preprocessing) for image in images])

    def tokenize(self, texts: str | Sequence[str]) -> np.ndarray:
        """Turn captions into ids, int32 [batch, context_length].

        A caption that is too long is cut and keeps its end token.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self.known_tokenizer()(texts, self.config.text.context_length)

    def encode_image(self, images: np.ndarray | jax.Array, normalize: bool = True) -> jax.Array:
        """Encode images: float32 [batch, embed_dim], of unit length unless `normalize=False`.

        Args:
          images: [batch, height, width, 3]; uint8 as `preprocess` returns them, or floats that
            are normalized already.

        Raises:
          UserError: the shape is not what the model takes.
        """
        z_BD = self._encode_image(self._variables, self._check_images(images, "encode_image"))
        return self._unit_length(z_BD) if normalize else z_BD

    def _check_images(self, images: np.ndarray | jax.Array, method: str) -> jax.Array:
        """Return the images as an array, or raise UserError with the method's name."""
        size = self.config.vision.image_size
        images = jnp.asarray(images)
        if images.shape[1:] != (size, size, 3):
            raise UserError(
                f"{method} takes [batch, {size}, {size}, 3] and got "
                f"{list(images.shape)}; make it with preprocess()"
            )
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"{method} takes uint8 or normalized floats and got {images.dtype}")
        return images

    def encode_text(self, tokens: np.ndarray | jax.Array, normalize: bool = True) -> jax.Array:
        """Encode captions: float32 [batch, embed_dim], of unit length unless `normalize=False`.

        Args:
          tokens: int32 [batch, length] as `tokenize` returns them; length may be shorter, except
            for SigLIP and CLIPA, which see or read their padding.

        Raises:
          UserError: the shape is not what the model takes.
        """
        text = self.config.text
        longest = text.context_length
        shortest = 1 if text.supports_trimming else longest
        if tokens.ndim != 2 or not shortest <= tokens.shape[1] <= longest:
            takes = f"at most {longest}" if text.supports_trimming else f"{longest}"
            raise UserError(
                f"encode_text takes [batch, {takes}] token ids and got "
                f"{list(tokens.shape)}; make them with tokenize()"
            )
        z_BD = self._encode_text(self._variables, jnp.asarray(tokens, jnp.int32))
        return self._unit_length(z_BD) if normalize else z_BD

    def classify(
        self,
        images: np.ndarray | jax.Array,
        class_names: Sequence[str],
        templates: Sequence[str] = EvalSection.templates,
    ) -> jax.Array:
        """Return zero-shot probabilities, float32 [batch, classes] (paper, section 3.1.2).

        Args:
          images: as `encode_image` takes them.
          class_names: what is asked for.
          templates: prompts with {} for the name; their unit features are averaged.

        Raises:
          UserError: a template lacks its {}, or there are no class names.
        """
        class_MD = class_embeddings(
            self.encode_text,
            self.known_tokenizer(),
            class_names,
            templates,
            batch_size=TEXT_BATCH,
            context_length=self.config.text.context_length,
        )
        logits_BM = self.scale * self.encode_image(images) @ jnp.asarray(class_MD).T
        return jax.nn.softmax(logits_BM, axis=-1)

    def relevance(self, images: np.ndarray | jax.Array, text: str | Sequence[str]) -> jax.Array:
        """Return what each patch adds to the cosine with a caption, float32 [batch, rows, columns].

        Gradient-weighted attention; see `models.relevance`. Nothing is below zero.

        Args:
          images: as `encode_image` takes them.
          text: a caption for all of them, or one for each.

        Raises:
          UserError: the shape is not what the model takes, or captions are too few or too many.
        """
        images = self._check_images(images, "relevance")
        texts = [text] * len(images) if isinstance(text, str) else list(text)
        if len(texts) != len(images):
            raise UserError(f"relevance got {len(images)} images and {len(texts)} captions")
        if images.dtype == jnp.uint8:
            mean, std = self.preprocessing.mean, self.preprocessing.std
            images = normalize_images(unit_range(images), mean, std)
        z_text_BD = self.encode_text(self.tokenize(texts))
        return self._relevance(self._variables, images, z_text_BD)


def create(name: str, seed: int = 0) -> LoadedCLIP:
    """Make a model of the zoo with random weights.

    Raises:
      UserError: no model has that name.
    """
    config = model_config(name)
    variables = jax.jit(lambda: init_variables(CLIP(config), seed))()
    return LoadedCLIP(
        name,
        config,
        variables,
        tokenizer_spec=TokenizerSpec() if tokenizer_family(config) == "clip" else None,
        preprocessing=family_preprocess(name),
    )


def load(
    path: str | Path,
    model: str | None = None,
    *,
    tokenizer: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    mesh: Mesh | None = None,
) -> LoadedCLIP:
    """Load a run's model, or a published one in any format; see `clip_jax.load`."""
    checkpoint = read_source(str(path), model).checkpoint
    spec = checkpoint.tokenizer
    if tokenizer is not None:
        spec = tokenizer_from_file(tokenizer, tokenizer_family(checkpoint.config))
    if checkpoint.arrays:
        checkpoint = resize_checkpoint(checkpoint, image_size, context_length)
        variables = place_arrays(
            checkpoint.arrays, sharded_variable_shapes(checkpoint.config, mesh)
        )
    elif image_size or context_length:
        raise UserError(f"{path} is a run: its sizes are its own; convert it first")
    else:
        variables = restore_run(path, sharded_variable_shapes(checkpoint.config, mesh))
    return LoadedCLIP(
        checkpoint.name,
        checkpoint.config,
        variables,
        tokenizer_spec=spec,
        preprocessing=checkpoint.preprocess,
    )


def load_encoders(
    model: str, *, architecture: str | None = None, tokenizer: str | None = None
) -> Encoders:
    """Load a model as the evaluators take it, its parameters and batches over all devices.

    Args:
      model: the path, as `load` takes it.
      architecture: a name of the zoo, or "name:tag", for a file that does not say it.
      tokenizer: for a checkpoint that came without one.

    Raises:
      UserError: the path is no checkpoint, or its tokenizer is not known.
    """
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    clip = load(model, architecture, tokenizer=tokenizer, mesh=mesh)
    known, spec = clip.known_tokenizer(), clip.tokenizer_spec
    digests = tree_digests({"params": clip.params, "batch_stats": clip.batch_stats})
    described = json.dumps([digests, repr(clip.config), spec and spec_digest(spec)])
    return mesh_encoders(
        clip.encode_image,
        clip.encode_text,
        mesh,
        config=clip.config,
        tokenizer=known,
        preprocess=clip.preprocessing,
        scale=clip.scale,
        name=clip.name,
        identity=hashlib.blake2b(described.encode(), digest_size=8).hexdigest(),
    )
