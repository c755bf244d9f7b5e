"""Search over a million rows, exactly and by faiss's index, a query at a time.

    python -m benchmarks.search

The rows are random, of unit length, in float16 files as `python -m clip_jax.embed` writes them:
"clustered" around 5,000 centers with a spectrum that falls off, as features of images do, its
queries off the rows as texts are off images; and "uniform" on the sphere, where no index has
anything to go by. Recall is the share of the exact 10 nearest that faiss's method finds.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.interleaved import make_parser, report, spread, time_interleaved
from benchmarks.private_memory import private_bytes
from clip_jax.embeddings.brute_force import brute_force_search
from clip_jax.embeddings.faiss_index import faiss_search, index_path, open_index
from clip_jax.embeddings.folder import Embeddings, open_embeddings

PART_ROWS = 65_536
CENTERS = 5_000
NEAREST = 10


def make_rows(kind: str, count: int, dim: int, rng: np.random.Generator, gap: float) -> np.ndarray:
    """Draw unit rows; `gap` moves them all in one direction, as texts lie off images."""
    x_BD = rng.standard_normal((count, dim), np.float32)
    if kind == "clustered":
        falling_D = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
        center_D = np.random.default_rng(1).standard_normal((CENTERS, dim), np.float32)
        x_BD = (0.7 * x_BD + center_D[rng.integers(0, CENTERS, count)]) * falling_D
        x_BD[:, 0] += gap
    return x_BD / np.linalg.norm(x_BD, axis=1, keepdims=True)


def write_folder(folder: Path, kind: str, count: int, dim: int) -> Embeddings:
    """Write a folder of embeddings, part by part, and open it."""
    rng = np.random.default_rng(0)
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir()
    for number, start in enumerate(range(0, count, PART_ROWS)):
        rows = min(PART_ROWS, count - start)
        z_BD = make_rows(kind, rows, dim, rng, 0.0).astype(np.float16)
        np.save(folder / f"img_emb/img_emb_{number:04d}.npy", z_BD)
        table = pa.table({"image_path": [str(start + i) for i in range(rows)]})
        pq.write_table(table, folder / f"metadata/metadata_{number:04d}.parquet")
    return open_embeddings(folder)


def measure(kind: str, options: argparse.Namespace, folder: Path) -> list[dict]:
    """Return a row for exact search and one for faiss."""
    embeddings = write_folder(folder, kind, options.rows, options.dim)
    queries_QD = make_rows(kind, options.queries, options.dim, np.random.default_rng(2), 1.0)
    seconds = {}
    for stage in ("build", "open"):
        start = time.perf_counter()
        index = open_index(embeddings)
        seconds[stage] = time.perf_counter() - start
    searches = {
        "exact": lambda query_1D: brute_force_search(embeddings.parts, query_1D, NEAREST),
        "faiss": lambda query_1D: faiss_search(index, embeddings, query_1D, NEAREST),
    }
    exact, approximate = (
        [search(query_D[None])[1][0] for query_D in queries_QD] for search in searches.values()
    )
    shares = [np.isin(e, a).mean() for e, a in zip(exact, approximate, strict=True)]
    queries = itertools.cycle(queries_QD[:, None])
    times = time_interleaved(
        {name: lambda search=search: search(next(queries)) for name, search in searches.items()},
        warmup=options.warmup,
        repeats=options.repeats,
    )
    size = index_path(embeddings).stat().st_size / 2**20
    faiss_only = {"index MiB": size} | {f"{stage} s": s for stage, s in seconds.items()}
    return [
        {
            "rows": kind,
            "method": method,
            "ms a query": str(spread(times[method]).scaled(1e3)),
            "slowest": f"{1e3 * max(times[method]):.4g}",
            "recall@10": 1.0 if method == "exact" else float(np.mean(shares)),
            **(dict.fromkeys(faiss_only, 0.0) if method == "exact" else faiss_only),
            "memory MiB": private_bytes() / 2**20,
        }
        for method in searches
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure and print one table."""
    parser = make_parser(__doc__, warmup=2, repeats=50)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=20)
    options = parser.parse_args(argv)
    rows = []
    for kind in ("clustered", "uniform"):
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(kind, options, Path(folder))
    report("search", options, rows)


if __name__ == "__main__":
    main()
