"""The shapes of a run, whose programs are compiled before they are needed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.data.loader import bucket_lengths
from clip_jax.models.clip import CLIP, CLIPConfig, variable_shapes
from clip_jax.models.projection import without_projections
from clip_jax.parallel.mesh import BATCH_AXES, batch_shards
from clip_jax.training.batch_feed import packed_shapes, trimmed_batch_shapes
from clip_jax.training.distillation import teacher_shapes
from clip_jax.training.programs import ShapedPrograms
from clip_jax.training.setup import RunComponents, draws_of_run
from clip_jax.training.step import make_encoders, make_features


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


def batches_of_run(run: RunComponents, size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Return the batches of `size` pairs that a step may get, without teachers' features.

    They are told by their captions: of every length, or packed and of the full length alone.
    """
    packing, lengths = run.caption_packing, caption_lengths(run)
    batches = {}
    if packing is not None:
        batch = trimmed_batch_shapes(run.mesh, run.model.config, size, lengths[0], negatives=False)
        batches["packed captions"] = packed_shapes(batch, packing)
        lengths = lengths[:1]
    for length in lengths:
        batches[f"captions of {length} tokens"] = trimmed_batch_shapes(
            run.mesh, run.model.config, size, length, negatives=bool(run.config.data.negatives)
        )
    return batches


def prepare_step(run: RunComponents, step: ShapedPrograms) -> None:
    """Compile the step for every batch that it may get."""
    size = run.config.train.batch_size
    infos = () if run.distiller is None else run.distiller.infos
    teachers = teacher_shapes(infos, run.mesh, size)
    for captions, batch in batches_of_run(run, size).items():
        step.prepare(f"the step for {captions}", run.shapes, batch | teachers)


def prepare_encoders(
    run: RunComponents, encode_image: ShapedPrograms, encode_text: ShapedPrograms
) -> None:
    """Compile the encoders of the evaluations during the run for their whole batches."""
    params = without_projections(run.shapes.params)
    variables = {"params": params, "batch_stats": run.shapes.batch_stats}
    variables = run.shapes.ema or variables
    images, captions = evaluation_shapes(run)
    encode_image.prepare("images of an evaluation", variables, images)
    for tokens in captions:
        name = f"captions of an evaluation, {tokens.shape[1]} tokens"
        encode_text.prepare(name, variables, tokens)


def evaluation_shapes(
    run: RunComponents,
) -> tuple[jax.ShapeDtypeStruct, list[jax.ShapeDtypeStruct]]:
    """Return the images, and captions of each length, that encoders get in whole batches."""
    sharding = NamedSharding(run.mesh, P(BATCH_AXES))
    # As many rows as devices share equally.
    rows = -(-run.config.eval.batch_size // batch_shards(run.mesh)) * batch_shards(run.mesh)
    side = run.model.config.vision.image_size

    def shape(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *dims), dtype, sharding=sharding)

    captions = [shape((length,), np.int32) for length in caption_lengths(run)]
    return shape((side, side, 3), np.uint8), captions


def trace_towers(run: RunComponents, model: CLIP) -> None:
    """Trace a model's towers as the run's steps and its evaluations compute them.

    All blocks of a stack are alike, so two of each are enough. Gradients are not traced: what they
    take is settled in the forward pass.
    """
    model = model.clone(config=_shallow(model.config))
    run = dataclasses.replace(run, model=model)
    variables = {"batch_stats": {}, **variable_shapes(model)}
    features = make_features(model, mesh=run.mesh, preprocess=run.preprocess, frozen=())
    draws, size = draws_of_run(run), run.config.train.microbatch_size or run.config.train.batch_size

    def towers(variables: Any, rows: Any) -> Any:
        rows = {**rows, **draws(jnp.zeros((), jnp.int32), size)}
        return features(variables["params"], variables["batch_stats"], rows)

    for batch in batches_of_run(run, size).values():
        jax.eval_shape(towers, variables, batch)
    if run.config.eval.data and run.config.eval.every:
        encode_image, encode_text = make_encoders(model, run.preprocess)
        images, captions = evaluation_shapes(run)
        jax.eval_shape(encode_image, variables, images)
        for tokens in captions:
            jax.eval_shape(encode_text, variables, tokens)


def _shallow(config: CLIPConfig) -> CLIPConfig:
    """Return a model with at most two blocks in each stack."""

    def cut(tower: Any) -> Any:
        layers = getattr(tower, "layers", None)
        return dataclasses.replace(tower, layers=min(layers, 2)) if type(layers) is int else tower

    return dataclasses.replace(config, vision=cut(config.vision), text=cut(config.text))
