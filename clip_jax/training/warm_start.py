"""The weights a run starts from: any checkpoint that can be read, laid straight onto the mesh.

What belongs to weights travels with them: preprocessing, tokenizer, activation. The run says which
sizes it wants; positions are interpolated to its image size and context length, and everything
else has to match.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.lora import LORA
from clip_jax.models.naflex import NaFlexConfig
from clip_jax.models.projection import PROJECTIONS, Projections
from clip_jax.parallel.sharding import partition_spec
from clip_jax.pretrained.by_name import read_model
from clip_jax.pretrained.load import Checkpoint, tokenizer_family
from clip_jax.pretrained.resize import resize_checkpoint
from clip_jax.pretrained.trees import array_shapes, by_path, to_variables
from clip_jax.pretrained.work_folder import CHECKPOINT_DIRNAME
from clip_jax.sections import Config
from clip_jax.tokenizers import TokenizerSpec, make_tokenizer, tokenizer_from_file
from clip_jax.training.bucket_copy import local_copy
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.state import TrainState, make_state, state_mesh

Reader = Callable[[], Any]
"""Reads an array: numpy's from a file, jax's from a run."""

THREADS = min(8, os.cpu_count() or 1)
POSITIONS = re.compile(r"positional_embedding$")
COMPARED_FIELDS = ("vision.pool", "text.pool", "text.causal")
"""What the arrays' shapes do not tell, and a run must agree with its checkpoint about."""


@dataclasses.dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint that a run starts from.

    Attributes:
      path: its file, folder or name, as it was given.
      place: the same on this machine, also of one in a bucket.
      checkpoint: what it holds; its `arrays` are empty where a run's own checkpoints hold them.
    """

    path: str
    place: str
    checkpoint: Checkpoint


def read_source(path: str | Path, model: str | None) -> SourceCheckpoint:
    """Read what a checkpoint is; its arrays are read when they are placed.

    Args:
      path: what `clip_jax.load` takes.
      model: decides where a bare file does not say what it is.

    Raises:
      UserError: nothing there can be read.
    """
    place = local_copy(path)
    return SourceCheckpoint(str(path), place, read_model(place, model))


WHOLE_BYTES, BLOCKS, BLOCK_BYTES = 64 << 20, 1024, 64 << 10


def source_digest(path: str) -> str | None:
    """Return a digest of the weights that a run starts from; None where there are none.

    It is of a file's bytes, and of one of more than 64 MiB of its length and of 1,024 blocks of
    64 KiB spread over it; of a folder, of its files; of a run, of its newest checkpoint, which
    holds a digest of every array. A published name stands for its files, which were compared with
    their sums when they were fetched.
    """
    if not path:
        return None
    place = Path(local_copy(path))
    state = hashlib.blake2b(digest_size=16)
    if not place.exists():
        return None
    if has_checkpoints(place):
        with closing(Checkpoints(place, read_only=True)) as checkpoints:
            meta = checkpoints.latest_meta() or {}
        state.update(json.dumps(meta.get("digests"), sort_keys=True).encode())
        return state.hexdigest()
    files = [place] if place.is_file() else [file for file in place.iterdir() if file.is_file()]
    for file in sorted(files):
        state.update(json.dumps([file.name, file.stat().st_size]).encode())
        with file.open("rb") as opened:
            for block in _blocks(opened, file.stat().st_size):
                state.update(block)
    return state.hexdigest()


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    if size <= WHOLE_BYTES:
        while block := file.read(BLOCK_BYTES):
            yield block
        return
    for i in range(BLOCKS):
        file.seek(i * (size - BLOCK_BYTES) // (BLOCKS - 1))
        yield file.read(BLOCK_BYTES)


def has_checkpoints(workdir: str | Path) -> bool:
    """Return whether a run in this folder can be resumed."""
    folder = Path(workdir) / CHECKPOINT_DIRNAME
    return folder.is_dir() and any(step.name.isdigit() for step in folder.iterdir())


def source_tokenizer(source: SourceCheckpoint, given: str) -> TokenizerSpec:
    """Return the checkpoint's own tokenizer, or the config's where it came without one.

    Args:
      source: the checkpoint.
      given: config.data.tokenizer; "clip", its default, leaves it to the checkpoint.

    Raises:
      UserError: there is none, or the config's is another than the checkpoint was trained with.
    """
    source_spec, text = source.checkpoint.tokenizer, source.checkpoint.config.text
    if given == "clip":
        if source_spec is None:
            raise UserError(
                f"{source.path} came without its tokenizer; give config.data.tokenizer the path of "
                "its tokenizer.json or SentencePiece .model"
            )
        return source_spec
    spec = tokenizer_from_file(given, tokenizer_family(source.checkpoint.config))
    tokenizer = make_tokenizer(spec)
    if source_spec is None:
        ends_alike = text.pool != "end" or tokenizer.eot_id == text.eot_id
        fits = tokenizer.vocab_size <= text.vocab_size and ends_alike
        advice = "give the one it was trained with"
    else:
        file = source_spec.file
        fits = file is not None and Path(file).read_bytes() == Path(given).read_bytes()
        advice = 'leave it at "clip" to take the checkpoint\'s own'
    if not fits:
        raise UserError(
            f"config.data.tokenizer {given} ({tokenizer.vocab_size:,} entries, end token "
            f"{tokenizer.eot_id}) is not the tokenizer of {source.path} ({text.vocab_size:,} "
            f"entries, end token {text.eot_id}); {advice}"
        )
    return source_spec or spec


def warm_start_sizes(source: SourceCheckpoint, sizes: CLIPConfig) -> CLIPConfig:
    """Return the sizes of a run: the checkpoint's, with the run's image size and text length.

    Raises:
      UserError: they do not match what the run asks for.
    """
    source_sizes = source.checkpoint.config
    if isinstance(source_sizes.vision, NaFlexConfig):
        raise UserError(
            f"{source.path} holds {source.checkpoint.name}, whose images have any shape: it is "
            "loaded and evaluated, and not trained; give config.model.init_from another model"
        )
    # `source_tokenizer` has checked the vocabulary; a text tower may have room for more.
    text = dataclasses.replace(
        sizes.text, vocab_size=source_sizes.text.vocab_size, eot_id=source_sizes.text.eot_id
    )
    sizes = dataclasses.replace(sizes, text=text)
    run_sizes = dataclasses.replace(
        source_sizes,
        vision=dataclasses.replace(source_sizes.vision, image_size=sizes.vision.image_size),
        text=dataclasses.replace(source_sizes.text, context_length=sizes.text.context_length),
        init_logit_scale=sizes.init_logit_scale,
        init_logit_bias=sizes.init_logit_bias,
    )
    check_source_matches(source, run_sizes, sizes)
    return run_sizes


def check_source_matches(
    source: SourceCheckpoint, run_sizes: CLIPConfig, sizes: CLIPConfig
) -> None:
    """Raise UserError if a model made from a checkpoint differs from the one that is asked for."""
    actual, expected = (
        {**array_shapes(config), **{field: _field(config, field) for field in COMPARED_FIELDS}}
        for config in (run_sizes, sizes)
    )
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            raise UserError(
                f"{source.path} holds {source.checkpoint.name}, which is not the model that "
                f"config.model.name says: {name} is {_show(actual.get(name))} and there "
                f"{_show(expected.get(name))}; give config.model.name the checkpoint's model"
            )


def _field(config: CLIPConfig, name: str) -> Any:
    tower, field = name.split(".")
    return getattr(getattr(config, tower), field, None)


def _show(value: Any) -> str:
    return "not there" if value is None else str(list(value) if isinstance(value, tuple) else value)


def warm_start_state(
    source: SourceCheckpoint,
    sizes: CLIPConfig,
    optimizer: optax.GradientTransformation,
    shapes: TrainState,
    config: Config,
    projections: Projections = (),
) -> TrainState:
    """Make a state before its first step, laid out as `shapes`, with the checkpoint's weights.

    Raises:
      UserError: the checkpoint's temperature is beyond the run's limit.
    """
    own = {name: tree for name, tree in shapes.params.items() if name not in (LORA, PROJECTIONS)}
    wanted = {"params": own, "batch_stats": shapes.batch_stats}
    variables = place_source(source, sizes, wanted, state_mesh(shapes))
    scale = math.exp(float(variables["params"]["logit_scale"]))
    max_logit_scale = config.optim.max_logit_scale
    # OpenAI's models end on the limit itself, a float32's rounding above or below it.
    if scale > max_logit_scale * (1 + 1e-5):
        raise UserError(
            f"the scale of {source.path} is {scale:.1f}, above config.optim.max_logit_scale "
            f"{max_logit_scale:g}; raise that, or the first step would change it"
        )

    def make(variables: dict[str, Any]) -> TrainState:
        return make_state(
            variables, optimizer, config.train, seed=config.seed, projections=projections
        )

    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    # Donated: the state holds these very arrays, not a second copy.
    return jax.jit(make, donate_argnums=0, out_shardings=shardings)(variables)


def place_source(
    source: SourceCheckpoint, sizes: CLIPConfig, shapes: Mapping[str, Any], mesh: Mesh
) -> dict[str, Any]:
    """Place the variables that a run starts from, each array straight onto its devices.

    Where the run has the sigmoid loss's bias and the checkpoint has none, bias and scale start as
    in a run from random weights: they mean something only together. A bias that the run does not
    have is left behind: a constant added to the logits changes nothing in a softmax.

    Args:
      source: the checkpoint.
      sizes: the run's, as `warm_start_sizes` returns them.
      shapes: ShapeDtypeStructs of {"params", "batch_stats"} with their shardings.
      mesh: where they lie.
    """
    checkpoint, threads = source.checkpoint, THREADS
    if not checkpoint.arrays:
        restored = read_run_arrays(source.place, checkpoint.config, mesh)
        # Arrays on several processes' devices must be moved in the same order on each of them.
        checkpoint, threads = dataclasses.replace(checkpoint, arrays=restored), 1
    size, length = sizes.vision.image_size, sizes.text.context_length
    arrays: dict[str, Reader] = {
        **resize_checkpoint(checkpoint, size, length, grow_text=True).arrays
    }
    if sizes.init_logit_bias is not None and "logit_bias" not in arrays:
        starts = {"logit_scale": sizes.init_logit_scale, "logit_bias": sizes.init_logit_bias}
        arrays |= {k: functools.partial(np.float32, start) for k, start in starts.items()}
    return place_arrays(arrays, shapes, threads=threads)


def read_run_arrays(path: str, config: CLIPConfig, mesh: Mesh | None) -> dict[str, Reader]:
    """Restore the newest undamaged weights of a run onto the mesh; return them by path.

    Raises:
      UserError: there is no checkpoint.
    """
    variables = restore_run(path, sharded_variable_shapes(config, mesh))
    arrays = by_path(variables)
    return {name: functools.partial(_read_restored, name, array) for name, array in arrays.items()}


def _read_restored(name: str, array: jax.Array) -> np.ndarray | jax.Array:
    # Positions may be interpolated, on the host.
    return np.asarray(array) if POSITIONS.search(name) else array


def restore_run(path: str | Path, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Restore the newest undamaged weights of a run, laid out as `shapes`.

    Raises:
      UserError: there is no checkpoint.
    """
    checkpoints = Checkpoints(path, read_only=True)
    try:
        restored = checkpoints.restore_model(shapes)
    finally:
        checkpoints.close()
    if restored is None:
        raise UserError(f"{path} has no checkpoint yet; train until the first one is saved")
    return restored[0]


def sharded_variable_shapes(
    config: CLIPConfig,
    mesh: Mesh | None,
    *,
    dtype: DTypeLike = jnp.float32,
    towers: str = "both",
) -> dict[str, Any]:
    """Return ShapeDtypeStructs of a model's variables with their shardings; nothing is allocated.

    They lie on the first device, or over a mesh by the rules of `sharding`; positions are whole
    on every device.

    Args:
      config: the model's sizes.
      mesh: None is the first device.
      dtype: of matrices; gains, biases, scalars and statistics stay float32, which costs nothing.
      towers: "both", or the one tower that is there, "image" or "text"; scalars always are.
    """
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def struct(path: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        sharding: jax.sharding.Sharding = one
        if mesh is not None:
            spec = P() if POSITIONS.search(path) else partition_spec(path, shape, mesh)
            sharding = NamedSharding(mesh, spec)
        kind = dtype if len(shape) > 1 else jnp.float32
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    absent = {"image": "text/", "text": "visual/", "both": None}[towers]
    shapes = array_shapes(config)
    return to_variables(
        {
            path: struct(path, shape)
            for path, shape in shapes.items()
            if absent is None or not path.startswith(absent)
        }
    )


def place_arrays(
    arrays: Mapping[str, Reader], shapes: Mapping[str, Any], *, threads: int = THREADS
) -> dict[str, Any]:
    """Make variables laid out as `shapes` from arrays by path, every layer by itself.

    Only as many arrays as there are threads are on the host at a time, and of each device's part
    no more than that part is sent: a model larger than the host can be placed. What `shapes` does
    not have is not read; what has another dtype there is converted.
    """
    wanted = by_path(shapes)

    def read(path: str, shape: tuple[int, ...]) -> Any:
        before, stack, after = path.partition("/resblocks/")
        if not stack:
            return arrays[path]()
        layers = [arrays[f"{before}/resblocks_{i}/{after}"]() for i in range(shape[0])]
        return (jnp if isinstance(layers[0], jax.Array) else np).stack(layers)

    def put(path: str) -> jax.Array:
        value, sharding = read(path, wanted[path].shape), wanted[path].sharding
        if value.dtype != wanted[path].dtype:
            value = value.astype(wanted[path].dtype)
        if isinstance(value, jax.Array):
            return jax.device_put(value, sharding)
        # Unlike `device_put`, it asks no other process whether its array is the same.
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    with ThreadPoolExecutor(threads) as pool:
        placed = dict(zip(wanted, pool.map(put, wanted), strict=True))
    return to_variables(placed)
