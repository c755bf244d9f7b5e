"""Search over embeddings: by faiss where it is installed and worth it, or exactly."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float32

from clip_jax.embeddings.brute_force import brute_force_search
from clip_jax.embeddings.faiss_index import MIN_ROWS, faiss_search, import_faiss, open_index
from clip_jax.embeddings.folder import Embeddings
from clip_jax.errors import UserError

METHODS = ("auto", "faiss", "exact")


@dataclasses.dataclass(frozen=True)
class Hit:
    """One result of a search.

    Attributes:
      row: its position among the embeddings.
      score: its cosine with the query.
      metadata: its row of the metadata.
    """

    row: int
    score: float
    metadata: dict[str, Any]


class Searcher:
    """A search over one folder's images or captions.

    Args:
      method: one of `METHODS`; "auto" takes faiss from `MIN_ROWS` rows on, where it is installed.

    Attributes:
      method: "faiss" or "exact".

    Raises:
      UserError: there is no such method, or faiss is asked for and cannot be used.
    """

    def __init__(self, embeddings: Embeddings, method: str = "auto"):
        if method not in METHODS:
            raise UserError(f"--using is {method!r}; it must be one of {', '.join(METHODS)}")
        self.embeddings = embeddings
        if method == "auto":
            worth_it = len(embeddings) >= MIN_ROWS and import_faiss() is not None
            method = "faiss" if worth_it else "exact"
        self.method = method
        self._index = open_index(embeddings) if method == "faiss" else None

    def search(self, query_QD: Float32[np.ndarray, "Q D"], k: int) -> list[list[Hit]]:
        """Return the `k` nearest rows of each query, best first.

        Raises:
          UserError: queries have another number of features than the rows.
        """
        if query_QD.shape[1] != self.embeddings.dim:
            raise UserError(
                f"{self.embeddings.folder} holds rows of {self.embeddings.dim} features and the "
                f"model makes {query_QD.shape[1]}: give --model the one that made it"
            )
        if self._index is not None:
            scores_Qk, rows_Qk = faiss_search(self._index, self.embeddings, query_QD, k)
        else:
            scores_Qk, rows_Qk = brute_force_search(self.embeddings.parts, query_QD, k)
        return [
            [
                Hit(int(row), float(score), self.embeddings.metadata(int(row)))
                for score, row in zip(scores, rows, strict=True)
            ]
            for scores, rows in zip(scores_Qk, rows_Qk, strict=True)
        ]
