"""Find data sets in CLIP_benchmark's webdataset layout.

A folder holds a folder for each split, with `nshards.txt` and `0.tar`, `1.tar`, ...; beside them
lie `classnames.txt`, `zeroshot_classification_templates.txt` and `dataset_type.txt` ("retrieval" or
"multilabel"; none is classification). In the tars, `.cls` is a class, `.npy` a row of zeros and
ones or the groups of an image, and `.txt` holds captions, one a line. The folder may be remote.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.data.formats.options import split_options
from clip_jax.data.formats.remote import RemoteError, answer_of, is_url, read_whole
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
MAX_BYTES = 1 << 24
"""Of the files beside the shards."""


@dataclass(frozen=True)
class BenchmarkFolder:
    """One split of a data set in the layout.

    Attributes:
      root: the folder of the whole data set, or its URL.
      split: the name of the split, a folder in it.
      shards: the number of its tar files.
      kind: one of `KINDS`.
    """

    root: str
    split: str
    shards: int
    kind: str

    @property
    def data(self) -> str:
        """The split's tars, as `data.sources.expand` takes them."""
        return f"{self.root}/{self.split}/{{0..{self.shards - 1}}}.tar"

    @property
    def name(self) -> str:
        """The data set's name: the folder's, without the `wds_` and `_test` of published ones."""
        name = re.sub(r"/resolve/[^/]+$", "", self.root).rpartition("/")[2]
        return re.sub(r"^wds_|_(test|train|val)$", "", name)

    def file(self, name: str) -> str:
        """Return the path of one of the files beside the splits; empty where it is not there."""
        path = f"{self.root}/{name}"
        return path if _read(path) is not None else ""


def find_benchmark_folder(pattern: str, split: str) -> BenchmarkFolder | None:
    """Return what a source names if it is a folder of the layout, else None.

    Args:
      pattern: the data set's folder or URL, or a split's; `{}` stands for the split. A page of
        Hugging Face's hub, .../datasets/OWNER/NAME/tree/REVISION, is read as the files behind it.
      split: the one that is read where the pattern names none.

    Raises:
      UserError: the data set has no such split, or a file beside the tars is damaged.
    """
    path = pattern.replace("{}", split).rstrip("/")
    if is_url(path):
        if re.search(r"::|[*{#]|\.\w{2,}$", path):
            return None  # shards by their own names
        path = re.sub(
            r"^(https://huggingface\.co/datasets/[^/]+/[^/]+)/tree/", r"\1/resolve/", path
        )
    else:
        path = os.path.abspath(os.path.expanduser(path))
        if not os.path.isdir(path):
            if "{}" in pattern and os.path.isdir(os.path.dirname(path)):
                raise _no_split(os.path.dirname(path), split)
            return None
    if (text := _read(f"{path}/{SHARD_COUNT}")) is not None:
        root, _, split = path.rpartition("/")
    elif (text := _read(f"{path}/{split}/{SHARD_COUNT}")) is not None:
        root = path
    elif _splits(path):
        raise _no_split(path, split)
    else:
        return None
    if not re.fullmatch(r"[1-9]\d*", text.strip()):
        raise UserError(f"{root}/{split}/{SHARD_COUNT} holds {text[:40]!r} and no number of shards")
    return BenchmarkFolder(root, split, int(text), _kind(root))


def _read(path: str) -> str | None:
    """Return a small file's text, local or remote; None where there is no such file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return read_whole(path, MAX_BYTES).decode("utf-8", "replace")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except RemoteError as e:
        if isinstance(e.__cause__, Exception) and answer_of(e.__cause__).kind == "missing":
            return None
        raise UserError(f"{path} cannot be read: {e}") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None


def _splits(root: str) -> list[str]:
    return (
        [] if is_url(root) else sorted(p.parent.name for p in Path(root).glob(f"*/{SHARD_COUNT}"))
    )


def _no_split(root: str, split: str) -> UserError:
    known = ", ".join(_splits(root)) or "none at all"
    return UserError(f"{root} has no split {split!r} with {SHARD_COUNT}; it has {known}: --split")


def _kind(root: str) -> str:
    text = _read(f"{root}/{KIND}")
    kind = CLASSIFICATION if text is None else text.strip().lower()
    if kind not in KINDS:
        raise UserError(f"{root}/{KIND} holds {kind[:40]!r}, which is none of {', '.join(KINDS)}")
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
        defaults = {"train_data": folder.root}
        defaults |= {"val_data": folder.root} if val_split else {}
        splits = {"train_data": train_split, "val_data": val_split or "val"}
        for field, pattern in (defaults | dict(given)).items():
            if field in splits and (found := find_benchmark_folder(pattern, splits[field])):
                sources[field] = found.data
    return added | dict(given) | sources


def _class_fields(folder: BenchmarkFolder, dataset: str) -> dict[str, Any]:
    """Return the class names and prompts of a folder, or else those shipped for its name."""
    fields = shipped_fields(dataset, has_names=False)
    names, prompts = folder.file(CLASS_NAMES), folder.file(TEMPLATES)
    fields |= {"classnames": names} if names else {}
    return fields | ({"templates": load_templates(prompts)} if prompts else {})


def shipped_fields(dataset: str, *, has_names: bool) -> dict[str, Any]:
    """Return the prompts shipped for a data set, and its class names unless it has its own.

    Prompts that are not shipped are ImageNet's, as in CLIP_benchmark.
    """
    short = dataset.rpartition("/")[2]
    prompts = load_templates(short if short in shipped_templates() else "imagenet1k")
    is_shipped = short in shipped_class_names() and not has_names
    return {"templates": prompts} | ({"classnames": short} if is_shipped else {})
