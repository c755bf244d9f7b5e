"""Teachers, frozen models whose features of a batch are computed beside its step.

A teacher sees what the loader gives: an image after crop, mirroring and gray, and the caption that
was chosen. What a step draws for its batch (colors, patches) is the student's alone. So the
features are a function of seed, epoch and sample, and are stored once or computed beside the step
with the same bits: `BLOCK_ROWS` rows at a time on each device, in one program whatever the batch,
and rounded to float16.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.data.images import Preprocess
from clip_jax.data.loader import Batch
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP
from clip_jax.models.naflex import NaFlexConfig
from clip_jax.parallel.mesh import BATCH_AXES, batch_part, batch_shards, device_target, place_batch
from clip_jax.tokenizers import make_tokenizer, spec_digest
from clip_jax.training.checkpoint import tree_digests
from clip_jax.training.distillation import FEATURE_DTYPE, TeacherInfo, feature_names
from clip_jax.training.kernel_check import with_checked_kernels
from clip_jax.training.warm_start import (
    place_arrays,
    read_source,
    restore_run,
    sharded_variable_shapes,
)
from clip_jax.typing import Tokenizer

BLOCK_ROWS = 32
"""Rows that a device encodes at a time: the one shape of a teacher's program."""


@dataclasses.dataclass(frozen=True)
class JoinedTokenizer:
    """Several tokenizers' ids of a caption, one behind another in a row.

    Attributes:
      parts: the tokenizers, with the length of each one's rows; the first is what it counts as.
    """

    parts: tuple[tuple[Tokenizer, int], ...]

    def __call__(self, texts: Sequence[str], context_length: int = 0) -> np.ndarray:
        """Return int32 [batch, length of all]."""
        del context_length
        return np.concatenate([part(texts, length) for part, length in self.parts], axis=1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for while it is unpickled
            raise AttributeError(name)
        return getattr(self.parts[0][0], name)


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen model, whole on every device of a mesh.

    Attributes:
      info: see there.
      tokenizer, context_length: of its captions.
      variables: its weights.
      encode: jitted, (variables, uint8 images, tokens) -> unit features of both, float16;
        `BLOCK_ROWS` rows a device.
    """

    info: TeacherInfo
    tokenizer: Tokenizer
    context_length: int
    variables: Mapping[str, Any]
    encode: Any


def load_teacher(path: str, mesh: Mesh, *, dtype: str) -> Teacher:
    """Load a teacher onto a mesh.

    Raises:
      UserError: there is no such model, or it cannot teach: its tokenizer is not known, or it takes
        images of any shape.
    """
    source = read_source(path, None)
    checkpoint = source.checkpoint
    config, spec = checkpoint.config, checkpoint.tokenizer
    if spec is None:
        raise UserError(
            f"config.distill.teachers: {path} came without its tokenizer; put its tokenizer.json "
            "beside it, or convert it with --tokenizer"
        )
    if isinstance(config.vision, NaFlexConfig):
        raise UserError(f"config.distill.teachers: {path} takes images of any shape, not crops")
    whole = NamedSharding(mesh, P())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        sharded_variable_shapes(config, mesh),
    )
    variables = (
        place_arrays(checkpoint.arrays, shapes)
        if checkpoint.arrays
        else restore_run(source.place, shapes)
    )
    model = CLIP(config, dtype=jnp.dtype(dtype), target=device_target(mesh.devices.flat[0]))
    described = [tree_digests(variables), repr(config), spec_digest(spec), dtype]
    described.append(repr(checkpoint.preprocess))
    info = TeacherInfo(
        path,
        hashlib.blake2b(json.dumps(described).encode(), digest_size=8).hexdigest(),
        config.embed_dim,
        float(np.exp(jax.device_get(variables["params"]["logit_scale"]))),
    )
    model = with_checked_kernels(
        model, lambda model: trace_encoder(model, mesh, checkpoint.preprocess, variables)
    )
    encode = make_block_encoder(model, mesh, checkpoint.preprocess)
    return Teacher(info, make_tokenizer(spec), config.text.context_length, variables, encode)


def trace_encoder(model: CLIP, mesh: Mesh, preprocess: Preprocess, variables: Any) -> None:
    """Trace the program of `Teacher.encode`."""
    rows, side = BLOCK_ROWS * batch_shards(mesh), model.config.vision.image_size
    jax.eval_shape(
        make_block_encoder(model, mesh, preprocess),
        variables,
        jax.ShapeDtypeStruct((rows, side, side, 3), jnp.uint8),
        jax.ShapeDtypeStruct((rows, model.config.text.context_length), jnp.int32),
    )


def make_block_encoder(model: CLIP, mesh: Mesh, preprocess: Preprocess) -> Any:
    """Make the program of `Teacher.encode`: each device runs it on rows of its own."""
    side = model.config.vision.image_size
    mean, std = jnp.array(preprocess.mean), jnp.array(preprocess.std)

    def encode(variables: Any, images_bHWC: jax.Array, tokens_bL: jax.Array):
        pixels_bHWC = images_bHWC.astype(jnp.float32) / 255
        if pixels_bHWC.shape[1] != side:
            shape = (len(pixels_bHWC), side, side, 3)
            pixels_bHWC = jax.image.resize(
                pixels_bHWC, shape, "bicubic", precision=jax.lax.Precision.HIGHEST
            )
            pixels_bHWC = jnp.clip(pixels_bHWC, 0, 1)
        images_bHWC = (pixels_bHWC - mean) / std
        pair: Any = model.apply(variables, images_bHWC, tokens_bL)
        return tuple(z_bD.astype(FEATURE_DTYPE) for z_bD in pair)

    rows = P(BATCH_AXES)
    return jax.jit(
        jax.shard_map(
            encode, mesh=mesh, in_specs=(P(), rows, rows), out_specs=(rows, rows), check_vma=False
        )
    )


class LiveTeachers:
    """Computes the teachers' features beside the step; see `Distiller`.

    Args:
      teachers: on the mesh.
      mesh: whose batch axes split the rows.
    """

    def __init__(self, teachers: Sequence[Teacher], mesh: Mesh) -> None:
        self.infos = tuple(teacher.info for teacher in teachers)
        self._teachers = teachers
        self._mesh = mesh
        self._shards = batch_shards(mesh) // batch_part(mesh)[1]
        rows = P(BATCH_AXES)

        def join(count: int, *blocks: jax.Array) -> jax.Array:
            return jax.shard_map(
                lambda *z: jnp.concatenate(z)[:count], mesh=mesh, in_specs=rows, out_specs=rows
            )(*blocks)

        self._join = jax.jit(join, static_argnums=0)

    def tokenizer(self, student: Tokenizer, context_length: int) -> tuple[Tokenizer, int]:
        """Return the tokenizers of the student and of the teachers, joined."""
        parts = [(student, context_length)]
        parts += [(teacher.tokenizer, teacher.context_length) for teacher in self._teachers]
        return JoinedTokenizer(tuple(parts)), sum(length for _, length in parts)

    def features(self, batch: Batch, step: int) -> dict[str, jax.Array]:
        """Compute the features of this process's rows; nothing waits for them."""
        del step
        return self.encode(batch["image"], batch["teacher_text"])

    def encode(self, images_BHWC: np.ndarray, tokens_BL: np.ndarray) -> dict[str, jax.Array]:
        """Compute the features of rows, whose number is a multiple of this process's devices."""
        lengths = [teacher.context_length for teacher in self._teachers]
        texts = np.split(tokens_BL, np.cumsum(lengths)[:-1], axis=1)
        count = len(images_BHWC) // self._shards
        blocks: list[list[jax.Array]] = [[] for _ in range(2 * len(texts))]
        for start in range(0, count, BLOCK_ROWS):
            images, *tokens = (self._block(x, count, start) for x in (images_BHWC, *texts))
            for i, teacher in enumerate(self._teachers):
                pair = teacher.encode(teacher.variables, images, tokens[i])
                blocks[2 * i].append(pair[0])
                blocks[2 * i + 1].append(pair[1])
        names = feature_names(len(texts))
        return {name: self._join(count, *block) for name, block in zip(names, blocks, strict=True)}

    def _block(self, x: np.ndarray, count: int, start: int) -> jax.Array:
        """Place `BLOCK_ROWS` rows of each device, from its row `start` on, filled up with zeros."""
        x = x.reshape(self._shards, count, *x.shape[1:])[:, start : start + BLOCK_ROWS]
        padding = [(0, 0), (0, BLOCK_ROWS - x.shape[1]), *((0, 0),) * (x.ndim - 2)]
        x = np.pad(x, padding).reshape(-1, *x.shape[2:])
        return place_batch({"rows": x}, self._mesh)["rows"]


def load_teachers(paths: Sequence[str], mesh: Mesh, *, dtype: str) -> LiveTeachers:
    """Load teachers onto a mesh; see `load_teacher`."""
    return LiveTeachers([load_teacher(path, mesh, dtype=dtype) for path in paths], mesh)
