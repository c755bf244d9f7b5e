"""Small images of results, read from the source that was embedded."""

import io

from PIL import Image

from clip_jax.data.images import ImageError, decode_image
from clip_jax.data.shards import BadSampleError, ConcatShards, Handles
from clip_jax.data.sources import fingerprint
from clip_jax.embeddings.encode_query import MAX_PIXELS
from clip_jax.embeddings.folder import Embeddings
from clip_jax.embeddings.write import open_images
from clip_jax.errors import UserError

SIDE = 256
"""Pixels of the square that a thumbnail fits."""


class Thumbnails:
    """Thumbnails of a folder's rows, by number: nothing that a browser sends becomes a path.

    Args:
      embeddings: the rows.
      data: the source of their images, where it is another than the embeddings say.

    Attributes:
      unavailable: why no images can be shown; empty where they can.
    """

    def __init__(self, embeddings: Embeddings, data: str | None = None):
        self._embeddings = embeddings
        self._samples = ConcatShards([])
        self.unavailable = ""
        info = embeddings.info
        source = data or (info.data if info else "")
        if not source:
            self.unavailable = "the embeddings do not say where their images lie; give --data"
            return
        try:
            shards = open_images(source)
        except UserError as e:
            self.unavailable = f"their source cannot be read: {e}"
            return
        if info is not None and fingerprint(shards) != info.fingerprint:
            self.unavailable = f"{source} is not the source that was embedded, or has changed"
            return
        self._samples = ConcatShards(shards)

    def thumbnail(self, row: int) -> tuple[bytes, str] | None:
        """Return an encoded thumbnail and its media type; None where the image cannot be had."""
        position = self._embeddings.metadata(row).get("row")
        if not isinstance(position, int) or not 0 <= position < len(self._samples):
            return None
        shard, i = self._samples.at(position)
        try:
            with Handles() as handles:
                data = shard.image(i, handles)
            image = decode_image(data, max_pixels=MAX_PIXELS)
        except (ImageError, BadSampleError, OSError):
            return None
        return encode_thumbnail(image)


def encode_thumbnail(image: Image.Image) -> tuple[bytes, str]:
    """Encode the pixels anew, so that no byte of the file itself reaches a browser."""
    has_alpha = image.mode in ("RGBA", "LA", "PA")
    image = image.convert("RGBA" if has_alpha else "RGB")
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image_format = "PNG" if has_alpha else "JPEG"
    image.save(out, image_format)
    return out.getvalue(), f"image/{image_format.lower()}"
