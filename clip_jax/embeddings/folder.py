"""A folder of embeddings in clip-retrieval's layout, and the file that says what made it.

`img_emb/img_emb_0.npy`, `text_emb/text_emb_0.npy` and `metadata/metadata_0.parquet` are one part:
float16 rows of unit length and, row by row, the images they are of. Numbers have as many digits
as clip-retrieval gives them. `embedding.json`, which only this project writes, says which model
and which data they come from.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from clip_jax.errors import UserError, short
from clip_jax.files import check_local, claim_folder

INFO_FILENAME = "embedding.json"
EMBEDDING_DIRNAMES = {"image": "img_emb", "text": "text_emb"}
METADATA_DIRNAME = "metadata"
SKIPPED_DIRNAME = "skipped"
_EXTENSIONS = {
    **dict.fromkeys(EMBEDDING_DIRNAMES.values(), "npy"),
    METADATA_DIRNAME: "parquet",
    SKIPPED_DIRNAME: "jsonl",
}


@dataclasses.dataclass(frozen=True)
class EmbeddingInfo:
    """Source and settings of a folder's embeddings, the contents of its `embedding.json`.

    Attributes:
      model, architecture, tokenizer: what `clip_jax.load` was given; empty is nothing.
      name: the model's name.
      identity: a hash of its weights, sizes, preprocessing and tokenizer.
      embed_dim: the features of a row.
      data: the source of the images.
      fingerprint: a hash of the source's shards.
      samples: the samples of the source, those that could not be used among them.
      part_rows: the samples of a part, of the last one at most so many.
      batch_size: images encoded at a time, which moves the last bits of a feature.
      texts: whether captions are embedded too.
      dtype: of the model's products.
    """

    model: str
    architecture: str
    tokenizer: str
    name: str
    identity: str
    embed_dim: int
    data: str
    fingerprint: str
    samples: int
    part_rows: int
    batch_size: int
    texts: bool = True
    dtype: str = "float32"

    @property
    def parts(self) -> int:
        """The number of parts of a finished folder."""
        return -(-self.samples // self.part_rows)


def part_path(folder: Path, dirname: str, number: int, parts: int) -> Path:
    """Return one file of part `number` of `parts`; `dirname` is the folder it lies in."""
    digits = int(math.log10(parts)) + 1  # clip-retrieval's rule
    return folder / dirname / f"{dirname}_{number:0{digits}d}.{_EXTENSIONS[dirname]}"


def read_info(folder: Path) -> EmbeddingInfo | None:
    """Read a folder's `embedding.json`; None where it has none, as clip-retrieval's folders.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / INFO_FILENAME
    try:
        return EmbeddingInfo(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError) as e:
        raise UserError(f"{path} is damaged ({short(e)}); embed into another folder") from None


def begin_folder(folder: Path, info: EmbeddingInfo, *, write: bool = True) -> bool:
    """Write a new folder's `embedding.json`, or check that one begun before holds the same.

    Args:
      write: False leaves a new folder as it is.

    Returns:
      Whether it was begun before.

    Raises:
      UserError: the folder holds embeddings of something else; the first difference is named.
    """
    return claim_folder(
        folder,
        dataclasses.asdict(info),
        name=INFO_FILENAME,
        write=write,
        may_differ=["model"],  # the same weights may have moved
        defaults={"texts": True, "dtype": "float32"},
        foreign=[*EMBEDDING_DIRNAMES.values(), METADATA_DIRNAME],
    )


def is_complete(folder: Path, info: EmbeddingInfo, number: int) -> bool:
    """Return whether part `number` is there, all its files with as many rows."""
    dirnames = EMBEDDING_DIRNAMES.values() if info.texts else [EMBEDDING_DIRNAMES["image"]]
    try:
        rows = pq.read_metadata(part_path(folder, METADATA_DIRNAME, number, info.parts)).num_rows
        shapes = [
            np.load(part_path(folder, dirname, number, info.parts), mmap_mode="r").shape
            for dirname in dirnames
        ]
    except (OSError, ValueError):
        return False
    return all(shape == (rows, info.embed_dim) for shape in shapes)


class Embeddings:
    """Rows of a folder's images or captions, memory-mapped: read only when they are used.

    Attributes:
      folder: where they lie.
      kind: "image" or "text".
      info: what made them; None for a folder of clip-retrieval's own.
      paths: the files of the rows.
      parts: the float16 rows of each file.
    """

    def __init__(self, folder: Path, kind: str, info: EmbeddingInfo | None, paths: Sequence[Path]):
        self.folder, self.kind, self.info = folder, kind, info
        self.paths = list(paths)
        self.parts = [np.load(path, mmap_mode="r") for path in paths]
        self._starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self._metadata_paths = sorted((folder / METADATA_DIRNAME).glob("*.parquet"))
        self._row_group = functools.lru_cache(maxsize=64)(self._read_row_group)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        """The features of a row."""
        return self.parts[0].shape[1]

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows of these numbers, in their order, as float32."""
        part_of = np.searchsorted(self._starts, ids, side="right") - 1
        out = np.empty((len(ids), self.dim), np.float32)
        for part in np.unique(part_of):
            at = np.flatnonzero(part_of == part)
            out[at] = self.parts[part][ids[at] - self._starts[part]]
        return out

    def metadata(self, row: int) -> dict[str, Any]:
        """Return the metadata of one row: `image_path`, `caption` and what else its table has."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        offset = row - int(self._starts[part])
        group = 0
        for rows in self._group_sizes(part):
            if offset < rows:
                break
            offset, group = offset - rows, group + 1
        return self._row_group(part, group).slice(offset, 1).to_pylist()[0]

    def _group_sizes(self, part: int) -> list[int]:
        footer = pq.read_metadata(self._metadata_paths[part])
        return [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]

    def _read_row_group(self, part: int, group: int) -> Any:
        return pq.ParquetFile(self._metadata_paths[part]).read_row_group(group)


def open_embeddings(folder: str | Path, kind: str = "image") -> Embeddings:
    """Open the rows of images ("image") or of captions ("text") in a folder.

    Raises:
      UserError: there are none, a part is missing or damaged, files do not fit each other, or the
        folder is a URL.
    """
    check_local({"the folder of features": folder}, is_read=True)
    folder = Path(folder)
    info = read_info(folder)
    rows_folder = folder / EMBEDDING_DIRNAMES[kind]
    paths = sorted(rows_folder.glob("*.npy"))
    if not paths:
        raise UserError(
            f"{folder} holds no {rows_folder.name}/*.npy; make it with python -m clip_jax.embed"
        )
    if info is not None:
        complete = sum(is_complete(folder, info, n) for n in range(info.parts))
        if complete < info.parts:
            raise UserError(
                f"{folder} is not finished: {complete} of {info.parts} parts are complete; run the "
                "same python -m clip_jax.embed again, which makes the others"
            )
    try:
        embeddings = Embeddings(folder, kind, info, paths)
    except (OSError, ValueError) as e:
        raise UserError(f"{rows_folder} cannot be read: {short(e)}") from None
    shapes = {part.shape[1:] for part in embeddings.parts}
    if len(shapes) > 1 or embeddings.parts[0].ndim != 2:
        raise UserError(f"{rows_folder}: parts have rows of shapes {sorted(shapes)}")
    if not len(embeddings):
        raise UserError(f"{folder} holds no image: none of its source could be read")
    return embeddings
