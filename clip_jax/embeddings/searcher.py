"""Embeddings and a way to search them: by faiss where it is there and worth it, or exactly."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float32

from clip_jax.embeddings.brute_force import search_exact
from clip_jax.embeddings.faiss_index import LEAST_ROWS, faiss_or_none, open_index, search_index
from clip_jax.embeddings.folder import Embeddings
from clip_jax.errors import UserError

WAYS = ("auto", "faiss", "exact")


@dataclasses.dataclass(frozen=True)
class Hit:
    """A row that was found.

    Attributes:
      row: its number in the embeddings.
      score: the cosine with the query.
      about: its row of the metadata.
    """

    row: int
    score: float
    about: dict[str, Any]


class Finder:
    """Searches one kind of rows.

    Attributes:
      way: "faiss" or "exact".
    """

    def __init__(self, embeddings: Embeddings, using: str = "auto"):
        if using not in WAYS:
            raise UserError(f"--using is {using!r}; it must be one of {', '.join(WAYS)}")
        self.embeddings = embeddings
        if using == "auto":
            worth_it = len(embeddings) >= LEAST_ROWS and faiss_or_none() is not None
            using = "faiss" if worth_it else "exact"
        self.way = using
        self._index = open_index(embeddings) if using == "faiss" else None

    def search(self, query_QD: Float32[np.ndarray, "Q D"], k: int) -> list[list[Hit]]:
        """The nearest rows of each query, best first.

        Raises:
          UserError: queries have another number of features than the rows.
        """
        if query_QD.shape[1] != self.embeddings.dim:
            raise UserError(
                f"{self.embeddings.folder} holds rows of {self.embeddings.dim} features and the "
                f"model makes {query_QD.shape[1]}: give --model the one that made it"
            )
        if self._index is not None:
            scores_Qk, rows_Qk = search_index(self._index, self.embeddings, query_QD, k)
        else:
            scores_Qk, rows_Qk = search_exact(self.embeddings.parts, query_QD, k)
        return [
            [
                Hit(int(row), float(score), self.embeddings.metadata(int(row)))
                for score, row in zip(scores, rows, strict=True)
            ]
            for scores, rows in zip(scores_Qk, rows_Qk, strict=True)
        ]
