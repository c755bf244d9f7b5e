"""Find data sets in CLIP_benchmark's webdataset layout.

A folder holds a folder for each split, with `nshards.txt` and `0.tar`, `1.tar`, ...; beside them
lie `classnames.txt`, `zeroshot_classification_templates.txt` and `dataset_type.txt` ("retrieval" or
"multilabel"; none is classification). In the tars, `.cls` is a class, `.npy` a row of zeros and
ones or the groups of an image, and `.txt` holds captions, one a line.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.data.formats.options import split_options
from clip_jax.errors import UserError
from clip_jax.evaluation.caption_choice import CHOICE, is_choice_file
from clip_jax.evaluation.datasets import known_dataset
from clip_jax.evaluation.prompts import load_templates, shipped_class_names, shipped_templates
from clip_jax.evaluation.tasks import MULTILABEL, RETRIEVAL, TRAINED_TASKS, ZERO_SHOT

SHARD_COUNT = "nshards.txt"
CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
KIND = "dataset_type.txt"
CLASSIFICATION, RETRIEVAL_KIND = "classification", "retrieval"
KINDS = (CLASSIFICATION, MULTILABEL, RETRIEVAL_KIND)


@dataclass(frozen=True)
class BenchmarkFolder:
    """One split of a data set in the layout.

    Attributes:
      root: the folder of the whole data set.
      split: the name of the split, a folder in it.
      shards: the number of its tar files.
      kind: one of `KINDS`.
    """

    root: Path
    split: str
    shards: int
    kind: str

    @property
    def data(self) -> str:
        """The split's tars, as `data.sources.expand` takes them."""
        return f"{self.root / self.split}/{{0..{self.shards - 1}}}.tar"

    @property
    def name(self) -> str:
        """The data set's name: the folder's, without the `wds_` and `_test` of published ones."""
        return re.sub(r"^wds_|_(test|train|val)$", "", self.root.name)

    def file(self, name: str) -> str:
        """Return the path of one of the files beside the splits; empty where it is not there."""
        path = self.root / name
        return str(path) if path.is_file() else ""


def find_benchmark_folder(pattern: str, split: str) -> BenchmarkFolder | None:
    """Return what a source names if it is a folder of the layout, else None.

    Args:
      pattern: the data set's folder, or a split's; `{}` stands for the split.
      split: the one that is read where the pattern names none.

    Raises:
      UserError: the data set has no such split, or a file beside the tars is damaged.
    """
    path = Path(os.path.expanduser(pattern.replace("{}", split)))
    if not path.is_dir():
        if "{}" in pattern and (parent := path.parent).is_dir():
            raise _no_split(parent, split)
        return None
    if (path / SHARD_COUNT).is_file():
        path, split = Path(os.path.abspath(path)).parent, path.name
    elif not (path / split / SHARD_COUNT).is_file():
        if _splits(path):
            raise _no_split(path, split)
        return None
    return BenchmarkFolder(path, split, _shard_count(path / split / SHARD_COUNT), _kind(path))


def _splits(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob(f"*/{SHARD_COUNT}"))


def _no_split(root: Path, split: str) -> UserError:
    known = ", ".join(_splits(root)) or "none at all"
    return UserError(f"{root} has no split {split!r} with {SHARD_COUNT}; it has {known}: --split")


def _shard_count(path: Path) -> int:
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[1-9]\d*", text):
        raise UserError(f"{path} holds {text[:40]!r} and no number of shards")
    return int(text)


def _kind(root: Path) -> str:
    path = root / KIND
    if not path.is_file():
        return CLASSIFICATION
    kind = path.read_text(encoding="utf-8", errors="replace").strip().lower()
    if kind not in KINDS:
        raise UserError(f"{path} holds {kind[:40]!r}, which is none of {', '.join(KINDS)}")
    return kind


def describe_source(
    given: Mapping[str, Any], *, split: str, train_split: str, val_split: str
) -> dict[str, Any]:
    """Return fields of `spec.EvalSpec` with what the data's own folder, file or name adds.

    Args:
      given: the fields that the user gives, `data` among them; they win.
      split: of the data that is scored; train_split, val_split: of data to learn from. Without a
        `val_split`, C is not chosen on a split of its own.

    Raises:
      UserError: a data set has no such split, or a file of it is damaged.
    """
    if is_choice_file(given["data"]):
        name = Path(split_options(given["data"])[0]).stem
        known = known_dataset(f"sugar_crepe/{name}")
        return {"dataset": known.name if known else name, "tasks": (CHOICE,), **given}
    folder = find_benchmark_folder(given["data"], split)
    if folder is None:
        return dict(given)
    known = known_dataset(given.get("dataset", "") or folder.name)
    is_retrieval = folder.kind == RETRIEVAL_KIND
    added: dict[str, Any] = {"tasks": (RETRIEVAL if is_retrieval else ZERO_SHOT,)}
    added["dataset"] = known.name if known else folder.name
    tasks = given.get("tasks") or added["tasks"]
    if ZERO_SHOT in tasks:
        added |= _class_fields(folder, added["dataset"])
        added["scoring"] = (
            MULTILABEL if folder.kind == MULTILABEL else known.scoring if known else ""
        )
    sources = {"data": folder.data}
    if set(tasks) & set(TRAINED_TASKS):
        defaults = {"train_data": str(folder.root)}
        defaults |= {"val_data": str(folder.root)} if val_split else {}
        splits = {"train_data": train_split, "val_data": val_split or "val"}
        for field, pattern in (defaults | dict(given)).items():
            if field in splits and (found := find_benchmark_folder(pattern, splits[field])):
                sources[field] = found.data
    return added | dict(given) | sources


def _class_fields(folder: BenchmarkFolder, dataset: str) -> dict[str, Any]:
    """Return the class names and prompts of a folder, or else those shipped for its name.

    Prompts that are not shipped are ImageNet's, as in CLIP_benchmark.
    """
    short = dataset.rpartition("/")[2]
    names = folder.file(CLASS_NAMES) or (short if short in shipped_class_names() else "")
    prompts = folder.file(TEMPLATES) or (short if short in shipped_templates() else "imagenet1k")
    fields = {"templates": load_templates(prompts)}
    return fields | ({"classnames": names} if names else {})
