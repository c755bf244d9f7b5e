"""Projections that a student learns beside its model, to features as wide as a teacher's.

They are a tree of their own, `distill`, of which what loads a model knows nothing.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from clip_jax.models.clip import unit_length
from clip_jax.typing import Features, Params

PROJECTIONS = "distill"
"""The top name of the projections among a run's parameters."""

Projections = Sequence[tuple[str, int, int]]
"""Of each projection its name, the student's width and the teacher's."""


def make_projections(projections: Projections, seed: int) -> Params:
    """Draw the matrices that lead a student's features to a teacher's width; traceable."""

    def draw(name: str, width: int, teacher_width: int) -> Params:
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        return {"kernel": jax.random.normal(key, (width, teacher_width)) / width**0.5}

    return {name: draw(name, *widths) for name, *widths in projections}


def without_projections(params: Params) -> Params:
    """Return the parameters of the model alone."""
    return {name: tree for name, tree in params.items() if name != PROJECTIONS}


def project(params: Mapping[str, Any], name: str, z_BD: Float[Array, "B d"]) -> Features:
    """Return unit features at a teacher's width: as they are where there is no such projection."""
    kernels = params.get(PROJECTIONS, {})
    if name not in kernels:
        return z_BD
    return unit_length(jnp.matmul(z_BD, kernels[name]["kernel"], precision=lax.Precision.HIGHEST))
