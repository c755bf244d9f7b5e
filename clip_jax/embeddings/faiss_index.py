"""Approximate search by faiss: a small code of every row is compared, the best are looked at.

Product quantization to 4 bits for every two features, compared in registers (faiss's "fast
scan"), is 128 bytes a row at 512 features: a million rows are compared in a few milliseconds,
whatever their distribution, with no lists to train and to miss. The nearest `CANDIDATES` codes are
then scored exactly, from the rows themselves, so that scores and order are those of exact search.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64

from clip_jax.embeddings.brute_force import best, scores_of
from clip_jax.embeddings.folder import Embeddings
from clip_jax.errors import UserError, short
from clip_jax.files import atomic_write

CANDIDATES = 512
TRAIN_ROWS = 4_096  # 256 for each of 16 centers, more than which faiss does not take
ADD_ROWS = 65_536
# With fewer rows, exact search takes some milliseconds itself.
LEAST_ROWS = 50_000


def faiss_or_none() -> Any:
    """The library, where it is installed."""
    try:
        import faiss
    except ImportError:
        return None
    # Its loops are far too short to share out: on two busy cores training took 20 times as long.
    faiss.omp_set_num_threads(1)
    return faiss


def index_file(embeddings: Embeddings) -> Path:
    """Where the index of these rows is kept."""
    return embeddings.folder / f"{embeddings.kind}.index"


def open_index(embeddings: Embeddings) -> Any:
    """The index beside the embeddings, made where there is none or they changed since.

    Raises:
      UserError: faiss is not installed.
    """
    faiss = faiss_or_none()
    if faiss is None:
        raise UserError("faiss is not installed: pip install 'clip_jax[search]', or --using exact")
    path = index_file(embeddings)
    stamp_path = path.with_name(path.name + ".json")
    stamp = _stamp(embeddings)
    try:
        if json.loads(stamp_path.read_text()) == stamp:
            return faiss.read_index(str(path))
    except (OSError, ValueError, RuntimeError):
        pass  # none, or not whole: made again
    index = build(embeddings)
    try:
        with atomic_write(path) as partial:
            faiss.write_index(index, str(partial))
        with atomic_write(stamp_path) as partial:
            partial.write_text(json.dumps(stamp) + "\n")
    except UserError as e:
        raise UserError(f"{e}; or use --using exact") from None
    except RuntimeError as e:  # faiss
        raise UserError(f"{path} cannot be written: {short(e)}; or use --using exact") from None
    return index


def _stamp(embeddings: Embeddings) -> list[list[Any]]:
    """What changes when the rows do: each file's name, size and time."""
    found = [(path.name, path.stat()) for path in embeddings.paths]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found]


def build(embeddings: Embeddings) -> Any:
    """An index of all rows, in the memory of its codes and of one block of rows."""
    faiss = faiss_or_none()
    dim, count = embeddings.dim, len(embeddings)
    codes = dim // 2 if dim % 2 == 0 else dim
    index = faiss.index_factory(dim, f"PQ{codes}x4fs", faiss.METRIC_INNER_PRODUCT)
    # Spread over all rows: neighbors in a source are alike.
    index.train(embeddings.rows(np.unique(np.linspace(0, count - 1, TRAIN_ROWS).astype(np.int64))))
    for start in range(0, count, ADD_ROWS):
        index.add(embeddings.rows(np.arange(start, min(start + ADD_ROWS, count))))
    return index


def search_index(
    index: Any, embeddings: Embeddings, query_QD: Float32[np.ndarray, "Q D"], k: int
) -> tuple[Float64[np.ndarray, "Q k"], Int64[np.ndarray, "Q k"]]:
    """As `exact.search_exact`, but for rows whose codes are not among the nearest."""
    wanted = min(max(CANDIDATES, 4 * k), len(embeddings))
    _, rows_QC = index.search(np.ascontiguousarray(query_QD), wanted)
    found = []
    for query_D, rows_C in zip(query_QD, rows_QC, strict=True):
        rows_C = np.sort(rows_C[rows_C >= 0])
        found.append(best(scores_of(embeddings.rows(rows_C), query_D), rows_C, k))
    return np.stack([scores for scores, _ in found]), np.stack([rows for _, rows in found])
