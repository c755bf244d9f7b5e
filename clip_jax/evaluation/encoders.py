"""What every evaluator does with an encoder: call it on equal batches, take unit vectors."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float32

from clip_jax.data.images import OPENAI, Preprocess
from clip_jax.data.loader import Loader, make_eval_loader, trim_to_bucket
from clip_jax.data.sample_reader import SampleShape
from clip_jax.data.shards import Shard
from clip_jax.errors import UserError
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
      scale: between cosines and logits (not its logarithm).
      name: for the results.
      identity: names the weights; what was computed with others is not used again.
      shards: the parts in which a mesh splits the rows of a batch.
    """

    encode_image: EncodeImage
    encode_text: EncodeText
    tokenizer: Tokenizer
    image_size: int = 224
    context_length: int = 77
    preprocess: Preprocess = OPENAI
    scale: float = 100.0
    name: str = ""
    identity: str = ""
    shards: int = 1

    def loader(self, shards: Sequence[Shard], *, batch_size: int, **options: Any) -> Loader:
        """Return every sample once, prepared as these encoders take it.

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


def image_encoder_over(encode: EncodeImage, mesh: Mesh) -> EncodeImage:
    """Each process's images, split over the mesh's batch axes; the features of all of them.

    Rows are filled up to a multiple of the devices and cut off again: any number can be given.
    With several processes each gives equally many, a multiple of its own devices.
    """

    def encode_rows(rows: np.ndarray) -> np.ndarray:
        padded = _fill_up(rows, batch_shards(mesh)) if jax.process_count() == 1 else rows
        z_BD = _fetch(encode(place_batch({"rows": padded}, mesh)["rows"]))
        return z_BD[: len(rows) * jax.process_count()]

    return encode_rows


def text_encoder_over(
    encode: EncodeText, mesh: Mesh, *, trim_behind: int | None = None
) -> EncodeText:
    """As `image_encoder_over`, for rows that every process holds all of.

    Args:
      trim_behind: the end token of a tower that nothing behind it reaches, whose rows are cut to
        the bucket of the longest; None leaves them whole.
    """

    def encode_rows(rows: np.ndarray) -> np.ndarray:
        if trim_behind is not None:
            rows = trim_to_bucket(rows, trim_behind)
        padded = _fill_up(rows, batch_shards(mesh))
        share = len(padded) // jax.process_count()
        own = padded[jax.process_index() * share : (jax.process_index() + 1) * share]
        return _fetch(encode(place_batch({"rows": own}, mesh)["rows"]))[: len(rows)]

    return encode_rows


def _fill_up(rows: np.ndarray, multiple: int) -> np.ndarray:
    missing = -len(rows) % multiple
    return np.pad(rows, ((0, missing), *((0, 0),) * (rows.ndim - 1)), mode="edge")


def equal_blocks(rows: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """`size` rows at a time, and how many of them count.

    The last block is filled up with its last row: a jitted function meets one shape only.
    """
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        yield _fill_up(block, size), len(block)


def _fetch(z_BD: jax.Array) -> np.ndarray:
    if jax.process_count() == 1:
        return np.asarray(z_BD)
    return np.asarray(multihost_utils.process_allgather(z_BD, tiled=True))


def unit_rows(z_BD: Any) -> Float32[np.ndarray, "B D"]:
    """Rows of length one, x / max(|x|, 1e-12) as torch's `normalize` has it, on the host.

    Raises UserError for values that are not finite: they would win or lose every comparison.
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
    """Unit features of any number of token rows, encoded `batch_size` at a time."""
    blocks = equal_blocks(tokens_BL, batch_size)
    return np.concatenate([unit_rows(encode_text(block_bL))[:used] for block_bL, used in blocks])
