"""TFRecord and ArrayRecord files of `tf.train.Example`, read without TensorFlow.

The wire format of an Example: field 1 holds Features, whose field 1 is a map entry of a name and
a Feature, which is one of bytes (1), floats (2, packed) or integers (3, packed). It is read here:
`tensorflow_datasets.proto` has the message too, but its map loses the order of the features, and
so the bytes of what is written from them.
"""

import os
import struct
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import UInt64

from clip_jax.data.formats.errors import ShardError, damaged, unreadable
from clip_jax.data.formats.file_shard import FileShard
from clip_jax.data.formats.options import Options
from clip_jax.data.formats.remote import is_url, open_local
from clip_jax.data.images import IMAGE_SUFFIXES
from clip_jax.data.shards import (
    MAX_IMAGE_BYTES,
    BadSampleError,
    Handles,
    caption_values,
    hash_image,
    parse_label,
)
from clip_jax.errors import short
from clip_jax.protobuf import BYTES, fields, varints

IMAGE_FEATURES = ("image", "image/encoded", *IMAGE_SUFFIXES, "image_bytes", "img")
CAPTION_FEATURES = ("caption", "text", "txt", "title", "captions", "caption/text", "image/caption")
LABEL_FEATURES = ("label", "cls", "image/class/label", "class")

_MASK_DELTA = 0xA282EAD8


def parse_example(data: bytes) -> dict[str, list[Any]]:
    """Return feature name -> its values: bytes, floats or integers.

    Raises:
      BadSampleError: `broken_record`, for whatever is wrong with the bytes.
    """
    try:
        features: dict[str, list[Any]] = {}
        for _, wire, body in fields(data, wanted=1):
            if wire == BYTES:
                for _, _, entry in fields(body, wanted=1):
                    name, values = _map_entry(_view(entry))
                    features[name] = values
        return features
    except (IndexError, ValueError) as e:
        raise BadSampleError("broken_record", f"not a tf.train.Example ({short(e)})") from e


def _map_entry(entry: memoryview) -> tuple[str, list[Any]]:
    name = ""
    values: list[Any] = []
    for number, _, body in fields(entry):
        if number == 1:
            name = str(_view(body), "utf-8")
        elif number == 2:
            for kind, _, value_list in fields(_view(body)):
                values += _VALUES[kind](_view(value_list)) if kind in _VALUES else []
    return name, values


def _view(value: int | memoryview) -> memoryview:
    """Return the bytes of a field; raise ValueError if it is a number."""
    if isinstance(value, int):
        raise ValueError("a number in the place of bytes")
    return value


def _bytes_list(body: memoryview) -> list[bytes]:
    return [bytes(_view(value)) for _, _, value in fields(body, wanted=1)]


def _float_list(body: memoryview) -> list[float]:
    # Packed or one by one, the bytes of a float are the same.
    parts = [_view(value) for _, _, value in fields(body, wanted=1)]
    return np.frombuffer(b"".join(parts), "<f4").tolist()


def _int_list(body: memoryview) -> list[int]:
    values = [v for _, _, value in fields(body, wanted=1) for v in varints(value)]
    return [v - (1 << 64) if v >> 63 else v for v in values]


_VALUES: dict[int, Callable[[Any], list[Any]]] = {1: _bytes_list, 2: _float_list, 3: _int_list}


def masked_crc(data: bytes) -> int:
    """Return the checksum of TFRecord: CRC32C, rotated right by 15 bits, plus a constant."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


class _ExampleShard(FileShard):
    """Records by number, each a `tf.train.Example` whose features are found by name."""

    def __init__(self, path: str, size: int, options: Options):
        super().__init__(path, size)
        self._options = options

    def _bytes(self, i: int, handles: Handles) -> bytes:
        raise NotImplementedError

    def _example(self, i: int, handles: Handles) -> dict[str, list[Any]]:
        return handles.once((self.path, i), lambda: parse_example(self._bytes(i, handles)))

    def _values(self, i: int, handles: Handles, wanted: str, usual: Sequence[str]) -> list[Any]:
        example = self._example(i, handles)
        names = [wanted] if wanted else usual
        return next((example[name] for name in names if name in example), [])

    def image(self, i: int, handles: Handles) -> bytes:
        values = self._values(i, handles, self._options.image, IMAGE_FEATURES)
        if not values or not isinstance(values[0], bytes):
            raise BadSampleError("no_image")
        return values[0]

    def image_id(self, i: int, handles: Handles) -> Hashable:
        """Return a hash of the image's bytes: the records of its captions hold the same."""
        return hash_image(self.image(i, handles))

    def captions(self, i: int, handles: Handles) -> list[str]:
        return caption_values(self._values(i, handles, self._options.caption, CAPTION_FEATURES))

    def label(self, i: int, handles: Handles) -> int:
        values = self._values(i, handles, self._options.label, LABEL_FEATURES)
        value = values[0] if values else None
        return parse_label(value, named=bool(self._options.label))

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        """Return the features of one value, numbers and texts; images are left out."""
        record = {}
        for name, values in self._example(i, handles).items():
            value = values[0] if len(values) == 1 and name not in IMAGE_FEATURES else None
            if isinstance(value, bytes):
                value = value.decode("utf-8", "replace") if len(value) < 4096 else None
            if value is not None:
                record[name] = value
        return record


class TFRecordShard(_ExampleShard):
    """Records by offset; the data's checksum is tested whenever a record is read.

    Args:
      places: each record's byte offset and length.
    """

    def __init__(
        self, path: str, size: int, places: UInt64[np.ndarray, "samples 2"], options: Options
    ):
        super().__init__(path, size, options)
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def _bytes(self, i: int, handles: Handles) -> bytes:
        offset, length = (int(v) for v in self._places[i])
        if length > MAX_IMAGE_BYTES:
            raise BadSampleError("too_large", f"{length} bytes")
        data = handles.read(self.path, self.size, offset, length + 4)
        if struct.unpack("<I", data[length:])[0] != masked_crc(data[:length]):
            raise BadSampleError("broken_record", "the checksum is wrong")
        return data[:length]


def open_tfrecord(path: str, options: Options) -> TFRecordShard:
    """Open a TFRecord file by walking its lengths, each of which has a checksum of its own.

    Raises:
      ShardError: the file cannot be read, is cut, or a length is damaged (at the byte named).
    """
    places: list[tuple[int, int]] = []
    try:
        with os.fdopen(open_local(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            offset = 0
            while offset < size:
                head = os.pread(file.fileno(), 12, offset)
                if not offset and head[:2] == b"\x1f\x8b":
                    raise damaged(path, 0, "it is compressed with gzip: unpack it first")
                if len(head) < 12 or struct.unpack("<I", head[8:])[0] != masked_crc(head[:8]):
                    raise damaged(path, offset, "no length with a right checksum")
                length = struct.unpack("<Q", head[:8])[0]
                places.append((offset + 12, length))
                offset += 12 + length + 4
            if offset != size:
                raise damaged(path, offset, f"the file ends at byte {size}")
    except OSError as e:
        raise unreadable(e, f"{path} cannot be read: {short(e)}") from e
    return TFRecordShard(path, size, np.array(places, np.uint64).reshape(-1, 2), options)


class ArrayRecordShard(_ExampleShard):
    """Records by number, through the array_record library, which checks them itself."""

    def __init__(self, path: str, options: Options):
        # The reader opens the file and keeps it, so a fetched copy may be deleted later.
        fd = open_local(path)
        try:
            super().__init__(path, os.fstat(fd).st_size, options)
            local = f"/proc/self/fd/{fd}" if is_url(path) else path
            self._reader = array_record_module.ArrayRecordReader(
                local, options="readahead_buffer_size:0"
            )
        finally:
            os.close(fd)
        if not self._reader.ok():
            self._reader.read([0])  # raises with the reason; a damaged file has 0 records
        self._count = self._reader.num_records()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    def _bytes(self, i: int, handles: Handles) -> bytes:
        try:
            with self._lock:
                return self._reader.read([i])[0]
        except (RuntimeError, ValueError, IndexError) as e:
            raise BadSampleError("broken_record", short(e)) from e


def open_array_record(path: str, options: Options) -> ArrayRecordShard:
    """Open an ArrayRecord file.

    Raises:
      ShardError: it cannot be read, or is cut or damaged.
    """
    try:
        return ArrayRecordShard(path, options)
    except OSError as e:
        raise unreadable(e, f"shard {path} cannot be read: {short(e)}. Fetch it again") from e
    except (RuntimeError, ValueError, IndexError) as e:  # the library's, for wrong bytes
        message = f"shard {path} cannot be read: {short(e)}. Fetch it again"
        raise ShardError("shard_damaged", message) from e
