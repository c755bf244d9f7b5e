"""A folder of embeddings in clip-retrieval's layout, and what it says of itself.

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
from clip_jax.files import atomic_write

FILE = "embedding.json"
FOLDERS = {"image": "img_emb", "text": "text_emb"}
METADATA = "metadata"
_ENDINGS = {"img_emb": "npy", "text_emb": "npy", METADATA: "parquet", "skipped": "jsonl"}


@dataclasses.dataclass(frozen=True)
class About:
    """What a folder was made of.

    Attributes:
      model, architecture, tokenizer: what `clip_jax.load` was given; empty is nothing.
      name: the model's.
      identity: of its weights, sizes, preprocessing and tokenizer.
      embed_dim: features of a row.
      data: the source.
      fingerprint: of the data's shards.
      samples: in the source, those that could not be used among them.
      part_rows: samples of a part, the last one's apart.
      batch_size: images encoded at a time, which moves the last bits of a feature.
      texts: whether captions are embedded too.
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

    @property
    def parts(self) -> int:
        """How many parts there are when all are made."""
        return -(-self.samples // self.part_rows)


def part_file(folder: Path, kind: str, number: int, parts: int) -> Path:
    """One file of part `number`; `kind` is the folder it lies in."""
    digits = int(math.log10(parts)) + 1  # clip-retrieval's rule
    return folder / kind / f"{kind}_{number:0{digits}d}.{_ENDINGS[kind]}"


def read_about(folder: Path) -> About | None:
    """What a folder says of itself; None where it says nothing, as clip-retrieval's do.

    Raises:
      UserError: its file is damaged.
    """
    path = folder / FILE
    try:
        return About(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, OSError) as e:
        raise UserError(f"{path} is damaged ({short(e)}); embed into another folder") from None


def claim(folder: Path, about: About) -> None:
    """Write what a folder will hold, or find that it holds just that.

    Raises:
      UserError: it holds embeddings of something else; the first difference is named.
    """
    found = read_about(folder)
    if found is None:
        if any((folder / name).exists() for name in (*FOLDERS.values(), METADATA)):
            raise UserError(f"{folder} holds embeddings without {FILE}; give another --out")
        with atomic_write(folder / FILE) as partial:
            text = json.dumps(dataclasses.asdict(about), indent=2)
            partial.write_text(text + "\n", encoding="utf-8")
        return
    here, wanted = dataclasses.asdict(found), dataclasses.asdict(about)
    # The same weights may have moved.
    names = [n for n in here if here[n] != wanted[n] and n != "model"]
    if names:
        raise UserError(
            f"{folder} was begun with {names[0]} {here[names[0]]!r} and this is "
            f"{wanted[names[0]]!r}; give another --out, or what it was begun with"
        )


def is_whole(folder: Path, about: About, number: int) -> bool:
    """Whether part `number` is there, all its files with as many rows."""
    kinds = ["img_emb", "text_emb"] if about.texts else ["img_emb"]
    try:
        rows = pq.read_metadata(part_file(folder, METADATA, number, about.parts)).num_rows
        shapes = [
            np.load(part_file(folder, kind, number, about.parts), mmap_mode="r").shape
            for kind in kinds
        ]
    except (OSError, ValueError):
        return False
    return all(shape == (rows, about.embed_dim) for shape in shapes)


class Embeddings:
    """A folder's rows, read where they lie: nothing is loaded until it is asked for.

    Attributes:
      parts: float16 rows, a memory-mapped array a part.
      about: None for a folder of clip-retrieval's own.
    """

    def __init__(self, folder: Path, kind: str, about: About | None, paths: Sequence[Path]):
        self.folder, self.kind, self.about = folder, kind, about
        self.paths = list(paths)
        self.parts = [np.load(path, mmap_mode="r") for path in paths]
        self._starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self._metadata = sorted((folder / METADATA).glob("*.parquet"))
        self._group = functools.lru_cache(maxsize=64)(self._read_group)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        """Features of a row."""
        return self.parts[0].shape[1]

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The rows of these numbers, in their order, as float32."""
        part_of = np.searchsorted(self._starts, ids, side="right") - 1
        out = np.empty((len(ids), self.dim), np.float32)
        for part in np.unique(part_of):
            at = np.flatnonzero(part_of == part)
            out[at] = self.parts[part][ids[at] - self._starts[part]]
        return out

    def metadata(self, row: int) -> dict[str, Any]:
        """What is known of one row: `image_path`, `caption` and what else its table has."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        place = row - int(self._starts[part])
        group = 0
        for rows in self._groups(part):
            if place < rows:
                break
            place, group = place - rows, group + 1
        return self._group(part, group).slice(place, 1).to_pylist()[0]

    def _groups(self, part: int) -> list[int]:
        about = pq.read_metadata(self._metadata[part])
        return [about.row_group(g).num_rows for g in range(about.num_row_groups)]

    def _read_group(self, part: int, group: int) -> Any:
        return pq.ParquetFile(self._metadata[part]).read_row_group(group)


def open_embeddings(folder: str | Path, kind: str = "image") -> Embeddings:
    """The rows of images ("image") or of captions ("text") in a folder.

    Raises:
      UserError: there are none, a part is missing or damaged, or files do not fit each other.
    """
    folder = Path(folder)
    about = read_about(folder)
    paths = sorted((folder / FOLDERS[kind]).glob("*.npy"))
    if not paths:
        raise UserError(
            f"{folder} holds no {FOLDERS[kind]}/*.npy; make it with python -m clip_jax.embed"
        )
    if about is not None:
        whole = sum(is_whole(folder, about, n) for n in range(about.parts))
        if whole < about.parts:
            raise UserError(
                f"{folder} is not finished: {whole} of {about.parts} parts are whole; run the "
                "same python -m clip_jax.embed again, which makes the others"
            )
    try:
        found = Embeddings(folder, kind, about, paths)
    except (OSError, ValueError) as e:
        raise UserError(f"{folder / FOLDERS[kind]} cannot be read: {short(e)}") from None
    shapes = {part.shape[1:] for part in found.parts}
    if len(shapes) > 1 or found.parts[0].ndim != 2:
        raise UserError(f"{folder / FOLDERS[kind]}: parts have rows of shapes {sorted(shapes)}")
    if not len(found):
        raise UserError(f"{folder} holds no image: none of its source could be read")
    return found
