"""Evaluate a model on a data source, and leave the results where people look for them.

A folder holds `eval.json`, `predictions.png`, `confusion.csv` and, for a run, `loss.png`; its
`features/` keeps what was encoded, for a later evaluation with other tasks and for the report.
"""

import dataclasses
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clip_jax.data.formats.options import split_options
from clip_jax.data.sources import Shard, expand, format_of, open_shards
from clip_jax.errors import UserError, check_choice
from clip_jax.evaluation.arrays import read_arrays
from clip_jax.evaluation.bootstrap import ratio_intervals
from clip_jax.evaluation.caption_choice import CHOICE, choice_metrics, open_choices
from clip_jax.evaluation.encoders import Encoders
from clip_jax.evaluation.feature_store import (
    class_file,
    encode_classes,
    encode_shards,
    feature_folder,
)
from clip_jax.evaluation.features import FeatureSet, join_rows_of_one_image
from clip_jax.evaluation.plots import loss_curve, prediction_grid
from clip_jax.evaluation.prompts import load_class_names, load_templates
from clip_jax.evaluation.read_images import read_images
from clip_jax.evaluation.results import (
    CONFUSION,
    CURVE,
    GRID,
    RESULTS,
    draw_examples,
    result_rows,
    write_confusion,
    write_results,
)
from clip_jax.evaluation.spec import EvalSpec
from clip_jax.evaluation.tasks import (
    MULTILABEL,
    RETRIEVAL,
    SCORINGS,
    TRAINED_TASKS,
    ZERO_SHOT,
    Predictions,
    TaskInputs,
    TaskResult,
    check_tasks,
    missing_train_data,
    run_tasks,
)
from clip_jax.evaluation.zero_shot import rank_classes
from clip_jax.files import make_folder
from clip_jax.pretrained.preprocess import preprocess_to_json

FEATURES = "features"
# Images in the grid of predictions.
EXAMPLES = 24
# Formats of `data.sources.FORMATS` in which the classes can have names.
_NAMED_FORMATS = {"folder", "tfds", "parquet"}


@dataclasses.dataclass(frozen=True)
class Sources:
    """The opened data of a spec; empty where it names none or no task needs it."""

    test: Sequence[Shard]
    train: Sequence[Shard]
    validation: Sequence[Shard]


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


def open_eval_sources(spec: EvalSpec) -> Sources:
    """Open all the data that the tasks of a spec need.

    Raises:
      UserError: there is no such task or it lacks its data, or a source cannot be read.
    """
    check_tasks(spec.tasks)
    check_choice("the scoring", spec.scoring, SCORINGS)
    if CHOICE in spec.tasks:
        raise UserError(f"{CHOICE} is a task of python -m clip_jax.evaluate, not of a run")
    trained = [task for task in spec.tasks if task in TRAINED_TASKS]
    if trained and not spec.train_data:
        raise missing_train_data(trained[0])

    def opened(pattern: str) -> Sequence[Shard]:
        return open_shards(expand(pattern)) if pattern else ()

    return Sources(
        opened(spec.data),
        opened(spec.train_data if trained else ""),
        opened(spec.val_data if trained else ""),
    )


def run_evaluation(
    encoders: Encoders,
    spec: EvalSpec,
    *,
    folder: str | Path,
    progress: bool = True,
    draw: bool = True,
) -> Evaluation:
    """Run every task of the spec, and write the results to `folder`.

    With several processes all of them call it; process 0 writes.

    Args:
      draw: makes the grid of predictions, and the curve of a run's loss, too.

    Raises:
      UserError: data or names are missing or do not fit each other.
    """
    if CHOICE in spec.tasks:
        return _run_choice(encoders, spec, folder, progress=progress)
    start = time.perf_counter()
    sources = open_eval_sources(spec)
    folder = make_folder(folder, flag="--out")
    store = folder / FEATURES
    inputs = make_task_inputs(encoders, spec, sources, store, progress=progress)
    task_results = run_tasks(inputs)
    if not any(task_results.values()):
        raise _nothing_scored(inputs)
    results = result_rows(
        task_results,
        dataset=spec.dataset or Path(spec.data).name,
        model=encoders.name,
        pretrained=spec.pretrained,
        images=len(inputs.test),
    )
    ablation = compare_templates(encoders, inputs, store)
    paths: list[Path] = []
    if jax.process_index() == 0:
        paths = [folder / RESULTS]
        extra = {"request": spec.to_json(), "ablation": ablation}
        extra |= _model_fields(encoders, spec, sources.test)
        zero_shot = task_results.get(ZERO_SHOT)
        predictions = zero_shot[0].predictions if zero_shot else None
        if predictions is not None:
            extra |= _class_fields(encoders, inputs, predictions)
            write_confusion(predictions, inputs, folder / CONFUSION)
            paths.append(folder / CONFUSION)
        if predictions is not None and draw:
            paths.append(_draw_grid(encoders, inputs, predictions, sources.test, folder))
        write_results(results, inputs.test.skipped, folder / RESULTS, **extra)
        if draw and (folder / "metrics.jsonl").exists():
            paths.append(loss_curve(folder / "metrics.jsonl", folder / CURVE))
    seconds = time.perf_counter() - start
    return Evaluation(results, inputs.test.skipped, folder, tuple(paths), seconds)


def _run_choice(
    encoders: Encoders, spec: EvalSpec, folder: str | Path, *, progress: bool
) -> Evaluation:
    """Do as `run_evaluation` for the choice between captions, which no other task goes with."""
    start = time.perf_counter()
    if len(spec.tasks) > 1:
        raise UserError(f"{CHOICE} has data of its own kind: evaluate it without other tasks")
    choices = open_choices(spec.data)
    folder = make_folder(folder, flag="--out")
    store = folder / FEATURES
    features = encode_shards(
        encoders,
        [choices],
        spec.batch_size,
        store,
        title=Path(spec.data).name,
        progress=progress,
        need_captions=False,
    )
    texts = choices.captions_of_all
    z_text_BD = encode_classes(encoders, texts, ["{}"], spec.batch_size, store)
    metrics, each = choice_metrics(choices, features.z_image_BD, features.row_B, z_text_BD)
    hits = np.stack(list(each.values()), axis=1)
    intervals = dict(zip(each, ratio_intervals(hits, np.ones_like(hits)), strict=True))
    results = result_rows(
        {CHOICE: [TaskResult(metrics, intervals, images=len(features))]},
        dataset=spec.dataset or Path(spec.data).stem,
        model=encoders.name,
        pretrained=spec.pretrained,
        images=len(features),
    )
    paths: list[Path] = []
    if jax.process_index() == 0:
        paths = [folder / RESULTS]
        write_results(results, features.skipped, paths[0], request=spec.to_json())
    seconds = time.perf_counter() - start
    return Evaluation(results, features.skipped, folder, tuple(paths), seconds)


def make_task_inputs(
    encoders: Encoders,
    spec: EvalSpec,
    sources: Sources,
    store: Path | None,
    *,
    progress: bool = True,
) -> TaskInputs:
    """Encode the classes and all the data; `store` keeps the features, None keeps none."""
    names = class_names(spec, sources)
    class_MD = None
    if names and ZERO_SHOT in spec.tasks:
        templates = load_templates(spec.templates)
        class_MD = encode_classes(encoders, names, templates, spec.batch_size, store)

    def features(shards: Sequence[Shard], pattern: str, title: str = "") -> FeatureSet:
        title = title or Path(pattern).name
        return encode_shards(
            encoders,
            shards,
            spec.batch_size,
            store,
            title=title,
            progress=progress,
            need_captions=spec.scoring != MULTILABEL,
        )

    test = features(sources.test, spec.data, spec.dataset)
    array_BK = None
    if spec.scoring:
        what = "labels" if spec.scoring == MULTILABEL else "groups"
        array_BK = read_arrays(sources.test, test.row_B, what)
    if RETRIEVAL in spec.tasks:
        test = join_rows_of_one_image(test, sources.test)
    return TaskInputs(
        spec=spec,
        test=test,
        scale=encoders.scale,
        train=features(sources.train, spec.train_data) if sources.train else None,
        validation=features(sources.validation, spec.val_data) if sources.validation else None,
        class_names=names,
        class_MD=class_MD,
        array_BK=array_BK,
        mesh=encoders.mesh,
        progress=progress,
    )


def class_names(spec: EvalSpec, sources: Sources) -> list[str]:
    """Return the names of the classes: those that are given, else the data's own, else none.

    Raises:
      UserError: they are not as many as the data's classes, or differ between its sources.
    """
    own_names = _own_class_names(sources)
    names = load_class_names(spec.classnames) if spec.classnames else own_names
    if own_names and len(names) != len(own_names) and ZERO_SHOT in spec.tasks:
        raise UserError(
            f"{spec.classnames} holds {len(names)} class names, and {spec.data} has "
            f"{len(own_names)} classes: give --classnames for these, or none to take the data's own"
        )
    if sorted(names) == sorted(own_names) and names != own_names:
        raise UserError(
            f"{spec.classnames} has the class names of {spec.data} in another order, so a label "
            f"means another class; its order is {', '.join(own_names)[:200]}: leave --classnames "
            "out (config.eval.classnames in training)"
        )
    return names


def may_name_classes(pattern: str) -> bool:
    """Return whether a source, which is not looked into, can have class names; so can an empty one.

    A folder is one of images or of shards: it is looked for alone.
    """
    paths = [split_options(part.strip())[0] for part in pattern.split("::")]
    return not pattern or all(
        os.path.isdir(path) or re.match(r"tfds:|.*\.parquet\b", path) for path in paths
    )


def source_class_names(pattern: str) -> list[str]:
    """Return the class names that a source itself has, in label order; empty where it has none.

    Raises:
      UserError: the source names nothing, or cannot be read.
    """
    names = expand(pattern)
    kinds = {format_of(split_options(name)[0]).name for name in names}
    return _class_names(open_shards(names)) if kinds <= _NAMED_FORMATS else []


def _own_class_names(sources: Sources) -> list[str]:
    """Return the class names that the data has, which all of the labeled data must share."""
    test, *others = [_class_names(s) for s in (sources.test, sources.train, sources.validation)]
    for names in others:
        if names and test and names != test:
            raise UserError(
                "--data and --train-data (or --val-data) have other classes, so a label means "
                f"another one in each: {', '.join(sorted(set(names) ^ set(test))[:5]) or names[:5]}"
            )
    return [name.replace("_", " ") for name in test]


def _class_names(shards: Sequence[Shard]) -> list[str]:
    """Return the names that all of these shards have; empty where one knows none.

    Raises:
      UserError: two of them have other names.
    """
    classes = [getattr(shard, "classes", []) for shard in shards]
    if not all(classes):
        return []
    for shard, names in zip(shards, classes, strict=True):
        if names != classes[0]:
            raise UserError(
                f"{shards[0].name} and {shard.name} have other classes, so a label means another "
                "one in each: evaluate them one by one"
            )
    return classes[0] if classes else []


def _nothing_scored(inputs: TaskInputs) -> UserError:
    """Make the error of data that has nothing for any of the tasks."""
    spec, test = inputs.spec, inputs.test
    has_labels = bool((test.label_B >= 0).any())
    lacks = "" if has_labels else " no image has a class number (a .cls member, a label column);"
    lacks += "" if inputs.class_names else " there are no class names (--classnames);"
    lacks += "" if test.captions else " no image has a caption;"
    return UserError(f"{spec.data} has nothing for {', '.join(spec.tasks)}:{lacks.rstrip(';')}")


def compare_templates(
    encoders: Encoders, inputs: TaskInputs, store: Path | None
) -> list[dict[str, Any]]:
    """Return the accuracy with each prompt of `spec.ablate` alone, and with all of them."""
    spec = inputs.spec
    if not spec.ablate or inputs.class_MD is None:
        return []
    rows = np.flatnonzero(inputs.test.label_B >= 0)
    label_B = inputs.test.label_B[rows]

    def accuracy(templates: Sequence[str]) -> float:
        class_MD = encode_classes(encoders, inputs.class_names, templates, spec.batch_size, store)
        top_B1, _ = rank_classes(inputs.test.z_image_BD[rows], class_MD, inputs.scale, k=1)
        return float((top_B1[:, 0] == label_B).mean())

    templates = load_templates(spec.ablate)
    ablation = [{"template": t, "acc1": accuracy([t])} for t in templates]
    if len(templates) > 1:
        ablation.append({"template": f"all {len(templates)} together", "acc1": accuracy(templates)})
    return ablation


def _model_fields(encoders: Encoders, spec: EvalSpec, shards: Sequence[Shard]) -> dict[str, Any]:
    """Return what eval.json says of the model and of the features of the data."""
    folder = feature_folder(
        Path(FEATURES),
        encoders,
        shards,
        encoders.round_batch_size(spec.batch_size),
        need_captions=spec.scoring != MULTILABEL,
    )
    return {
        "scale": encoders.scale,
        "preprocess": preprocess_to_json(encoders.preprocess),
        "features": folder.as_posix(),
    }


def _class_fields(
    encoders: Encoders, inputs: TaskInputs, predictions: Predictions
) -> dict[str, Any]:
    """Return what eval.json says of the classes."""
    names, templates = inputs.class_names, load_templates(inputs.spec.templates)
    return {
        "classes": class_file(Path(FEATURES), encoders, names, templates).as_posix(),
        "class_names": list(names),
        "reliability": predictions.reliability,
    }


def _draw_grid(
    encoders: Encoders,
    inputs: TaskInputs,
    predictions: Predictions,
    shards: Sequence[Shard],
    folder: Path,
) -> Path:
    """Draw some images with their predictions."""
    examples = draw_examples(predictions, inputs, EXAMPLES)
    images = read_images(shards, examples.rows, encoders.shown_side, encoders.preprocess)
    prediction_grid(list(images), examples.truths, examples.guesses, folder / GRID)
    return folder / GRID
