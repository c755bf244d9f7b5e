"""Evaluate a model on tar shards, and leave the results where people look for them."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_jax.data.images import Preprocess
from clip_jax.data.loader import make_eval_loader
from clip_jax.data.sources import expand, index_shards
from clip_jax.evaluation.evaluate import evaluate
from clip_jax.evaluation.features import EncodeImage, EncodeText
from clip_jax.evaluation.pictures import loss_curve, prediction_grid
from clip_jax.evaluation.prompts import load_class_names
from clip_jax.typing import Tokenizer

RESULTS, GRID, CURVE = "eval.json", "predictions.png", "loss.png"


def run_evaluation(
    encode_image: EncodeImage,
    encode_text: EncodeText,
    tokenizer: Tokenizer,
    *,
    image_size: int,
    context_length: int,
    preprocess: Preprocess,
    logit_scale: float,
    model: str,
    data: str,
    classnames: str,
    templates: Sequence[str],
    batch_size: int,
    workdir: str | Path,
) -> list[dict[str, Any]]:
    """Zero-shot classification and retrieval on `data`, written to `workdir`.

    `eval.json` holds the results, `predictions.png` some images with the top guesses under each,
    `loss.png` the curves of the run's `metrics.jsonl`, where there is one.

    Args:
      preprocess: how pictures are made for the model.
      logit_scale: the scale itself, for the probabilities under the pictures.
      data, classnames: tar shards with .cls members, and the file of class names.

    Raises:
      UserError: shards or names are missing or do not fit each other.
    """
    names = load_class_names(classnames)
    loader = make_eval_loader(
        index_shards(expand(data)),
        tokenizer,
        image_size=image_size,
        context_length=context_length,
        batch_size=batch_size,
        preprocess=preprocess,
    )
    workdir = Path(workdir)
    with loader:
        found = evaluate(
            encode_image,
            encode_text,
            tokenizer,
            loader,
            names,
            templates,
            dataset=Path(data).name,
            model=model,
            pretrained=workdir.name,
            context_length=context_length,
            text_batch_size=batch_size,
            logit_scale=logit_scale,
        )
        skipped = dict(loader.skipped)
    results = found["results"]
    write_results(results, skipped, workdir / RESULTS)
    examples = found["examples"]
    if examples["images"]:
        grid = workdir / GRID
        prediction_grid(examples["images"], examples["truths"], examples["guesses"], grid)
    if (workdir / "metrics.jsonl").exists():
        loss_curve(workdir / "metrics.jsonl", workdir / CURVE)
    return results


def write_results(results: Sequence[dict[str, Any]], skipped: dict[str, int], path: Path) -> None:
    """The results as one JSON file, whole or not at all; null stands for NaN."""
    rows = [
        result
        | {"metrics": {k: None if math.isnan(v) else v for k, v in result["metrics"].items()}}
        for result in results
    ]
    partial = path.with_name(path.name + ".partial")
    text = json.dumps({"results": rows, "skipped": skipped}, indent=2)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def table(results: Sequence[dict[str, Any]], seconds: float) -> str:
    """The results as lines to print."""
    lines = [f"evaluation in {seconds:.0f} s:"]
    for result in results:
        lines.append(f"  {result['task']} on {result['dataset']}")
        lines += [f"    {name:<28} {100 * v:6.2f} %" for name, v in result["metrics"].items()]
    return "\n".join(lines)
