"""Tar shards of image-text pairs, whose members are located once and then read by offset.

The format is WebDataset's: the members of one sample lie next to each other and share a key, the
part of the name before the first dot of the base name; what follows the dot, in lower case, is
the suffix (`000.jpg`, `000.txt`, `000.json`, `000.cls`, `000.npy`).

A shard is opened by its headers alone, see `clip_jax.data.formats.tar`; nothing is extracted.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt32

from clip_jax.data.formats import tar
from clip_jax.data.formats.errors import ShardError, damaged, unreadable
from clip_jax.data.formats.remote import RemoteError, is_url, open_local
from clip_jax.data.images import IMAGE_SUFFIXES
from clip_jax.data.shards import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadSampleError,
    Handles,
    caption_values,
    json_record,
    parse_label,
    text_captions,
)
from clip_jax.errors import note
from clip_jax.files import atomic_write

SUFFIXES = (*IMAGE_SUFFIXES, "txt", "json", "cls", "npy")
# Side files of earlier versions know these members alone.
_DIGEST_SUFFIXES = {"jpg", "jpeg", "png", "webp", "txt", "json", "cls"}
SIDE_SUFFIX = ".index.json"
"""Of the file beside a shard that says what it must hold."""

_MAX_MEMBER_BYTES = 2**32 - 1
_MAX_GAP_BYTES = 8 * tar.BLOCK  # between an image and its text that are read in one go
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, eq=False)
class TarShard:
    """The places of every sample's members in one tar file: 8 bytes a member, and the key.

    Attributes:
      path: the file.
      size: its length in bytes.
      key_bytes: all keys, in UTF-8, one after the other.
      key_ends: uint32 [samples], where each key ends in `key_bytes`.
      members: suffix -> uint32 [samples, 2]: the 512-byte block where the data starts, and its
        length in bytes. Block 0 (always a header) says that the sample has no such member.
      ignored: members that belong to no sample or have a suffix that is not read.
      caption_key: the field of `.json` that holds the caption or a list of them.
      whole_txt: a `.txt` member is one caption, and not one a line.
    """

    path: str
    size: int
    key_bytes: bytes
    key_ends: UInt32[np.ndarray, " samples"]
    members: dict[str, UInt32[np.ndarray, "samples 2"]]
    ignored: int
    caption_key: str = "caption"
    whole_txt: bool = False

    def __len__(self) -> int:
        return len(self.key_ends)

    @property
    def name(self) -> str:
        """The file name without its folder."""
        return os.path.basename(self.path)

    def key(self, i: int) -> str:
        """Return the key of sample `i`, in this shard."""
        start = self.key_ends.item(i - 1) if i else 0
        return self.key_bytes[start : self.key_ends.item(i)].decode("utf-8", "replace")

    def member(self, i: int, suffix: str) -> tuple[int, int] | None:
        """Return (byte offset, bytes) of one member of sample `i`, or None if it has none."""
        table = self.members.get(suffix)
        if table is None:
            return None
        block = table.item(i, 0)
        return (block * tar.BLOCK, table.item(i, 1)) if block else None

    def image(self, i: int, handles: Handles) -> bytes:
        if pair := self._text_and_image(i, handles):
            return pair[1]
        place = self._image_place(i)
        if place is None:
            raise BadSampleError("no_image")
        if place[1] > MAX_IMAGE_BYTES:
            raise BadSampleError("too_large", f"{place[1]} bytes")
        return handles.read(self.path, self.size, *place)

    def _image_place(self, i: int) -> tuple[int, int] | None:
        for suffix in IMAGE_SUFFIXES:
            if place := self.member(i, suffix):
                return place
        return None

    def _text_and_image(self, i: int, handles: Handles) -> tuple[bytes, bytes] | None:
        """Return `.txt` and the image, read in one go; None where they are read one by one."""
        if not handles.reads_images:
            return None
        return handles.once((self.path, i), lambda: self._read_text_and_image(i, handles))

    def _read_text_and_image(self, i: int, handles: Handles) -> tuple[bytes, bytes] | None:
        text, image = self.member(i, "txt"), self._image_place(i)
        if not text or not image or text[1] > MAX_TEXT_BYTES or image[1] > MAX_IMAGE_BYTES:
            return None
        start, end = min(text[0], image[0]), max(sum(text), sum(image))
        if end - start > text[1] + image[1] + _MAX_GAP_BYTES:
            return None
        try:
            data = handles.read(self.path, self.size, start, end - start)
        except BadSampleError as e:
            if e.cause == "shard_changed":
                raise
            return None  # one of the two may be there
        return (
            data[text[0] - start : sum(text) - start],
            data[image[0] - start : sum(image) - start],
        )

    def captions(self, i: int, handles: Handles) -> list[str]:
        """Return the lines of `.txt`, or else `self.caption_key` of `.json`.

        A blank `.txt` gives way to a `.json` with a caption.
        """
        if place := self.member(i, "txt"):
            pair = self._text_and_image(i, handles)
            text = pair[0] if pair else self._text(place, handles)
            return text_captions(text, lambda: self._json_caption(i, handles), self.whole_txt)
        if not self.member(i, "json"):
            raise BadSampleError("no_caption")
        return caption_values(self._json_caption(i, handles))

    def captions_beside(self, suffix: str, i: int, handles: Handles) -> list[str]:
        """Return the captions of the member of this suffix, one on "txt".

        Raises:
          BadSampleError: as `Shard.captions`.
        """
        place = self.member(i, suffix)
        if place is None:
            raise BadSampleError("no_caption", f"no .{suffix}")
        return text_captions(self._text(place, handles), lambda: None, self.whole_txt)

    def _json_caption(self, i: int, handles: Handles) -> Any:
        return self.record(i, handles).get(self.caption_key)

    def label(self, i: int, handles: Handles) -> int:
        place = self.member(i, "cls")
        if place is None:
            return -1
        data = handles.read(self.path, self.size, place[0], min(place[1], 32))
        return parse_label(data, named=False)

    def array(self, i: int, handles: Handles) -> np.ndarray | None:
        """Return the array of `.npy`, such as several labels or a group; None without one.

        Raises:
          BadSampleError: it is no array of numbers.
        """
        place = self.member(i, "npy")
        if place is None:
            return None
        try:
            return np.load(io.BytesIO(self._text(place, handles)), allow_pickle=False)
        except (ValueError, EOFError, OSError) as e:
            raise BadSampleError("no_array", str(e)) from e

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        place = self.member(i, "json")
        return {} if place is None else json_record(self._text(place, handles))

    def _text(self, place: tuple[int, int], handles: Handles) -> bytes:
        if place[1] > MAX_TEXT_BYTES:
            raise BadSampleError("caption_too_long", f"{place[1]} bytes")
        return handles.read(self.path, self.size, *place)

    def incomplete(self) -> dict[str, list[str]]:
        """Return the samples without an image, or with neither `.txt` nor `.json`."""
        has = {suffix: table[:, 0] > 0 for suffix, table in self.members.items()}
        absent = np.zeros(len(self), bool)
        image = np.any([absent, *(has.get(s, absent) for s in IMAGE_SUFFIXES)], axis=0)
        caption = has.get("txt", absent) | has.get("json", absent)
        return {
            cause: [self.key(int(i)) for i in np.flatnonzero(~present)]
            for cause, present in (("no_image", image), ("no_caption", caption))
        }

    def digest(self) -> str:
        """Return a hash of keys, offsets and lengths, but not of the members' contents."""
        state = hashlib.blake2b(self.key_bytes, digest_size=16)
        state.update(self.key_ends.astype("<u4").tobytes())
        for suffix in sorted(set(self.members) & _DIGEST_SUFFIXES):
            state.update(suffix.encode() + b"\0")
            state.update(self.members[suffix].astype("<u4").tobytes())
        return state.hexdigest()


def open_shard(path: str, caption_key: str = "caption", *, whole_txt: bool = False) -> TarShard:
    """Read a shard's headers and prove that they are all there.

    The walk must end at the archive's closing zeros, no member may run past the end of the file,
    and where a side file `<path>.index.json` exists its count and hash must agree.

    Raises:
      ShardError: the file cannot be read, is compressed, is cut or damaged, or disagrees with its
        side file.
    """
    try:
        with os.fdopen(open_local(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            _refuse_compressed(path, file.read(8))
            shard = _collect(path, size, tar.members(path, file, size), caption_key)
            shard = dataclasses.replace(shard, whole_txt=whole_txt)
    except RemoteError as e:
        raise unreadable(e, f"shard {path} cannot be fetched: {e}") from e
    except OSError as e:
        raise unreadable(e, f"shard {path} cannot be read: {e.strerror or e}") from e
    _check_side_file(shard)
    return shard


def _refuse_compressed(path: str, head: bytes) -> None:
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise ShardError(
                "shard_damaged",
                f"shard {path} is compressed with {kind}. Shards are read by offset, which a"
                " compressed archive does not allow: unpack it first",
            )


def _collect(path: str, size: int, members: Sequence[tar.Member], caption_key: str) -> TarShard:
    """Group the members into samples."""
    keys: list[bytes] = []
    rows: list[dict[str, tuple[int, int]]] = []
    ignored = 0
    current = None
    for member in members:
        key, suffix = split_name(member.name)
        known = suffix in SUFFIXES or suffix.endswith(".txt")
        ignored += not member.is_folder and not (key and member.is_file and known)
        if not key or not member.is_file:
            continue
        # A sample without a known suffix keeps its place: it is named and not dropped.
        if key != current or (known and suffix in rows[-1]):
            keys.append(key.encode("utf-8", "surrogateescape"))
            rows.append({})
            current = key
        if known:
            if member.size > _MAX_MEMBER_BYTES:
                reason = f"member {member.name!r} has {member.size} bytes"
                raise damaged(path, member.offset, reason)
            rows[-1][suffix] = (member.data // tar.BLOCK, member.size)
    tables = {
        suffix: np.array([row.get(suffix, (0, 0)) for row in rows], np.uint32)
        for suffix in sorted({suffix for row in rows for suffix in row})
    }
    _note_several_images(path, tables)
    ends = np.cumsum([len(key) for key in keys], dtype=np.uint32)
    return TarShard(path, size, b"".join(keys), ends, tables, ignored, caption_key)


_SEVERAL_IMAGES: set[tuple[str, ...]] = set()


def _note_several_images(path: str, tables: Mapping[str, np.ndarray]) -> None:
    """Say, once for each pair of endings, that samples have two images, and which is read."""
    present = [suffix for suffix in IMAGE_SUFFIXES if suffix in tables]
    for first, other in itertools.combinations(present, 2):
        both = int(((tables[first][:, 0] > 0) & (tables[other][:, 0] > 0)).sum())
        if both and (first, other) not in _SEVERAL_IMAGES:
            _SEVERAL_IMAGES.add((first, other))
            note(f"{path}: {both} samples have a .{first} and a .{other}; only the first is read")


def split_name(name: str) -> tuple[str, str]:
    """Return (key, suffix) of a member: cut at the base name's first dot, suffix in lower case.

    Names without a key or a suffix (`README`, `.DS_Store`, `._000.jpg`) give ("", "").
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or not suffix:
        return "", ""
    return folder + slash + stem, suffix.lower()


def write_side_file(shard: TarShard, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write what `open_shard` will hold the shard to beside it; return the content.

    Args:
      extra: further fields, which `open_shard` does not look at.
    """
    record = {"samples": len(shard), "bytes": shard.size, "members": shard.digest()}
    record |= extra or {}
    with atomic_write(Path(shard.path + SIDE_SUFFIX)) as partial:
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return record


def _check_side_file(shard: TarShard) -> None:
    """Raise ShardError if the shard is another than its side file says."""
    side = shard.path + SIDE_SUFFIX
    if is_url(side) or not os.path.exists(side):
        return
    try:
        with open(side, encoding="utf-8") as file:
            record = json.loads(file.read(65536))
        if not isinstance(record, dict):
            raise ValueError(record)
        samples, size, members = record["samples"], record["bytes"], record["members"]
    except OSError as e:
        raise unreadable(e, f"{side} cannot be read: {e.strerror or e}") from e
    except (ValueError, KeyError, RecursionError) as e:
        message = f"{side} is damaged ({type(e).__name__}): delete it or write it anew"
        raise ShardError("shard_damaged", message) from e
    for name, expected, actual in (
        ("samples", samples, len(shard)),
        ("bytes", size, shard.size),
        ("members (hash)", members, shard.digest()),
    ):
        if expected != actual:
            raise ShardError(
                "shard_damaged",
                f"shard {shard.path} is damaged or was replaced: {name} {actual}, and its side"
                f" file says {expected}. Fetch it again, or delete {side} if the change was meant",
            )
