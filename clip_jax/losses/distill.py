"""What a student learns from a teacher's features of the same pairs.

The affinity compares what either says of a batch, and so needs no common width: the divergence of
the student's softmax over the texts for each image, and over the images for each text, from the
teacher's (MobileCLIP, arXiv:2311.17049; TinyCLIP's affinity mimicking, arXiv:2309.12314). The
feature distance compares unit features (CLIP-KD, arXiv:2307.12732).

Rows with valid=False are in no softmax and in no mean. Products and sums are float32, and of the
logits of a device [rows, B] a tile of `TILE_ROWS` rows is there at a time.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from clip_jax.losses.dense import count_valid, dot_products, zero_invalid
from clip_jax.losses.tiled import NEG_INF, join_rows, split_rows
from clip_jax.typing import Features, Rows, Scalar

TILE_ROWS = 1024


class PairFeatures(NamedTuple):
    """Unit features of a batch's images and texts, and what multiplies their cosines."""

    z_image_BD: Features
    z_text_BD: Features
    scale: Scalar | float


@runtime_checkable
class AffinityFn(Protocol):
    """The affinity of a global batch; call it under `jax.jit`."""

    def __call__(self, student: PairFeatures, teacher: PairFeatures, valid_B: Rows) -> Scalar:
        """Return the mean divergence over valid rows and both directions."""
        ...


def row_divergences(
    student: tuple[Array, Array, Scalar | float],
    teacher: tuple[Array, Array, Scalar | float],
    valid_r: Bool[Array, " r"],
    valid_c: Bool[Array, " c"],
) -> Float[Array, " r"]:
    """Return the divergence of the student's softmax over columns from the teacher's, by row.

    Args:
      student, teacher: features of the rows, of the columns, and the scale of their cosines.
      valid_r, valid_c: the rows, and the columns, that count.
    """

    def log_softmax(z_rD: Array, z_cD: Array, scale: Scalar | float) -> Array:
        z_rD, z_cD = (z.astype(jnp.float32) for z in (z_rD, z_cD))
        logits_rc = scale * dot_products(zero_invalid(z_rD, valid_r), zero_invalid(z_cD, valid_c))
        return jax.nn.log_softmax(jnp.where(valid_c, logits_rc, NEG_INF), axis=-1)

    log_p_rc, log_q_rc = log_softmax(*teacher), log_softmax(*student)
    terms_rc = jnp.where(valid_c, jnp.exp(log_p_rc) * (log_p_rc - log_q_rc), 0)
    return jnp.where(valid_r, jnp.sum(terms_rc, axis=-1), 0)


def affinity_loss(student: PairFeatures, teacher: PairFeatures, valid_B: Rows) -> Scalar:
    """Return the affinity by its definition, over the whole matrices."""
    image_B = row_divergences(student, teacher, valid_B, valid_B)
    text_B = row_divergences(_turned(student), _turned(teacher), valid_B, valid_B)
    return jnp.sum(image_B + text_B) / 2 / count_valid(valid_B)


def _turned(features: PairFeatures) -> PairFeatures:
    """Return images and texts in each other's place."""
    return PairFeatures(features.z_text_BD, features.z_image_BD, features.scale)


def make_affinity_loss(mesh: Mesh, batch_axes: tuple[str, ...]) -> AffinityFn:
    """Make the affinity of a batch whose rows are split over a mesh.

    Each device gathers both sides' features and has its own rows of both softmaxes, which is all
    that the definition asks of a row.
    """
    split, whole = PartitionSpec(batch_axes), PartitionSpec()
    features = PairFeatures(split, split, whole)  # type: ignore[arg-type]

    def gather(x: Array) -> Array:
        return lax.all_gather(x, batch_axes, tiled=True)

    def divergences(student: PairFeatures, teacher: PairFeatures, valid_b: Rows) -> Array:
        valid_B = gather(valid_b)

        def of_rows(student: PairFeatures, teacher: PairFeatures) -> Array:
            columns = gather(student.z_text_BD), gather(teacher.z_text_BD)
            tile = _tile_of(columns, student.scale, teacher.scale, valid_B)
            rows = split_rows((student.z_image_BD, teacher.z_image_BD, valid_b), TILE_ROWS)
            # Tile by tile, and again in the backward pass: a tile's matrices are held at a time.
            return join_rows(lax.map(jax.checkpoint(tile), rows), valid_b.size)

        return of_rows(student, teacher) + of_rows(_turned(student), _turned(teacher))

    rows_fn = jax.shard_map(
        divergences, mesh=mesh, in_specs=(features, features, split), out_specs=split
    )

    def loss(student: PairFeatures, teacher: PairFeatures, valid_B: Rows) -> Scalar:
        student = student._replace(scale=jnp.asarray(student.scale, jnp.float32))
        teacher = teacher._replace(scale=jnp.asarray(teacher.scale, jnp.float32))
        return jnp.sum(rows_fn(student, teacher, valid_B)) / 2 / count_valid(valid_B)

    return loss


def _tile_of(
    columns: tuple[Array, Array],
    scale: Scalar | float,
    teacher_scale: Scalar | float,
    valid_B: Rows,
) -> Callable[[tuple[Array, Array, Rows]], Array]:
    """Return the function that has the divergences of a tile of rows against all columns."""

    def tile(rows: tuple[Array, Array, Rows]) -> Array:
        student_rD, teacher_rD, valid_r = rows
        student, teacher = (student_rD, columns[0], scale), (teacher_rD, columns[1], teacher_scale)
        return row_divergences(student, teacher, valid_r, valid_B)

    return tile


def feature_distance(z_BD: Features, teacher_BD: Features, valid_B: Rows) -> Scalar:
    """Return the mean squared distance between a student's and a teacher's unit features."""
    difference_BD = zero_invalid(z_BD - teacher_BD.astype(jnp.float32), valid_B)
    return jnp.sum(difference_BD**2) / count_valid(valid_B)
