"""Load what a report shows of a run from its folder; nothing is computed on a device."""

import base64
import csv
import dataclasses
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image

from clip_jax.data.sources import expand, open_shards
from clip_jax.errors import UserError
from clip_jax.evaluation.feature_store import read_parts
from clip_jax.evaluation.features import FeatureSet, concatenate
from clip_jax.evaluation.interpolate import CURVE_FILENAME
from clip_jax.evaluation.plots import read_curves
from clip_jax.evaluation.read_images import read_images
from clip_jax.evaluation.results import CONFUSION, RESULTS
from clip_jax.pretrained.preprocess import preprocess_from_json

THUMBNAIL_SIDE = 72


@dataclasses.dataclass(frozen=True)
class Run:
    """A work folder, or the folder of an evaluation.

    Attributes:
      curves: name -> (steps, values) of metrics.jsonl; empty without training.
      evaluation: eval.json; empty where nothing was evaluated.
      confusion: (truth, guess, images), most first.
      features: of the evaluated images; None where they are not kept.
      class_MD: the embeddings of `class_names`.
      wiseft: the curve of `python -m clip_jax.wiseft`; empty without one.
    """

    name: str
    folder: Path
    curves: dict[str, tuple[list[int], list[float]]]
    evaluation: dict[str, Any]
    confusion: list[tuple[str, str, int]]
    features: FeatureSet | None
    class_names: list[str]
    class_MD: Float32[np.ndarray, "M D"] | None
    wiseft: dict[str, Any] = dataclasses.field(default_factory=dict)


def load_run(folder: str | Path) -> Run:
    """Load everything there is of a run.

    Raises:
      UserError: there is neither a training nor an evaluation in the folder, or a file is damaged.
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
    parts = read_parts(folder / evaluation["features"]) if "features" in evaluation else []
    return Run(
        folder.resolve().name,
        folder,
        curves,
        evaluation,
        confusion,
        concatenate(parts) if parts else None,
        evaluation.get("class_names", []),
        class_MD,
        _read_wiseft(folder / CURVE_FILENAME),
    )


def _read_wiseft(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); measure it again") from None


def _read_confusion(path: Path) -> list[tuple[str, str, int]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [(truth, guess, int(images)) for truth, guess, images in rows]


def load_thumbnails(run: Run, positions: Iterable[int]) -> dict[int, str]:
    """Load images of the evaluated set by their positions in `run.features`, as data URIs.

    The dict is empty where the data is no longer there.
    """
    assert run.features is not None
    positions = sorted(set(positions))
    try:
        shards = open_shards(expand(run.evaluation["request"]["data"]))
    except UserError:
        return {}
    preprocess = preprocess_from_json(run.evaluation["preprocess"], where="eval.json: preprocess")
    rows = run.features.row_B[positions].tolist()
    images = read_images(shards, rows, THUMBNAIL_SIDE, preprocess)
    return {position: data_uri(image) for position, image in zip(positions, images, strict=True)}


def data_uri(image_HWC: np.ndarray) -> str:
    """Encode an image so that it lies inside the page itself."""
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
