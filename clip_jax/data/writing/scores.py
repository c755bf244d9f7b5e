"""Scores of a set's samples, in parts on disk, and the choice of samples by them.

`scores/part-00000.parquet` has a row a sample, in the order of the data: `key` ("shard/key") and
`similarity`, which is absent where the sample could not be scored. A part is whole or absent.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from clip_jax.errors import UserError, short
from clip_jax.files import atomic_write

FIELD = "similarity"


def part_path(folder: Path, part: int) -> Path:
    """Return the path of one part."""
    return folder / f"part-{part:05d}.parquet"


def write_part(
    path: Path,
    keys: Sequence[str],
    scores_B: Float32[np.ndarray, " B"],
    skipped: Counter[str],
) -> None:
    """Write one part.

    Args:
      scores_B: NaN where the sample has no score.
      skipped: cause -> samples of this part without a score.

    Raises:
      UserError: it cannot be written.
    """
    utf8_keys = [key.encode("utf-8", "replace").decode() for key in keys]
    table = pa.table({"key": utf8_keys, FIELD: pa.array(scores_B, mask=np.isnan(scores_B))})
    metadata = {"skipped": json.dumps(dict(sorted(skipped.items())))}
    with atomic_write(path) as partial:
        pq.write_table(table.replace_schema_metadata(metadata), partial)


def read_part(path: Path) -> tuple[Float32[np.ndarray, " B"], Counter[str]]:
    """Return the scores of a part, NaN where there is none, and what was skipped.

    Raises:
      UserError: it is damaged.
    """
    try:
        with path.open("rb") as file:
            table = pq.read_table(file, columns=[FIELD])
        skipped = Counter(json.loads((table.schema.metadata or {})[b"skipped"]))
        column = table.column(FIELD).cast(pa.float32()).fill_null(float("nan"))
        return column.to_numpy().astype(np.float32), skipped
    except (OSError, ValueError, KeyError, pa.ArrowException) as e:
        raise UserError(f"{path} is damaged ({short(e):.100}): delete it and run again") from e


def read_scores(folder: Path, parts: int) -> tuple[Float32[np.ndarray, " samples"], Counter[str]]:
    """Return the scores of all parts, one after the other, and what was skipped."""
    scores, skipped = [np.zeros(0, np.float32)], Counter[str]()
    for part in range(parts):
        scores_B, part_skipped = read_part(part_path(folder, part))
        scores.append(scores_B)
        skipped += part_skipped
    return np.concatenate(scores), skipped


def select(
    scores_B: Float32[np.ndarray, " samples"],
    *,
    threshold: float | None = None,
    top: float | None = None,
) -> Int64[np.ndarray, " selected"]:
    """Return the places of the selected samples, in order; one without a score never is.

    Args:
      threshold: the lowest score that is selected.
      top: the share of the scored samples, those with the highest scores; of equal ones the
        first. With both, each must be met.

    Raises:
      UserError: none is left.
    """
    rows = np.flatnonzero(~np.isnan(scores_B))
    scored = len(rows)
    if top is not None:
        # Sorting is stable: of equal scores the first in the data comes first.
        order = np.argsort(-scores_B[rows], kind="stable")
        rows = np.sort(rows[order[: int(scored * top)]])
    if threshold is not None:
        # As `config.data.filter` compares: in float64.
        rows = rows[scores_B[rows].astype(np.float64) >= threshold]
    if not len(rows):
        flags = {"--threshold": threshold, "--top": top}
        given = " ".join(f"{k} {v:g}" for k, v in flags.items() if v is not None) or "scoring"
        best = f"{np.nanmax(scores_B):.4f}" if scored else "none"
        raise UserError(
            f"{given} leaves none of the {scored:,} scored samples (the highest score is {best})"
        )
    return rows.astype(np.int64)
