"""Evaluate batches in memory as `evaluation.run` does those of a loader."""

import dataclasses
from typing import Any

from clip_jax.evaluation.encoders import Encoders
from clip_jax.evaluation.feature_store import encode_classes, encode_dataset
from clip_jax.evaluation.results import Examples, draw_examples, result_rows
from clip_jax.evaluation.spec import EvalSpec
from clip_jax.evaluation.tasks import ZERO_SHOT, TaskInputs, run_tasks
from clip_jax.sections import EvalSection

SPEC = EvalSpec.from_section(EvalSection())


@dataclasses.dataclass(frozen=True)
class EvaluatedBatches:
    results: list[dict[str, Any]]
    examples: Examples | None

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        return {result["task"]: result["metrics"] for result in self.results}


def evaluate_batches(
    encoders: Encoders, batches, class_names, templates, *, num_examples: int = 24
) -> EvaluatedBatches:
    """Evaluate by the default tasks; without class names by retrieval alone."""
    size = SPEC.batch_size
    class_MD = encode_classes(encoders, class_names, templates, size, None) if class_names else None
    features = encode_dataset(
        encoders, lambda start: batches, batch_size=size, batches_per_part=32, folder=None,
        title="toy", progress=False,
    )  # fmt: skip
    inputs = TaskInputs(
        spec=SPEC, test=features, scale=encoders.scale, class_names=class_names, class_MD=class_MD
    )
    task_results = run_tasks(inputs)
    results = result_rows(
        task_results, dataset="toy", model="toy", pretrained="", images=len(features)
    )
    zero_shot = task_results[ZERO_SHOT]
    predictions = zero_shot[0].predictions if zero_shot else None
    examples = draw_examples(predictions, inputs, num_examples) if predictions else None
    return EvaluatedBatches(results, examples)
