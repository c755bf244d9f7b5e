"""Read a folder of embeddings as what the tasks of an evaluation score: no image is encoded."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float32, Int

from clip_jax.embeddings.folder import (
    EMBEDDING_DIRNAMES,
    METADATA_DIRNAME,
    Embeddings,
    open_embeddings,
)
from clip_jax.errors import UserError, short
from clip_jax.evaluation.encoders import unit_rows
from clip_jax.evaluation.features import FeatureSet


def read_features(folder: str | Path, label_B: Int[np.ndarray, " B"] | None = None) -> FeatureSet:
    """Return the features of a folder's images and of their captions, made unit again.

    Stored numbers are float16, so that a cosine is off by up to about 5e-4.

    Args:
      label_B: the images' classes; None takes those that `clip_jax.embed` found in the data.

    Raises:
      UserError: the folder cannot be read or is not finished, or there are other numbers of labels.
    """
    folder = Path(folder)
    images = open_embeddings(folder)
    rows = len(images)
    columns = _metadata(folder, rows)
    if label_B is None:
        label_B = np.array(columns.get("label", [-1] * rows), np.int32)
    elif len(label_B) != rows:
        raise UserError(f"{folder} holds {rows} images, and there are {len(label_B)} labels")
    captions = columns.get("caption", [""] * rows)
    has_texts = any((folder / EMBEDDING_DIRNAMES["text"]).glob("*.npy"))
    captioned = [i for i, caption in enumerate(captions) if caption and has_texts]
    z_text_BD = np.zeros((0, images.dim), np.float32)
    if captioned:
        texts = open_embeddings(folder, "text")
        if len(texts) != rows:
            raise UserError(f"{folder} holds {rows} images and {len(texts)} captions")
        z_text_BD = _unit(texts, np.array(captioned))
    return FeatureSet(
        z_image_BD=_unit(images, np.arange(rows)),
        row_B=np.arange(rows),
        label_B=label_B.astype(np.int32),
        keys=[str(key) for key in columns.get("image_path", range(rows))],
        z_text_BD=z_text_BD,
        captions=[captions[i] for i in captioned],
        image_of_text=np.array(captioned, np.int64),
        skipped={},
    )


def _unit(embeddings: Embeddings, rows: np.ndarray) -> Float32[np.ndarray, "B D"]:
    return unit_rows(embeddings.rows(rows))


def _metadata(folder: Path, rows: int) -> dict[str, list[Any]]:
    """Return the columns of the folder's metadata that are known here; some may be absent."""
    known = ("label", "caption", "image_path")
    columns: dict[str, list[Any]] = {}
    for path in sorted((folder / METADATA_DIRNAME).glob("*.parquet")):
        try:
            table = pq.read_table(path)
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read: {short(e)}") from None
        for name in known:
            if name in table.column_names:
                columns.setdefault(name, []).extend(table[name].to_pylist())
    for name, values in columns.items():
        if len(values) != rows:
            raise UserError(f"{folder} holds {rows} images, and metadata of {len(values)} {name}s")
    return columns
