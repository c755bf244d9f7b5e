"""Small images of results, read from the source that was embedded."""

import io

from PIL import Image

from clip_jax.data.images import decode_image
from clip_jax.data.shards import BadSampleError, ConcatShards, Handles
from clip_jax.data.sources import fingerprint
from clip_jax.embeddings.encode_query import MAX_PIXELS
from clip_jax.embeddings.folder import Embeddings
from clip_jax.embeddings.write import open_images
from clip_jax.errors import UserError

SIDE = 256


class Pictures:
    """The images of a folder's rows, by number: nothing that a browser says becomes a path.

    Attributes:
      why_none: what keeps them from being shown; empty where they are.
    """

    def __init__(self, embeddings: Embeddings, data: str | None = None):
        self._embeddings = embeddings
        self._line = ConcatShards([])
        self.why_none = ""
        about = embeddings.about
        source = data or (about.data if about else "")
        if not source:
            self.why_none = "the embeddings do not say where their images lie; give --data"
            return
        try:
            indexes = open_images(source)
        except UserError as e:
            self.why_none = f"their source cannot be read: {e}"
            return
        if about is not None and fingerprint(indexes) != about.fingerprint:
            self.why_none = f"{source} is not the source that was embedded, or has changed"
            return
        self._line = ConcatShards(indexes)

    def small(self, row: int) -> tuple[bytes, str] | None:
        """An encoded image that fits a square of `SIDE`, and its media type; None for none."""
        place = self._embeddings.metadata(row).get("row")
        if self.why_none or not isinstance(place, int) or not 0 <= place < len(self._line):
            return None
        shard, i = self._line.at(place)
        try:
            with Handles() as handles:
                data = shard.image(i, handles)
            image = decode_image(data, max_pixels=MAX_PIXELS)
        except (BadSampleError, OSError):
            return None
        return encode_small(image)


def encode_small(image: Image.Image) -> tuple[bytes, str]:
    """Made anew from its pixels, so that no byte of the file itself reaches a browser."""
    see_through = image.mode in ("RGBA", "LA", "PA")
    image = image.convert("RGBA" if see_through else "RGB")
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    kind = "PNG" if see_through else "JPEG"
    image.save(out, kind)
    return out.getvalue(), f"image/{kind.lower()}"
