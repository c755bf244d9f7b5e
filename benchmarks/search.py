"""Search over a million rows: exactly, and by faiss's index, a query at a time.

    python -m benchmarks.search

The rows are random, of unit length, in float16 files as `python -m clip_jax.embed` writes them:
"clustered" around 5,000 centers with a spectrum that falls off, as features of images do, its
queries off the rows as texts are off images; and "uniform" on the sphere, where no index has
anything to go by. Recall is the share of the exact 10 nearest that faiss's method finds.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.interleaved import arguments, report, spread, take_turns
from clip_jax.embeddings.brute_force import brute_force_search
from clip_jax.embeddings.faiss_index import faiss_search, index_path, open_index
from clip_jax.embeddings.folder import Embeddings, open_embeddings

PART = 65_536
CENTRES = 5_000


def rows_of(kind: str, count: int, dim: int, rng: np.random.Generator, gap: float) -> np.ndarray:
    """Unit rows; `gap` moves them all in one direction, as texts lie off images."""
    x_BD = rng.standard_normal((count, dim), np.float32)
    if kind == "clustered":
        falling_D = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
        centre_D = np.random.default_rng(1).standard_normal((CENTRES, dim), np.float32)
        x_BD = (0.7 * x_BD + centre_D[rng.integers(0, CENTRES, count)]) * falling_D
        x_BD[:, 0] += gap
    return x_BD / np.linalg.norm(x_BD, axis=1, keepdims=True)


def write_folder(folder: Path, kind: str, count: int, dim: int) -> Embeddings:
    """A folder of embeddings, part by part."""
    rng = np.random.default_rng(0)
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir()
    for number, start in enumerate(range(0, count, PART)):
        rows = min(PART, count - start)
        z_BD = rows_of(kind, rows, dim, rng, 0.0).astype(np.float16)
        np.save(folder / f"img_emb/img_emb_{number:04d}.npy", z_BD)
        table = pa.table({"image_path": [str(start + i) for i in range(rows)]})
        pq.write_table(table, folder / f"metadata/metadata_{number:04d}.parquet")
    return open_embeddings(folder)


def own_memory() -> int:
    """Bytes of memory that are the process's own; pages of mapped files are the system's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def measure(kind: str, options, folder: Path) -> list[dict]:
    """A row for exact search and one for faiss."""
    embeddings = write_folder(folder, kind, options.rows, options.dim)
    queries_QD = rows_of(kind, options.queries, options.dim, np.random.default_rng(2), 1.0)
    start = time.perf_counter()
    index = open_index(embeddings)
    built = time.perf_counter() - start
    start = time.perf_counter()
    index = open_index(embeddings)
    opened = time.perf_counter() - start
    wanted = [brute_force_search(embeddings.parts, q[None], 10)[1][0] for q in queries_QD]
    found = [faiss_search(index, embeddings, q[None], 10)[1][0] for q in queries_QD]
    recall = float(np.mean([np.isin(w, f).mean() for w, f in zip(wanted, found, strict=True)]))
    calls = {"exact": brute_force_search, "faiss": faiss_search}
    turn = iter(range(10**9))

    def call(method):
        query_1D = queries_QD[next(turn) % len(queries_QD)][None]
        if method == "exact":
            return brute_force_search(embeddings.parts, query_1D, 10)
        return faiss_search(index, embeddings, query_1D, 10)

    times = take_turns(
        {method: lambda method=method: call(method) for method in calls},
        warmup=options.warmup,
        repeats=options.repeats,
    )
    size = index_path(embeddings).stat().st_size / 2**20
    return [
        {
            "rows": kind,
            "method": method,
            "ms a query": str(spread(times[method]).scaled(1e3)),
            "slowest": f"{1e3 * max(times[method]):.4g}",
            "recall@10": 1.0 if method == "exact" else recall,
            "index MiB": 0.0 if method == "exact" else size,
            "build s": 0.0 if method == "exact" else built,
            "open s": 0.0 if method == "exact" else opened,
            "memory MiB": own_memory() / 2**20,
        }
        for method in calls
    ]


def main(argv: list[str] | None = None) -> None:
    """Prints one table."""
    parser = arguments(__doc__, warmup=2, repeats=50)
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
