"""The tasks: what each asks of a set of features, and how sure the answer is."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Int

from clip_jax.errors import UserError
from clip_jax.evaluation.bootstrap import Interval, mean_recall_interval, ratio_intervals
from clip_jax.evaluation.calibration import calibration_error, reliability
from clip_jax.evaluation.feature_store import FeatureSet
from clip_jax.evaluation.knn import neighbour_votes
from clip_jax.evaluation.linear_probe import MOST_FITS, Probe, choose_c, draw_shots, fit, hold_out
from clip_jax.evaluation.retrieval import Ranks, recalls, retrieval_ranks
from clip_jax.evaluation.zero_shot import rank_classes, zero_shot_metrics
from clip_jax.progress_bar import progress_bar

ZERO_SHOT, RETRIEVAL = "zeroshot_classification", "zeroshot_retrieval"
PROBE, NEIGHBOURS, FEW_SHOT = "linear_probe", "knn", "few_shot"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What the tasks look at.

    Attributes:
      test: the images that are scored.
      train, validation: labeled images to learn from; without `validation` a fifth of `train`
        chooses C.
      class_MD: the classes' text embeddings, or None.
      scale: between cosines and logits, for probabilities.
      shots: labeled images a class in `few_shot`, each drawn `draws` times.
      confuse_equal_captions: retrieval as CLIP_benchmark has it, where equal captions of different
        images are wrong answers.
      progress: a bar of the fits, on stderr.
    """

    test: FeatureSet
    class_names: Sequence[str] = ()
    class_MD: Float32[np.ndarray, "M D"] | None = None
    scale: float = 100.0
    train: FeatureSet | None = None
    validation: FeatureSet | None = None
    neighbours: int = 20
    shots: Sequence[int] = (1, 2, 4, 8, 16)
    draws: int = 3
    confuse_equal_captions: bool = False
    mesh: Mesh | None = None
    progress: bool = False


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One result: figures, intervals of 95 % of some of them, and what else the task found."""

    metrics: dict[str, float]
    intervals: dict[str, Interval] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


def zero_shot(subject: Subject) -> list[TaskResult]:
    """Accuracy, recall by class and calibration of the nearest class names."""
    rows = _labelled(subject.test, len(subject.class_names))
    if subject.class_MD is None or not len(rows):
        return []
    top_Bk, share_Bk = rank_classes(subject.test.z_image_BD[rows], subject.class_MD, subject.scale)
    label_B = subject.test.label_B[rows]
    metrics, intervals = _classification(top_Bk, label_B, len(subject.class_names))
    right_B = top_Bk[:, 0] == label_B
    share_B = share_Bk[:, 0].astype(np.float64)
    metrics["calibration_error"] = calibration_error(share_B, right_B)
    details = {
        "rows": rows,
        "top": top_Bk,
        "shares": share_Bk,
        "reliability": reliability(share_B, right_B),
    }
    return [TaskResult(metrics, intervals, details)]


def retrieval(subject: Subject) -> list[TaskResult]:
    """Recall at 1, 5 and 10 of images by their texts, and of texts by their images."""
    test = subject.test
    if not len(test.captions):
        return []
    # Images without a text take no part; the others are numbered in order.
    kept, image_of_text = np.unique(test.image_of_text, return_inverse=True)
    captions = None if subject.confuse_equal_captions else test.captions
    ranks = retrieval_ranks(test.z_image_BD[kept], test.z_text_BD, image_of_text, captions=captions)
    metrics = recalls(ranks)
    return [TaskResult(metrics, _recall_intervals(ranks, image_of_text, metrics))]


def linear_probe(subject: Subject) -> list[TaskResult]:
    """Logistic regression on all of the training features, C chosen as the paper does."""
    classes, (x_BD, y_B), held = _training(subject, PROBE)
    if subject.validation is None:
        train, validation = [(x_BD[rows], y_B[rows]) for rows in held]
    else:
        train, validation = (x_BD, y_B), _pairs(subject.validation, classes)
        x_BD, y_B = (np.concatenate(both) for both in zip(train, validation, strict=True))
    with _fits(subject, PROBE, classes, MOST_FITS + 1) as fit_one:
        c, tried = choose_c(train, validation, fit_one)
        probe = fit_one(x_BD, y_B, c=c)
    outcome = _learned(subject, probe.logits, classes, "lp_")
    settings = {"C": c, "fewshot_k": -1.0, "normalized": 1.0}
    tried_list = [{"C": k, "accuracy": a} for k, a in tried.items()]
    return [TaskResult(outcome.metrics | settings, outcome.intervals, {"tried": tried_list})]


def neighbours(subject: Subject) -> list[TaskResult]:
    """The votes of the nearest training images."""
    classes, (x_BD, y_B), _ = _training(subject, NEIGHBOURS)

    def votes(z_BD: np.ndarray) -> np.ndarray:
        return neighbour_votes(z_BD, x_BD, y_B, num_classes=classes, k=subject.neighbours)

    outcome = _learned(subject, votes, classes, "knn_")
    return [TaskResult(outcome.metrics | {"k": float(subject.neighbours)}, outcome.intervals)]


def few_shot(subject: Subject) -> list[TaskResult]:
    """Logistic regression on a few training images a class; the mean of some draws.

    C is 1, or every draw's own where there is a validation split to choose it by.
    """
    classes, (x_BD, y_B), _ = _training(subject, FEW_SHOT)
    validation = None if subject.validation is None else _pairs(subject.validation, classes)
    most_shots = int(np.bincount(y_B, minlength=classes).max())
    possible = [shots for shots in subject.shots if shots <= most_shots]
    if not possible:
        raise UserError(
            f"{FEW_SHOT}: no class has more than {most_shots} training images; give fewer --shots"
        )
    outcomes = []
    for shots in possible:
        found, chosen = [], []
        most = subject.draws * (1 if validation is None else MOST_FITS + 1)
        with _fits(subject, f"{FEW_SHOT} {shots}", classes, most) as fit_one:
            for seed in range(subject.draws):
                rows = draw_shots(y_B, shots, seed=seed)
                drawn, c = (x_BD[rows], y_B[rows]), 1.0
                if validation is not None:
                    c, _ = choose_c(drawn, validation, fit_one)
                chosen.append(c)
                probe = fit_one(*drawn, c=c)
                found.append(_learned(subject, probe.logits, classes, "lp_").metrics)
        mean = {name: float(np.mean([f[name] for f in found])) for name in found[0]}
        spread = float(np.std([f["lp_acc1"] for f in found]))
        middle = float(np.exp(np.mean(np.log(chosen))))
        settings = {"fewshot_k": float(shots), "C": middle, "lp_acc1_std": spread}
        outcomes.append(TaskResult(mean | settings))
    return outcomes


TASKS: dict[str, Callable[[Subject], list[TaskResult]]] = {
    ZERO_SHOT: zero_shot,
    RETRIEVAL: retrieval,
    PROBE: linear_probe,
    NEIGHBOURS: neighbours,
    FEW_SHOT: few_shot,
}
LEARNING = (PROBE, NEIGHBOURS, FEW_SHOT)


def check_tasks(names: Sequence[str]) -> list[str]:
    """The tasks' names; UserError for one that does not exist."""
    for name in names:
        if name not in TASKS:
            raise UserError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    return list(names)


def lacks_training(task: str) -> UserError:
    """What is wrong where a task of `LEARNING` has no images to learn from."""
    return UserError(f"{task} learns from labeled images; give --train-data")


def _labelled(features: FeatureSet, num_classes: int) -> Int[np.ndarray, " rows"]:
    if len(features) and num_classes and features.label_B.max() >= num_classes:
        raise UserError(
            f"label {features.label_B.max()} is no class: there are {num_classes} class names, "
            f"so labels go up to {num_classes - 1}"
        )
    return np.flatnonzero(features.label_B >= 0)


def _pairs(features: FeatureSet, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    rows = _labelled(features, num_classes)
    return features.z_image_BD[rows], features.label_B[rows]


def _training(
    subject: Subject, task: str
) -> tuple[int, tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The number of classes, the labeled training images, and the rows that fit and choose."""
    if subject.train is None:
        raise lacks_training(task)
    if not (subject.test.label_B >= 0).any():
        raise UserError(f"{task}: no image of the test data has a label (a .cls member)")
    known = [f for f in (subject.train, subject.test, subject.validation) if f is not None]
    classes = len(subject.class_names) or 1 + max(int(f.label_B.max()) for f in known)
    x_BD, y_B = _pairs(subject.train, classes)
    if len(y_B) < 2:
        raise UserError(f"{task}: the training data has {len(y_B)} labeled images")
    return classes, (x_BD, y_B), hold_out(y_B)


@contextlib.contextmanager
def _fits(subject: Subject, title: str, classes: int, most: int) -> Iterator[Callable[..., Probe]]:
    """A function that fits a probe of C, and a bar that moves with every fit; `most` may be too
    many, for a search does not always look on both sides."""
    shown = subject.progress and jax.process_index() == 0
    with progress_bar(most, title, "fit", shown=shown) as moved:

        def fit_one(z_BD: np.ndarray, label_B: np.ndarray, *, c: float) -> Probe:
            def told(steps: int) -> None:
                moved.set_postfix_str(f"C {c:.3g}, step {steps}", refresh=False)
                moved.update(0)

            probe = fit(z_BD, label_B, num_classes=classes, c=c, mesh=subject.mesh, told=told)
            moved.update()
            return probe

        yield fit_one
        moved.total = moved.n
        moved.refresh()


def _learned(
    subject: Subject, scores: Callable[[np.ndarray], np.ndarray], classes: int, prefix: str
) -> TaskResult:
    z_BD, label_B = _pairs(subject.test, classes)
    top_Bk = np.argsort(-scores(z_BD), axis=1, kind="stable")[:, :5]
    metrics, intervals = _classification(top_Bk, label_B, classes)
    return TaskResult(
        {prefix + name: value for name, value in metrics.items()},
        {prefix + name: value for name, value in intervals.items()},
    )


def _classification(
    top_Bk: np.ndarray, label_B: np.ndarray, num_classes: int
) -> tuple[dict[str, float], dict[str, Interval]]:
    """The three accuracies and their intervals."""
    metrics = zero_shot_metrics(top_Bk, label_B, num_classes=num_classes)
    hit_Bk = top_Bk == label_B[:, None]
    hits_B2 = np.stack([hit_Bk[:, 0], hit_Bk[:, :5].any(axis=1)], axis=1).astype(np.float64)
    first, five = ratio_intervals(hits_B2, np.ones_like(hits_B2))
    mean = mean_recall_interval(hit_Bk[:, 0], label_B)
    intervals = {"acc1": first, "mean_per_class_recall": mean}
    return metrics, intervals | ({"acc5": five} if num_classes >= 5 else {})


def _recall_intervals(
    ranks: Ranks,
    image_of_text: np.ndarray,
    metrics: dict[str, float],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, Interval]:
    """Images are drawn anew, each with all its texts."""
    images = len(ranks.text_of_image)

    def of_image(values: np.ndarray) -> Float[np.ndarray, " images"]:
        return np.bincount(image_of_text, values, images)

    hits = [of_image(ranks.image_of_text < k) for k in ks]
    hits += [(ranks.text_of_image < k).astype(np.float64) for k in ks]
    texts = of_image(np.ones(len(image_of_text)))
    counts = [texts] * len(ks) + [np.ones(images)] * len(ks)
    found = ratio_intervals(np.stack(hits, axis=1), np.stack(counts, axis=1))
    return dict(zip(metrics, found, strict=True))
