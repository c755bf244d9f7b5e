"""What the loader asks of a shard, whatever its format, and the files that reading it opens."""

import json
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from clip_jax.data.formats.remote import open_local

MAX_IMAGE_BYTES = 256 << 20
MAX_TEXT_BYTES = 1 << 20
# No context holds this many characters, and cleaning a megabyte of text takes a second.
MAX_CAPTION_CHARS = 8192

T = TypeVar("T")


class BadSampleError(Exception):
    """A sample without a usable image or caption; `cause` is the name it is counted under."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


PROGRAMMING_ERRORS = (TypeError, AttributeError, NameError)
"""Mistakes of the program, which no sample and no shard is blamed for.

Libraries raise them on damaged bytes, too: what calls a library there turns its errors, and its
alone, into `BadSampleError`.
"""


def sample_cause(error: Exception) -> str:
    """Return the name that a sample is counted under which reading ended with this error."""
    return getattr(error, "cause", "read_failed" if isinstance(error, OSError) else "broken")


class Handles:
    """What one run of rows keeps open: every file once, and the record that was read last."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._record: tuple[Hashable, Any] = (None, None)

    def read(self, path: str, size: int, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` of a file, local or remote, that was indexed with `size`."""
        fd = self.open(path, lambda: open_local(path))
        if os.fstat(fd).st_size != size:
            os.close(self._open.pop(path))
            raise BadSampleError("shard_changed", "the file has another size than at the start")
        data = os.pread(fd, count, offset)
        if len(data) != count:
            raise BadSampleError("read_failed", f"{len(data)} of {count} bytes")
        return data

    def open(self, name: str, opener: Callable[[], int]) -> int:
        """The descriptor that `opener` gave for this name, closed when the run of rows ends."""
        if name not in self._open:
            self._open[name] = opener()
        return self._open[name]

    def once(self, key: Hashable, read: Callable[[], T]) -> T:
        """`read()`, or what it gave the last time when the key is still the same."""
        if self._record[0] != key:
            self._record = key, read()
        return self._record[1]

    def __enter__(self) -> "Handles":
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._open.values():
            os.close(fd)


@runtime_checkable
class Shard(Protocol):
    """The samples of one file or folder, counted and in order.

    Reading methods may be called from several threads. They raise `BadSampleError`
    or an OSError for a sample that cannot be read, and never touch another one.
    """

    @property
    def name(self) -> str:
        """For messages and keys: the file name without its folder."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the file; with name and count it goes into the data's fingerprint."""
        ...

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """The key of sample `i`, in this shard."""
        ...

    def image(self, i: int, handles: Handles) -> bytes:
        """The encoded image."""
        ...

    def captions(self, i: int, handles: Handles) -> list[str]:
        """Every caption that is not blank; `no_caption` or `empty_caption` when there is none."""
        ...

    def label(self, i: int, handles: Handles) -> int:
        """The class number, -1 when there is none."""
        ...

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        """The fields that filters look at; empty when there are none."""
        ...

    def incomplete(self) -> dict[str, list[str]]:
        """Keys of the samples that the index alone shows to lack something, by cause."""
        ...


def caption_lines(text: str | bytes) -> list[str]:
    """One caption a line, blank ones left out.

    Raises:
      Unusable: `caption_not_utf8`, `caption_too_long` or `empty_caption`.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise BadSampleError("caption_too_long", f"{len(text)} bytes")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        text.encode("utf-8")  # JSON can spell half a surrogate pair; UTF-8 cannot
    except UnicodeError as e:
        raise BadSampleError("caption_not_utf8", str(e)) from e
    lines = [line.strip()[:MAX_CAPTION_CHARS] for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise BadSampleError("empty_caption")
    return lines


def caption_values(value: Any) -> list[str]:
    """The captions of a field that holds one text or a list of them.

    Raises:
      Unusable: there is no text, or as for `caption_lines`.
    """
    values = value if isinstance(value, list | tuple) else [value]
    texts = [v for v in values if isinstance(v, str | bytes)]
    if not texts:
        raise BadSampleError("no_caption", f"no text in {value!r:.80}" if value is not None else "")
    if len(texts) == 1:
        return caption_lines(texts[0])
    lines = [line for text in texts if text.strip() for line in caption_lines(text)]
    if not lines:
        raise BadSampleError("empty_caption")
    return lines


def json_record(text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
      Unusable: `caption_not_utf8`, `caption_too_long` or `caption_not_json`.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise BadSampleError("caption_too_long", f"{len(text)} bytes")
    try:
        record = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeError as e:
        raise BadSampleError("caption_not_utf8", str(e)) from e
    except (ValueError, RecursionError) as e:
        raise BadSampleError("caption_not_json", str(e)) from e
    if not isinstance(record, dict):
        raise BadSampleError("caption_not_json", "not an object")
    return record


def whole_label(value: Any) -> int:
    """A class number as an integer or its digits; -1 for None.

    Raises:
      Unusable: `bad_label`.
    """
    if value is None:
        return -1
    if isinstance(value, int) and not isinstance(value, bool):
        digits = str(value)
    elif isinstance(value, bytes | str):
        digits = value.strip() if isinstance(value, str) else value.strip().decode("latin-1")
    else:
        raise BadSampleError("bad_label", repr(value)[:80])
    if not (digits.isascii() and digits.isdigit()) or int(digits) >= 2**31:
        raise BadSampleError("bad_label", repr(value)[:80])
    return int(digits)


def with_templates(names: list[str], templates: tuple[str, ...]) -> list[str]:
    """Every name in every template; `{}` is the name."""
    return [template.replace("{}", name) for name in names for template in templates]


class ConcatShards:
    """The samples of several shards, counted through.

    Attributes:
      shards: one after the other.
      starts: the place of each shard's first sample, and how many samples there are.
    """

    def __init__(self, shards: Sequence[Shard]):
        self.shards = shards
        self.starts = np.cumsum([0, *map(len, shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def at(self, row: int) -> tuple[Shard, int]:
        """The shard that holds sample `row` of the line, and the sample's place in it."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.shards[number], row - int(self.starts[number])
