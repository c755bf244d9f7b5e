"""A loaded model for notebooks and commands: jitted `encode_image` / `encode_text`, `classify`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from clip_jax.checkpoint import Checkpoints
from clip_jax.data.images import IMAGE_MEAN, IMAGE_STD, eval_transform
from clip_jax.errors import UserError
from clip_jax.evaluation.zero_shot import class_embeddings
from clip_jax.models.clip import CLIP, CLIPConfig, unit_length
from clip_jax.models.zoo import model_config
from clip_jax.state import init_variables
from clip_jax.step import make_encoders
from clip_jax.tokenizers import make_tokenizer
from clip_jax.typing import Tokenizer
from clip_jax.workdir import read_description

TEXT_BATCH = 256


class LoadedCLIP:
    """A model, its parameters, its tokenizer and its preprocessing.

    Attributes:
      config: the sizes of both towers.
      params: the parameter pytree, float32.
      batch_stats: a ResNet's running statistics; empty for a ViT.
      tokenizer: captions to ids.
    """

    def __init__(
        self, config: CLIPConfig, params: Any, batch_stats: Any, tokenizer: Tokenizer
    ) -> None:
        self.config = config
        self.params = params
        self.batch_stats = batch_stats
        self.tokenizer = tokenizer
        self._encode_image, self._encode_text = make_encoders(
            CLIP(config), image_mean=IMAGE_MEAN, image_std=IMAGE_STD
        )
        self._unit_length = jax.jit(unit_length)

    @property
    def logit_scale(self) -> jax.Array:
        """The logarithm of the scale (of the inverse temperature), as stored; a scalar."""
        return self.params["logit_scale"]

    @property
    def scale(self) -> float:
        """exp(logit_scale), the factor between cosines and logits."""
        return float(jnp.exp(self.logit_scale))

    @property
    def _variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}

    def preprocess(self, images: Image.Image | Sequence[Image.Image]) -> np.ndarray:
        """PIL pictures through CLIP's evaluation transform: uint8 [batch, height, width, 3].

        They stay uint8 until `encode_image` normalises them on the device.
        """
        if isinstance(images, Image.Image):
            images = [images]
        size = self.config.vision.image_size
        return np.stack([eval_transform(image, size) for image in images])

    def tokenize(self, texts: str | Sequence[str]) -> np.ndarray:
        """Captions to ids, int32 [batch, context_length]; too long ones are cut, end token kept."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self.tokenizer(texts, self.config.text.context_length)

    def encode_image(self, images: np.ndarray | jax.Array, normalize: bool = True) -> jax.Array:
        """Image features, float32 [batch, embed_dim], of unit length unless `normalize=False`.

        Args:
          images: [batch, height, width, 3]; uint8 as `preprocess` returns them, or floats that
            are normalised already.

        Raises:
          UserError: the shape is not what the model takes.
        """
        size = self.config.vision.image_size
        images = jnp.asarray(images)
        if images.shape[1:] != (size, size, 3):
            raise UserError(
                f"encode_image takes [batch, {size}, {size}, 3] and got "
                f"{list(images.shape)}; make it with preprocess()"
            )
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"encode_image takes uint8 or normalised floats and got {images.dtype}")
        z_BD = self._encode_image(self._variables, images)
        return self._unit_length(z_BD) if normalize else z_BD

    def encode_text(self, tokens: np.ndarray | jax.Array, normalize: bool = True) -> jax.Array:
        """Text features, float32 [batch, embed_dim], of unit length unless `normalize=False`.

        Args:
          tokens: int32 [batch, length] as `tokenize` returns them; length may be shorter.

        Raises:
          UserError: the shape is not what the model takes.
        """
        longest = self.config.text.context_length
        if tokens.ndim != 2 or tokens.shape[1] > longest:
            raise UserError(
                f"encode_text takes [batch, at most {longest}] token ids and got "
                f"{list(tokens.shape)}; make them with tokenize()"
            )
        z_BD = self._encode_text(self._variables, jnp.asarray(tokens, jnp.int32))
        return self._unit_length(z_BD) if normalize else z_BD

    def classify(
        self,
        images: np.ndarray | jax.Array,
        class_names: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
    ) -> jax.Array:
        """Zero-shot probabilities, float32 [batch, classes] (paper, section 3.1.2).

        Raises:
          UserError: a template lacks its {}, or there are no class names.
        """
        class_MD = class_embeddings(
            self.encode_text,
            self.tokenizer,
            class_names,
            templates,
            batch_size=TEXT_BATCH,
            context_length=self.config.text.context_length,
        )
        logits_BM = self.scale * self.encode_image(images) @ jnp.asarray(class_MD).T
        return jax.nn.softmax(logits_BM, axis=-1)


def create(name: str, seed: int = 0) -> LoadedCLIP:
    """A model of the zoo with random weights.

    Raises:
      UserError: no model has that name.
    """
    config = model_config(name)
    variables = jax.jit(lambda: init_variables(CLIP(config), seed))()
    return LoadedCLIP(
        config, variables["params"], variables.get("batch_stats", {}), make_tokenizer("clip")
    )


def load(path: str | Path) -> LoadedCLIP:
    """The model of a work folder, from its newest undamaged checkpoint.

    Raises:
      UserError: the folder is not a work folder, or has no checkpoint.
    """
    description = read_description(path)
    model = CLIP(description.model)
    shapes = jax.eval_shape(lambda: init_variables(model, 0))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        {"params": shapes["params"], "batch_stats": shapes.get("batch_stats", {})},
    )
    checkpoints = Checkpoints(path, read_only=True)
    try:
        found = checkpoints.restore_model(shapes)
    finally:
        checkpoints.close()
    if found is None:
        raise UserError(f"{path} has no checkpoint yet; train until the first one is saved")
    variables, _ = found
    return LoadedCLIP(
        description.model,
        variables["params"],
        variables["batch_stats"],
        make_tokenizer(description.tokenizer),
    )
