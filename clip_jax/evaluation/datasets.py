"""List the data sets of CLIP_benchmark and DataComp by their names there, and how each is scored.

Names, tasks and collections are those of CLIP_benchmark 1.6.2; the metrics of DataComp's 38 sets
and their groups are those of DataComp's own evaluation (`tasklist.yml` and `aggregate_scores.py`,
arXiv:2304.14108, appendix N). Every other classification is scored by its accuracy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clip_jax.evaluation.caption_choice import CHOICE
from clip_jax.evaluation.multilabel import MEAN_AVERAGE_PRECISION
from clip_jax.evaluation.tasks import FEW_SHOT, KNN, LINEAR_PROBE, MULTILABEL, RETRIEVAL, ZERO_SHOT

MEAN_RECALL = "mean_recall@1"
"""The mean of recall at 1 in both directions: DataComp's figure of retrieval."""
MAIN_METRICS: Mapping[str, str] = {
    ZERO_SHOT: "acc1",
    RETRIEVAL: MEAN_RECALL,
    CHOICE: "acc",
    LINEAR_PROBE: "lp_acc1",
    FEW_SHOT: "lp_acc1",
    KNN: "knn_acc1",
}
"""The figure of a task that stands in the table, where the data set has none of its own."""


@dataclass(frozen=True)
class BenchmarkDataset:
    """How a data set is scored.

    Attributes:
      name: CLIP_benchmark's or DataComp's.
      task: the one it is made for.
      metric: the figure that stands for it.
      scoring: see `spec.EvalSpec`.
    """

    name: str
    task: str = ZERO_SHOT
    metric: str = "acc1"
    scoring: str = ""


VTAB = (
    *("vtab/caltech101", "vtab/cifar100", "vtab/clevr_count_all"),
    *("vtab/clevr_closest_object_distance", "vtab/diabetic_retinopathy", "vtab/dmlab"),
    *("vtab/dsprites_label_orientation", "vtab/dsprites_label_x_position", "vtab/dtd"),
    *("vtab/eurosat", "vtab/kitti_closest_vehicle_distance", "vtab/flowers", "vtab/pets"),
    *("vtab/pcam", "vtab/resisc45", "vtab/smallnorb_label_azimuth"),
    *("vtab/smallnorb_label_elevation", "sun397", "vtab/svhn"),
)
ROBUSTNESS = ("imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet")
RETRIEVAL_SETS = ("mscoco_captions", "flickr8k", "flickr30k")
SUGAR_CREPE = tuple(
    f"sugar_crepe/{change}"
    for change in (
        *("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel"),
        *("swap_att", "swap_obj"),
    )
)
_MORE_OF_VTAB_PLUS = (
    *("imagenet1k", *ROBUSTNESS, "fer2013", "voc2007", "voc2007_multilabel", "cars"),
    *("fgvc_aircraft", "mnist", "stl10", "gtsrb", "country211", "renderedsst2", "vtab/cifar10"),
)
_DATACOMP_FLICKR = "retrieval/flickr30k"
_DATACOMP_COCO = "retrieval/mscoco_2014_5k_test_image_text_retrieval"
WINOGAVIL = "misc/winogavil"
_WILDS = ("wilds/iwildcam", "wilds/camelyon17", "wilds/fmow")
_FAIRNESS = ("fairness/dollar_street", "fairness/geode")
_DATACOMP_SHIFTS = (*ROBUSTNESS, "imagenet-o")
_DATACOMP_VTAB = tuple(
    name for name in VTAB if not name.startswith(("vtab/d", "vtab/smallnorb")) or name == "vtab/dtd"
)
DATACOMP = (
    *("imagenet1k", *_DATACOMP_SHIFTS, *_DATACOMP_VTAB, "cifar10", "country211"),
    *("fgvc_aircraft", "food101", "gtsrb", "mnist", "voc2007", "renderedsst2", "cars", "stl10"),
    *(_DATACOMP_FLICKR, _DATACOMP_COCO, WINOGAVIL, *_WILDS, *_FAIRNESS),
)
COLLECTIONS: Mapping[str, tuple[str, ...]] = {
    "vtab": VTAB,
    "vtab+": (*_MORE_OF_VTAB_PLUS, *VTAB),
    "retrieval": RETRIEVAL_SETS,
    "imagenet_robustness": ROBUSTNESS,
    "sugar_crepe": SUGAR_CREPE,
    "datacomp": DATACOMP,
}
"""CLIP_benchmark's collections, and DataComp's 38."""
DATACOMP_GROUPS: Mapping[str, tuple[str, ...]] = {
    "ImageNet": ("imagenet1k",),
    "ImageNet dist. shifts": _DATACOMP_SHIFTS,
    "VTAB": _DATACOMP_VTAB,
    "Retrieval": (_DATACOMP_FLICKR, _DATACOMP_COCO, WINOGAVIL),
    "Average": DATACOMP,
}
"""DataComp's aggregates: each the mean of the main metrics of these sets."""

_OTHERS = (
    *("imagenet1k-unverified", "imagenet-w", "babel_imagenet", "caltech101", "cifar100", "dtd"),
    *("flowers", "pets", "eurosat", "pcam"),
)
_CAPTIONS = (
    *("multilingual_mscoco_captions", "crossmodal3600", "xtd10", "xtd200", "flickr30k-200"),
    *(*RETRIEVAL_SETS, _DATACOMP_FLICKR, _DATACOMP_COCO),
)
_PER_CLASS = ("caltech101", "fgvc_aircraft", "flowers", "pets")
_SCORED_OTHERWISE = (
    BenchmarkDataset("voc2007_multilabel", metric=MEAN_AVERAGE_PRECISION, scoring=MULTILABEL),
    BenchmarkDataset("wilds/iwildcam", metric="F1-macro_all", scoring="iwildcam"),
    BenchmarkDataset("wilds/camelyon17", scoring="camelyon17"),
    BenchmarkDataset("wilds/fmow", metric="acc_worst_region", scoring="fmow"),
    BenchmarkDataset("fairness/dollar_street", metric="acc_top5_wg", scoring="dollar_street"),
    BenchmarkDataset("fairness/geode", metric="acc_wg", scoring="geode"),
    BenchmarkDataset(WINOGAVIL, CHOICE, "jaccard_score_10-12"),
    BenchmarkDataset("winoground", CHOICE, "acc"),
)


def _classification(name: str) -> BenchmarkDataset:
    per_class = name.removeprefix("vtab/") in _PER_CLASS
    return BenchmarkDataset(name, metric="mean_per_class_recall" if per_class else "acc1")


DATASETS: Mapping[str, BenchmarkDataset] = {
    **{name: _classification(name) for name in (*COLLECTIONS["vtab+"], *DATACOMP, *_OTHERS)},
    **{name: BenchmarkDataset(name, RETRIEVAL, MEAN_RECALL) for name in _CAPTIONS},
    **{name: BenchmarkDataset(name, CHOICE, "acc") for name in SUGAR_CREPE},
    **{dataset.name: dataset for dataset in _SCORED_OTHERWISE},
}
"""All of them, by name."""


def known_dataset(name: str) -> BenchmarkDataset | None:
    """Return the data set of a name, or of a folder's name, or None.

    "wds/" before a name counts for nothing, a "-" may stand for a "/", as in published folders, and
    DataComp's folders of WILDS and others lack what stands before their "/".

    >>> known_dataset("vtab-dtd").name, known_dataset("wds/wilds/fmow").metric
    ('vtab/dtd', 'acc_worst_region')
    """
    name = name.removeprefix("wds/")
    if name in DATASETS:
        return DATASETS[name]
    for known in DATASETS:
        if name in (known.replace("/", "-"), known.rpartition("/")[2]):
            return DATASETS[known]
    return None


def main_value(metric: str, metrics: Mapping[str, float | None]) -> float | None:
    """Return the figure of a data set, or None where it was not measured.

    >>> main_value("mean_recall@1", {"image_retrieval_recall@1": 0.5, "text_retrieval_recall@1": 1})
    0.75
    """
    if metric == MEAN_RECALL:
        both = [metrics.get(f"{kind}_retrieval_recall@1") for kind in ("image", "text")]
        known = [value for value in both if value is not None]
        return sum(known) / 2 if len(known) == 2 else None
    value = metrics.get(metric)
    return None if value is None or math.isnan(value) else value


def aggregates(values: Mapping[str, float]) -> dict[str, float]:
    """Return DataComp's aggregates that all of their data sets are measured for.

    Args:
      values: the main metric of each data set, by its name.
    """
    return {
        group: sum(values[name] for name in names) / len(names)
        for group, names in DATACOMP_GROUPS.items()
        if all(name in values for name in names)
    }


def expand_names(items: Sequence[str]) -> list[str]:
    """Return the data sets that names and names of collections stand for, each once."""
    return list(dict.fromkeys(name for item in items for name in COLLECTIONS.get(item, (item,))))
