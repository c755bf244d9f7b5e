"""Measure classification by groups of images, as DataComp's evaluation does for WILDS and others.

The groups are columns of the `.npy` members. Names and definitions are those of WILDS 2.0, whose
worst group is the least accuracy among the groups that have images. (WILDS leaves FMoW's region
"Other" out of the worst region; DataComp's evaluation, whose figures these are, does not.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

Metrics = dict[str, float]


def macro_scores(
    predicted_B: Int[np.ndarray, " B"], label_B: Int[np.ndarray, " B"]
) -> tuple[float, float]:
    """Return recall and F1, each averaged over the classes that have images.

    >>> macro_scores(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1]))
    (0.75, 0.8333333333333333)
    """
    classes = 1 + int(max(predicted_B.max(), label_B.max()))
    truths_M = np.bincount(label_B, minlength=classes)
    guesses_M = np.bincount(predicted_B, minlength=classes)
    hits_M = np.bincount(label_B[predicted_B == label_B], minlength=classes)
    present_M = truths_M > 0
    f1_M = 2 * hits_M / np.maximum(truths_M + guesses_M, 1)
    recall_M = hits_M / np.maximum(truths_M, 1)
    return float(recall_M[present_M].mean()), float(f1_M[present_M].mean())


def group_accuracies(
    right_B: Bool[np.ndarray, " B"], group_B: Int[np.ndarray, " B"]
) -> tuple[Float[np.ndarray, " G"], Int[np.ndarray, " G"]]:
    """Return each group's accuracy, 0 for an empty one, and its images."""
    images_G = np.bincount(group_B)
    hits_G = np.bincount(group_B[right_B], minlength=len(images_G))
    return hits_G / np.maximum(images_G, 1), images_G


def _worst(right_B: np.ndarray, group_B: np.ndarray) -> float:
    accuracy_G, images_G = group_accuracies(right_B, group_B)
    return float(accuracy_G[images_G > 0].min())


def _iwildcam(top_Bk: np.ndarray, label_B: np.ndarray, groups_BK: np.ndarray) -> Metrics:
    recall, f1 = macro_scores(top_Bk[:, 0], label_B)
    right = float((top_Bk[:, 0] == label_B).mean())
    return {"acc_avg": right, "recall-macro_all": recall, "F1-macro_all": f1}


def _fmow(top_Bk: np.ndarray, label_B: np.ndarray, groups_BK: np.ndarray) -> Metrics:
    right_B = top_Bk[:, 0] == label_B
    accuracy_G, images_G = group_accuracies(right_B, groups_BK[:, 0])
    regions = {f"acc_region:{i}": float(accuracy_G[i]) for i in range(len(images_G))}
    worst = {
        "acc_worst_year": _worst(right_B, groups_BK[:, 1]),
        "acc_worst_region": _worst(right_B, groups_BK[:, 0]),
    }
    return {"acc_avg": float(right_B.mean())} | regions | worst


def _worst_of_column(column: int, *, k: int = 1, name: str = "acc") -> "ScoreFn":
    def score(top_Bk: np.ndarray, label_B: np.ndarray, groups_BK: np.ndarray) -> Metrics:
        right_B = (top_Bk[:, :k] == label_B[:, None]).any(axis=1)
        worst = _worst(right_B, groups_BK[:, column])
        return {f"{name}_avg": float(right_B.mean()), f"{name}_wg": worst}

    return score


ScoreFn = Callable[[np.ndarray, np.ndarray, np.ndarray], Metrics]
"""Of classes likeliest first [B, k], labels [B] and groups [B, columns]."""


@dataclass(frozen=True)
class GroupScores:
    """The figures of a data set with groups.

    Attributes:
      columns: what the `.npy` of an image holds.
      score: computes the figures.
    """

    columns: tuple[str, ...]
    score: ScoreFn


GROUP_SCORES: Mapping[str, GroupScores] = {
    "iwildcam": GroupScores(
        ("location", "sequence", "year", "month", "day", "hour", "minute", "second", "y"),
        _iwildcam,
    ),
    "camelyon17": GroupScores(("hospital", "slide", "y"), _worst_of_column(1)),
    "fmow": GroupScores(("region", "year", "y"), _fmow),
    "dollar_street": GroupScores(
        ("income_ds", "income_meta", "region"), _worst_of_column(0, k=5, name="acc_top5")
    ),
    "geode": GroupScores(("region", "country"), _worst_of_column(0)),
}
