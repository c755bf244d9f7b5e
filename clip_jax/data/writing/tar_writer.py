"""Write one tar shard of samples from any source: images as they are, and always the same bytes."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.data.images import IMAGE_SUFFIXES, decode_image, image_suffix
from clip_jax.data.shards import BadSampleError, Handles, Shard
from clip_jax.files import atomic_write

JPEG_QUALITY = 95
"""Pillow's quality of an image that is encoded again."""

# Others become PNG.
_FORMAT = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass(frozen=True)
class Sample:
    """One pair as it goes into a shard; `label` is -1 where there is none."""

    key: str
    image: bytes
    captions: list[str]
    record: dict[str, Any]
    label: int = -1


@dataclass(frozen=True)
class Shrink:
    """Make images whose short side is above `side` pixels that small; leave the others."""

    side: int
    quality: int = JPEG_QUALITY

    def __call__(self, data: bytes) -> bytes:
        """Return the bytes of the smaller image, or the same bytes if it is small enough.

        Raises:
          ImageError: it cannot be read.
        """
        image = decode_image(data)
        short = min(image.size)
        if short <= self.side:
            return data
        width, height = (max(1, round(length * self.side / short)) for length in image.size)
        form = _FORMAT.get(image_suffix(data), "PNG")
        if image.mode in ("P", "1") or (form == "PNG" and image.mode in ("CMYK", "LAB", "YCbCr")):
            image = image.convert("RGB")  # places in a palette cannot be averaged
        image = image.resize((width, height))
        out = io.BytesIO()
        # PNG has no quality, and Pillow ignores it there.
        image.save(out, form, quality=self.quality)
        return out.getvalue()


def read_sample(shard: Shard, i: int, handles: Handles) -> Sample:
    """Read every part of sample `i`, as evaluation does: a label stands in for a caption.

    Fields that are not JSON are left out: neither training nor evaluation would read them.

    Raises:
      BadSampleError, ImageError, OSError: image, caption or label cannot be read.
    """
    label = shard.label(i, handles)
    try:
        captions = shard.captions(i, handles)
    except BadSampleError as e:
        if label < 0 or e.cause not in ("no_caption", "empty_caption"):
            raise
        captions = []
    try:
        record = shard.record(i, handles)
    except BadSampleError:
        record = {}
    return Sample(shard.key(i), shard.image(i, handles), captions, record, label)


def safe_key(key: str) -> str:
    """Return a key as a member's name: no image suffix, no dots, no path out of a folder."""
    stem, dot, suffix = key.rpartition(".")
    if dot and suffix.lower() in IMAGE_SUFFIXES:
        key = stem
    # Lone surrogates (file names that are not UTF-8) would come back as something else.
    key = key.encode("utf-8", "replace").decode().replace("\0", "").replace("\\", "/")
    parts = [part.replace(".", "_") for part in key.split("/") if part not in ("", ".", "..")]
    return "/".join(parts) or "_"


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write one tar file of these samples, with times and owners of 0.

    A key that came before in the shard gets a number: `a`, `a-2`.

    Raises:
      UserError: the file cannot be written.
    """
    last_number: dict[str, int] = {}
    with (
        atomic_write(path) as partial,
        tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for sample in samples:
            key = _numbered(safe_key(sample.key), last_number)
            for suffix, data in _members(sample):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _numbered(key: str, last_number: dict[str, int]) -> str:
    """Return the key, with a number if it is not new; `last_number` is kept up to date."""
    name, number = key, last_number.get(key, 0)
    while name in last_number:
        number += 1
        name = f"{key}-{number}"
    last_number[key] = max(number, 1)
    last_number.setdefault(name, 1)
    return name


def _members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    yield image_suffix(sample.image), sample.image
    if sample.captions:
        yield "txt", "\n".join(sample.captions).encode()
    if sample.label >= 0:
        yield "cls", str(sample.label).encode()
    if sample.record:
        yield "json", json.dumps(sample.record, default=str).encode()
