"""Tables of pairs: CSV and TSV, JSON lines, Parquet, with a column of paths or of bytes.

Paths in a table start from the table's own folder, or from the option `root`. The columns are
found by their usual names (open_clip's `filepath` and `title` among them) or named as options.
"""

import csv
import json
import os
import re
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from jaxtyping import UInt64

from clip_jax.data.formats.errors import ShardError, unreadable
from clip_jax.data.formats.file_shard import FileShard
from clip_jax.data.formats.options import Options
from clip_jax.data.formats.remote import CACHE, RemoteError, is_url, open_local, read_whole
from clip_jax.data.images import IMAGE_SUFFIXES
from clip_jax.data.shards import (
    MAX_IMAGE_BYTES,
    BadSampleError,
    Handles,
    caption_values,
    hash_image,
    json_record,
    parse_label,
)
from clip_jax.errors import UserError, note, short

IMAGE_COLUMNS = ("filepath", "file_name", "image_path", "path", "filename", "file", "image")
BYTES_COLUMNS = ("image", *IMAGE_SUFFIXES, "image_bytes", "bytes", "img")
CAPTION_COLUMNS = ("title", "caption", "text", "captions", "txt", "alt_text")
LABEL_COLUMNS = ("label", "cls", "class")


def resolve(root: str, path: str) -> str:
    """Return a table's path as a path from here, or as a URL.

    Raises:
      BadSampleError: `no_image`, if it is empty.
    """
    if not path:
        raise BadSampleError("no_image", "the path is empty")
    if is_url(path) or os.path.isabs(path):
        return path
    return f"{root.rstrip('/')}/{path}"


def read_image(root: str, path: str) -> bytes:
    """Read the file that a table names.

    Raises:
      BadSampleError, OSError: it is not named, is not there, or is too long.
    """
    return read_whole(resolve(root, path), MAX_IMAGE_BYTES)


def _path_id(root: str, path: str) -> str:
    return path if is_url(path) or is_url(root) else os.path.normpath(os.path.join(root, path))


def root_of(path: str, options: Options) -> str:
    """Return where the relative paths of a table start."""
    return options.root or path.rpartition("/")[0] or "."


class Columns(NamedTuple):
    """The names of a table's columns; `label` is empty where there is none.

    `caption` is empty where the names of the label's classes are the captions. `label_is_named`
    says that an option names the label; else it has one of the usual names.
    """

    image: str
    caption: str
    label: str
    label_is_named: bool


def find_columns(
    names: Sequence[str],
    options: Options,
    path: str,
    *,
    image: str = "",
    named_labels: Sequence[str] = (),
) -> Columns:
    """Return the columns that the options name, or those with the usual names.

    Args:
      names: of all columns.
      path: the table, for messages.
      image: the column of the image, if it is known.
      named_labels: columns of class numbers whose classes have names; these are the captions where
        no column holds any.

    Raises:
      UserError: no such column, or two of one name.
    """
    usual_labels = [*LABEL_COLUMNS, *named_labels]
    label = _find_column(names, options.label, usual_labels, "label", path)
    captions = [*CAPTION_COLUMNS, *([""] if label in named_labels else [])]
    columns = Columns(
        image or _find_column(names, options.image, IMAGE_COLUMNS, "image", path),
        _find_column(["", *names], options.caption, captions, "caption", path),
        label,
        bool(options.label),
    )
    for name in columns[:3]:
        if name and list(names).count(name) > 1:
            raise UserError(f"{path} has two columns of the name {name!r}: rename one")
    return columns


def _find_column(
    names: Sequence[str], wanted: str, usual: Sequence[str], role: str, path: str
) -> str:
    if wanted:
        if wanted not in names:
            known = ", ".join(filter(None, names))
            raise UserError(f"{path} has no column {wanted!r}; it has {known}")
        return wanted
    column = next((name for name in usual if name in names), None)
    if column is None and role != "label":
        raise UserError(
            f"{path} has no column for the {role} among {', '.join(usual)}; it has "
            f"{', '.join(filter(None, names))}: name it, {path}#{role}=COLUMN"
        )
    return column or ""


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the classes by column, as Hugging Face describes a table."""
    try:
        metadata = (schema.metadata or {}).get(b"huggingface", b"{}")
        features = json.loads(metadata)["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and isinstance(feature.get("names"), list)
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


_LIST = re.compile(r"""\[\s*(['"]).*\1\s*\]""", re.DOTALL)


def _note_lists(path: str, table: pa.Table, column: str) -> None:
    """Say that captions look like lists that were written as text, each of which is one caption."""
    value = table.column(column)[0].as_py() if column and table.num_rows else None
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if isinstance(text, str) and _LIST.fullmatch(text.strip()):
        note(
            f"{path}: captions look like lists written as text, and each is one caption, the first "
            f"{text.strip():.60}; write a row for each caption, or JSON lines"
        )


class TableShard(FileShard):
    """A table in memory whose images are files.

    Args:
      path: the table.
      size: its bytes.
      table: the values.
      columns: where image, caption and label stand in it.
      root: where relative paths start.
    """

    def __init__(self, path: str, size: int, table: pa.Table, columns: Columns, root: str):
        super().__init__(path, size)
        self._table = table.combine_chunks()
        self._columns = columns
        self._root = root

    def __len__(self) -> int:
        return self._table.num_rows

    def key(self, i: int) -> str:
        """Return the image's path as it stands in the table."""
        value = self._value(self._columns.image, i)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or i)

    def image(self, i: int, handles: Handles) -> bytes:
        value = self._value(self._columns.image, i)
        if value and not isinstance(value, str | bytes):
            raise BadSampleError("no_image", f"the path is {value!r:.80}")
        return read_image(self._root, os.fsdecode(value) if value else "")

    def image_id(self, i: int, handles: Handles) -> Hashable:
        """Return the path of the image, which the rows of its captions have in common."""
        return _path_id(self._root, self.key(i))

    @property
    def classes(self) -> list[str]:
        """The names in Hugging Face's description of the label; empty where there is none."""
        return class_names(self._table.schema).get(self._columns.label, [])

    def captions(self, i: int, handles: Handles) -> list[str]:
        """Return the row's captions, or the name of its class where no column holds captions."""
        if not self._columns.caption:
            label, names = self.label(i, handles), self.classes
            if not 0 <= label < len(names):
                raise BadSampleError("no_caption", f"label {label}")
            return [names[label].replace("_", " ")]
        return caption_values(self._value(self._columns.caption, i))

    def label(self, i: int, handles: Handles) -> int:
        column = self._columns.label
        if not column:
            return -1
        return parse_label(self._value(column, i), named=self._columns.label_is_named)

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        row = {name: self._value(name, i) for name in self._table.column_names}
        return {
            k: v.decode("utf-8", "replace") if isinstance(v, bytes) else v for k, v in row.items()
        }

    def _value(self, column: str, i: int) -> Any:
        return self._table.column(column)[i].as_py()


def open_csv(path: str, options: Options) -> TableShard:
    """Open a CSV (commas; tabs where the header has tabs alone) or TSV table with a header line.

    Raises:
      ShardError: it cannot be read.
      UserError: it has no column for image or caption.
    """
    try:
        with os.fdopen(open_local(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.readline(1 << 16)
            if header[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise ShardError("shard_damaged", f"{path} is UTF-16 text: save it as UTF-8")
            tabs = path.lower().endswith(".tsv") or (b"\t" in header and b"," not in header)
            delimiter = "\t" if tabs else ","
            lines = header.decode("utf-8-sig", "replace").splitlines()
            names = next(csv.reader(lines[:1], delimiter=delimiter), [])
            # Bytes, not text: one caption that is no UTF-8 is that row's fault and not the table's.
            types = dict.fromkeys(names, pa.binary())
            file.seek(0)
            table = pyarrow.csv.read_csv(
                file,
                read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows=1),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=delimiter, newlines_in_values=True
                ),
                convert_options=pyarrow.csv.ConvertOptions(column_types=types, check_utf8=False),
            )
    except OSError as e:
        raise unreadable(e, f"{path} cannot be read: {short(e)}") from e
    except pa.ArrowInvalid as e:
        message = f"table {path} cannot be read: {short(e)}; mend the row, or leave it out"
        raise unreadable(e, message) from e
    _check_quotes(path, table, delimiter)
    columns = find_columns(names, options, path)
    _note_lists(path, table, columns.caption)
    return TableShard(path, size, table, columns, root_of(path, options))


def _check_quotes(path: str, table: pa.Table, delimiter: str) -> None:
    """Raise ShardError if a quote that is not closed has taken in the rows after it.

    Only a table in which a value spans lines is read again, by the rules that Arrow does not
    check: a quote that opens a value must be closed, and a comma or the line's end must follow.
    """
    if not any(
        pc.any(pc.match_substring(column, end)).as_py()
        for column in table.columns
        for end in (b"\n", b"\r")
    ):
        return
    csv.field_size_limit(MAX_IMAGE_BYTES)
    with open(open_local(path), encoding="latin-1", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        number, line = 0, 1
        try:
            for row in rows:
                if row and len(row) != table.num_columns:
                    raise csv.Error(f"{len(row)} values, and the header has {table.num_columns}")
                number, line = number + 1, rows.line_num + 1
        except csv.Error as e:
            raise ShardError(
                "shard_damaged",
                f"table {path}: row {number}, line {line}: a quote that opens a value is not "
                f"closed ({e}): close it, or write the value in quotes with each quote in it twice",
            ) from None


class JsonLinesShard(FileShard):
    """One JSON object a line, read when it is asked for; the lines' places are in memory.

    Args:
      ends: where each line ends, in bytes.
    """

    def __init__(
        self, path: str, size: int, ends: UInt64[np.ndarray, " samples"], options: Options
    ):
        super().__init__(path, size)
        self._ends = ends
        self._options = options
        self._root = root_of(path, options)

    def __len__(self) -> int:
        return len(self._ends)

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
        return read_image(self._root, path)

    def image_id(self, i: int, handles: Handles) -> Hashable:
        """Return the path of the image, which the rows of its captions have in common."""
        path = self._field(i, handles, self._options.image, IMAGE_COLUMNS)
        return _path_id(self._root, str(path))

    def captions(self, i: int, handles: Handles) -> list[str]:
        return caption_values(self._field(i, handles, self._options.caption, CAPTION_COLUMNS))

    def label(self, i: int, handles: Handles) -> int:
        value = self._field(i, handles, self._options.label, LABEL_COLUMNS)
        return parse_label(value, named=bool(self._options.label))


def open_jsonl(path: str, options: Options) -> JsonLinesShard:
    """Open a file of JSON lines; blank ones are not samples.

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


class ParquetShard(TableShard):
    """A Parquet file with a column of encoded images; the other columns are in memory.

    A row group is compressed as a whole, and samples are asked for one by one: its images are
    written to the bounded folder of `remote.CACHE` when the first is asked for, and then read by
    offset.

    Args:
      groups: rows of each row group.
    """

    def __init__(
        self, path: str, size: int, table: pa.Table, columns: Columns, groups: Sequence[int]
    ):
        super().__init__(path, size, table, columns, root="")
        self._starts = np.cumsum([0, *groups])
        self._image_ends: dict[int, UInt64[np.ndarray, " rows"]] = {}

    def key(self, i: int) -> str:
        """Return the row's number, from 0."""
        return f"{i:08d}"

    def image_id(self, i: int, handles: Handles) -> Hashable:
        """Return a hash of the image's bytes: the rows of its captions hold the same."""
        return hash_image(self.image(i, handles))

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

    def _ends(self, group: int, fd: int) -> UInt64[np.ndarray, " rows"]:
        """Return where each image ends, from behind the images: others may have spooled them."""
        if group not in self._image_ends:
            count = int(self._starts[group + 1] - self._starts[group])
            ends = os.pread(fd, 8 * count, os.fstat(fd).st_size - 8 * count)
            self._image_ends[group] = np.frombuffer(ends, "<u8")
        return self._image_ends[group]

    def _spool(self, group: int, to: str) -> None:
        """Write the images of a row group to a file, and then where each of them ends."""
        name = self._columns.image
        ends: list[int] = []
        try:
            with os.fdopen(open_local(self.path), "rb") as file, open(to, "wb") as out:
                column = pq.ParquetFile(file).read_row_group(group, columns=[name]).column(0)
                for value in column:
                    out.write(_image_bytes(value.as_py()))
                    ends.append(out.tell())
                out.write(np.array(ends, "<u8").tobytes())
        except pa.ArrowException as e:
            raise RemoteError(f"row group {group} of {self.path} cannot be read: {short(e)}") from e


def _image_bytes(value: Any) -> bytes:
    """Return the bytes of a cell, or the `bytes` of a Hugging Face image struct in it."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""


def open_parquet(path: str, options: Options) -> TableShard:
    """Open a Parquet file with a column of images, as bytes or as paths.

    Raises:
      ShardError: it cannot be read.
      UserError: it has no column for image or caption.
    """
    try:
        with os.fdopen(open_local(path), "rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            file = pq.ParquetFile(raw)
            schema = file.schema_arrow
            image = _bytes_column(schema) if not options.image else ""
            labels = sorted(class_names(schema).keys() & set(schema.names))
            columns = find_columns(schema.names, options, path, image=image, named_labels=labels)
            names = {name for name in schema.names if not _is_bytes(schema.field(name).type)}
            names |= {name for name in (columns.caption, columns.label) if name}
            table = file.read(columns=sorted(names))
            groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    except (OSError, pa.ArrowException) as e:
        message = f"{path} cannot be read: {short(e)}; fetch it again, or leave it out"
        raise unreadable(e, message) from e
    _note_lists(path, table, columns.caption)
    if _is_bytes(schema.field(columns.image).type):
        return ParquetShard(path, size, table, columns, groups)
    return TableShard(path, size, table, columns, root_of(path, options))


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _bytes_column(schema: pa.Schema) -> str:
    """Return a usual column of bytes, which often has the old path beside it; empty if none."""
    names = (name for name in BYTES_COLUMNS if name in schema.names)
    return next((name for name in names if _is_bytes(schema.field(name).type)), "")
