"""From sample ids to rows: read, decode, transform, tokenise. Never raises for bad data."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8, UInt32
from PIL import Image

from clip_jax.data.images import ImageError, decode_image
from clip_jax.data.order import philox
from clip_jax.data.sources import ShardIndex
from clip_jax.typing import Tokenizer

ImageTransform = Callable[[Image.Image, np.random.Generator], UInt8[np.ndarray, "H W 3"]]

_AUGMENT = 3  # this use's key of the seed; 1 and 2 are the order's
_MAX_IMAGE_BYTES = 256 << 20
_MAX_TEXT_BYTES = 1 << 20
# No context holds this many characters, and cleaning a megabyte of text takes a second.
_MAX_CAPTION_CHARS = 8192


class Unusable(Exception):
    """A sample without a usable picture or caption; `cause` is a short name."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


@dataclass
class Rows:
    """A run of rows on its way from a thread to a batch; opaque to Grain's tree functions.

    The fields are those of `loader.Batch`, and `skipped` holds (cause, what to log) for every
    sample that could not be used.
    """

    image: UInt8[np.ndarray, "rows H W 3"]
    text: Int32[np.ndarray, "rows L"]
    caption_id: UInt32[np.ndarray, " rows"]
    ok: Bool[np.ndarray, " rows"]
    label: Int32[np.ndarray, " rows"]
    key: list[str]
    captions: list[list[str]]
    skipped: list[tuple[str, str]] = field(default_factory=list)


class RowReader:
    """Reads rows of training or evaluation data. Threads share it: only its cache changes.

    Args:
      indexes: the shards whose samples, in line, the ids count.
      tokenizer: called from several threads.
      transform: (picture, rng) -> uint8 [image_size, image_size, 3].
      image_size, context_length: of the rows.
      seed: with epoch and sample id it fixes a row's chance, whoever reads it.
      cache_bytes: memory for decoded pictures.
      evaluation: read labels, take the first caption, and do without one where there is a label.
    """

    def __init__(
        self,
        indexes: Sequence[ShardIndex],
        tokenizer: Tokenizer,
        transform: ImageTransform,
        *,
        image_size: int,
        context_length: int,
        seed: int = 0,
        cache_bytes: int = 0,
        evaluation: bool = False,
    ):
        self.evaluation = evaluation
        self._indexes = indexes
        self._tokenizer = tokenizer
        self._transform = transform
        self._image_size = image_size
        self._context_length = context_length
        self._seed = seed
        self._cache = _PictureCache(cache_bytes)
        self._starts = np.concatenate([[0], np.cumsum([len(i) for i in indexes])])

    def read(self, ids: Int64[np.ndarray, " rows"], epochs: Int64[np.ndarray, " rows"]) -> Rows:
        """The rows of these samples in these epochs; an id of -1 is padding."""
        n, side = len(ids), self._image_size
        rows = Rows(
            image=np.zeros((n, side, side, 3), np.uint8),
            text=np.empty((n, self._context_length), np.int32),
            caption_id=np.zeros(n, np.uint32),
            ok=np.zeros(n, bool),
            label=np.full(n, -1, np.int32),
            key=[""] * n,
            captions=[[] for _ in range(n)],
        )
        texts = [""] * n
        with _Files() as files:
            for row in range(n):
                if ids[row] >= 0:
                    texts[row] = self._read_row(
                        rows, row, int(ids[row]), epoch=int(epochs[row]), files=files
                    )
        rows.text[:] = self._tokenizer(texts, self._context_length)
        return rows

    def _read_row(self, rows: Rows, row: int, sample: int, *, epoch: int, files: "_Files") -> str:
        """Fills one row and returns its caption; whatever goes wrong becomes `ok=False`."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        index, i = self._indexes[shard], sample - int(self._starts[shard])
        rows.key[row] = f"{index.name}/{index.key(i)}"
        rng = np.random.Generator(philox(self._seed, _AUGMENT, sample, epoch))
        try:
            label = _read_label(index, i, files) if self.evaluation else -1
            captions = _read_captions(index, i, files, optional=label >= 0)
            # Drawn even for one caption, so that a crop does not depend on their number.
            choice = 0 if self.evaluation else int(rng.random() * len(captions))
            caption = captions[choice] if captions else ""
            rows.image[row] = self._transform(self._picture(index, i, sample, files), rng)
        except Exception as e:
            # Pillow's readers and transforms raise a dozen types; none may end the run.
            cause = getattr(e, "cause", "read_failed" if isinstance(e, OSError) else "broken")
            rows.skipped.append((cause, f"{e} ({rows.key[row]})"))
            return ""
        rows.ok[row] = True
        rows.label[row] = label
        rows.captions[row] = captions
        if caption:
            rows.caption_id[row] = caption_id(caption)
        return caption

    def _picture(self, index: ShardIndex, i: int, sample: int, files: "_Files") -> Image.Image:
        image = self._cache.get(sample)
        if image is None:
            place = index.image(i)
            if place is None:
                raise Unusable("no_image")
            if place[1] > _MAX_IMAGE_BYTES:
                raise ImageError("too_large", f"{place[1]} bytes")
            image = decode_image(files.read(index, *place))
            self._cache.put(sample, image)
        return image


class _PictureCache:
    """Decoded pictures up to a number of bytes, then no more.

    An epoch visits every picture once, so what is evicted would have been as useful as what
    replaces it: keeping the first comers is as good as any policy, and the simplest.
    """

    def __init__(self, limit: int):
        self._free = limit
        self._pictures: dict[int, Image.Image] = {}
        self._lock = threading.Lock()

    def get(self, sample: int) -> Image.Image | None:
        return self._pictures.get(sample)

    def put(self, sample: int, image: Image.Image) -> None:
        # Pillow stores every picture of several bands with four bytes a pixel.
        size = image.width * image.height * (4 if len(image.getbands()) > 1 else 1)
        with self._lock:
            if size <= self._free and sample not in self._pictures:
                # A copy, to leave the reader and the file's bytes behind.
                self._pictures[sample] = image.copy()
                self._free -= size


class _Files:
    """The shards that one run of rows reads, each opened once and closed with the run."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def read(self, index: ShardIndex, offset: int, size: int) -> bytes:
        fd = self._open.get(index.path)
        if fd is None:
            fd = self._open[index.path] = os.open(index.path, os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(fd).st_size != index.size:
                os.close(self._open.pop(index.path))
                raise Unusable("shard_changed", "the file has another size than at the start")
        data = os.pread(fd, size, offset)
        if len(data) != size:
            raise Unusable("read_failed", f"{len(data)} of {size} bytes")
        return data

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._open.values():
            os.close(fd)


def _read_captions(index: ShardIndex, i: int, files: _Files, *, optional: bool) -> list[str]:
    """The lines of `.txt` that are not blank, or else the `caption` of `.json`."""
    suffix = "txt" if index.member(i, "txt") else "json"
    place = index.member(i, suffix)
    if place is None:
        if optional:
            return []
        raise Unusable("no_caption")
    if place[1] > _MAX_TEXT_BYTES:
        raise Unusable("caption_too_long", f"{place[1]} bytes")
    data = files.read(index, *place)
    try:
        text = data.decode("utf-8")
        if suffix == "json":
            text = _json_caption(text)
        text.encode("utf-8")  # JSON can spell half a surrogate pair; UTF-8 cannot
    except UnicodeError as e:
        raise Unusable("caption_not_utf8", str(e)) from e
    lines = [line.strip()[:_MAX_CAPTION_CHARS] for line in text.splitlines()]
    captions = [line for line in lines if line]
    if not captions and not optional:
        raise Unusable("empty_caption")
    return captions


def _json_caption(text: str) -> str:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Unusable("caption_not_json", str(e)) from e
    caption = record.get("caption") if isinstance(record, dict) else None
    if not isinstance(caption, str):
        raise Unusable("no_caption", "no text under `caption` in the .json")
    return caption


def _read_label(index: ShardIndex, i: int, files: _Files) -> int:
    place = index.member(i, "cls")
    if place is None:
        return -1
    text = files.read(index, place[0], min(place[1], 32)).strip()
    if not text.isdigit() or int(text) >= 2**31:
        raise Unusable("bad_label", repr(text))
    return int(text)


def caption_id(caption: str) -> int:
    """32 bits of BLAKE2b: the same on every host, so equal captions meet across hosts."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=4).digest(), "little")
