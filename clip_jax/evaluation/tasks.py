"""Run the tasks: each computes figures from features, and how sure they are."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Int

from clip_jax.errors import UserError
from clip_jax.evaluation.bootstrap import (
    Interval,
    mean_recall_interval,
    ratio_intervals,
    score_intervals,
)
from clip_jax.evaluation.calibration import Bin, calibration_error, reliability
from clip_jax.evaluation.caption_choice import CHOICE
from clip_jax.evaluation.features import FeatureSet
from clip_jax.evaluation.groups import GROUP_SCORES
from clip_jax.evaluation.knn import knn_votes
from clip_jax.evaluation.linear_probe import MAX_FITS, Probe, choose_c, draw_shots, fit, hold_out
from clip_jax.evaluation.multilabel import MEAN_AVERAGE_PRECISION, average_precisions
from clip_jax.evaluation.retrieval import KS, Ranks, recalls, retrieval_ranks
from clip_jax.evaluation.spec import EvalSpec
from clip_jax.evaluation.zero_shot import rank_classes, zero_shot_metrics
from clip_jax.progress_bar import progress_bar

ZERO_SHOT, RETRIEVAL = "zeroshot_classification", "zeroshot_retrieval"
LINEAR_PROBE, KNN, FEW_SHOT = "linear_probe", "knn", "few_shot"
MULTILABEL = "multilabel"
SCORINGS = ("", MULTILABEL, *GROUP_SCORES)
"""The values of `spec.EvalSpec.scoring`."""

# Draws of the training images in `few_shot`, of which the mean is reported.
DRAWS = 3

# Features and their labels.
Labeled = tuple[Float32[np.ndarray, "B D"], Int[np.ndarray, " B"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """The features that the tasks score, and how.

    Attributes:
      spec: of it `neighbors`, `shots`, `confuse_equal_captions` and `scoring`.
      test: the images that are scored.
      scale: what multiplies cosines to give logits, for probabilities.
      train, validation: labeled images to learn from; without `validation` a fifth of `train`
        chooses C.
      class_MD: the text embeddings of `class_names`, or None.
      array_BK: the rows of the test set's `.npy` members, where `spec.scoring` needs them.
      mesh: the devices that fit a linear probe; None is one.
      progress: shows a bar of the fits on stderr.
    """

    spec: EvalSpec
    test: FeatureSet
    scale: float
    train: FeatureSet | None = None
    validation: FeatureSet | None = None
    class_names: Sequence[str] = ()
    class_MD: Float32[np.ndarray, "M D"] | None = None
    array_BK: Int[np.ndarray, "B K"] | None = None
    mesh: Mesh | None = None
    progress: bool = False


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The likeliest classes of the labeled images.

    Attributes:
      rows: the images' positions in the test set.
      top_Bk: each image's classes, likeliest first; share_Bk: their probabilities.
      reliability: see `calibration.reliability`.
    """

    rows: Int[np.ndarray, " B"]
    top_Bk: Int[np.ndarray, "B k"]
    share_Bk: Float[np.ndarray, "B k"]
    reliability: list[Bin]


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The figures of a task.

    Attributes:
      metrics: by CLIP_benchmark's names, where it has them.
      intervals: of 95 %, for some of the metrics.
      predictions: of zero-shot classification alone, where an image has one class.
      images: that were scored; None is all.
    """

    metrics: dict[str, float]
    intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)
    predictions: Predictions | None = None
    images: int | None = None


def zero_shot(inputs: TaskInputs) -> list[TaskResult]:
    """Score the nearest class names: accuracy, recall by class, calibration, or by `scoring`."""
    if inputs.spec.scoring == MULTILABEL:
        return _multilabel(inputs)
    rows = _labeled_rows(inputs.test, len(inputs.class_names))
    if inputs.class_MD is None or not len(rows):
        return []
    top_Bk, share_Bk = rank_classes(inputs.test.z_image_BD[rows], inputs.class_MD, inputs.scale)
    label_B = inputs.test.label_B[rows]
    metrics, intervals = _classification(top_Bk, label_B, len(inputs.class_names))
    right_B = top_Bk[:, 0] == label_B
    share_B = share_Bk[:, 0].astype(np.float64)
    metrics["calibration_error"] = calibration_error(share_B, right_B)
    if inputs.array_BK is not None:
        by_group = _group_figures(inputs.spec.scoring, top_Bk, label_B, inputs.array_BK[rows])
        metrics, intervals = metrics | by_group[0], intervals | by_group[1]
    predictions = Predictions(rows, top_Bk, share_Bk, reliability(share_B, right_B))
    return [TaskResult(metrics, intervals, predictions, images=len(rows))]


def _multilabel(inputs: TaskInputs) -> list[TaskResult]:
    """Score every class's ranking of the images: the mean average precision."""
    if inputs.class_MD is None or inputs.array_BK is None:
        return []
    if inputs.array_BK.shape[1] != len(inputs.class_MD):
        raise UserError(
            f"an image's .npy has {inputs.array_BK.shape[1]} labels, and there are "
            f"{len(inputs.class_MD)} class names"
        )
    cosine_BM = inputs.test.z_image_BD @ inputs.class_MD.T
    precision_M = average_precisions(cosine_BM, inputs.array_BK != 0)
    return [TaskResult({MEAN_AVERAGE_PRECISION: float(precision_M.mean())})]


def _group_figures(
    scoring: str, top_Bk: np.ndarray, label_B: np.ndarray, groups_BK: np.ndarray
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Return the figures by groups and their intervals.

    The accuracies of single groups have none: a resample may have no image of a group.

    Raises:
      UserError: the groups are others.
    """
    columns = GROUP_SCORES[scoring].columns
    if groups_BK.shape[1] != len(columns) or groups_BK.min() < 0:
        raise UserError(
            f"{scoring}: an image's .npy holds {groups_BK.shape[1]} numbers, and not "
            f"{', '.join(columns)}, each from 0 on"
        )
    score = GROUP_SCORES[scoring].score
    intervals = score_intervals(
        lambda rows: score(top_Bk[rows], label_B[rows], groups_BK[rows]), len(label_B)
    )
    metrics = score(top_Bk, label_B, groups_BK)
    return metrics, {name: x for name, x in intervals.items() if ":" not in name}


def retrieval(inputs: TaskInputs) -> list[TaskResult]:
    """Score images by their texts and texts by their images: recall at 1, 5 and 10."""
    test = inputs.test
    if not len(test.captions):
        return []
    # Images without a text take no part; the others are numbered in order.
    rows, image_of_text = np.unique(test.image_of_text, return_inverse=True)
    captions = None if inputs.spec.confuse_equal_captions else test.captions
    ranks = retrieval_ranks(test.z_image_BD[rows], test.z_text_BD, image_of_text, captions=captions)
    metrics = recalls(ranks)
    intervals = _recall_intervals(ranks, image_of_text, metrics)
    return [TaskResult(metrics, intervals, images=len(test) - test.joined)]


def linear_probe(inputs: TaskInputs) -> list[TaskResult]:
    """Score logistic regression on all of the training features, C chosen as the paper does."""
    num_classes, (x_BD, y_B) = _training_data(inputs, LINEAR_PROBE)
    if inputs.validation is None:
        train, validation = [(x_BD[rows], y_B[rows]) for rows in hold_out(y_B)]
    else:
        train, validation = (x_BD, y_B), _labeled(inputs.validation, num_classes)
        x_BD, y_B = (np.concatenate(pair) for pair in zip(train, validation, strict=True))
    with _probe_fitter(inputs, LINEAR_PROBE, num_classes, MAX_FITS + 1) as fit_one:
        c, _ = choose_c(train, validation, fit_one)
        probe = fit_one(x_BD, y_B, c=c)
    result = _score(inputs, probe.logits, num_classes, "lp_")
    settings = {"C": c, "fewshot_k": -1.0, "normalized": 1.0}
    return [TaskResult(result.metrics | settings, result.intervals)]


def knn(inputs: TaskInputs) -> list[TaskResult]:
    """Score the votes of the nearest training images."""
    num_classes, (x_BD, y_B) = _training_data(inputs, KNN)
    k = inputs.spec.neighbors

    def votes(z_BD: np.ndarray) -> np.ndarray:
        return knn_votes(z_BD, x_BD, y_B, num_classes=num_classes, k=k)

    result = _score(inputs, votes, num_classes, "knn_")
    return [TaskResult(result.metrics | {"k": float(k)}, result.intervals)]


def few_shot(inputs: TaskInputs, *, draws: int = DRAWS) -> list[TaskResult]:
    """Score logistic regression on a few training images a class; the mean of some draws.

    C is 1, or every draw's own where there is a validation set to choose it by.

    Raises:
      UserError: no class has as many images as the least of the shots.
    """
    num_classes, (x_BD, y_B) = _training_data(inputs, FEW_SHOT)
    validation = None if inputs.validation is None else _labeled(inputs.validation, num_classes)
    max_shots = int(np.max(np.bincount(y_B, minlength=num_classes)))
    possible = [shots for shots in inputs.spec.shots if shots <= max_shots]
    if not possible:
        raise UserError(
            f"{FEW_SHOT}: no class has more than {max_shots} training images; give fewer --shots"
        )
    task_results = []
    for shots in possible:
        metrics, cs = [], []
        max_fits = draws * (1 if validation is None else MAX_FITS + 1)
        with _probe_fitter(inputs, f"{FEW_SHOT} {shots}", num_classes, max_fits) as fit_one:
            for seed in range(draws):
                rows = draw_shots(y_B, shots, seed=seed)
                drawn, c = (x_BD[rows], y_B[rows]), 1.0
                if validation is not None:
                    c, _ = choose_c(drawn, validation, fit_one)
                cs.append(c)
                probe = fit_one(*drawn, c=c)
                metrics.append(_score(inputs, probe.logits, num_classes, "lp_").metrics)
        mean = {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}
        spread = float(np.std([m["lp_acc1"] for m in metrics]))
        mean_c = float(np.exp(np.mean(np.log(cs))))
        settings = {"fewshot_k": float(shots), "C": mean_c, "lp_acc1_std": spread}
        task_results.append(TaskResult(mean | settings))
    return task_results


TASKS: dict[str, Callable[[TaskInputs], list[TaskResult]]] = {
    ZERO_SHOT: zero_shot,
    RETRIEVAL: retrieval,
    LINEAR_PROBE: linear_probe,
    KNN: knn,
    FEW_SHOT: few_shot,
}
TRAINED_TASKS = (LINEAR_PROBE, KNN, FEW_SHOT)
"""Those that learn from labeled images."""


def run_tasks(inputs: TaskInputs) -> dict[str, list[TaskResult]]:
    """Run every task of the spec; a task that the test set has nothing for has no result."""
    return {task: TASKS[task](inputs) for task in inputs.spec.tasks}


def check_tasks(names: Sequence[str]) -> None:
    """Raise UserError for a name that no task has."""
    known = (*TASKS, CHOICE)
    for name in names:
        if name not in known:
            raise UserError(f"there is no task {name!r}; the tasks are {', '.join(known)}")


def missing_train_data(task: str) -> UserError:
    """Make the error of one of `TRAINED_TASKS` that has no images to learn from."""
    return UserError(f"{task} learns from labeled images; give --train-data")


def _labeled_rows(features: FeatureSet, num_classes: int) -> Int[np.ndarray, " rows"]:
    """Return the rows that have a label, or raise UserError for one that is no class."""
    if len(features) and num_classes and features.label_B.max() >= num_classes:
        raise UserError(
            f"label {features.label_B.max()} is no class: there are {num_classes} class names, "
            f"so labels go up to {num_classes - 1}"
        )
    return np.flatnonzero(features.label_B >= 0)


def _labeled(features: FeatureSet, num_classes: int) -> Labeled:
    rows = _labeled_rows(features, num_classes)
    return features.z_image_BD[rows], features.label_B[rows]


def _training_data(inputs: TaskInputs, task: str) -> tuple[int, Labeled]:
    """Return the number of classes, and the labeled training images.

    Raises:
      UserError: there are none, or the test set has no labels.
    """
    if inputs.train is None:
        raise missing_train_data(task)
    if not (inputs.test.label_B >= 0).any():
        raise UserError(f"{task}: no image of the test data has a label (a .cls member)")
    sets = [s for s in (inputs.train, inputs.test, inputs.validation) if s is not None]
    num_classes = len(inputs.class_names) or 1 + max(int(s.label_B.max()) for s in sets)
    x_BD, y_B = _labeled(inputs.train, num_classes)
    if len(y_B) < 2:
        raise UserError(f"{task}: the training data has {len(y_B)} labeled images")
    return num_classes, (x_BD, y_B)


@contextlib.contextmanager
def _probe_fitter(
    inputs: TaskInputs, title: str, num_classes: int, max_fits: int
) -> Iterator[Callable[..., Probe]]:
    """Yield a function that fits a probe of one C, and move a bar with every fit.

    There may be fewer than `max_fits`: a search does not always look on both sides.
    """
    shown = inputs.progress and jax.process_index() == 0
    with progress_bar(max_fits, title, "fit", shown=shown) as bar:

        def fit_one(z_BD: np.ndarray, label_B: np.ndarray, *, c: float) -> Probe:
            def on_steps(steps: int) -> None:
                bar.set_postfix_str(f"C {c:.3g}, step {steps}", refresh=False)
                bar.update(0)

            probe = fit(
                z_BD, label_B, num_classes=num_classes, c=c, mesh=inputs.mesh, on_steps=on_steps
            )
            bar.update()
            return probe

        yield fit_one
        bar.total = bar.n
        bar.refresh()


def _score(
    inputs: TaskInputs, scores: Callable[[np.ndarray], np.ndarray], num_classes: int, prefix: str
) -> TaskResult:
    """Score the labeled test images by `scores`, which takes features and returns [B, M]."""
    z_BD, label_B = _labeled(inputs.test, num_classes)
    top_Bk = np.argsort(-scores(z_BD), axis=1, kind="stable")[:, :5]
    metrics, intervals = _classification(top_Bk, label_B, num_classes)
    return TaskResult(
        {prefix + name: value for name, value in metrics.items()},
        {prefix + name: value for name, value in intervals.items()},
    )


def _classification(
    top_Bk: np.ndarray, label_B: np.ndarray, num_classes: int
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Return the three accuracies and their intervals."""
    metrics = zero_shot_metrics(top_Bk, label_B, num_classes=num_classes)
    hit_Bk = top_Bk == label_B[:, None]
    hits_B2 = np.stack([hit_Bk[:, 0], hit_Bk[:, :5].any(axis=1)], axis=1).astype(np.float64)
    top1, top5 = ratio_intervals(hits_B2, np.ones_like(hits_B2))
    mean = mean_recall_interval(hit_Bk[:, 0], label_B)
    intervals = {"acc1": top1, "mean_per_class_recall": mean}
    return metrics, intervals | ({"acc5": top5} if num_classes >= 5 else {})


def _recall_intervals(
    ranks: Ranks, image_of_text: np.ndarray, metrics: dict[str, float]
) -> dict[str, Interval]:
    """Return the metrics' intervals when the images are drawn anew, each with all its texts."""
    images = len(ranks.text_of_image)

    def of_image(values: np.ndarray) -> Float[np.ndarray, " images"]:
        return np.bincount(image_of_text, values, images)

    hits = [of_image(ranks.image_of_text < k) for k in KS]
    hits += [(ranks.text_of_image < k).astype(np.float64) for k in KS]
    texts = of_image(np.ones(len(image_of_text)))
    counts = [texts] * len(KS) + [np.ones(images)] * len(KS)
    intervals = ratio_intervals(np.stack(hits, axis=1), np.stack(counts, axis=1))
    return dict(zip(metrics, intervals, strict=True))
