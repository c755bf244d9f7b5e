"""Where every parameter lies: one table from its path to a PartitionSpec.

Modules know nothing of meshes. A row that names an axis which does not divide the dimension
leaves that dimension whole. The optimiser's moments have their parameter's path as their ending
and are laid out by the same rows.
"""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

RULES: tuple[tuple[str, P], ...] = (
    # Attention: heads over `tensor`, the width over `fsdp`.
    (r"(attn|attnpool)/[qkv]_proj/kernel$", P("fsdp", "tensor", None)),
    (r"(attn|attnpool)/[qkv]_proj/bias$", P("tensor", None)),
    (r"attn/out_proj/kernel$", P("tensor", None, "fsdp")),
    (r"attnpool/c_proj/kernel$", P("tensor", None, "fsdp")),
    # MLP: hidden features over `tensor`, so that the pair needs one reduction.
    (r"mlp/c_fc/kernel$", P("fsdp", "tensor")),
    (r"mlp/c_fc/bias$", P("tensor")),
    (r"mlp/c_proj/kernel$", P("tensor", "fsdp")),
    # Embeddings and projections.
    (r"token_embedding/embedding$", P("tensor", "fsdp")),
    (r"positional_embedding$", P(None, "fsdp")),
    (r"(visual/proj|text_projection)$", P("fsdp", "tensor")),
    # Convolutions: output features over `fsdp`.
    (r"(conv\d|downsample_0)/kernel$", P(None, None, None, "fsdp")),
)

FACTORED = re.compile(r"(^|/)v_(row|col)/")
"""Adafactor's rows and columns: an axis less than their parameter, small, and whole everywhere."""


def path_name(path: tuple) -> str:
    """A tree path as names joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The first row that matches, without the axes that do not divide their dimension.

    Blocks in a loop have their parameters stacked; the axis of layers stays whole, because every
    device needs every layer.
    """
    if "/resblocks/" in name and shape:
        return P(None, *partition_spec(name.replace("/resblocks/", "/"), shape[1:], mesh))
    rules = () if FACTORED.search(name) else RULES
    for pattern, spec in rules:
        if re.search(pattern, name) and len(spec) == len(shape):
            return P(
                *(
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(spec, shape, strict=True)
                )
            )
    return P()


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array (or shape) of a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, partition_spec(path_name(path), x.shape, mesh)), tree
    )
