"""The shapes of a run, whose programs are compiled before they are needed."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.data.loader import bucket_lengths
from clip_jax.models.projection import without_projections
from clip_jax.parallel.mesh import BATCH_AXES, batch_shards
from clip_jax.training.batch_feed import packed_shapes, trimmed_batch_shapes
from clip_jax.training.distillation import teacher_shapes
from clip_jax.training.programs import ShapedPrograms
from clip_jax.training.setup import RunComponents


def compiles_ahead(run: RunComponents) -> bool:
    """Return whether `config.train.compile_ahead` asks for programs before they are needed."""
    choice = run.config.train.compile_ahead
    return choice == "all" or (choice == "auto" and run.model.target.platform != "cpu")


def caption_lengths(run: RunComponents) -> list[int]:
    """Return the lengths that a run's captions may be trimmed to, the longest first.

    In a large batch some caption is always among the longest.
    """
    text = run.model.config.text
    lengths = bucket_lengths(text.context_length) if text.supports_trimming else []
    return sorted(lengths or [text.context_length], reverse=True)


def prepare_step(run: RunComponents, step: ShapedPrograms) -> None:
    """Compile the step for every length of captions; for packed ones and the full length alone."""
    size, packing, lengths = run.config.train.batch_size, run.caption_packing, caption_lengths(run)
    infos = () if run.distiller is None else run.distiller.infos
    teachers = teacher_shapes(infos, run.mesh, size)
    if packing is not None:
        batch = trimmed_batch_shapes(run.mesh, run.model.config, size, lengths[0], negatives=False)
        batch = packed_shapes(batch, packing) | teachers
        step.prepare("the step for packed captions", run.shapes, batch)
        lengths = lengths[:1]
    for length in lengths:
        negatives = bool(run.config.data.negatives)
        batch = trimmed_batch_shapes(run.mesh, run.model.config, size, length, negatives=negatives)
        step.prepare(f"the step for captions of {length} tokens", run.shapes, batch | teachers)


def prepare_encoders(
    run: RunComponents, encode_image: ShapedPrograms, encode_text: ShapedPrograms
) -> None:
    """Compile the encoders of the evaluations during the run for their whole batches."""
    sharding = NamedSharding(run.mesh, P(BATCH_AXES))
    # As many rows as devices share equally.
    rows = -(-run.config.eval.batch_size // batch_shards(run.mesh)) * batch_shards(run.mesh)
    side = run.model.config.vision.image_size

    def shape(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *dims), dtype, sharding=sharding)

    params = without_projections(run.shapes.params)
    variables = {"params": params, "batch_stats": run.shapes.batch_stats}
    variables = run.shapes.ema or variables
    encode_image.prepare("images of an evaluation", variables, shape((side, side, 3), np.uint8))
    for length in caption_lengths(run):
        name = f"captions of an evaluation, {length} tokens"
        encode_text.prepare(name, variables, shape((length,), np.int32))
