"""Between a model's variables, a nested dict, and a flat dict by path (`visual/ln_post/scale`)."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from clip_jax.typing import path_name

STATISTICS = ("mean", "var")  # the leaves of the collection batch_stats


def to_variables(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path as {"params": ..., "batch_stats": ...}."""
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for path, leaf in arrays.items():
        *folders, name = path.split("/")
        tree = variables["batch_stats" if folders and name in STATISTICS else "params"]
        for folder in folders:
            tree = tree.setdefault(folder, {})
        tree[name] = leaf
    return variables


def from_variables(params: Any, batch_stats: Any) -> dict[str, np.ndarray]:
    """Every array by its path, on the host."""
    leaves = [
        *jax.tree_util.tree_leaves_with_path(params),
        *jax.tree_util.tree_leaves_with_path(batch_stats),
    ]
    return {path_name(path): np.asarray(leaf, np.float32) for path, leaf in leaves}
