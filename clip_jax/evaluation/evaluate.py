"""One pass over an evaluation set: zero-shot classification, retrieval, examples to look at."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from clip_jax.errors import UserError
from clip_jax.evaluation.features import EncodeImage, EncodeText, encode_padded, unit_rows
from clip_jax.evaluation.retrieval import retrieval_metrics
from clip_jax.evaluation.zero_shot import class_embeddings, top_classes, zero_shot_metrics
from clip_jax.typing import Tokenizer

ZERO_SHOT, RETRIEVAL = "zeroshot_classification", "zeroshot_retrieval"


def evaluate(
    encode_image: EncodeImage,
    encode_text: EncodeText,
    tokenizer: Tokenizer,
    batches: Iterable[Mapping[str, Any]],
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    dataset: str,
    model: str,
    pretrained: str = "",
    language: str = "en",
    context_length: int = 77,
    text_batch_size: int = 256,
    logit_scale: float = 100.0,
    num_examples: int = 24,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores an encoder on batches of images; rows with `ok` False count nowhere.

    Args:
      encode_image: uint8 [b, H, W, 3] -> [b, D]; encode_text: int32 [b, L] -> [b, D].
      batches: dicts with `image` uint8 [b, H, W, 3] and `ok` bool [b]; for classification `label`
        int32 [b], the index into `class_names` (-1: unknown, left out); for retrieval `captions`,
        a list of texts a row, or `text` int32 [b, L] with `caption_id` [b].
      class_names: empty leaves classification out.
      dataset, model, pretrained, language: go into the results as they are.
      logit_scale: the scale itself, not its logarithm; for the examples' probabilities alone.
      num_examples: images drawn evenly from all classified ones, the same on every run.

    Returns:
      "results": one dict a task, in CLIP_benchmark's form: dataset, model, pretrained, language,
        task ("zeroshot_classification" or "zeroshot_retrieval") and metrics. A task the batches
        have nothing for is absent.
      "examples": `images`, `truths` and `guesses`, as `pictures.prediction_grid` takes them.

    Raises UserError when a label is no class, when features are not finite, or when no image
    could be used.
    """
    zero_shot = _ZeroShot(class_names, logit_scale, num_examples)
    if class_names:
        zero_shot.class_MD = class_embeddings(
            encode_text,
            tokenizer,
            class_names,
            templates,
            batch_size=text_batch_size,
            context_length=context_length,
        )
    retrieval = _Retrieval()
    num_images = 0
    steps = getattr(batches, "num_steps", None)
    # A bar redrawn often is noise in a log file.
    pace = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(
        batches,
        f"evaluate {dataset}",
        steps,
        unit="batch",
        mininterval=pace,
        disable=not progress,
    )
    for batch in bar:
        ok_B = np.asarray(batch["ok"], bool)
        num_images += int(ok_B.sum())
        # Bad rows stay until they are counted out, so that every batch has one shape.
        z_image_BD = unit_rows(np.where(ok_B[:, None], np.asarray(encode_image(batch["image"])), 0))
        if class_names:
            zero_shot.add(z_image_BD, batch["image"], np.where(ok_B, batch["label"], -1))
        tokens_BL, captions, rows = _texts(batch, tokenizer, context_length)
        if captions:
            z_text_BD = encode_padded(encode_text, tokens_BL, text_batch_size)
            retrieval.add(z_image_BD, z_text_BD, captions, rows)
    if not num_images:
        raise UserError(f"{dataset} has no image that could be read: nothing to evaluate")
    about = {"dataset": dataset, "model": model, "pretrained": pretrained, "language": language}
    metrics = {ZERO_SHOT: zero_shot.metrics(), RETRIEVAL: retrieval.metrics()}
    results = [about | {"task": task, "metrics": m} for task, m in metrics.items() if m]
    return {"results": results, "examples": zero_shot.examples()}


def _texts(
    batch: Mapping[str, Any], tokenizer: Tokenizer, context_length: int
) -> tuple[np.ndarray, list[Any], list[int]]:
    """Tokens of the usable rows' texts, what they say, and the row of each."""
    rows = np.flatnonzero(batch["ok"]).tolist()
    if "captions" in batch:
        pairs = [(row, text) for row in rows for text in batch["captions"][row]]
        captions = [text for _, text in pairs]
        return tokenizer(captions, context_length), captions, [row for row, _ in pairs]
    if "text" in batch:
        return batch["text"][rows], batch["caption_id"][rows].tolist(), rows
    return np.empty((0, context_length), np.int32), [], []


class _ZeroShot:
    """The classification of every image so far: its best classes and label, never its logits."""

    def __init__(self, class_names: Sequence[str], logit_scale: float, num_examples: int):
        self.class_MD: np.ndarray | None = None
        self._names = class_names
        self._scale = logit_scale
        self._top: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._num_examples = num_examples
        self._examples: list[tuple[np.ndarray, str, list[tuple[str, float]]]] = []
        self._seen = 0
        self._rng = np.random.default_rng(0)

    def add(self, z_image_BD: np.ndarray, images_BHWC: np.ndarray, labels_B: np.ndarray) -> None:
        if len(labels_B) and labels_B.max() >= len(self._names):
            raise UserError(
                f"label {labels_B.max()} is no class: there are {len(self._names)} class names, "
                f"so labels go up to {len(self._names) - 1}"
            )
        known_B = labels_B >= 0
        if not known_B.any():
            return
        k = min(5, len(self._names))
        top, shares = top_classes(z_image_BD, self.class_MD, self._scale, k=k)
        top_Bk, shares_Bk = np.asarray(top)[known_B], np.asarray(shares)[known_B]
        self._top.append(top_Bk)
        self._labels.append(labels_B[known_B])
        rows = zip(images_BHWC[known_B], labels_B[known_B], top_Bk, shares_Bk, strict=True)
        for image_HWC, label, top_k, shares_k in rows:
            guesses = [(self._names[m], float(p)) for m, p in zip(top_k, shares_k, strict=True)]
            self._draw((image_HWC, self._names[label], guesses))

    def _draw(self, example: tuple) -> None:
        """Reservoir sampling: every image so far has the same chance to be an example."""
        self._seen += 1
        if len(self._examples) < self._num_examples:
            self._examples.append(example)
        elif (place := self._rng.integers(self._seen)) < self._num_examples:
            self._examples[place] = example

    def metrics(self) -> dict[str, float]:
        if not self._labels:
            return {}
        top_Bk, labels_B = np.concatenate(self._top), np.concatenate(self._labels)
        return zero_shot_metrics(top_Bk, labels_B, num_classes=len(self._names))

    def examples(self) -> dict[str, list]:
        images, truths, guesses = zip(*self._examples, strict=True) if self._examples else [()] * 3
        return {"images": list(images), "truths": list(truths), "guesses": list(guesses)}


class _Retrieval:
    """Unit features of every image that has a text, and of all texts."""

    def __init__(self) -> None:
        self._z_image: list[np.ndarray] = []
        self._z_text: list[np.ndarray] = []
        self._captions: list[Any] = []
        self._image_of_text: list[np.ndarray] = []
        self._num_images = 0

    def add(
        self, z_image_BD: np.ndarray, z_text_BD: np.ndarray, captions: list, rows: list[int]
    ) -> None:
        # Images without a text take no part; the others are numbered in order.
        kept, image_of_text = np.unique(rows, return_inverse=True)
        self._z_image.append(z_image_BD[kept])
        self._z_text.append(z_text_BD)
        self._captions += captions
        self._image_of_text.append(image_of_text + self._num_images)
        self._num_images += len(kept)

    def metrics(self) -> dict[str, float]:
        if not self._num_images:
            return {}
        return retrieval_metrics(
            np.concatenate(self._z_image),
            np.concatenate(self._z_text),
            np.concatenate(self._image_of_text),
            captions=self._captions,
        )
