"""Choose between captions, and between images: SugarCrepe, Winoground and WinoGAViL.

An example has a few images and a few captions. Three layouts are read:

* SugarCrepe's (arXiv:2306.14610): a JSON object of {"filename", "caption", "negative_caption"}, the
  images in `val2017/` beside it;
* Winoground's (arXiv:2204.03162): a line of JSON an example, {"image_0", "image_1", "caption_0",
  "caption_1"}, the images in `images/` beside it;
* WinoGAViL's (arXiv:2207.12576): a line of JSON an example, {"cue", "candidates", "associations"}.

The image's file is looked for by its name, with `.png`, `.jpg` or `.jpeg` if it has no ending.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from clip_jax.data.formats.file_shard import FileShard
from clip_jax.data.formats.options import split_options
from clip_jax.data.formats.remote import read_whole
from clip_jax.data.shards import MAX_IMAGE_BYTES, BadSampleError, Handles
from clip_jax.errors import UserError

CHOICE = "image_caption_selection"
MAX_FILE_BYTES = 1 << 30
_FOLDERS = ("val2017", "images", "")
_ENDINGS = ("", ".png", ".jpg", ".jpeg")


@dataclasses.dataclass(frozen=True)
class Example:
    """Images and captions to be matched, as positions in the lists of all.

    Attributes:
      right: for WinoGAViL, whether each image belongs to the one caption; else empty, and the i-th
        image belongs to the i-th caption.
    """

    images: tuple[int, ...]
    captions: tuple[int, ...]
    right: tuple[bool, ...] = ()


class ChoiceSet(FileShard):
    """The examples of a file; as a shard, its images, each once and without a caption.

    Attributes:
      files: the images' paths.
      captions_of_all: every caption, each once.
      examples: in the file's order.
    """

    def __init__(self, path: str, files: Sequence[str], captions: Sequence[str], examples: Any):
        super().__init__(path, os.path.getsize(path))
        self.files, self.captions_of_all = list(files), list(captions)
        self.examples: list[Example] = list(examples)

    def __len__(self) -> int:
        return len(self.files)

    def key(self, i: int) -> str:
        """Return the image's file name."""
        return os.path.basename(self.files[i])

    def image(self, i: int, handles: Handles) -> bytes:
        return read_whole(self.files[i], MAX_IMAGE_BYTES)

    def captions(self, i: int, handles: Handles) -> list[str]:
        raise BadSampleError("no_caption")

    def label(self, i: int, handles: Handles) -> int:
        return -1

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        return {}


def is_choice_file(source: str) -> bool:
    """Return whether a source is one file of examples in one of the layouts."""
    path = os.path.expanduser(split_options(source)[0])
    if not path.endswith((".json", ".jsonl")) or not os.path.isfile(path):
        return False
    try:
        records = _records(path, first=True)
    except UserError:
        return False
    return bool(records) and _parse(records[0]) is not None


def open_choices(source: str) -> ChoiceSet:
    """Open a file of examples; `#root=FOLDER` says where its images are.

    Raises:
      UserError: it cannot be read, has another layout, or an image is not there.
    """
    path, options = split_options(source)
    path = os.path.expanduser(path)
    folder = os.path.dirname(path)
    roots = [options.root] if options.root else [os.path.join(folder, name) for name in _FOLDERS]
    images: dict[str, int] = {}
    captions: dict[str, int] = {}
    examples, files = [], []
    for number, record in enumerate(_records(path)):
        parsed = _parse(record)
        if parsed is None:
            raise UserError(f"{path}: example {number} is of no known layout: {str(record)[:80]}")
        names, texts, right = parsed
        for name in names:
            if name not in images:
                images[name] = len(images)
                files.append(_find(name, roots))
        for text in texts:
            captions.setdefault(text, len(captions))
        ids = (tuple(images[n] for n in names), tuple(captions[t] for t in texts))
        examples.append(Example(*ids, right))
    missing = [name for name, file in zip(images, files, strict=True) if not file]
    if missing or not examples:
        what = f"{len(missing)} of {len(files)} images, the first {missing[0]}," if missing else ""
        raise UserError(
            f"{path}: {what} not found in {' or '.join(roots)}; name their folder, as in "
            f"{path}#root=FOLDER"
            if missing
            else f"{path} holds no example"
        )
    return ChoiceSet(path, files, list(captions), examples)


def _find(name: str, roots: Sequence[str]) -> str:
    """Return the path of an image; empty where it is in none of the folders."""
    for root in roots:
        for ending in _ENDINGS:
            path = os.path.join(root, name + ending)
            if os.path.isfile(path):
                return path
    return ""


def _records(path: str, *, first: bool = False) -> list[Any]:
    """Return the examples of a JSON object, a JSON list, or lines; `first` needs but one."""
    try:
        if path.endswith(".jsonl"):
            with open(path, encoding="utf-8") as file:
                lines = (line for line in file if line.strip())
                return [json.loads(s) for s in itertools.islice(lines, 1 if first else None)]
        value = json.loads(Path(path).read_bytes())
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON: {e}") from None
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else [value]


_Parsed = tuple[list[str], list[str], tuple[bool, ...]]


def _parse(record: Any) -> _Parsed | None:
    """Return the images, the captions and which images are right; None for another layout."""
    if not isinstance(record, Mapping):
        return None
    if {"filename", "caption", "negative_caption"} <= set(record):
        images, captions = [record["filename"]], [record["caption"], record["negative_caption"]]
        return (images, captions, ()) if _are_texts(images, captions) else None
    if {"image_0", "image_1", "caption_0", "caption_1"} <= set(record):
        images = [record["image_0"], record["image_1"]]
        captions = [record["caption_0"], record["caption_1"]]
        return (images, captions, ()) if _are_texts(images, captions) else None
    if {"cue", "candidates", "associations"} <= set(record):
        images, right = record["candidates"], record["associations"]
        if isinstance(images, list) and isinstance(right, list) and set(right) & set(images):
            cue = str(record["cue"]).lower()
            captions = [f"{'An' if cue[:1] in set('aeiou') else 'A'} {cue}"]
            return images, captions, tuple(image in right for image in images)
    return None


def _are_texts(*lists: Sequence[Any]) -> bool:
    return all(isinstance(item, str) and item for items in lists for item in items)


def choice_metrics(
    choices: ChoiceSet,
    z_image_BD: Float32[np.ndarray, "B D"],
    row_B: np.ndarray,
    z_text_BD: Float32[np.ndarray, "texts D"],
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the figures, and each example's own.

    Args:
      z_image_BD: unit features of the images that could be read, whose numbers are `row_B`;
        examples with another are left out.
      z_text_BD: unit features of all captions.
    """
    position = {row: i for i, row in enumerate(row_B.tolist())}
    examples = [e for e in choices.examples if all(i in position for i in e.images)]
    if not examples:
        raise UserError(f"{choices.path}: no example whose images can be read")
    scores = [
        z_image_BD[[position[i] for i in e.images]] @ z_text_BD[list(e.captions)].T
        for e in examples
    ]
    if examples[0].right:
        return _association_metrics(examples, scores)
    return _matching_metrics(scores)


def _matching_metrics(
    scores: Sequence[np.ndarray],
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return CLIP_benchmark's three figures, which are Winoground's image, text and group score.

    The first of equal scores is chosen.
    """
    image_right, text_right = [], []
    for score_IT in scores:
        first = np.arange(min(score_IT.shape))
        text_right.append((score_IT.argmax(axis=1)[: len(first)] == first).all())
        image_right.append((score_IT.argmax(axis=0)[: len(first)] == first).all())
    image, text = np.array(image_right, np.float64), np.array(text_right, np.float64)
    right = {"image_acc": image, "text_acc": text, "acc": image * text}
    return {name: float(values.mean()) for name, values in right.items()}, right


def _association_metrics(
    examples: Sequence[Example], scores: Sequence[np.ndarray]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Return the Jaccard index of the nearest images and the right ones, by candidates' number."""
    shares = []
    for example, score_I1 in zip(examples, scores, strict=True):
        right = np.array(example.right)
        guess = np.zeros(len(right), bool)
        guess[np.argsort(score_I1[:, 0])[-right.sum() :]] = True
        shares.append(int(np.sum(right & guess)) / int(np.sum(right | guess)))
    share_E = np.array(shares)
    count_E = np.array([len(example.images) for example in examples])
    groups = {"avg_jaccard_score": count_E > 0}
    groups |= {f"jaccard_score_{n}": count_E == n for n in (5, 6, 10, 12)}
    groups |= {"jaccard_score_5-6": count_E <= 6, "jaccard_score_10-12": count_E >= 10}
    metrics = {name: float(share_E[g].mean()) if g.any() else float("nan")
               for name, g in groups.items()}  # fmt: skip
    return metrics, {"avg_jaccard_score": share_E}
