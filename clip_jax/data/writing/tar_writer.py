"""One tar shard of samples from any source: images as they are, and always the same bytes."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.data.formats.webdataset import IMAGE_SUFFIXES
from clip_jax.data.images import ImageError, decode_image
from clip_jax.data.shards import BadSampleError, Handles, Shard
from clip_jax.files import atomic_write

_MAGIC = {"jpg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n", "webp": b"RIFF"}
_FORMAT = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass(frozen=True)
class Sample:
    """One pair as it goes into a shard; `label` is -1 where there is none."""

    key: str
    image: bytes
    captions: list[str]
    record: dict[str, Any]
    label: int


@dataclass(frozen=True)
class Shrink:
    """Images whose short side is above `side` pixels are made that small; others stay."""

    side: int
    quality: int = 95

    def __call__(self, data: bytes) -> bytes:
        """The image's bytes: the same ones where it is small enough.

        Raises:
          ImageError: it cannot be read.
        """
        image = decode_image(data)
        short = min(image.size)
        if short <= self.side:
            return data
        size = [max(1, round(length * self.side / short)) for length in image.size]
        if image.mode in ("P", "1"):
            image = image.convert("RGB")  # an index cannot be averaged
        image = image.resize((size[0], size[1]))
        out = io.BytesIO()
        # PNG has no such setting and Pillow passes over it.
        image.save(out, _FORMAT[image_suffix(data)], quality=self.quality)
        return out.getvalue()


def image_suffix(data: bytes) -> str:
    """`jpg`, `png` or `webp`, by the first bytes.

    Raises:
      ImageError: `empty` or `not_an_image`.
    """
    if not data:
        raise ImageError("empty")
    for suffix, magic in _MAGIC.items():
        if data.startswith(magic) and (suffix != "webp" or data[8:12] == b"WEBP"):
            return suffix
    raise ImageError("not_an_image", data[:8].hex())


def read_sample(index: Shard, i: int, handles: Handles) -> Sample:
    """Every part of a sample, as evaluation asks for them: no caption is needed beside a label.

    Fields that are no JSON are none: neither training nor evaluation would ask for them.

    Raises:
      Unusable, ImageError, OSError: image, caption or label cannot be read.
    """
    label = index.label(i, handles)
    try:
        captions = index.captions(i, handles)
    except BadSampleError as e:
        if label < 0 or e.cause not in ("no_caption", "empty_caption"):
            raise
        captions = []
    try:
        record = index.record(i, handles)
    except BadSampleError:
        record = {}
    return Sample(index.key(i), index.image(i, handles), captions, record, label)


def safe_key(key: str) -> str:
    """A key as a member's name: no ending of an image, no dots, no way out of a folder."""
    stem, dot, ending = key.rpartition(".")
    if dot and ending.lower() in IMAGE_SUFFIXES:
        key = stem
    # Lone surrogates (file names that are no UTF-8) would not come back the same.
    key = key.encode("utf-8", "replace").decode().replace("\0", "").replace("\\", "/")
    parts = [part.replace(".", "_") for part in key.split("/") if part not in ("", ".", "..")]
    return "/".join(parts) or "_"


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """One tar file of these samples, with times and owners of 0.

    A key that came before in the shard gets a number: `a`, `a-2`.
    """
    taken: dict[str, int] = {}
    with (
        atomic_write(path) as partial,
        tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for sample in samples:
            key = _numbered(safe_key(sample.key), taken)
            for suffix, data in _members(sample):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _numbered(key: str, taken: dict[str, int]) -> str:
    """The key, with a number where it is not new; `taken` keeps the last number of each."""
    name, number = key, taken.get(key, 0)
    while name in taken:
        number += 1
        name = f"{key}-{number}"
    taken[key] = max(number, 1)
    taken.setdefault(name, 1)
    return name


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    yield image_suffix(sample.image), sample.image
    if sample.captions:
        yield "txt", "\n".join(sample.captions).encode()
    if sample.label >= 0:
        yield "cls", str(sample.label).encode()
    if sample.record:
        yield "json", json.dumps(sample.record, default=str).encode()
