"""Evaluate a folder of embeddings, for `python -m clip_jax.evaluate --embeddings DIR`."""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_jax.errors import UserError, note, short
from clip_jax.sections import EvalSection

if TYPE_CHECKING:
    from clip_jax.embeddings.folder import EmbeddingInfo
    from clip_jax.evaluation.encoders import Encoders
    from clip_jax.evaluation.run import Evaluation
    from clip_jax.evaluation.spec import EvalSpec

SCALE = 100.0
"""What multiplies cosines where no model says it: CLIP's own limit."""


def evaluate_embeddings(args: argparse.Namespace, changes: Mapping[str, Any]) -> "Evaluation":
    """Run the tasks on features that `clip_jax.embed` or clip-retrieval has written.

    The model is loaded for the names of classes alone, and not where --class-embeddings is given.

    Args:
      args: `clip_jax.tools.evaluate.parse`'s.
      changes: fields of `evaluation.spec.EvalSpec`.

    Raises:
      UserError: a folder or a file cannot be read, or they do not fit each other.
    """
    from clip_jax.embeddings.folder import read_info
    from clip_jax.embeddings.score import read_features
    from clip_jax.evaluation.spec import EvalSpec
    from clip_jax.evaluation.tasks import TRAINED_TASKS, ZERO_SHOT, TaskInputs, run_tasks

    start = time.perf_counter()
    label_BK = _read_array(args.labels, "--labels") if args.labels else None
    is_multilabel = label_BK is not None and label_BK.ndim == 2
    fields = {"tasks": _default_tasks(args)} | dict(changes)
    fields["scoring"] = "multilabel" if is_multilabel else ""
    spec = EvalSpec.from_section(EvalSection(), **fields | {"data": args.embeddings})
    test = read_features(args.embeddings, None if is_multilabel else label_BK)
    info = read_info(Path(args.embeddings))
    names: list[str] = []
    class_MD, scale = None, SCALE
    if ZERO_SHOT in spec.tasks:
        names, class_MD, scale = _class_embeddings(args, spec, info)
        if class_MD.shape[1] != test.z_image_BD.shape[1]:
            raise UserError(
                f"{args.embeddings} holds rows of {test.z_image_BD.shape[1]} features, and the "
                f"classes have {class_MD.shape[1]}: give the model that made both"
            )
    for task in set(spec.tasks) & set(TRAINED_TASKS):
        if not args.train_embeddings:
            raise UserError(f"{task} learns from labeled images; give --train-embeddings")
    inputs = TaskInputs(
        spec=spec,
        test=test,
        scale=scale,
        train=read_features(args.train_embeddings) if args.train_embeddings else None,
        class_names=names,
        class_MD=class_MD,
        array_BK=label_BK if is_multilabel else None,
        progress=True,
    )
    task_results = run_tasks(inputs)
    if not any(task_results.values()):
        raise UserError(
            f"{args.embeddings} has nothing for {', '.join(spec.tasks)}: classification needs "
            "labels (--labels) and retrieval needs text_emb/ with captions"
        )
    return _write(args, spec, inputs, task_results, info, start)


def _default_tasks(args: argparse.Namespace) -> tuple[str, ...]:
    """Return what is scored without --task: classification where classes are named."""
    from clip_jax.evaluation.tasks import RETRIEVAL, ZERO_SHOT

    has_classes = args.classnames or args.dataset or args.class_embeddings
    return (ZERO_SHOT,) if has_classes else (RETRIEVAL,)


def _class_embeddings(
    args: argparse.Namespace, spec: "EvalSpec", info: "EmbeddingInfo | None"
) -> tuple[list[str], np.ndarray, float]:
    """Return the classes' names, their unit embeddings and the model's scale."""
    from clip_jax.evaluation.encoders import unit_rows
    from clip_jax.evaluation.feature_store import encode_classes
    from clip_jax.evaluation.prompts import load_class_names, load_templates

    names = load_class_names(spec.classnames) if spec.classnames else []
    if args.class_embeddings:
        class_MD = _read_array(args.class_embeddings, "--class-embeddings")
        if class_MD.ndim != 2 or (names and len(names) != len(class_MD)):
            raise UserError(
                f"--class-embeddings {args.class_embeddings} has the shape {class_MD.shape}, not "
                f"[{len(names) or 'classes'}, features]"
            )
        note(
            f"no model says by what cosines are multiplied; {SCALE:g} is taken, and figures of "
            "probabilities depend on it"
        )
        return names or [str(m) for m in range(len(class_MD))], unit_rows(class_MD), SCALE
    if not names:
        raise UserError("classification needs class names; give --classnames or --dataset")
    encoders = _load_model(args, info)
    templates = load_templates(spec.templates)
    return names, encode_classes(encoders, names, templates, 256, None), encoders.scale


def _load_model(args: argparse.Namespace, info: "EmbeddingInfo | None") -> "Encoders":
    """Load the model that made the folder, for its text tower."""
    from clip_jax.api import load_encoders

    model = args.model or (info.model if info else "")
    if not model:
        raise UserError(
            f"{args.embeddings} does not say which model made it; give --model, or the classes' "
            "own features by --class-embeddings"
        )
    encoders = load_encoders(
        model,
        architecture=args.architecture or (info and info.architecture) or None,
        tokenizer=args.tokenizer or (info and info.tokenizer) or None,
        dtype=args.dtype,
    )
    if info is not None and info.identity != encoders.identity:
        raise UserError(
            f"{args.embeddings} was made by {info.name} ({info.model}) with weights or settings "
            f"other than those of {model} now: give --model the one that made it"
        )
    return encoders


def _read_array(path: str, flag: str) -> np.ndarray:
    """Read a .npy, or a text file with one whole number a line."""
    try:
        if path.endswith(".npy"):
            return np.load(path, allow_pickle=False)
        return np.array([int(line) for line in Path(path).read_text().split()], np.int64)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{flag} {path} is no .npy and no list of numbers ({short(e)})") from None


def _write(
    args: argparse.Namespace,
    spec: "EvalSpec",
    inputs: Any,
    task_results: Mapping[str, Any],
    info: "EmbeddingInfo | None",
    start: float,
) -> "Evaluation":
    """Write the results and the confusion matrix."""
    from clip_jax.evaluation.results import (
        CONFUSION,
        RESULTS,
        result_rows,
        write_confusion,
        write_results,
    )
    from clip_jax.evaluation.run import Evaluation
    from clip_jax.evaluation.tasks import ZERO_SHOT
    from clip_jax.files import make_folder

    folder = make_folder(args.out or f"{args.embeddings.rstrip('/')}-eval", flag="--out")
    results = result_rows(
        task_results,
        dataset=spec.dataset or Path(args.embeddings).name,
        model=info.name if info else args.model or "",
        pretrained=spec.pretrained,
        images=len(inputs.test),
    )
    write_results(results, {}, folder / RESULTS, request=spec.to_json())
    paths = [folder / RESULTS]
    zero_shot = task_results.get(ZERO_SHOT)
    if zero_shot and zero_shot[0].predictions is not None:
        write_confusion(zero_shot[0].predictions, inputs, folder / CONFUSION)
        paths.append(folder / CONFUSION)
    return Evaluation(results, {}, folder, tuple(paths), time.perf_counter() - start)
