"""Convert between a model's variables, a nested dict, and a flat dict by path (`visual/proj`)."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from clip_jax.models.clip import CLIP, CLIPConfig, variable_shapes
from clip_jax.typing import leaves_by_path

STATISTICS = ("mean", "var")  # the leaves of the collection batch_stats


# Tracing a deep model takes half a second.
@functools.lru_cache(maxsize=16)
def array_shapes(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and batch statistic by its path; allocate nothing."""
    shapes = variable_shapes(CLIP(config))
    return {path: leaf.shape for path, leaf in by_path(shapes).items()}


def by_path(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of {"params": ..., "batch_stats": ...} by their paths in those."""
    return {k: v for tree in variables.values() for k, v in leaves_by_path(tree).items()}


def to_variables(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return leaves by path as {"params": ..., "batch_stats": ...}."""
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for path, leaf in arrays.items():
        *modules, name = path.split("/")
        tree = variables["batch_stats" if modules and name in STATISTICS else "params"]
        for module in modules:
            tree = tree.setdefault(module, {})
        tree[name] = leaf
    return variables


def from_variables(params: Any, batch_stats: Any) -> dict[str, np.ndarray]:
    """Return every array by its path, on the host, float32."""
    leaves = by_path({"params": params, "batch_stats": batch_stats})
    return {path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()}
