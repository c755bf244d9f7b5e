"""Evaluating the cells of a benchmark on the workers of an executor."""

import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_jax.errors import UserError
from clip_jax.executors.parts import Executor, PartMaker
from clip_jax.executors.pool import WorkerPool

if TYPE_CHECKING:
    from clip_jax.evaluation.cells import Cell
    from clip_jax.evaluation.encoders import Encoders


def run_cells_elsewhere(
    executor: Executor,
    cells: Sequence["Cell"],
    out: str | Path,
    *,
    keep_features: bool,
    on_cell: Callable[["Cell", str], object],
) -> None:
    """Evaluate cells, each by one worker, in their order as far as workers live.

    Args:
      on_cell: takes a cell that is done, and why it could not be evaluated, or "".
    """
    if not cells:
        return
    options = {
        "cells": list(cells),
        "out": os.path.abspath(out),
        "keep_features": keep_features,
        "current_folder": os.getcwd(),
    }
    with WorkerPool(executor, f"{__name__}:open_cells", options, uses_devices=True) as pool:
        pool.run(
            dict.fromkeys(range(len(cells)), 1),
            range(len(cells)),
            title="benchmark",
            unit="cell",
            on_part=lambda number, error: on_cell(cells[number], error),
        )


def open_cells(
    cells: Sequence["Cell"], out: str, keep_features: bool, current_folder: str
) -> PartMaker:
    """Open what a worker evaluates cells with. Paths are those of the command's folder."""
    if os.path.isdir(current_folder):
        os.chdir(current_folder)
    worker = _CellWorker(cells, keep_features)
    return PartMaker(None, make=worker.make, folder=Path(out), is_begun=Path(out).is_dir)


class _CellWorker:
    """Holds the model of the last cell: the cells come model by model."""

    def __init__(self, cells: Sequence["Cell"], keep_features: bool) -> None:
        self._cells, self._keep_features = cells, keep_features
        self._model = ""
        self._encoders: Encoders | None = None

    def make(self, number: int) -> str:
        """Evaluate a cell; return why it could not be, or ""."""
        from clip_jax.evaluation.cells import run_cell

        cell = self._cells[number]
        try:
            encoders = self._encoders_of(cell)
            run_cell(encoders, cell, keep_features=self._keep_features)
        except UserError as error:
            return str(error)
        return ""

    def _encoders_of(self, cell: "Cell") -> "Encoders":
        import jax

        from clip_jax.api import load_encoders

        if self._encoders is None or self._model != cell.model:
            self._encoders = None
            jax.clear_caches()
            gc.collect()
            self._encoders = load_encoders(cell.model, dtype=cell.dtype)
            self._model = cell.model
        return self._encoders
