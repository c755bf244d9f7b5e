"""From sample ids to rows: read, decode, transform, tokenize. Never raises for bad data."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8, UInt32
from PIL import Image

from clip_jax.data.images import decode_image
from clip_jax.data.order import philox
from clip_jax.data.shards import BadSampleError, ConcatShards, Handles, Shard
from clip_jax.typing import Tokenizer

ImageTransform = Callable[[Image.Image, np.random.Generator], UInt8[np.ndarray, "H W 3"]]
Decode = Callable[[bytes], Image.Image]

_AUGMENT = 3  # this use's key of the seed; 1 and 2 are the order's


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
      indexes: the shards whose samples, in line, the ids count.
      tokenizer: called from several threads.
      transform: (image, rng) -> uint8 [image_size, image_size, 3].
      decode: bytes -> an image; what it gives must depend on the bytes alone.
      image_size, context_length: of the rows.
      seed: with epoch and sample id it fixes a row's chance, whoever reads it.
      cache_bytes: memory for decoded images.
      evaluation: read labels, take the first caption, and do without one where there is a label.
      need_captions: False does without a caption everywhere.
    """

    def __init__(
        self,
        indexes: Sequence[Shard],
        tokenizer: Tokenizer,
        transform: ImageTransform,
        *,
        image_size: int,
        context_length: int,
        decode: Decode = decode_image,
        seed: int = 0,
        cache_bytes: int = 0,
        evaluation: bool = False,
        need_captions: bool = True,
    ):
        self.evaluation = evaluation
        self._need_captions = need_captions
        self._line = ConcatShards(indexes)
        self._tokenizer = tokenizer
        self._transform = transform
        self._decode = decode
        self._image_size = image_size
        self._context_length = context_length
        self._seed = seed
        self._cache = _PictureCache(cache_bytes)

    def read(self, ids: Int64[np.ndarray, " rows"], epochs: Int64[np.ndarray, " rows"]) -> Rows:
        """The rows of these samples in these epochs; an id of -1 is padding."""
        n, side = len(ids), self._image_size
        rows = Rows(
            image=np.zeros((n, side, side, 3), np.uint8),
            text=np.empty((n, self._context_length), np.int32),
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
        rows.text[:] = self._tokenizer(texts, self._context_length)
        return rows

    def _read_row(self, rows: Rows, row: int, sample: int, *, epoch: int, handles: Handles) -> str:
        """Fills one row and returns its caption; whatever goes wrong becomes `valid=False`."""
        index, i = self._line.at(sample)
        rows.key[row] = f"{index.name}/{index.key(i)}"
        rng = np.random.Generator(philox(self._seed, _AUGMENT, sample, epoch))
        try:
            label = index.label(i, handles) if self.evaluation else -1
            optional = label >= 0 or not self._need_captions
            captions = _captions(index, i, handles, optional=optional)
            # Drawn even for one caption, so that a crop does not depend on their number.
            choice = 0 if self.evaluation else int(rng.random() * len(captions))
            caption = captions[choice] if captions else ""
            rows.image[row] = self._transform(self._picture(index, i, sample, handles), rng)
        except Exception as e:
            # Pillow's readers and transforms raise a dozen types; none may end the run.
            cause = getattr(e, "cause", "read_failed" if isinstance(e, OSError) else "broken")
            rows.skipped.append((cause, rows.key[row], str(e)))
            return ""
        rows.valid[row] = True
        rows.label[row] = label
        rows.captions[row] = captions
        if caption:
            rows.caption_id[row] = caption_id(caption)
        return caption

    def _picture(self, index: Shard, i: int, sample: int, handles: Handles) -> Image.Image:
        image = self._cache.get(sample)
        if image is None:
            image = self._decode(index.image(i, handles))
            self._cache.put(sample, image)
        return image


class _PictureCache:
    """Decoded images up to a number of bytes, then no more.

    An epoch visits every image once, so what is evicted would have been as useful as what
    replaces it: keeping the first comers is as good as any policy, and the simplest.
    """

    def __init__(self, limit: int):
        self._free = limit
        self._pictures: dict[int, Image.Image] = {}
        self._lock = threading.Lock()

    def get(self, sample: int) -> Image.Image | None:
        return self._pictures.get(sample)

    def put(self, sample: int, image: Image.Image) -> None:
        # Pillow stores every image of several bands with four bytes a pixel.
        size = image.width * image.height * (4 if len(image.getbands()) > 1 else 1)
        with self._lock:
            if size <= self._free and sample not in self._pictures:
                # A copy, to leave the reader and the file's bytes behind.
                self._pictures[sample] = image.copy()
                self._free -= size


def _captions(index: Shard, i: int, handles: Handles, *, optional: bool) -> list[str]:
    try:
        return index.captions(i, handles)
    except BadSampleError as e:
        if optional and e.cause in ("no_caption", "empty_caption"):
            return []
        raise


def caption_id(caption: str) -> int:
    """32 bits of BLAKE2b: the same on every host, so equal captions meet across hosts."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=4).digest(), "little")
