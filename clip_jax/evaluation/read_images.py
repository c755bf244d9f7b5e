"""Read images of a data set by their positions, to show them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from clip_jax.data.images import Preprocess
from clip_jax.data.sample_reader import SampleShape, make_eval_reader
from clip_jax.data.shards import Shard


class _NoTokens:
    """A tokenizer for a reader of which only images are wanted."""

    vocab_size, eot_id, pad_id = 1, 0, 0

    def __call__(self, texts: Sequence[str], context_length: int = 77) -> np.ndarray:
        """Return zeros, int32 [batch, context_length]."""
        return np.zeros((len(texts), context_length), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the empty text."""
        return ""


def read_images(
    shards: Sequence[Shard], rows: Sequence[int], size: int, preprocess: Preprocess
) -> UInt8[np.ndarray, "rows size size 3"]:
    """Read the images at these positions of the data's order; one that cannot be read is black."""
    reader = make_eval_reader(shards, _NoTokens(), SampleShape(size, 1), preprocess)
    ids = np.asarray(rows, np.int64)
    return reader.read(ids, np.zeros_like(ids)).image
