"""Evaluation while a run trains: the same tasks on parameters that change."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from clip_jax.evaluation.encoders import Encoders, image_encoder_over, text_encoder_over
from clip_jax.evaluation.run import EvalSpec, make_subject, open_request
from clip_jax.evaluation.tasks import TASKS

# (variables, rows) -> features, jitted: `step.make_encoders` makes both.
EncodeWith = Callable[[Mapping[str, Any], Any], Any]
Evaluator = Callable[[Mapping[str, Any]], dict[str, float]]


def make_evaluator(
    encode_image: EncodeWith,
    encode_text: EncodeWith,
    request: EvalSpec,
    mesh: Mesh,
    *,
    scale: Callable[[Mapping[str, Any]], float],
    trim_behind: int | None = None,
    **encoders: Any,
) -> Evaluator:
    """A function of the variables, {"params": ..., "batch_stats": ...}, that returns the metrics.

    The encoders take the variables as an argument, so every call runs the programs that the
    first one compiled, and the training step is not touched. Nothing is stored. With several
    processes all of them call it.

    Args:
      scale: the factor between cosines and logits, of the variables.
      trim_behind: see `features.text_encoder_over`.
      request: its data is indexed here, once.
      encoders: the other fields of `features.Encoders`: tokenizer, sizes, preprocess, shards.
    """
    sources = open_request(request)

    def evaluate(variables: Mapping[str, Any]) -> dict[str, float]:
        made = Encoders(
            image_encoder_over(lambda rows: encode_image(variables, rows), mesh),
            text_encoder_over(
                lambda rows: encode_text(variables, rows), mesh, trim_behind=trim_behind
            ),
            scale=scale(variables),
            **encoders,
        )
        subject = make_subject(made, request, sources, None, mesh, progress=False)
        return named_metrics({task: TASKS[task](subject) for task in request.tasks})

    return evaluate


def named_metrics(outcomes: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Every metric that is a number by its name; few-shot ones with their shots, "lp_acc1@4"."""
    found: dict[str, float] = {}
    for results in outcomes.values():
        for result in results:
            shots = result.metrics.get("fewshot_k", -1)
            ending = f"@{shots:g}" if shots > 0 else ""
            found |= {n + ending: v for n, v in result.metrics.items() if not np.isnan(v)}
    return found
