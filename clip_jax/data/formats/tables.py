"""Tables of pairs: CSV and TSV, JSON lines, Parquet, with a column of paths or of bytes.

Paths in a table start from the table's own folder, or from the option `root`. The columns are
found by their usual names (open_clip's `filepath` and `title` among them) or named as options.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from jaxtyping import UInt64

from clip_jax.data.formats.errors import unreadable
from clip_jax.data.formats.options import Options
from clip_jax.data.formats.remote import CACHE, RemoteError, is_url, open_local, read_whole
from clip_jax.data.shards import (
    MAX_IMAGE_BYTES,
    BadSampleError,
    Handles,
    caption_values,
    json_record,
    whole_label,
)
from clip_jax.errors import UserError, short

IMAGE_COLUMNS = ("filepath", "file_name", "image_path", "path", "filename", "file", "image")
BYTES_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "img")
CAPTION_COLUMNS = ("title", "caption", "text", "captions", "txt", "alt_text")
LABEL_COLUMNS = ("label", "cls", "class")


def resolve(root: str, path: str) -> str:
    """A table's path as a path from here, or a URL.

    Raises:
      Unusable: `no_image`, when it is empty.
    """
    if not path:
        raise BadSampleError("no_image", "the path is empty")
    if is_url(path) or os.path.isabs(path):
        return path
    return f"{root.rstrip('/')}/{path}"


def read_picture(root: str, path: str) -> bytes:
    """The file that a table names.

    Raises:
      Unusable, OSError: it is not named, is not there, or is too long.
    """
    return read_whole(resolve(root, path), MAX_IMAGE_BYTES)


def folder_of(path: str, options: Options) -> str:
    """Where the relative paths of a table start."""
    return options.root or path.rpartition("/")[0] or "."


def pick(names: Sequence[str], wanted: str, usual: Sequence[str], what: str, where: str) -> str:
    """The column that is wanted, or the first usual one; empty when `what` may be absent.

    Raises:
      UserError: no such column.
    """
    if wanted:
        if wanted not in names:
            raise UserError(f"{where} has no column {wanted!r}; it has {', '.join(names)}")
        return wanted
    found = next((name for name in usual if name in names), "")
    if not found and what != "label":
        raise UserError(
            f"{where} has no column for the {what} among {', '.join(usual)}; it has "
            f"{', '.join(names)}: name it, {where}#{what}=COLUMN"
        )
    return found


class TableShard:
    """A table in memory whose images are files.

    Args:
      path: the table.
      size: its bytes.
      columns: column -> values, as an arrow table.
      image, caption, label: names of columns; `label` may be empty.
      root: where relative paths start.
    """

    def __init__(
        self, path: str, size: int, columns: pa.Table, names: tuple[str, str, str], root: str
    ):
        self.path, self.size, self.root = path, size, root
        self._columns = columns.combine_chunks()
        self._image, self._caption, self._label = names

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def __len__(self) -> int:
        return self._columns.num_rows

    def key(self, i: int) -> str:
        """The image's path as the table has it."""
        value = self._value(self._image, i)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or i)

    def image(self, i: int, handles: Handles) -> bytes:
        value = self._value(self._image, i)
        if value and not isinstance(value, str | bytes):
            raise BadSampleError("no_image", f"the path is {value!r:.80}")
        return read_picture(self.root, os.fsdecode(value) if value else "")

    def captions(self, i: int, handles: Handles) -> list[str]:
        return caption_values(self._value(self._caption, i))

    def label(self, i: int, handles: Handles) -> int:
        return whole_label(self._value(self._label, i)) if self._label else -1

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        row = {name: self._value(name, i) for name in self._columns.column_names}
        return {
            k: v.decode("utf-8", "replace") if isinstance(v, bytes) else v for k, v in row.items()
        }

    def incomplete(self) -> dict[str, list[str]]:
        return {}

    def _value(self, column: str, i: int) -> Any:
        return self._columns.column(column)[i].as_py()


def open_csv(path: str, options: Options) -> TableShard:
    """A CSV (commas; tabs where the header has tabs alone) or TSV table with a header line.

    Raises:
      ShardError: it cannot be read.
      UserError: it has no column for image or caption.
    """
    size, head = _head(path)
    first = head.partition(b"\n")[0]
    tabs = path.lower().endswith(".tsv") or (b"\t" in first and b"," not in first)
    names = first.decode("utf-8-sig", "replace").strip("\r").split("\t" if tabs else ",")
    names = [name.strip('"') for name in names]
    # Bytes, not text: one caption that is no UTF-8 is that row's fault and not the table's.
    kinds = dict.fromkeys(names, pa.binary())
    try:
        with os.fdopen(open_local(path), "rb") as file:
            columns = pyarrow.csv.read_csv(
                file,
                read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows=1),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="\t" if tabs else ",", newlines_in_values=True
                ),
                convert_options=pyarrow.csv.ConvertOptions(column_types=kinds, check_utf8=False),
            )
    except (OSError, pa.ArrowInvalid) as e:
        message = f"table {path} cannot be read: {short(e)}; mend the row, or leave it out"
        raise unreadable(e, message) from e
    chosen = (
        pick(names, options.image, IMAGE_COLUMNS, "image", path),
        pick(names, options.caption, CAPTION_COLUMNS, "caption", path),
        pick(names, options.label, LABEL_COLUMNS, "label", path),
    )
    return TableShard(path, size, columns, chosen, folder_of(path, options))


def _head(path: str) -> tuple[int, bytes]:
    try:
        with os.fdopen(open_local(path), "rb") as file:
            return os.fstat(file.fileno()).st_size, file.read(1 << 16)
    except OSError as e:
        raise unreadable(e, f"{path} cannot be read: {short(e)}") from e


class JsonLinesShard:
    """One JSON object a line, read when it is asked for; in memory are the lines' places."""

    def __init__(
        self, path: str, size: int, ends: UInt64[np.ndarray, " samples"], options: Options
    ):
        self.path, self.size = path, size
        self._ends = ends
        self._options = options
        self._root = folder_of(path, options)

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def __len__(self) -> int:
        return len(self._ends)

    def key(self, i: int) -> str:
        """The line's number, from 0."""
        return f"{i:08d}"

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        return handles.once((self.path, i), lambda: json_record(self._line(i, handles)))

    def _line(self, i: int, handles: Handles) -> bytes:
        start = int(self._ends[i - 1]) if i else 0
        return handles.read(self.path, self.size, start, int(self._ends[i]) - start)

    def _field(self, i: int, handles: Handles, wanted: str, usual: Sequence[str]) -> Any:
        record = self.record(i, handles)
        names = [wanted] if wanted else usual
        return next((record[name] for name in names if name in record), None)

    def image(self, i: int, handles: Handles) -> bytes:
        path = self._field(i, handles, self._options.image, IMAGE_COLUMNS)
        if not isinstance(path, str):
            raise BadSampleError("no_image", "no path in the line")
        return read_picture(self._root, path)

    def captions(self, i: int, handles: Handles) -> list[str]:
        return caption_values(self._field(i, handles, self._options.caption, CAPTION_COLUMNS))

    def label(self, i: int, handles: Handles) -> int:
        return whole_label(self._field(i, handles, self._options.label, LABEL_COLUMNS))

    def incomplete(self) -> dict[str, list[str]]:
        return {}


def open_jsonl(path: str, options: Options) -> JsonLinesShard:
    """JSON lines; blank ones at the end are no samples.

    Raises:
      ShardError: the file cannot be read.
    """
    ends: list[int] = []
    position = 0
    try:
        with os.fdopen(open_local(path), "rb") as file:
            for line in file:
                position += len(line)
                if line.strip():
                    ends.append(position)
    except OSError as e:
        raise unreadable(e, f"{path} cannot be read: {short(e)}") from e
    return JsonLinesShard(path, position, np.array(ends, np.uint64), options)


class ParquetShard:
    """A Parquet file with a column of encoded images.

    A row group is compressed as a whole, and samples are asked for one by one: its images are
    written to the bounded folder of `remote.CACHE` when the first is asked for, and then read by
    offset.
    """

    def __init__(
        self,
        path: str,
        size: int,
        columns: pa.Table,
        names: tuple[str, str, str],
        groups: list[int],
    ):
        self._table = TableShard(path, size, columns, ("", *names[1:]), "")
        self.path, self.size = path, size
        self._image = names[0]
        self._starts = np.cumsum([0, *groups])
        self._places: dict[int, np.ndarray] = {}

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def __len__(self) -> int:
        return len(self._table)

    def key(self, i: int) -> str:
        """The row's number, from 0."""
        return f"{i:08d}"

    def captions(self, i: int, handles: Handles) -> list[str]:
        return self._table.captions(i, handles)

    def label(self, i: int, handles: Handles) -> int:
        return self._table.label(i, handles)

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        return self._table.record(i, handles)

    def incomplete(self) -> dict[str, list[str]]:
        return {}

    def image(self, i: int, handles: Handles) -> bytes:
        group = int(np.searchsorted(self._starts, i, side="right")) - 1
        # The size, too: another file may have taken the place of one that was spooled.
        spool = f"{self.path}#{self.size}#{group}"
        fd = handles.open(spool, lambda: CACHE.open(spool, lambda to: self._spool(group, to)))
        ends = self._ends(group, fd)
        row = i - int(self._starts[group])
        start = int(ends[row - 1]) if row else 0
        count = int(ends[row]) - start
        if not count:
            raise BadSampleError("no_image")
        if count > MAX_IMAGE_BYTES:
            raise BadSampleError("too_large", f"{count} bytes")
        return os.pread(fd, count, start)

    def _ends(self, group: int, fd: int) -> np.ndarray:
        """Where each image ends; behind the images, since others may have written the file."""
        if group not in self._places:
            count = int(self._starts[group + 1] - self._starts[group])
            table = os.pread(fd, 8 * count, os.fstat(fd).st_size - 8 * count)
            self._places[group] = np.frombuffer(table, "<u8")
        return self._places[group]

    def _spool(self, group: int, to: str) -> None:
        ends: list[int] = []
        try:
            with os.fdopen(open_local(self.path), "rb") as file, open(to, "wb") as out:
                column = pq.ParquetFile(file).read_row_group(group, columns=[self._image]).column(0)
                for value in column:
                    out.write(_picture_bytes(value.as_py()))
                    ends.append(out.tell())
                out.write(np.array(ends, "<u8").tobytes())
        except pa.ArrowException as e:
            raise RemoteError(f"row group {group} of {self.path} cannot be read: {short(e)}") from e


def _picture_bytes(value: Any) -> bytes:
    """The bytes of a cell: bytes as they are, or the `bytes` of a Hugging Face image struct."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""


def open_parquet(path: str, options: Options) -> TableShard | ParquetShard:
    """A Parquet file with a column of images, as bytes or as paths.

    Raises:
      ShardError: it cannot be read.
      UserError: it has no column for image or caption.
    """
    try:
        with os.fdopen(open_local(path), "rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            file = pq.ParquetFile(raw)
            schema = file.schema_arrow
            image = _parquet_image(schema, options, path)
            names = [n for n in schema.names if not _is_bytes(schema.field(n).type)]
            caption = pick(schema.names, options.caption, CAPTION_COLUMNS, "caption", path)
            label = pick(schema.names, options.label, LABEL_COLUMNS, "label", path)
            in_bytes = _is_bytes(schema.field(image).type)
            kept = sorted({*names, caption} | ({label} if label else set()))
            columns = file.read(columns=kept)
            groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    except (OSError, pa.ArrowException) as e:
        message = f"{path} cannot be read: {short(e)}; fetch it again, or leave it out"
        raise unreadable(e, message) from e
    if in_bytes:
        return ParquetShard(path, size, columns, (image, caption, label), groups)
    return TableShard(path, size, columns, (image, caption, label), folder_of(path, options))


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _parquet_image(schema: pa.Schema, options: Options, path: str) -> str:
    """Bytes before paths: a table of bytes often has the old path beside them."""
    if not options.image:
        for name in BYTES_COLUMNS:
            if name in schema.names and _is_bytes(schema.field(name).type):
                return name
    return pick(schema.names, options.image, IMAGE_COLUMNS, "image", path)
