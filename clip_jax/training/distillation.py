"""What a run learns from teachers' features of its batches, wherever they come from."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.data.loader import Batch
from clip_jax.losses.distill import (
    AffinityFn,
    PairFeatures,
    feature_distance,
    make_affinity_loss,
)
from clip_jax.models.projection import Projections, project
from clip_jax.parallel.mesh import BATCH_AXES
from clip_jax.sections import DistillSection
from clip_jax.typing import Features, Params, Scalar, Tokenizer

FEATURE_DTYPE = np.dtype(np.float16)
"""What teachers' features are rounded to, once: stored and computed ones are the same bits."""


@dataclasses.dataclass(frozen=True)
class TeacherInfo:
    """What a student must know of a teacher.

    Attributes:
      name: its path or published name.
      identity: names its weights, sizes, tokenizer and dtype.
      embed_dim: the width of its features.
      scale: what multiplies its cosines to give logits.
    """

    name: str
    identity: str
    embed_dim: int
    scale: float


@runtime_checkable
class Distiller(Protocol):
    """Where the teachers' features of a batch come from."""

    infos: tuple[TeacherInfo, ...]

    def tokenizer(self, student: Tokenizer, context_length: int) -> tuple[Tokenizer, int]:
        """Return what the loader makes captions to ids by, and the length of its rows.

        The student's ids come first in a row.
        """
        ...

    def features(self, batch: Batch, step: int) -> dict[str, jax.Array]:
        """Return what the step takes of this process's rows of the batch at `step`."""
        ...


def image_rows(number: int) -> str:
    """Return the name of a teacher's image features in a batch."""
    return f"teacher_image_{number}"


def text_rows(number: int) -> str:
    """Return the name of a teacher's text features in a batch."""
    return f"teacher_text_{number}"


def feature_names(teachers: int) -> list[str]:
    """Return the names of so many teachers' features: of each its images', then its texts'."""
    return [name(i) for i in range(teachers) for name in (image_rows, text_rows)]


def teacher_shapes(
    infos: Sequence[TeacherInfo], mesh: Mesh, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the teachers' features in a global batch."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return {
        name(i): jax.ShapeDtypeStruct(
            (batch_size, info.embed_dim), FEATURE_DTYPE, sharding=sharding
        )
        for i, info in enumerate(infos)
        for name in (image_rows, text_rows)
    }


def split_captions(batch: Batch, context_length: int) -> None:
    """Take the teachers' captions out of the student's, which come first in each row."""
    text_BL = batch["text"]
    batch["text"], batch["teacher_text"] = text_BL[:, :context_length], text_BL[:, context_length:]
    if "negative" in batch:  # the student's alone
        batch["negative"] = batch["negative"][:, :context_length]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The losses of a run with teachers, see `DistillSection`.

    Of several teachers each one's loss is taken by itself and their mean is the loss, as
    MobileCLIP has it (arXiv:2311.17049, equation 2).

    Attributes:
      section: its weights and temperature.
      infos: the teachers.
      affinity: over the mesh.
    """

    section: DistillSection
    infos: tuple[TeacherInfo, ...]
    affinity: AffinityFn

    def losses(
        self,
        z_image_BD: Features,
        z_text_BD: Features,
        params: Params,
        rows: Mapping[str, jax.Array],
    ) -> dict[str, Scalar]:
        """Return the losses that have a weight, by the names of their metrics.

        Of the parameters they take the temperature and the projections.
        """
        found: dict[str, list[Scalar]] = {}
        section, valid_B, scale = self.section, rows["valid"], jnp.exp(params["logit_scale"])
        for i, info in enumerate(self.infos):
            teacher_image_BD, teacher_text_BD = rows[image_rows(i)], rows[text_rows(i)]
            if section.affinity_weight:
                t = section.temperature
                student = PairFeatures(z_image_BD, z_text_BD, scale / t)
                teacher = PairFeatures(teacher_image_BD, teacher_text_BD, info.scale / t)
                affinity = t**2 * self.affinity(student, teacher, valid_B)
                found.setdefault("affinity_loss", []).append(affinity)
            if section.feature_weight:
                image_BD = project(params, image_rows(i), z_image_BD)
                text_BD = project(params, text_rows(i), z_text_BD)
                distance = feature_distance(image_BD, teacher_image_BD, valid_B)
                distance += feature_distance(text_BD, teacher_text_BD, valid_B)
                found.setdefault("feature_loss", []).append(distance / 2)
        return {name: jnp.mean(jnp.stack(each)) for name, each in found.items()}

    def total(self, contrastive: Scalar, losses: Mapping[str, Scalar]) -> Scalar:
        """Return the weighted sum of the run's own loss and these."""
        weights = {
            "affinity_loss": self.section.affinity_weight,
            "feature_loss": self.section.feature_weight,
        }
        own = self.section.contrastive_weight * contrastive
        return own + sum(weights[name] * loss for name, loss in losses.items())


def projections_of(
    section: DistillSection, infos: Sequence[TeacherInfo], embed_dim: int
) -> Projections:
    """Return the projections that a student's feature loss needs: where widths differ."""
    if not section.feature_weight:
        return ()
    return tuple(
        (name(i), embed_dim, info.embed_dim)
        for i, info in enumerate(infos)
        if info.embed_dim != embed_dim
        for name in (image_rows, text_rows)
    )


def make_distillation(
    section: DistillSection, infos: Sequence[TeacherInfo], mesh: Mesh
) -> Distillation:
    """Make the losses of a run's global batch."""
    return Distillation(section, tuple(infos), make_affinity_loss(mesh, BATCH_AXES))
