"""Evaluate while a run trains: the same tasks on parameters that change."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from clip_jax.data.images import Preprocess
from clip_jax.errors import UserError
from clip_jax.evaluation.encoders import mesh_encoders
from clip_jax.evaluation.run import class_names, make_task_inputs, open_eval_sources
from clip_jax.evaluation.spec import EvalSpec
from clip_jax.evaluation.tasks import ZERO_SHOT, TaskResult, run_tasks
from clip_jax.models.clip import CLIPConfig
from clip_jax.typing import Tokenizer

# {"params": ..., "batch_stats": ...}
Variables = Mapping[str, Any]
# (variables, rows) -> features, jitted: `training.step.make_encoders` makes both.
EncodeWith = Callable[[Variables, Any], Any]
Evaluator = Callable[[Variables], dict[str, float]]

WITHOUT_NAMES = (
    "config.eval.classnames names no file; name one, or leave zeroshot_classification out of "
    "config.eval.tasks"
)


def logit_factor(variables: Variables) -> float:
    """Return exp(logit_scale) of a model's variables, which multiplies cosines to give logits."""
    return math.exp(float(variables["params"]["logit_scale"]))


def make_evaluator(
    encode_image: EncodeWith,
    encode_text: EncodeWith,
    spec: EvalSpec,
    mesh: Mesh,
    *,
    config: CLIPConfig,
    tokenizer: Tokenizer,
    preprocess: Preprocess,
    scale: Callable[[Variables], float] = logit_factor,
    without_names: str = WITHOUT_NAMES,
) -> Evaluator:
    """Make a function of the variables that returns the metrics; the data is opened here, once.

    The encoders take the variables as an argument, so every call runs the programs that the
    first one compiled, and the training step is not touched. Nothing is stored. With several
    processes all of them call it.

    Args:
      config, tokenizer, preprocess: of the model, as `encoders.mesh_encoders` takes them.
      scale: returns what multiplies cosines to give logits.
      without_names: what is said of data without class names, as this command's options have it.

    Raises:
      UserError: a task does not exist or lacks its data, a source cannot be read, or classes have
        no names.
    """
    sources = open_eval_sources(spec)
    if ZERO_SHOT in spec.tasks and not class_names(spec, sources):
        raise UserError(f"{spec.data} has no class names of its own and {without_names}")

    def evaluate(variables: Variables) -> dict[str, float]:
        encoders = mesh_encoders(
            lambda rows: encode_image(variables, rows),
            lambda rows: encode_text(variables, rows),
            mesh,
            config=config,
            tokenizer=tokenizer,
            preprocess=preprocess,
            scale=scale(variables),
        )
        inputs = make_task_inputs(encoders, spec, sources, None, progress=False)
        return named_metrics(run_tasks(inputs))

    return evaluate


def named_metrics(task_results: Mapping[str, Sequence[TaskResult]]) -> dict[str, float]:
    """Return every metric that is a number by its name; few-shot ones as "lp_acc1@4", by shots."""
    metrics: dict[str, float] = {}
    for results in task_results.values():
        for result in results:
            shots = result.metrics.get("fewshot_k", -1)
            suffix = f"@{shots:g}" if shots > 0 else ""
            metrics |= {n + suffix: v for n, v in result.metrics.items() if not np.isnan(v)}
    return metrics
