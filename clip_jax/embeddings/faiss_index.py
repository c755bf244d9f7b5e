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

from clip_jax.distribution import install_command
from clip_jax.embeddings.brute_force import inner_products, top_k
from clip_jax.embeddings.folder import Embeddings
from clip_jax.errors import UserError, short
from clip_jax.files import atomic_write

CANDIDATES = 512
TRAIN_ROWS = 4_096  # 256 for each of 16 centers, more than which faiss does not take
ADD_ROWS = 65_536
MIN_ROWS = 50_000
"""With fewer rows, exact search takes some milliseconds itself."""


def import_faiss() -> Any:
    """Return the library, or None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    # Its loops are far too short to share out: on two busy cores training took 20 times as long.
    faiss.omp_set_num_threads(1)
    return faiss


def index_path(embeddings: Embeddings) -> Path:
    """Return the file that the index of these rows is stored in."""
    return embeddings.folder / f"{embeddings.kind}.index"


def open_index(embeddings: Embeddings) -> Any:
    """Open the index beside the embeddings, built where there is none or they have changed.

    Raises:
      UserError: faiss is not installed, or the index cannot be written.
    """
    faiss = import_faiss()
    if faiss is None:
        raise UserError(f"faiss is not installed: {install_command('search')}, or --using exact")
    path = index_path(embeddings)
    fingerprint_path = path.with_name(path.name + ".json")
    fingerprint = _fingerprint(embeddings)
    try:
        if json.loads(fingerprint_path.read_text()) == fingerprint:
            return faiss.read_index(str(path))
    except (OSError, ValueError, RuntimeError):
        pass  # none, or a damaged one: built again
    index = build_index(embeddings)
    try:
        with atomic_write(path) as partial:
            faiss.write_index(index, str(partial))
        with atomic_write(fingerprint_path) as partial:
            partial.write_text(json.dumps(fingerprint) + "\n")
    except UserError as e:
        raise UserError(f"{e}; or use --using exact") from None
    except RuntimeError as e:  # faiss
        raise UserError(f"{path} cannot be written: {short(e)}; or use --using exact") from None
    return index


def _fingerprint(embeddings: Embeddings) -> list[list[Any]]:
    """Return what changes when the rows do: each file's name, size and time of change."""
    stats = [(path.name, path.stat()) for path in embeddings.paths]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def build_index(embeddings: Embeddings) -> Any:
    """Build an index of all rows, in the memory of its codes and of one block of rows."""
    faiss = import_faiss()
    dim, count = embeddings.dim, len(embeddings)
    codes = dim // 2 if dim % 2 == 0 else dim
    index = faiss.index_factory(dim, f"PQ{codes}x4fs", faiss.METRIC_INNER_PRODUCT)
    # Spread over all rows: neighbors in a source are alike.
    index.train(embeddings.rows(np.unique(np.linspace(0, count - 1, TRAIN_ROWS).astype(np.int64))))
    for start in range(0, count, ADD_ROWS):
        index.add(embeddings.rows(np.arange(start, min(start + ADD_ROWS, count))))
    return index


def faiss_search(
    index: Any, embeddings: Embeddings, query_QD: Float32[np.ndarray, "Q D"], k: int
) -> tuple[Float64[np.ndarray, "Q k"], Int64[np.ndarray, "Q k"]]:
    """Search as `brute_force_search` does, but for rows whose codes are not among the nearest."""
    candidates = min(max(CANDIDATES, 4 * k), len(embeddings))
    _, rows_QC = index.search(np.ascontiguousarray(query_QD), candidates)
    nearest = []
    for query_D, rows_C in zip(query_QD, rows_QC, strict=True):
        rows_C = np.sort(rows_C[rows_C >= 0])
        nearest.append(top_k(inner_products(embeddings.rows(rows_C), query_D), rows_C, k))
    return np.stack([scores for scores, _ in nearest]), np.stack([rows for _, rows in nearest])
