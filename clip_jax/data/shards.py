"""What the loader needs of a shard, whatever its format, and the files that reading it opens."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int64

from clip_jax.data.formats.remote import open_local

MAX_IMAGE_BYTES = 256 << 20
MAX_TEXT_BYTES = 1 << 20
MAX_CAPTION_CHARS = 8192
"""No context holds this many characters, and cleaning a megabyte of text takes a second."""
OPEN_THREADS = 8
"""Threads that open shards or count their samples."""

T = TypeVar("T")


class BadSampleError(Exception):
    """A sample without a usable image or caption; `cause` is the name it is counted under."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause, self.detail = cause, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.cause, self.detail)


PROGRAMMING_ERRORS = (TypeError, AttributeError, NameError)
"""Mistakes of the program, which no sample and no shard is blamed for.

Libraries raise them on damaged bytes, too: what calls a library there turns its errors, and its
alone, into `BadSampleError`.
"""


def sample_cause(error: Exception) -> str:
    """Return the name that a sample is counted under which reading ended with this error."""
    return getattr(error, "cause", "read_failed" if isinstance(error, OSError) else "broken")


class Handles:
    """The files that one run of rows keeps open, each once, and the record that was read last.

    Args:
      reads_images: the image of every sample is asked for after its captions, so that both may be
        read in one go.
    """

    def __init__(self, *, reads_images: bool = False) -> None:
        self.reads_images = reads_images
        self._open: dict[str, int] = {}
        self._record: tuple[Hashable, Any] = (None, None)

    def read(self, path: str, size: int, offset: int, count: int) -> bytes:
        """Read `count` bytes from `offset` of a file, local or remote, that was opened with `size`.

        Raises:
          BadSampleError: `shard_changed`, the size is another; `read_failed`, bytes are missing.
        """
        fd = self._open.get(path)
        if fd is None:
            fd = self.open(path, lambda: open_local(path))
            self._check_size(path, fd, size)
        data = os.pread(fd, count, offset)
        if len(data) != count:
            self._check_size(path, fd, size)
            raise BadSampleError("read_failed", f"{len(data)} of {count} bytes")
        return data

    def _check_size(self, path: str, fd: int, size: int) -> None:
        if os.fstat(fd).st_size != size:
            os.close(self._open.pop(path))
            raise BadSampleError("shard_changed", "the file has another size than at the start")

    def open(self, name: str, opener: Callable[[], int]) -> int:
        """Return the descriptor that `opener` gave for this name, closed when the run ends."""
        if name not in self._open:
            self._open[name] = opener()
        return self._open[name]

    def once(self, key: Hashable, read: Callable[[], T]) -> T:
        """Return `read()`, or what it gave the last time if the key is still the same."""
        if self._record[0] != key:
            self._record = key, read()
        return self._record[1]

    def __enter__(self) -> "Handles":
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._open.values():
            os.close(fd)


@runtime_checkable
class HasDigest(Protocol):
    """A shard whose members' table, which opening it reads anyway, has a hash."""

    def digest(self) -> str:
        """Return a hash of keys, offsets and lengths."""
        ...


@runtime_checkable
class Shard(Protocol):
    """The samples of one file or folder, counted and in order.

    Reading methods may be called from several threads. They raise `BadSampleError`
    or an OSError for a sample that cannot be read, and never touch another one.
    """

    @property
    def name(self) -> str:
        """The file name without its folder, for messages and keys."""
        ...

    @property
    def size(self) -> int:
        """The bytes of the file; with name and count they go into the data's fingerprint."""
        ...

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """Return the key of sample `i`, in this shard."""
        ...

    def image(self, i: int, handles: Handles) -> bytes:
        """Return the encoded image."""
        ...

    def captions(self, i: int, handles: Handles) -> list[str]:
        """Return every caption that is not blank.

        Raises:
          BadSampleError: `no_caption` or `empty_caption` if there is none.
        """
        ...

    def label(self, i: int, handles: Handles) -> int:
        """Return the class number, -1 if there is none."""
        ...

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        """Return the fields that filters look at; empty if there are none."""
        ...

    def incomplete(self) -> dict[str, list[str]]:
        """Return the keys of samples that lack something, by cause, as far as no sample is read."""
        ...


def hash_image(image: bytes) -> Hashable:
    """Return what the samples that hold this very image have in common."""
    return hashlib.blake2b(image, digest_size=16).digest()


def caption_lines(text: str | bytes) -> list[str]:
    """Split a text into captions, one a line, blank ones left out.

    A line feed ends a line, and nothing else does: form feeds and Unicode's separators may stand
    inside a caption.

    Raises:
      BadSampleError: `caption_not_utf8`, `caption_too_long` or `empty_caption`.
    """
    lines = [line.strip()[:MAX_CAPTION_CHARS] for line in _caption_text(text).split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise BadSampleError("empty_caption")
    return lines


def whole_caption(text: str | bytes) -> str:
    """Return a text as one caption, its line ends as spaces.

    Raises:
      BadSampleError: as `caption_lines`.
    """
    lines = [line.strip() for line in _caption_text(text).split("\n")]
    caption = " ".join(line for line in lines if line)[:MAX_CAPTION_CHARS]
    if not caption:
        raise BadSampleError("empty_caption")
    return caption


def _caption_text(text: str | bytes) -> str:
    """Return the text, or raise BadSampleError if it is too long or no UTF-8."""
    if len(text) > MAX_TEXT_BYTES:
        raise BadSampleError("caption_too_long", f"{len(text)} bytes")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8").removeprefix("\ufeff")
        else:
            text.encode("utf-8")  # JSON can spell half a surrogate pair; UTF-8 cannot
    except UnicodeError as e:
        raise BadSampleError("caption_not_utf8", str(e)) from e
    return text


def text_captions(text: bytes, other: Callable[[], Any], whole: bool = False) -> list[str]:
    """Return the captions of a `.txt` file, or of a field beside it where the file is blank.

    Args:
      other: returns the value of the field.
      whole: take the file for one caption, and not each line.

    Raises:
      BadSampleError: as `caption_lines`.
    """
    try:
        return [whole_caption(text)] if whole else caption_lines(text)
    except BadSampleError as blank:
        if blank.cause != "empty_caption":
            raise
        try:
            return caption_values(other())
        except BadSampleError:
            raise blank from None


def caption_values(value: Any) -> list[str]:
    """Return the captions of a field that holds one text or number, or a list of them.

    Each is one caption, whatever line ends it has.

    Raises:
      BadSampleError: `no_caption` if there is no text, or as for `caption_lines`.
    """
    values = list(_flat(value))
    odd = next((v for v in values if isinstance(v, dict)), None)
    if odd is not None and len(values) > 1:
        raise BadSampleError("no_caption", f"one of {len(values)} captions is no text: {odd!r:.80}")
    texts = [str(v) if _is_number(v) else v for v in values]
    texts = [v for v in texts if isinstance(v, str | bytes)]
    if not texts:
        raise BadSampleError("no_caption", f"no text in {value!r:.80}" if value is not None else "")
    captions = [whole_caption(text) for text in texts if text.strip()]
    if not captions:
        raise BadSampleError("empty_caption")
    return captions


def _flat(value: Any) -> Iterator[Any]:
    """Yield the items of a list and of the lists in it; anything else as it is."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def json_record(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
      BadSampleError: `caption_not_utf8`, `caption_too_long` or `caption_not_json`.
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


def parse_label(value: Any, *, named: bool = True) -> int:
    """Parse a class number, an integer or its digits; -1 for None, NaN, "" and -1.

    Args:
      value: a number, or its digits as text or bytes; a fraction of zero may follow ("3.0").
      named: the user has named the field as one of class numbers. Where False, it was found by its
        usual name, and what is no class number is no label: many tables keep names of classes or
        numbers of another kind there.

    Raises:
      BadSampleError: `bad_label`.
    """
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None if value != value else value
    if value is None:
        return -1
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    if isinstance(text, str):
        text = re.sub(r"\.0+$", "", text.strip())
        if re.fullmatch(r"-1|", text):
            return -1
        if text.isascii() and text.isdigit() and int(text) < 2**31:
            return int(text)
    if not named:
        return -1
    raise BadSampleError("bad_label", repr(value)[:80])


def with_templates(names: list[str], templates: tuple[str, ...]) -> list[str]:
    """Return every name in every template; `{}` is the name."""
    return [template.replace("{}", name) for name in names for template in templates]


class ConcatShards:
    """The samples of several shards, one shard after the other, numbered from 0.

    Attributes:
      starts: the number of each shard's first sample, and at last of all samples; counted if it is
        not given.
    """

    def __init__(self, shards: Sequence[Shard], starts: Int64[np.ndarray, " n"] | None = None):
        self.shards = shards
        self.starts = np.cumsum([0, *map(len, shards)]) if starts is None else starts

    def __len__(self) -> int:
        return int(self.starts[-1])

    def at(self, row: int) -> tuple[Shard, int]:
        """Return the shard that holds sample `row` of all, and the sample's place in the shard."""
        k = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.shards[k], row - int(self.starts[k])

    def places(self, rows: Int64[np.ndarray, " rows"]) -> list[tuple[int, int]]:
        """Return the number of each sample's shard, and its place there; of a -1, nonsense."""
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        return list(zip(numbers.tolist(), (rows - self.starts[numbers]).tolist(), strict=True))
