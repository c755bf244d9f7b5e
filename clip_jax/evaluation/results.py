"""Write what an evaluation leaves in its folder: results as CLIP_benchmark has them, confusions."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_jax.evaluation.tasks import Predictions, TaskInputs, TaskResult
from clip_jax.files import atomic_write

RESULTS, GRID, CURVE, CONFUSION = "eval.json", "predictions.png", "loss.png", "confusion.csv"

# Figures that are no shares.
COUNTS = ("C", "fewshot_k", "normalized", "k")


class Examples(NamedTuple):
    """Some classified images.

    Attributes:
      rows: their positions in the order of the data.
      truths: their class names.
      guesses: for each, (name, probability) of five classes, likeliest first.
    """

    rows: list[int]
    truths: list[str]
    guesses: list[list[tuple[str, float]]]


def result_rows(
    task_results: Mapping[str, Sequence[TaskResult]],
    *,
    dataset: str,
    model: str,
    pretrained: str,
    images: int,
) -> list[dict[str, Any]]:
    """Return one row a result.

    Its fields are CLIP_benchmark's, dataset, model, pretrained, language, task and metrics, and two
    of ours: intervals (95 %, of some metrics) and images.
    """
    return [
        {
            "dataset": dataset,
            "model": model,
            "pretrained": pretrained,
            "language": "en",
            "task": task,
            "metrics": result.metrics,
            "intervals": result.intervals,
            "images": images if result.images is None else result.images,
        }
        for task, results in task_results.items()
        for result in results
    ]


def draw_examples(
    predictions: Predictions, inputs: TaskInputs, count: int, *, seed: int = 0
) -> Examples:
    """Draw images evenly from all classified ones, the same on every run."""
    names = inputs.class_names
    drawn = np.sort(np.random.default_rng(seed).permutation(len(predictions.rows))[:count])
    guesses = [
        [
            (names[m], float(share))
            for m, share in zip(predictions.top_Bk[i], predictions.share_Bk[i], strict=True)
        ]
        for i in drawn
    ]
    rows = predictions.rows[drawn]
    truths = [names[inputs.test.label_B[row]] for row in rows]
    return Examples(inputs.test.row_B[rows].tolist(), truths, guesses)


def write_confusion(predictions: Predictions, inputs: TaskInputs, path: Path) -> None:
    """Write the confusion matrix as rows (truth, guess, images) that are not 0, most first."""
    label_B = inputs.test.label_B[predictions.rows]
    pairs_B2 = np.stack([label_B, predictions.top_Bk[:, 0]], axis=1)
    pairs, counts = np.unique(pairs_B2, axis=0, return_counts=True)
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["truth", "guess", "images"])
        for i in np.argsort(-counts, kind="stable"):
            truth, guess = (inputs.class_names[m] for m in pairs[i])
            writer.writerow([truth, guess, int(counts[i])])


def write_results(
    results: Sequence[dict[str, Any]], skipped: dict[str, int], path: Path, **extra: Any
) -> None:
    """Write the results as one JSON file, whole or not at all; null stands for NaN."""
    rows = [
        result
        | {"metrics": {k: None if math.isnan(v) else v for k, v in result["metrics"].items()}}
        for result in results
    ]
    text = json.dumps({"results": rows, "skipped": skipped} | extra, indent=2, ensure_ascii=False)
    with atomic_write(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
