"""Evaluate a model on a data source, and leave the results where people look for them.

A folder holds `eval.json`, `predictions.png`, `confusion.csv` and, for a run, `loss.png`; its
`features/` keeps what was encoded, for a later evaluation with other tasks and for the report.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax.data.images import Preprocess
from clip_jax.data.order import BatchPart
from clip_jax.data.sample_reader import SampleShape, make_eval_reader
from clip_jax.data.sources import Shard, expand, fingerprint, open_shards
from clip_jax.evaluation.encoders import Encoders
from clip_jax.evaluation.evaluate import draw_examples, result_rows
from clip_jax.evaluation.feature_store import FeatureSet, collect, gather_json
from clip_jax.evaluation.plots import loss_curve, prediction_grid
from clip_jax.evaluation.prompts import load_class_names, load_templates
from clip_jax.evaluation.results import (
    CONFUSION,
    CURVE,
    GRID,
    RESULTS,
    write_confusion,
    write_results,
)
from clip_jax.evaluation.tasks import (
    LEARNING,
    RETRIEVAL,
    TASKS,
    ZERO_SHOT,
    Subject,
    TaskResult,
    check_tasks,
    lacks_training,
)
from clip_jax.evaluation.zero_shot import class_embeddings, rank_classes
from clip_jax.files import atomic_write, make_folder
from clip_jax.pretrained.preprocess import preprocess_to_json

FEATURES = "features"
PART_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    """What to evaluate.

    Attributes:
      data: the source that is scored; train_data, val_data: labeled ones to learn from.
      classnames: a file or a shipped data set; empty leaves classification out.
      templates, ablate: prompts and names of lists; `ablate` are compared, each by itself.
      dataset, pretrained: for the results; empty takes the data's name and nothing.
    """

    data: str
    classnames: str = ""
    templates: Sequence[str] = ("a photo of a {}.",)
    ablate: Sequence[str] = ()
    tasks: Sequence[str] = (ZERO_SHOT, RETRIEVAL)
    train_data: str = ""
    val_data: str = ""
    batch_size: int = 256
    dataset: str = ""
    pretrained: str = ""
    neighbours: int = 20
    shots: Sequence[int] = (1, 2, 4, 8, 16)
    confuse_equal_captions: bool = False


@dataclasses.dataclass(frozen=True)
class Sources:
    """The shards of a request's data, indexed; empty where it names none or no task needs them."""

    test: Sequence[Shard]
    train: Sequence[Shard] = ()
    validation: Sequence[Shard] = ()


def open_request(request: EvalSpec) -> Sources:
    """Index all the data that a request's tasks need.

    Raises:
      UserError: there is no such task or it lacks its data, or a source cannot be read.
    """
    for task in check_tasks(request.tasks):
        if task in LEARNING and not request.train_data:
            raise lacks_training(task)

    def indexed(pattern: str) -> Sequence[Shard]:
        return open_shards(expand(pattern)) if pattern else ()

    learning = any(task in LEARNING for task in request.tasks)
    return Sources(
        indexed(request.data),
        indexed(request.train_data if learning else ""),
        indexed(request.val_data if learning else ""),
    )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation and where they were written.

    Attributes:
      results: one row a result, see `results.result_rows`.
      skipped: cause -> images that could not be used.
      folder: where the files and `features/` are.
      paths: the files that this process has written; only process 0 writes.
      seconds: how long it took.
    """

    results: list[dict[str, Any]]
    skipped: dict[str, int]
    folder: Path
    paths: tuple[Path, ...]
    seconds: float


def run_evaluation(
    encoders: Encoders,
    request: EvalSpec,
    *,
    folder: str | Path,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Evaluation:
    """Run every task of the request, and write the results to `folder`.

    With several processes all of them call it; process 0 writes.

    Raises:
      UserError: data or names are missing or do not fit each other.
    """
    start = time.perf_counter()
    sources = open_request(request)
    folder = make_folder(folder, flag="--out")
    subject = make_subject(encoders, request, sources, folder / FEATURES, mesh, progress=progress)
    outcomes = {task: TASKS[task](subject) for task in request.tasks}
    about = {
        "dataset": request.dataset or Path(request.data).name,
        "model": encoders.name,
        "pretrained": request.pretrained,
        "language": "en",
    }
    results = result_rows(outcomes, about, len(subject.test))
    ablation = compare_templates(encoders, request, subject, folder / FEATURES)
    paths: list[Path] = []
    if jax.process_index() == 0:
        paths = _write(
            encoders, request, sources.test, subject, outcomes, results, ablation, folder
        )
    seconds = time.perf_counter() - start
    return Evaluation(results, subject.test.skipped, folder, tuple(paths), seconds)


def make_subject(
    encoders: Encoders,
    request: EvalSpec,
    sources: Sources,
    store: Path | None,
    mesh: Mesh | None = None,
    *,
    progress: bool = True,
) -> Subject:
    """Class embeddings and features of all the data a request names; `store` keeps them."""
    names = load_class_names(request.classnames) if request.classnames else []
    class_MD = None
    if names and ZERO_SHOT in request.tasks:
        class_MD = stored_class_embeddings(
            encoders, names, load_templates(request.templates), request.batch_size, store
        )

    def features(indexes: Sequence[Shard], pattern: str) -> FeatureSet:
        title = Path(pattern).name
        return source_features(
            encoders, indexes, request.batch_size, store, title=title, progress=progress
        )

    return Subject(
        features(sources.test, request.data),
        names,
        class_MD,
        encoders.scale,
        features(sources.train, request.train_data) if sources.train else None,
        features(sources.validation, request.val_data) if sources.validation else None,
        neighbours=request.neighbours,
        shots=request.shots,
        confuse_equal_captions=request.confuse_equal_captions,
        mesh=mesh,
        progress=progress,
    )


def source_features(
    encoders: Encoders,
    indexes: Sequence[Shard],
    batch_size: int,
    store: Path | None = None,
    *,
    title: str,
    progress: bool = True,
) -> FeatureSet:
    """The features of indexed data; what `store` has of them already is not encoded again."""
    batch_size = whole_batch(encoders, batch_size)
    folder = None if store is None else feature_folder(store, encoders, indexes, batch_size)
    _remove_others(folder)
    with contextlib.ExitStack() as stack:

        def batches_from(start: int):
            loader = encoders.loader(
                indexes,
                batch_size=batch_size,
                steps=slice(start, None),
                part=BatchPart(jax.process_index(), jax.process_count()),
            )
            return stack.enter_context(loader)

        return collect(
            encoders.encode_image,
            encoders.encode_text,
            encoders.tokenizer,
            batches_from,
            context_length=encoders.context_length,
            text_batch_size=batch_size,
            batches_per_part=max(1, PART_ROWS // batch_size),
            folder=folder,
            title=title,
            progress=progress,
        )


def _short_hash(*values: Any) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=6).hexdigest()


def whole_batch(encoders: Encoders, batch_size: int) -> int:
    """At least so many images, of which every device and process takes an equal share."""
    multiple = math.lcm(encoders.shards, jax.process_count())
    return -(-batch_size // multiple) * multiple


def feature_folder(
    store: Path, encoders: Encoders, indexes: Sequence[Shard], batch_size: int
) -> Path:
    """Where the features of this data by these weights are kept: "DATA-WEIGHTS"."""
    # Two sets may have files of one name and size; a source that is not a file has its name alone.
    paths = [os.path.abspath(getattr(index, "path", index.name)) for index in indexes]
    sizes = (encoders.image_size, encoders.context_length, repr(encoders.preprocess), batch_size)
    data = _short_hash(fingerprint(indexes), paths)
    return store / f"{data}-{_short_hash(encoders.identity, *sizes)}"


def _remove_others(folder: Path | None) -> None:
    """The same data's features by other weights: a run's newest checkpoint is what counts."""
    if folder is not None and jax.process_index() == 0:
        for old in folder.parent.glob(f"{folder.name.split('-')[0]}-*"):
            if old != folder:
                shutil.rmtree(old)


def stored_class_embeddings(
    encoders: Encoders,
    names: Sequence[str],
    templates: Sequence[str],
    batch_size: int,
    store: Path | None,
) -> np.ndarray:
    """The classes' embeddings, computed once for these weights, names and prompts."""
    path = None if store is None else class_file(store, encoders, names, templates)
    if path is not None and all(gather_json(path.exists())):
        return np.load(path, allow_pickle=False)
    class_MD = class_embeddings(
        encoders.encode_text,
        encoders.tokenizer,
        names,
        templates,
        batch_size=batch_size,
        context_length=encoders.context_length,
    )
    if path is not None and jax.process_index() == 0:
        for old in path.parent.glob("classes-*.npy"):
            if old.name.split("-")[1] != path.name.split("-")[1]:
                old.unlink()
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.save(file, class_MD)
    return class_MD


def class_file(
    store: Path, encoders: Encoders, names: Sequence[str], templates: Sequence[str]
) -> Path:
    """Where the classes' embeddings by these weights and prompts are kept."""
    weights = _short_hash(encoders.identity, encoders.context_length)
    return store / f"classes-{weights}-{_short_hash(list(names), list(templates))}.npy"


def compare_templates(
    encoders: Encoders, request: EvalSpec, subject: Subject, store: Path | None
) -> list[dict[str, Any]]:
    """Accuracy with each prompt of `request.ablate` alone, and with all of them together."""
    if not request.ablate or subject.class_MD is None:
        return []
    rows = np.flatnonzero(subject.test.label_B >= 0)
    label_B = subject.test.label_B[rows]

    def accuracy(templates: Sequence[str]) -> float:
        class_MD = stored_class_embeddings(
            encoders, subject.class_names, templates, request.batch_size, store
        )
        top_B1, _ = rank_classes(subject.test.z_image_BD[rows], class_MD, subject.scale, k=1)
        return float((top_B1[:, 0] == label_B).mean())

    templates = load_templates(request.ablate)
    found = [{"template": t, "acc1": accuracy([t])} for t in templates]
    if len(templates) > 1:
        found.append({"template": f"all {len(templates)} together", "acc1": accuracy(templates)})
    return found


class _NoTokens:
    """Stands where a reader wants a tokenizer and only images are asked for."""

    vocab_size, eot_id, pad_id = 1, 0, 0

    def __call__(self, texts: Sequence[str], context_length: int = 77) -> np.ndarray:
        return np.zeros((len(texts), context_length), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        return ""


def read_pictures(
    indexes: Sequence[Shard], rows: Sequence[int], size: int, preprocess: Preprocess
) -> np.ndarray:
    """The images at these places of the data's order, uint8 [rows, size, size, 3]."""
    reader = make_eval_reader(indexes, _NoTokens(), SampleShape(size, 1), preprocess)
    ids = np.asarray(rows, np.int64)
    return reader.read(ids, np.zeros_like(ids)).image


def _write(
    encoders: Encoders,
    request: EvalSpec,
    indexes: Sequence[Shard],
    subject: Subject,
    outcomes: dict[str, list[TaskResult]],
    results: list[dict[str, Any]],
    ablation: list[dict[str, Any]],
    folder: Path,
) -> list[Path]:
    """Write the files of an evaluation and return their paths, the results' first."""
    paths = [folder / RESULTS]
    extra: dict[str, Any] = {"request": dataclasses.asdict(request), "ablation": ablation}
    extra["scale"] = encoders.scale
    extra["preprocess"] = preprocess_to_json(encoders.preprocess)
    batch_size = whole_batch(encoders, request.batch_size)
    extra["features"] = feature_folder(Path(FEATURES), encoders, indexes, batch_size).as_posix()
    if outcomes.get(ZERO_SHOT):
        templates = load_templates(request.templates)
        classes = class_file(Path(FEATURES), encoders, subject.class_names, templates)
        extra |= {"classes": classes.as_posix(), "class_names": list(subject.class_names)}
        details = outcomes[ZERO_SHOT][0].details
        extra["reliability"] = details["reliability"]
        write_confusion(details, subject, folder / CONFUSION)
        examples = draw_examples(outcomes, subject, 24)
        size, preprocess = encoders.image_size, encoders.preprocess
        images = read_pictures(indexes, examples["rows"], size, preprocess)
        prediction_grid(list(images), examples["truths"], examples["guesses"], folder / GRID)
        paths += [folder / GRID, folder / CONFUSION]
    write_results(results, subject.test.skipped, folder / RESULTS, **extra)
    if (folder / "metrics.jsonl").exists():
        paths.append(loss_curve(folder / "metrics.jsonl", folder / CURVE))
    return paths
