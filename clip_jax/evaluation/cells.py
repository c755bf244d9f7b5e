"""Evaluate many models on many data sets: a folder a cell, which is not computed again.

A cell's `cell.json` appears last and says what was evaluated on what: the model and its files, the
data and its files, and the whole spec. Where all of these are the same, its results are taken.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_jax.data.formats.options import split_options
from clip_jax.data.sources import expand
from clip_jax.errors import UserError, located
from clip_jax.evaluation.benchmark_folder import describe_source, shipped_fields
from clip_jax.evaluation.caption_choice import is_choice_file
from clip_jax.evaluation.datasets import COLLECTIONS, MAIN_METRICS, expand_names, known_dataset
from clip_jax.evaluation.encoders import Encoders
from clip_jax.evaluation.multilabel import MEAN_AVERAGE_PRECISION
from clip_jax.evaluation.results import RESULTS
from clip_jax.evaluation.run import FEATURES, run_evaluation, source_class_names
from clip_jax.evaluation.spec import EvalSpec
from clip_jax.evaluation.tasks import MULTILABEL, ZERO_SHOT
from clip_jax.files import absolute_model, atomic_write
from clip_jax.pretrained.work_folder import CHECKPOINT_DIRNAME
from clip_jax.sections import EvalSection

CELL_FILENAME = "cell.json"
VERSION = 1
"""Of the figures: one that computes them another way has another number."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model on one data set.

    Attributes:
      model: as `clip_jax.load` takes it.
      label: the model's name in the table.
      dataset: the data set's name in the table.
      spec: what is evaluated.
      folder: where its files are.
      dtype: of the model's products.
    """

    model: str
    label: str
    dataset: str
    spec: EvalSpec
    folder: Path
    dtype: str = "float32"

    @property
    def metric(self) -> str:
        """The figure that stands for the cell in the table."""
        known = known_dataset(self.dataset)
        task = self.spec.tasks[0]
        if known is not None and known.task == task:
            return known.metric
        return MEAN_AVERAGE_PRECISION if self.spec.scoring == MULTILABEL else MAIN_METRICS[task]

    def key(self) -> dict[str, Any]:
        """Return what the cell's results depend on.

        Raises:
          UserError: a file of the data is not there.
        """
        return {
            "version": VERSION,
            "dtype": self.dtype,
            "model": absolute_model(self.model),
            "weights": files_stamp(_weight_files(Path(self.model))),
            "data": files_stamp(_data_files(self.spec)),
            "spec": json.loads(json.dumps(self.spec.to_json())),
        }

    def results(self) -> list[dict[str, Any]] | None:
        """Return the cell's results; None where it is not done, or done with something else."""
        try:
            done = json.loads((self.folder / CELL_FILENAME).read_text(encoding="utf-8"))
            return done["results"] if done["key"] == self.key() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def slug(text: str) -> str:
    """Return a text as one part of a path.

    >>> slug("vtab/dtd"), slug("ViT-B-32:openai")
    ('vtab-dtd', 'ViT-B-32_openai')
    """
    return re.sub(r"[^\w.+-]+", "_", text.strip("/").replace("/", "-")) or "_"


def named_sources(items: Sequence[str], root: str, split: str) -> dict[str, str]:
    """Return the source of each data set, by its name in the table.

    Args:
      items: sources, names of data sets or of collections, and text files with one of these a line.
      root: where a data set of a name lies: `{dataset}` is the name and `{dataset_cleaned}` the
        name with "-" for "/", as CLIP_benchmark has it.
      split: for names of folders.

    Raises:
      UserError: a name comes without a root, or two data sets have one name.
    """
    sources: dict[str, str] = {}
    for item in expand_names(list(_lines(items))):
        if _is_source(item):
            name = describe_source(
                {"data": item}, split=split, train_split="train", val_split=""
            ).get("dataset") or _stem(item)
            source = item
        elif not root or "{" not in root:
            names = ", ".join(COLLECTIONS)
            raise UserError(
                f"--dataset {item} is no file and no folder; for a name give --dataset-root, such "
                f"as '/data/wds_{{dataset_cleaned}}_test' (collections are {names})"
            )
        else:
            known = known_dataset(item)
            name = known.name if known else item.removeprefix("wds/")
            source = _located(root, name)
        if sources.get(name, source) != source:
            raise UserError(f"{sources[name]} and {source} are both called {name}: rename a folder")
        sources[name] = source
    if not sources:
        raise UserError("--dataset names nothing")
    return sources


def _lines(items: Iterable[str]) -> Iterable[str]:
    """Yield the items, and the lines of those that are text files."""
    for item in items:
        if item.endswith(".txt") and os.path.isfile(item):
            lines = Path(item).read_text(encoding="utf-8").splitlines()
            yield from (line.strip() for line in lines if line.strip())
        else:
            yield item


def _is_source(item: str) -> bool:
    path = os.path.expanduser(split_options(item)[0])
    return os.path.exists(path) or bool(re.search(r"::|[*{]|^\w+:", item))


def _stem(source: str) -> str:
    """Return the name of a source that says none: that of its folder or file."""
    path = Path(split_options(source)[0])
    return path.parent.name if re.search(r"[*{]", path.name) else path.stem


def _located(root: str, name: str) -> str:
    """Return where the data set of a name lies, the file of its examples if it has one."""
    path = root.replace("{dataset_cleaned}", name.replace("/", "-")).replace("{dataset}", name)
    last = name.rpartition("/")[2]
    candidates = [f"{path}.json", f"{path}.jsonl", *(
        os.path.join(path, file) for file in (f"{last}.json", f"{last}.jsonl", "examples.jsonl")
    )]  # fmt: skip
    return next((file for file in candidates if is_choice_file(file)), path)


def make_spec(
    source: str,
    *,
    dataset: str,
    tasks: Sequence[str],
    pretrained: str,
    batch_size: int,
    confuse_equal_captions: bool,
    split: str,
    train_split: str,
    val_split: str,
) -> EvalSpec:
    """Return what a cell evaluates; a source in no known layout is one of labeled images.

    Raises:
      UserError: the source is not there, or is damaged.
    """
    given: dict[str, Any] = {"data": source} | ({"tasks": tuple(tasks)} if tasks else {})
    fields = describe_source(given, split=split, train_split=train_split, val_split=val_split)
    fields["dataset"] = dataset
    if not is_choice_file(fields["data"]):
        expand(fields["data"])  # raises
    known = known_dataset(dataset)
    fields.setdefault("tasks", (known.task if known else ZERO_SHOT,))
    if known and ZERO_SHOT in fields["tasks"] and "templates" not in fields:
        # A source without files of its own for them, such as tfds: or a folder of classes.
        has_names = bool(source_class_names(fields["data"]))
        fields |= shipped_fields(dataset, has_names=has_names)
    fields |= {"batch_size": batch_size, "pretrained": pretrained}
    fields["confuse_equal_captions"] = confuse_equal_captions
    return EvalSpec.from_section(EvalSection(), **fields)


def files_stamp(paths: Iterable[Path]) -> str:
    """Return a hash of files' names, sizes and times; of none, the empty text."""
    found = []
    for path in paths:
        status = path.stat()
        found.append([str(path), status.st_size, status.st_mtime_ns])
    text = json.dumps(sorted(found))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest() if found else ""


def _weight_files(model: Path) -> list[Path]:
    """Return the files that hold a local model's weights, or may hold them."""
    if not model.exists():
        return []
    if model.is_file():
        return [model]
    checkpoints = model / CHECKPOINT_DIRNAME
    if checkpoints.is_dir():
        return [path for path in checkpoints.rglob("*") if path.is_file()]
    endings = (".safetensors", ".bin", ".pt", ".npz", ".msgpack", ".json", ".model")
    return [path for path in model.iterdir() if path.name.endswith(endings)]


def _data_files(spec: EvalSpec) -> list[Path]:
    """Return the local files that a spec reads; of a folder of images, the folder."""
    files = [Path(spec.classnames)] if os.path.isfile(spec.classnames) else []
    for pattern in (spec.data, spec.train_data, spec.val_data):
        if pattern and is_choice_file(pattern):
            files.append(Path(split_options(pattern)[0]))
        elif pattern:
            files += [Path(split_options(name)[0]) for name in expand(pattern)]
    return [file for file in files if file.exists()]


def run_cell(encoders: Encoders, cell: Cell, *, keep_features: bool) -> list[dict[str, Any]]:
    """Evaluate a cell and return its results, which are in its folder then.

    A cell that was killed goes on at the features that it has.

    Raises:
      UserError: its data or names are missing or do not fit each other.
    """
    key = cell.key()
    with located(cell.dataset):
        evaluation = run_evaluation(encoders, cell.spec, folder=cell.folder, draw=False)
    results = json.loads((cell.folder / RESULTS).read_text(encoding="utf-8"))["results"]
    done: Mapping[str, Any] = {"key": key, "results": results, "seconds": evaluation.seconds}
    with atomic_write(cell.folder / CELL_FILENAME) as partial:
        partial.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if not keep_features:
        shutil.rmtree(cell.folder / FEATURES, ignore_errors=True)
    return results
