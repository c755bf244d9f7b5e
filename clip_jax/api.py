"""Load or create a model for notebooks and commands.

`encode_image` and `encode_text` give features, `logits`, `probabilities` and `classify` what is
made of them, `image_states` and `text_states` what precedes them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from clip_jax.api_inputs import (
    as_array,
    block_numbers,
    check_normalized,
    check_patches,
    image_items,
    is_array,
    is_text,
    pil_image,
    several,
    shown,
    text_items,
    token_ids,
)
from clip_jax.api_inputs import class_names as check_class_names
from clip_jax.data.images import OPENAI, ImageError, Preprocess, eval_transform
from clip_jax.data.patches import PatchShape
from clip_jax.errors import UserError, check_choice
from clip_jax.evaluation.encoders import Encoders, image_size, mesh_encoders
from clip_jax.evaluation.prompts import load_templates
from clip_jax.evaluation.zero_shot import class_embeddings
from clip_jax.models.clip import CLIP, CLIPConfig, init_variables, unit_length
from clip_jax.models.execution import DTYPES
from clip_jax.models.naflex import ImagePatches, NaFlexConfig, canvas_patches
from clip_jax.models.relevance import make_relevance
from clip_jax.models.states import TOWERS, StatesFn, TowerStates, make_states
from clip_jax.models.zoo import model_config
from clip_jax.parallel.jax_internals import draws_as_gpu_kernels
from clip_jax.parallel.mesh import device_target, make_mesh, mesh_target
from clip_jax.pretrained.load import tokenizer_family
from clip_jax.pretrained.peft import with_peft
from clip_jax.pretrained.preprocess import MAX_PATCHES
from clip_jax.pretrained.resize import resize_checkpoint
from clip_jax.pretrained.tags import family_preprocess
from clip_jax.pretrained.trees import by_path, to_variables
from clip_jax.sections import EvalSection
from clip_jax.tokenizers import TokenizerSpec, make_tokenizer, spec_digest, tokenizer_from_file
from clip_jax.training.bucket_copy import local_copy
from clip_jax.training.checkpoint import not_finite, tree_digests
from clip_jax.training.step import make_encoders, model_images
from clip_jax.training.warm_start import (
    place_arrays,
    read_source,
    restore_run,
    sharded_variable_shapes,
)
from clip_jax.typing import Tokenizer

TEXT_BATCH = 256

OneImage = Image.Image | np.ndarray | str | Path | bytes
ImageInput = OneImage | jax.Array | ImagePatches | Iterable[OneImage]
"""One image or several: PIL images, files of images, or arrays of pixels [height, width, 3]; or
what `preprocess` has made of them."""
TextInput = str | np.ndarray | jax.Array | Iterable[str] | Sequence[int] | Sequence[Sequence[int]]
"""One text or several: captions, or token ids."""


class LoadedCLIP:
    """A model, its parameters, its tokenizer and its preprocessing.

    Attributes:
      name: of the zoo's entry, or of the file.
      config: the sizes of both towers.
      params: the parameter pytree, matrices in `dtype`, all else float32.
      batch_stats: a ResNet's running statistics; empty for a ViT.
      preprocessing: how images are made for it.
      tokenizer_spec: which tokenizer it was trained with; None where that is not known.
      tokenizer: captions to ids; None where it is not known.
      dtype: of activations and matrix products, "float32" or "bfloat16"; results are float32.
    """

    def __init__(
        self,
        name: str,
        config: CLIPConfig,
        variables: Mapping[str, Any],
        *,
        tokenizer_spec: TokenizerSpec | None = None,
        preprocessing: Preprocess = OPENAI,
        dtype: str = "float32",
        mesh: Mesh | None = None,
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.config = config
        self.params = variables["params"]
        self.batch_stats = variables.get("batch_stats", {})
        self.preprocessing = preprocessing
        self.tokenizer_spec = tokenizer_spec
        self.tokenizer = None if tokenizer_spec is None else make_tokenizer(tokenizer_spec)
        target = device_target(jax.devices()[0]) if mesh is None else mesh_target(mesh)
        model = CLIP(config, dtype=jnp.dtype(dtype), target=target)
        # Relevance and states look into blocks in their plain form; the encoders need not.
        self._model = model
        encoders = make_encoders(model.clone(remat="auto"), preprocessing)
        self._encode_image, self._encode_text = encoders
        self._unit_length = jax.jit(unit_length)
        self._relevance = jax.jit(make_relevance(model))
        self._states: dict[tuple[str, tuple[int, ...]], StatesFn] = {}
        self._is_checked = False

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

    def encoders_of_variables(self) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
        """Return the jitted encoders of images and texts, which take other weights first."""
        return self._encode_image, self._encode_text

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

    @property
    def bias(self) -> float:
        """What is added to scaled cosines to give logits: a sigmoid model's, else 0."""
        return float(self.params.get("logit_bias", 0.0))

    @property
    def is_sigmoid(self) -> bool:
        """Whether each pair has a probability of its own (SigLIP), instead of a share of 1."""
        return "logit_bias" in self.params

    def preprocess(
        self, images: ImageInput, *, max_patches: int | None = None
    ) -> np.ndarray | ImagePatches:
        """Prepare images of any size as the model takes them: uint8 [batch, height, width, 3].

        They stay uint8 until `encode_image` normalizes them on the device. A model of images of any
        shape (SigLIP 2 NaFlex) takes `ImagePatches`: patches, mask and grid.

        Args:
          images: PIL images, paths, bytes or open files of images, or uint8 arrays [height, width,
            3]; one or several.
          max_patches: of such a model, patches of each image, at most; None is what the
            checkpoint's own preprocessing says.

        Raises:
          UserError: there is none, one cannot be read, an array is not uint8, or the model takes no
            patches.
        """
        size = image_size(self.config)
        if max_patches is not None:
            size = self._patch_shape(max_patches)
        items = [pil_image(image) for image in image_items(images, "preprocess")]
        try:
            batch = np.stack([eval_transform(item, size, self.preprocessing) for item in items])
        except ImageError as error:
            raise UserError(f"preprocess: an image cannot be used: {error}") from None
        return canvas_patches(batch) if isinstance(size, PatchShape) else batch

    def _patch_shape(self, max_patches: int) -> PatchShape:
        """Return the size of images that are so many patches, or raise UserError."""
        if not isinstance(self.config.vision, NaFlexConfig):
            raise UserError(f"{self.name} takes squares: give max_patches to SigLIP 2 NaFlex alone")
        whole = isinstance(max_patches, int | np.integer) and not isinstance(max_patches, bool)
        if not whole or not 1 <= max_patches <= MAX_PATCHES:
            raise UserError(
                f"preprocess: max_patches is {shown(max_patches)}: it must be a whole number from "
                f"1 to {MAX_PATCHES}"
            )
        return PatchShape(self.config.vision.patch_size, int(max_patches))

    def tokenize(self, texts: str | Iterable[str]) -> np.ndarray:
        """Turn captions into ids, int32 [batch, context_length].

        A caption that is too long is cut and keeps its end token.

        Raises:
          UserError: one is no text.
        """
        texts = text_items(texts, "tokenize")
        return self.known_tokenizer()(texts, self.config.text.context_length)

    def encode_image(self, images: ImageInput, normalize: bool = True) -> jax.Array:
        """Encode images: float32 [batch, embed_dim], of unit length unless `normalize=False`.

        An image's features do not depend on the others'.

        Args:
          images: PIL images, prepared as `preprocess` does; or arrays [height, width, 3] of the
            model's size, one, several or a batch of them: uint8 as `preprocess` returns them, or
            floats that are normalized already. Where the model takes images of any shape, what
            `preprocess` returns, or images and uint8 arrays of any size.

        Raises:
          UserError: the shape is not what the model takes, it has no image tower, or its weights
            are not finite.
        """
        z_BD = self._encode_image(self._variables, self._check_images(images, "encode_image"))
        return self._unit_length(z_BD) if normalize else z_BD

    def _check_patches(self, images: ImageInput, patch_size: int, method: str) -> ImagePatches:
        """Return images as patches, or raise UserError with the method's name."""
        if isinstance(images, ImagePatches):
            return check_patches(images, patch_size, method)
        if is_array(images) and jnp.issubdtype(as_array(images).dtype, jnp.floating):
            raise UserError(f"{method} takes images, or the patches that preprocess() returns")
        prepared: Any = self.preprocess(images)
        return prepared

    def _check_images(self, images: ImageInput, method: str) -> jax.Array | ImagePatches:
        """Return images as an array or as patches, or raise UserError with the method's name."""
        self._check_tower("visual", "image")
        vision = self.config.vision
        if isinstance(vision, NaFlexConfig):
            return self._check_patches(images, vision.patch_size, method)
        if isinstance(images, ImagePatches):
            raise UserError(f"{method} takes squares of {vision.image_size} pixels and got patches")
        size = vision.image_size
        batch: Any = as_array(images) if is_array(images) else None
        if batch is None or batch.dtype == object:
            items, shape = image_items(images, method), (size, size, 3)
            if any(isinstance(image, Image.Image) for image in items):
                batch = self.preprocess(items)
            elif {(np.shape(x), np.result_type(x)) for x in items} == {(shape, items[0].dtype)}:
                batch = np.stack(items)
            else:
                raise UserError(
                    f"{method} takes arrays of [{size}, {size}, 3] and of one type; make them with "
                    "preprocess()"
                )
        if batch.dtype != jnp.uint8 and not jnp.issubdtype(batch.dtype, jnp.floating):
            raise UserError(f"{method} takes uint8 or normalized floats and got {batch.dtype}")
        check_normalized(batch, method)
        batch = jnp.asarray(batch)
        batch = batch[None] if batch.ndim == 3 else batch
        if batch.shape[1:] != (size, size, 3):
            raise UserError(
                f"{method} takes [batch, {size}, {size}, 3] and got "
                f"{list(batch.shape)}; make it with preprocess()"
            )
        if not len(batch):
            raise UserError(f"{method} got no image")
        return batch

    def encode_text(self, texts: TextInput, normalize: bool = True) -> jax.Array:
        """Encode captions: float32 [batch, embed_dim], of unit length unless `normalize=False`.

        A caption's features do not depend on the others'.

        Args:
          texts: captions, one or several; or ids [batch, length] as `tokenize` returns them, or
            one row of them: length may be shorter, except for SigLIP and CLIPA, which see or read
            their padding.

        Raises:
          UserError: the shape is not what the model takes, it has no text tower, or its weights are
            not finite.
        """
        z_BD = self._encode_text(self._variables, self._check_tokens(texts, "encode_text"))
        return self._unit_length(z_BD) if normalize else z_BD

    def _check_tokens(self, texts: TextInput, method: str) -> jax.Array:
        """Return the texts as token ids, or raise UserError with the method's name."""
        self._check_tower("text", "text")
        if not isinstance(texts, str | bytes) and not is_array(texts):
            texts = several(texts, method, "texts or token ids")
        if is_text(texts):
            texts = text_items(texts, method)
            if not texts:
                raise UserError(f"{method} got no text")
            texts = self.tokenize(texts)
        tokens = token_ids(texts, self.config.text.vocab_size, method)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        text = self.config.text
        longest = text.context_length
        shortest = 1 if text.supports_trimming else longest
        if tokens.ndim != 2 or not shortest <= tokens.shape[1] <= longest:
            takes = f"at most {longest}" if text.supports_trimming else f"{longest}"
            raise UserError(
                f"{method} takes [batch, {takes}] token ids and got "
                f"{list(tokens.shape)}; make them with tokenize()"
            )
        return jnp.asarray(tokens, jnp.int32)

    def _check_tower(self, module: str, tower: str) -> None:
        if module not in self.params:
            raise UserError(f'{self.name} was loaded without its {tower} tower; give towers="both"')
        self._check_finite()

    def _check_finite(self) -> None:
        """Raise UserError, at the first use, if a weight is not finite: figures would be NaN."""
        if self._is_checked:
            return
        # Also while a caller's function is traced: the weights are there.
        with jax.ensure_compile_time_eval():
            bad = not_finite(self._variables)
        if bad:
            arrays = len(jax.tree.leaves(self._variables))
            raise UserError(
                f"{self.name}: {len(bad)} of {arrays} arrays hold values that are not finite "
                f"(NaN or infinity), the first {bad[0]}: fetch or train it again"
            )
        self._is_checked = True

    def logits(self, images: ImageInput, texts: TextInput) -> jax.Array:
        """Return what the loss compares, float32 [images, texts]: scaled cosines, plus the bias.

        Args:
          images, texts: as `encode_image` and `encode_text` take them.

        Raises:
          UserError: a shape is not what the model takes.
        """
        return self.scale * self.encode_image(images) @ self.encode_text(texts).T + self.bias

    def probabilities(self, images: ImageInput, texts: TextInput) -> jax.Array:
        """Return the probability of each text for each image, float32 [images, texts].

        Of a sigmoid model (`is_sigmoid`) each pair has its own; else those of an image sum to 1.

        Args:
          images, texts: as `encode_image` and `encode_text` take them.

        Raises:
          UserError: a shape is not what the model takes.
        """
        return self._from_logits(self.logits(images, texts))

    def _from_logits(self, logits_BM: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(logits_BM) if self.is_sigmoid else jax.nn.softmax(logits_BM, axis=-1)

    def image_states(self, images: ImageInput, blocks: int | Sequence[int] = ()) -> TowerStates:
        """Return all rows of the image tower, the pooled row, and the outputs of some blocks.

        For segmentation, for heads that see patches, and for diffusion. Of a tower of convolutions
        they are the places of its last feature map, and its stages stand for blocks.

        Args:
          images: as `encode_image` takes them.
          blocks: numbers of blocks, from 0; -1 is the last.

        Raises:
          UserError: the shape is not what the model takes, or the tower has no such blocks.
        """
        pixels = model_images(self._check_images(images, "image_states"), self.preprocessing)
        return self._tower_states("image", blocks)(self._variables, pixels)

    def text_states(self, texts: TextInput, blocks: int | Sequence[int] = ()) -> TowerStates:
        """Return all rows of the text tower, the pooled row, and the outputs of some blocks.

        Args:
          texts: as `encode_text` takes them.
          blocks: numbers of blocks, from 0; -1 is the last, -2 what Stable Diffusion 2 and XL take.

        Raises:
          UserError: the shape is not what the model takes, or the tower has no such blocks.
        """
        tokens = self._check_tokens(texts, "text_states")
        return self._tower_states("text", blocks)(self._variables, tokens)

    def _tower_states(self, tower: str, blocks: int | Sequence[int]) -> StatesFn:
        key = (tower, block_numbers(blocks, f"{tower}_states"))
        if key not in self._states:
            self._states[key] = jax.jit(make_states(self._model, *key))
        return self._states[key]

    def classify(
        self,
        images: ImageInput,
        class_names: str | Iterable[str],
        templates: str | Iterable[str] = EvalSection.templates,
    ) -> jax.Array:
        """Return zero-shot probabilities, float32 [batch, classes] (paper, section 3.1.2).

        They are the model's own: of a sigmoid model (`is_sigmoid`) each class has its own, with
        the bias; else those of an image sum to 1.

        Args:
          images: as `encode_image` takes them.
          class_names: what is asked for.
          templates: prompts with {} (or {c}) for the name, or names of lists ("imagenet_80"); their
            unit features are averaged.

        Raises:
          UserError: a template lacks its {}, there are no class names, or one is no text.
        """
        self._check_tower("text", "text")
        class_MD = class_embeddings(
            self.encode_text,
            self.known_tokenizer(),
            check_class_names(class_names, "classify"),
            load_templates(text_items(templates, "classify", "templates")),
            batch_size=TEXT_BATCH,
            context_length=self.config.text.context_length,
        )
        logits_BM = self.scale * self.encode_image(images) @ jnp.asarray(class_MD).T + self.bias
        return self._from_logits(logits_BM)

    def relevance(self, images: ImageInput, text: str | Iterable[str]) -> jax.Array:
        """Return what each patch adds to the cosine with a caption, float32 [batch, rows, columns].

        Gradient-weighted attention; see `models.relevance`. Nothing is below zero.

        Args:
          images: as `encode_image` takes them.
          text: a caption for all of them, or one for each.

        Raises:
          UserError: the shape is not what the model takes, or captions are too few or too many.
        """
        if isinstance(self.config.vision, NaFlexConfig):
            raise UserError(f"relevance: {self.name} takes images of any shape, which have no map")
        images = self._check_images(images, "relevance")
        texts = text_items(text, "relevance")
        texts = texts * len(images) if isinstance(text, str) else texts
        if len(texts) != len(images):
            raise UserError(f"relevance got {len(images)} images and {len(texts)} captions")
        z_text_BD = self.encode_text(self.tokenize(texts))
        pixels = model_images(images, self.preprocessing)
        return self._relevance(self._variables, pixels, z_text_BD)


def create(name: str, seed: int = 0) -> LoadedCLIP:
    """Make a model of the zoo with random weights.

    Raises:
      UserError: no model has that name.
    """
    _check_types("create", name=(name, str), seed=(seed, int | np.integer))
    config = model_config(name)
    with draws_as_gpu_kernels():
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
    dtype: str = "float32",
    towers: str = "both",
    adapters: str | Path | None = None,
) -> LoadedCLIP:
    """Load a run's model, or a published one in any format; see `clip_jax.load`."""
    _check_types(
        "load",
        path=(path, str | os.PathLike),
        model=(model, str | None),
        tokenizer=(tokenizer, str | os.PathLike | None),
        image_size=(image_size, int | np.integer | None),
        context_length=(context_length, int | np.integer | None),
        mesh=(mesh, Mesh | None),
        dtype=(dtype, str),
        towers=(towers, str),
        adapters=(adapters, str | os.PathLike | None),
    )
    if not str(path):
        raise UserError("load: path is empty")
    check_choice("dtype", dtype, DTYPES)
    check_choice("towers", towers, (*TOWERS, "both"))
    source = read_source(path, model)
    checkpoint = source.checkpoint
    if adapters is not None:
        checkpoint = with_peft(checkpoint, local_copy(adapters))
    spec = checkpoint.tokenizer
    if tokenizer is not None:
        spec = tokenizer_from_file(str(tokenizer), tokenizer_family(checkpoint.config))
    if checkpoint.arrays:
        checkpoint = resize_checkpoint(checkpoint, image_size, context_length)
        shapes = sharded_variable_shapes(
            checkpoint.config, mesh, dtype=jnp.dtype(dtype), towers=towers
        )
        variables = place_arrays(checkpoint.arrays, shapes)
    elif image_size or context_length:
        raise UserError(f"{path} is a run: its sizes are its own; convert it first")
    else:
        variables = _restored(source.place, checkpoint.config, mesh, dtype, towers)
    return LoadedCLIP(
        checkpoint.name,
        checkpoint.config,
        variables,
        tokenizer_spec=spec,
        preprocessing=checkpoint.preprocess,
        dtype=dtype,
        mesh=mesh,
    )


def _restored(
    path: str | Path, config: CLIPConfig, mesh: Mesh | None, dtype: str, towers: str
) -> dict[str, Any]:
    """Restore a run's variables, which are checked whole, and keep what is wanted of them."""
    variables = by_path(restore_run(path, sharded_variable_shapes(config, mesh)))
    wanted = by_path(sharded_variable_shapes(config, mesh, dtype=jnp.dtype(dtype), towers=towers))
    return to_variables({name: variables[name].astype(x.dtype) for name, x in wanted.items()})


def _check_types(method: str, **arguments: tuple[Any, Any]) -> None:
    """Raise UserError for an argument of another type: name -> (value, types)."""
    for name, (value, types) in arguments.items():
        if not isinstance(value, types) or isinstance(value, bool):
            raise UserError(f"{method}: {name} is a {type(value).__name__}: {shown(value)}")


def load_encoders(
    model: str,
    *,
    architecture: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "float32",
) -> Encoders:
    """Load a model as the evaluators take it, its parameters and batches over all devices.

    Args:
      model: the path or name, as `load` takes it.
      architecture: a name of the zoo, or "name:tag", for a file that does not say it.
      tokenizer: for a checkpoint that came without one.
      dtype: of activations and matrix products, "float32" or "bfloat16".

    Raises:
      UserError: the path is no checkpoint, or its tokenizer is not known.
    """
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    clip = load(model, architecture, tokenizer=tokenizer, mesh=mesh, dtype=dtype)
    known, spec = clip.known_tokenizer(), clip.tokenizer_spec
    digests = tree_digests({"params": clip.params, "batch_stats": clip.batch_stats})
    described = json.dumps([digests, repr(clip.config), spec and spec_digest(spec)])
    encode_image: Any = clip.encode_image
    if isinstance(clip.config.vision, NaFlexConfig):
        unpack = jax.jit(canvas_patches)
        encode_image = lambda canvas_BRPC: clip.encode_image(unpack(canvas_BRPC))  # noqa: E731
    return mesh_encoders(
        encode_image,
        clip.encode_text,
        mesh,
        config=clip.config,
        tokenizer=known,
        preprocess=clip.preprocessing,
        scale=clip.scale,
        name=clip.name,
        identity=hashlib.blake2b(described.encode(), digest_size=8).hexdigest(),
    )
