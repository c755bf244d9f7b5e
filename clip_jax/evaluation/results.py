"""What an evaluation leaves in its folder, and prints."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.evaluation.tasks import Subject
from clip_jax.files import atomic_write

RESULTS, GRID, CURVE, CONFUSION = "eval.json", "predictions.png", "loss.png", "confusion.csv"


def write_confusion(details: dict[str, Any], subject: Subject, path: Path) -> None:
    """The confusion matrix as rows (truth, guess, images) of those that are not 0, most first."""
    label_B = subject.test.label_B[details["rows"]]
    pairs = np.stack([label_B, details["top"][:, 0]], axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["truth", "guess", "images"])
        for i in np.argsort(-counts, kind="stable"):
            truth, guess = (subject.class_names[m] for m in found[i])
            writer.writerow([truth, guess, int(counts[i])])


def write_results(
    results: Sequence[dict[str, Any]], skipped: dict[str, int], path: Path, **extra: Any
) -> None:
    """The results as one JSON file, whole or not at all; null stands for NaN."""
    rows = [
        result
        | {"metrics": {k: None if math.isnan(v) else v for k, v in result["metrics"].items()}}
        for result in results
    ]
    text = json.dumps({"results": rows, "skipped": skipped} | extra, indent=2, ensure_ascii=False)
    with atomic_write(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


# Figures that are no shares.
COUNTS = ("C", "fewshot_k", "normalized", "k")
