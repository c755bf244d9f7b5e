"""From encoders and batches to results, in CLIP_benchmark's form."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.evaluation.encoders import EncodeImage, EncodeText
from clip_jax.evaluation.feature_store import collect
from clip_jax.evaluation.tasks import RETRIEVAL, TASKS, ZERO_SHOT, Subject, TaskResult
from clip_jax.evaluation.zero_shot import class_embeddings
from clip_jax.typing import Tokenizer


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
    tasks: Sequence[str] = (ZERO_SHOT, RETRIEVAL),
    context_length: int = 77,
    text_batch_size: int = 256,
    logit_scale: float = 100.0,
    num_examples: int = 24,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores an encoder on batches of images; rows with `valid` False count nowhere.

    Args:
      encode_image: uint8 [b, H, W, 3] -> [b, D]; encode_text: int32 [b, L] -> [b, D].
      batches: dicts with `image` uint8 [b, H, W, 3] and `valid` bool [b]; for classification
        `label` int32 [b], the index into `class_names` (-1: unknown, left out); for
        retrieval `captions`, a list of texts a row, or `text` int32 [b, L] with `caption_id` [b].
      class_names: empty leaves classification out.
      dataset, model, pretrained, language: go into the results as they are.
      logit_scale: the scale itself, not its logarithm; for probabilities alone.
      num_examples: images drawn evenly from all classified ones, the same on every run.

    Returns:
      "results": one dict a task, in CLIP_benchmark's form, see `result_rows`. A task the batches
        have nothing for is absent.
      "examples": `rows` (places in the data's order), `truths` and `guesses`.

    Raises UserError when a label is no class, when features are not finite, or when no image
    could be used.
    """
    class_MD = None
    if class_names:
        class_MD = class_embeddings(
            encode_text,
            tokenizer,
            class_names,
            templates,
            batch_size=text_batch_size,
            context_length=context_length,
        )
    features = collect(
        encode_image,
        encode_text,
        tokenizer,
        lambda start: batches,
        context_length=context_length,
        text_batch_size=text_batch_size,
        title=f"evaluate {dataset}",
        progress=progress,
    )
    subject = Subject(features, class_names, class_MD, logit_scale)
    about = {"dataset": dataset, "model": model, "pretrained": pretrained, "language": language}
    outcomes = {task: TASKS[task](subject) for task in tasks}
    return {
        "results": result_rows(outcomes, about, len(features)),
        "examples": draw_examples(outcomes, subject, num_examples),
    }


def result_rows(
    outcomes: Mapping[str, Sequence[TaskResult]], about: Mapping[str, str], images: int
) -> list[dict[str, Any]]:
    """A result a row: CLIP_benchmark's fields dataset, model, pretrained, language, task and
    metrics, and two of ours: intervals (95 %, of some metrics) and images."""
    return [
        {
            **about,
            "task": task,
            "metrics": outcome.metrics,
            "intervals": outcome.intervals,
            "images": images,
        }
        for task, found in outcomes.items()
        for outcome in found
    ]


def draw_examples(
    outcomes: Mapping[str, Sequence[TaskResult]], subject: Subject, count: int, *, seed: int = 0
) -> dict[str, list]:
    """Some classified images by their rows, with their names and five guesses each."""
    if not outcomes.get(ZERO_SHOT):
        return {"rows": [], "truths": [], "guesses": []}
    names, found = subject.class_names, outcomes[ZERO_SHOT][0].details
    total = len(found["rows"])
    drawn = np.sort(np.random.default_rng(seed).permutation(total)[:count])
    guesses = [
        [(names[m], float(p)) for m, p in zip(found["top"][i], found["shares"][i], strict=True)]
        for i in drawn
    ]
    rows = found["rows"][drawn]
    truths = [names[subject.test.label_B[row]] for row in rows]
    return {"rows": subject.test.row_B[rows].tolist(), "truths": truths, "guesses": guesses}
