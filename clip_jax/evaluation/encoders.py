"""Define a model as the evaluators take it, and what all of them do with it.

They call the encoders on blocks of one size, so that one program is compiled, and compare unit
vectors on the host.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float32

from clip_jax.data.images import OPENAI, Preprocess
from clip_jax.data.loader import Loader, make_eval_loader, trim_to_bucket
from clip_jax.data.patches import ImageSize, PatchShape
from clip_jax.data.sample_reader import SampleShape
from clip_jax.data.shards import Shard
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.naflex import NaFlexConfig
from clip_jax.parallel.mesh import batch_shards, place_batch
from clip_jax.typing import Tokenizer

# uint8 [b, H, W, 3] -> [b, D], and int32 [b, L] -> [b, D]: JAX or numpy, of any length.
EncodeImage = Callable[[Any], Any]
EncodeText = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Encoders:
    """A model as the evaluators take it.

    Attributes:
      encode_image: this process's uint8 [b, H, W, 3] -> the global [B, D], on every process.
      encode_text: int32 [B, L], the same on every process -> [B, D].
      image_size: side of the images, pixels, or how many patches; context_length: tokens of a
        caption.
      embed_dim: D, the width of the features.
      scale: what multiplies cosines to give logits (not its logarithm).
      name: for the results.
      identity: names the weights; what was computed with others is not used again.
      mesh: whose batch axes split the rows of a batch; None is one device.
      encode_elsewhere: has the missing parts of a `feature_store.FeatureJob` encoded by other
        machines; None where this process encodes.
    """

    encode_image: EncodeImage
    encode_text: EncodeText
    tokenizer: Tokenizer
    image_size: ImageSize
    context_length: int
    embed_dim: int
    scale: float
    preprocess: Preprocess = OPENAI
    name: str = ""
    identity: str = ""
    mesh: Mesh | None = None
    encode_elsewhere: Callable[[Any], None] | None = None

    @property
    def batch_parts(self) -> int:
        """The number of parts in which the mesh splits the rows of a batch."""
        return 1 if self.mesh is None else batch_shards(self.mesh)

    @property
    def shown_side(self) -> int:
        """The side of an image that is shown as the model takes it, pixels."""
        return self.image_size.side if isinstance(self.image_size, PatchShape) else self.image_size

    def round_batch_size(self, batch_size: int) -> int:
        """Return the least number from `batch_size` on that devices and processes share equally."""
        multiple = math.lcm(self.batch_parts, jax.process_count())
        return -(-batch_size // multiple) * multiple

    def loader(self, shards: Sequence[Shard], *, batch_size: int, **options: Any) -> Loader:
        """Load every sample once, prepared as these encoders take it.

        `options` are `data.loader.make_eval_loader`'s.
        """
        return make_eval_loader(
            shards,
            self.tokenizer,
            shape=SampleShape(self.image_size, self.context_length),
            batch_size=batch_size,
            preprocess=self.preprocess,
            **options,
        )


def image_size(config: CLIPConfig) -> ImageSize:
    """Return the size of a model's images: a side in pixels, or a number of patches."""
    vision = config.vision
    if isinstance(vision, NaFlexConfig):
        return PatchShape(vision.patch_size, vision.max_patches)
    return vision.image_size


def mesh_encoders(
    encode_image: EncodeImage,
    encode_text: EncodeText,
    mesh: Mesh,
    *,
    config: CLIPConfig,
    tokenizer: Tokenizer,
    preprocess: Preprocess,
    scale: float,
    name: str = "",
    identity: str = "",
) -> Encoders:
    """Make the encoders of a model whose batches are split over a mesh.

    Args:
      encode_image, encode_text: jitted; they take global arrays, split over the mesh's batch axes,
        images as `data.images.eval_transform` makes them.
      config: the sizes of both towers; captions are cut to a bucket where the text tower allows it.
    """
    trim_after = tokenizer.eot_id if config.text.supports_trimming else None
    return Encoders(
        mesh_image_encoder(encode_image, mesh),
        mesh_text_encoder(encode_text, mesh, trim_after=trim_after),
        tokenizer,
        image_size=image_size(config),
        context_length=config.text.context_length,
        embed_dim=config.embed_dim,
        scale=scale,
        preprocess=preprocess,
        name=name,
        identity=identity,
        mesh=mesh,
    )


def mesh_image_encoder(encode: EncodeImage, mesh: Mesh) -> EncodeImage:
    """Split each process's images over the mesh's batch axes; return the features of all of them.

    Rows are filled up to a multiple of the devices and cut off again: any number can be given.
    With several processes each gives equally many, a multiple of its own devices.
    """

    def encode_rows(rows: np.ndarray) -> np.ndarray:
        one_process = jax.process_count() == 1
        padded = _pad_rows(rows, batch_shards(mesh)) if one_process else rows
        z_BD = _fetch(encode(place_batch({"rows": padded}, mesh)["rows"]))
        return z_BD[: len(rows) * jax.process_count()]

    return encode_rows


def mesh_text_encoder(
    encode: EncodeText, mesh: Mesh, *, trim_after: int | None = None
) -> EncodeText:
    """Do as `mesh_image_encoder`, for rows that every process holds all of.

    Args:
      trim_after: the end token of a tower that nothing behind it reaches, whose rows are cut to
        the bucket of the longest; None leaves them whole.
    """

    def encode_rows(rows: np.ndarray) -> np.ndarray:
        if trim_after is not None:
            rows = trim_to_bucket(rows, trim_after)
        padded = _pad_rows(rows, batch_shards(mesh))
        share = len(padded) // jax.process_count()
        local = padded[jax.process_index() * share : (jax.process_index() + 1) * share]
        return _fetch(encode(place_batch({"rows": local}, mesh)["rows"]))[: len(rows)]

    return encode_rows


def _pad_rows(rows: np.ndarray, multiple: int) -> np.ndarray:
    """Repeat the last row until their number is a multiple."""
    missing = -len(rows) % multiple
    return np.pad(rows, ((0, missing), *((0, 0),) * (rows.ndim - 1)), mode="edge")


def _fetch(z_BD: jax.Array) -> np.ndarray:
    """Copy a global array to the host, on every process."""
    if jax.process_count() == 1:
        return np.asarray(z_BD)
    return np.asarray(multihost_utils.process_allgather(z_BD, tiled=True))


def equal_blocks(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield `size` rows at a time, and how many of them count.

    The last block is filled up with its last row: a jitted function meets one shape only.
    """
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        yield _pad_rows(block, size), len(block)


def unit_rows(z_BD: Any) -> Float32[np.ndarray, "B D"]:
    """Divide each row by its length, x / max(|x|, 1e-12) as torch's `normalize`, on the host.

    Raises:
      UserError: a value is not finite; it would win or lose every comparison.
    """
    z_BD = np.asarray(z_BD, np.float32)
    bad = int((~np.isfinite(z_BD)).any(axis=1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(z_BD)} features are not finite: the model's weights are damaged or "
            "its training has diverged"
        )
    return z_BD / np.maximum(np.linalg.norm(z_BD, axis=1, keepdims=True), 1e-12)


def encode_padded(
    encode_text: EncodeText, tokens_BL: np.ndarray, batch_size: int
) -> Float32[np.ndarray, "B D"]:
    """Encode any number of token rows, `batch_size` at a time, to unit features.

    Raises:
      UserError: a feature is not finite.
    """
    blocks = equal_blocks(tokens_BL, batch_size)
    return np.concatenate([unit_rows(encode_text(block_bL))[:used] for block_bL, used in blocks])
