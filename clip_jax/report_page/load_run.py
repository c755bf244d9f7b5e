"""What a report shows of a run, read from its folder; nothing is computed on a device."""

import base64
import csv
import dataclasses
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_jax.data.sources import expand, open_shards
from clip_jax.errors import UserError
from clip_jax.evaluation.feature_store import FeatureSet, join, stored_parts
from clip_jax.evaluation.plots import read_curves
from clip_jax.evaluation.results import CONFUSION, RESULTS
from clip_jax.evaluation.run import read_pictures
from clip_jax.pretrained.preprocess import preprocess_from_json

THUMBNAIL = 72


@dataclasses.dataclass(frozen=True)
class Run:
    """A work folder, or the folder of an evaluation.

    Attributes:
      curves: name -> (steps, values) of metrics.jsonl; empty without training.
      evaluation: eval.json; empty where nothing was evaluated.
      confusion: (truth, guess, images), most first.
      features: of the evaluated images; None where they are not kept.
      class_MD: the classes' embeddings, of `class_names`.
    """

    name: str
    folder: Path
    curves: dict[str, tuple[list[int], list[float]]]
    evaluation: dict[str, Any]
    confusion: list[tuple[str, str, int]]
    features: FeatureSet | None
    class_names: list[str]
    class_MD: np.ndarray | None


def read_run(folder: str | Path) -> Run:
    """Everything there is of a run.

    Raises UserError when there is neither a training nor an evaluation in the folder, or a file
    is damaged.
    """
    folder = Path(folder)
    metrics, results = folder / "metrics.jsonl", folder / RESULTS
    if not metrics.exists() and not results.exists():
        raise UserError(
            f"{folder} has no metrics.jsonl and no {RESULTS}; give the folder of a run, or of "
            "python -m clip_jax.evaluate --out"
        )
    curves = {}
    if metrics.exists() and metrics.stat().st_size:
        curves = read_curves(metrics)
    try:
        evaluation = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
        confusion = _read_confusion(folder / CONFUSION) if "classes" in evaluation else []
        class_MD = np.load(folder / evaluation["classes"]) if "classes" in evaluation else None
    except FileNotFoundError:
        class_MD, confusion = None, []
    except (ValueError, TypeError) as error:
        raise UserError(f"{results} is damaged ({error}); evaluate again") from None
    parts = stored_parts(folder / evaluation["features"]) if "features" in evaluation else []
    return Run(
        folder.resolve().name,
        folder,
        curves,
        evaluation,
        confusion,
        join(parts) if parts else None,
        evaluation.get("class_names", []),
        class_MD,
    )


def _read_confusion(path: Path) -> list[tuple[str, str, int]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [(truth, guess, int(images)) for truth, guess, images in rows]


def thumbnails(run: Run, places: Iterable[int]) -> dict[int, str]:
    """Images of the evaluated set by their place in `run.features`, as data URIs.

    Empty where the data is no longer there.
    """
    assert run.features is not None
    places = sorted(set(places))
    try:
        indexes = open_shards(expand(run.evaluation["request"]["data"]))
    except UserError:
        return {}
    preprocess = preprocess_from_json(run.evaluation["preprocess"], where="eval.json: preprocess")
    rows = run.features.row_B[places].tolist()
    images = read_pictures(indexes, rows, THUMBNAIL, preprocess)
    return {place: data_uri(image) for place, image in zip(places, images, strict=True)}


def data_uri(image_HWC: np.ndarray) -> str:
    """An image inside the page itself."""
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
