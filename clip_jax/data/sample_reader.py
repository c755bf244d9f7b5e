"""From sample ids to rows: read, decode, transform, tokenize. Never raises for bad data."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8, UInt32
from PIL import Image

from clip_jax.data.images import MAX_PIXELS, Preprocess, decode_image, eval_transform
from clip_jax.data.order import AUGMENT_KEY, philox
from clip_jax.data.shards import (
    PROGRAMMING_ERRORS,
    BadSampleError,
    ConcatShards,
    Handles,
    Shard,
    sample_cause,
)
from clip_jax.typing import Tokenizer

ImageTransform = Callable[[Image.Image, np.random.Generator], UInt8[np.ndarray, "H W 3"]]
Decode = Callable[[bytes], Image.Image]


@dataclass(frozen=True)
class SampleShape:
    """The size of a model's inputs: an image's side in pixels, and a caption's tokens."""

    image_size: int
    context_length: int


@dataclass
class Rows:
    """A run of rows on its way from a thread to a batch; opaque to Grain's tree functions.

    The fields are those of `loader.Batch`, and `skipped` holds (cause, key, details) for
    every sample that could not be used.
    """

    image: UInt8[np.ndarray, "rows H W 3"]
    text: Int32[np.ndarray, "rows L"]
    caption_id: UInt32[np.ndarray, " rows"]
    valid: Bool[np.ndarray, " rows"]
    label: Int32[np.ndarray, " rows"]
    key: list[str]
    captions: list[list[str]]
    skipped: list[tuple[str, str, str]] = field(default_factory=list)


class SampleReader:
    """Reads rows of training or evaluation data. Threads share it: only its cache changes.

    Args:
      shards: their samples, one shard after the other, are what the ids count.
      tokenizer: called from several threads.
      shape: of the rows.
      decode: bytes -> an image; what it gives must depend on the bytes alone.
      transform: (image, rng) -> uint8 [image_size, image_size, 3].
      seed: with epoch and sample id it fixes a row's chance, whoever reads it.
      cache_bytes: memory for decoded images.
      evaluation: read labels, take the first caption, and do without one where there is a label.
      need_captions: False does without a caption everywhere.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        tokenizer: Tokenizer,
        shape: SampleShape,
        *,
        decode: Decode,
        transform: ImageTransform,
        seed: int,
        cache_bytes: int,
        evaluation: bool = False,
        need_captions: bool = True,
    ):
        self.evaluation = evaluation
        self._need_captions = need_captions
        self._shards = ConcatShards(shards)
        self._tokenizer = tokenizer
        self._shape = shape
        self._decode = decode
        self._transform = transform
        self._seed = seed
        self._cache = _ImageCache(cache_bytes)

    def read(self, ids: Int64[np.ndarray, " rows"], epochs: Int64[np.ndarray, " rows"]) -> Rows:
        """Return the rows of these samples in these epochs; an id of -1 is padding."""
        n, side, length = len(ids), self._shape.image_size, self._shape.context_length
        rows = Rows(
            image=np.zeros((n, side, side, 3), np.uint8),
            text=np.empty((n, length), np.int32),
            caption_id=np.zeros(n, np.uint32),
            valid=np.zeros(n, bool),
            label=np.full(n, -1, np.int32),
            key=[""] * n,
            captions=[[] for _ in range(n)],
        )
        texts = [""] * n
        with Handles() as handles:
            for row in range(n):
                if ids[row] >= 0:
                    texts[row] = self._read_row(
                        rows, row, int(ids[row]), epoch=int(epochs[row]), handles=handles
                    )
        rows.text[:] = self._tokenizer(texts, length)
        return rows

    def _read_row(self, rows: Rows, row: int, sample: int, *, epoch: int, handles: Handles) -> str:
        """Fill one row and return its caption; a fault of the data becomes `valid=False`."""
        shard, i = self._shards.at(sample)
        rows.key[row] = f"{shard.name}/{shard.key(i)}"
        rng = np.random.Generator(philox(self._seed, AUGMENT_KEY, sample, epoch))
        try:
            label = shard.label(i, handles) if self.evaluation else -1
            optional = label >= 0 or not self._need_captions
            captions = _captions(shard, i, handles, optional=optional)
            # Drawn even for one caption, so that a crop does not depend on their number.
            choice = 0 if self.evaluation else int(rng.random() * len(captions))
            caption = captions[choice] if captions else ""
            image_HWC = self._transform(self._image(shard, i, sample, handles), rng)
        except PROGRAMMING_ERRORS:
            raise
        except Exception as e:
            # The libraries that read records and tables have types of their own.
            rows.skipped.append((sample_cause(e), rows.key[row], str(e)))
            return ""
        rows.image[row] = image_HWC
        rows.valid[row] = True
        rows.label[row] = label
        rows.captions[row] = captions
        if caption:
            rows.caption_id[row] = caption_id(caption)
        return caption

    def _image(self, shard: Shard, i: int, sample: int, handles: Handles) -> Image.Image:
        image = self._cache.get(sample)
        if image is None:
            image = self._decode(shard.image(i, handles))
            self._cache.put(sample, image)
        return image


def make_eval_reader(
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    shape: SampleShape,
    preprocess: Preprocess,
    *,
    need_captions: bool = True,
) -> SampleReader:
    """Make the reader of evaluation data: whole images through `images.eval_transform`."""
    return SampleReader(
        shards,
        tokenizer,
        shape,
        decode=lambda data: decode_image(data, max_pixels=MAX_PIXELS),
        transform=lambda image, rng: eval_transform(
            image, shape.image_size, preprocess, max_pixels=MAX_PIXELS
        ),
        seed=0,  # nothing is drawn
        cache_bytes=0,
        evaluation=True,
        need_captions=need_captions,
    )


class _ImageCache:
    """Decoded images up to a number of bytes, then no more.

    An epoch visits every image once, so what is evicted would have been as useful as what
    replaces it: keeping the first comers is as good as any policy, and the simplest.
    """

    def __init__(self, limit: int):
        self._free = limit
        self._images: dict[int, Image.Image] = {}
        self._lock = threading.Lock()

    def get(self, sample: int) -> Image.Image | None:
        """Return the image of a sample, if it is there."""
        return self._images.get(sample)

    def put(self, sample: int, image: Image.Image) -> None:
        """Keep the image of a sample, if there is room."""
        # Pillow stores every image of several bands with four bytes a pixel.
        size = image.width * image.height * (4 if len(image.getbands()) > 1 else 1)
        with self._lock:
            if size <= self._free and sample not in self._images:
                # A copy, to leave the reader and the file's bytes behind.
                self._images[sample] = image.copy()
                self._free -= size


def _captions(shard: Shard, i: int, handles: Handles, *, optional: bool) -> list[str]:
    try:
        return shard.captions(i, handles)
    except BadSampleError as e:
        if optional and e.cause in ("no_caption", "empty_caption"):
            return []
        raise


def caption_id(caption: str) -> int:
    """Return 32 bits of BLAKE2b, the same on every host: equal captions meet across hosts."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=4).digest(), "little")
