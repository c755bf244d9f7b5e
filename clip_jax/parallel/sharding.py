"""The place of every parameter: one table from its path to a PartitionSpec.

Modules know nothing of it, but for `models.shared_loop`, which a test holds to it. A row that names
an axis which does not divide the dimension leaves that dimension whole. Where `fsdp` is then not
used, it splits the largest dimension it divides: gains, biases and embeddings too, which on many
devices would outweigh a share of the matrices. The optimizer's moments have their parameter's path
as their ending and are laid out by the same rows.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.parallel.mesh import BATCH_AXES
from clip_jax.typing import Params, path_name

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


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Return the first row that matches, without the axes that do not divide their dimension.

    Blocks in a loop have their parameters stacked; the axis of layers stays whole, because every
    device needs every layer.
    """
    if "/resblocks/" in name and shape:
        return P(None, *partition_spec(name.replace("/resblocks/", "/"), shape[1:], mesh))
    if FACTORED.search(name):
        return P()
    axes: list[str | None] = [None] * len(shape)
    for pattern, spec in RULES:
        if re.search(pattern, name) and len(spec) == len(shape):
            axes = [
                axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, shape, strict=True)
            ]
            break
    fsdp = mesh.shape["fsdp"]
    fits = [i for i, size in enumerate(shape) if axes[i] is None and size and size % fsdp == 0]
    if fsdp > 1 and "fsdp" not in axes and fits:
        axes[max(fits, key=lambda i: shape[i])] = "fsdp"
    return P(*axes) if any(axes) else P()


SMALL, SMALL_KERNEL = 2**16, 2**21
"""Arrays of fewer elements are updated whole: exchanging them takes longer. Kernels of convolutions
are up to a larger size: the compiler sums gradients that stay whole over the devices in few
exchanges, and those that are split one by one, and lays a kernel out anew to split it. This size
takes least for RN50."""


def update_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Return how a parameter is updated where copies of the model share that work (ZeRO stage 1).

    Rajbhandari et al. 2020 (arXiv:1910.02054): as `partition_spec`, and the largest dimension that
    is whole there and that `data` divides is split over it.
    """
    spec, data = partition_spec(name, shape, mesh), mesh.shape["data"]
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    first = 1 if "/resblocks/" in name else 0
    fits = [i for i in range(first, len(shape)) if axes[i] is None and shape[i] % data == 0]
    is_small = math.prod(shape) < (SMALL_KERNEL if len(shape) == 4 else SMALL)
    if data == 1 or is_small or not fits:
        return spec
    axes[max(fits, key=lambda i: shape[i])] = "data"
    return P(*axes)


def tree_shardings(tree: Any, mesh: Mesh, spec: Callable[..., P] = partition_spec) -> Any:
    """Return a NamedSharding for every array (or shape) of a tree, by default as it is kept."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec(path_name(path), x.shape, mesh)), tree
    )


def with_whole_table(params: Params, mesh: Mesh) -> Params:
    """Gather the token embedding of parameters before it is read; return the parameters.

    Read while its features are split, it would give every device those features of all the
    batch's tokens, to be exchanged afterwards.
    """

    def gather(path: tuple, x: jax.Array) -> jax.Array:
        is_table = path_name(path).endswith("token_embedding/embedding")
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P())) if is_table else x

    return jax.tree_util.tree_map_with_path(gather, params)


def rows_stay_split(mesh: Mesh) -> Callable[..., Any]:
    """Make an interceptor for `flax.linen.intercept_methods` that keeps rows split.

    It holds for what any module returns. Left to itself, the partitioner meets a batch and a matrix
    that are both split over `fsdp`, and may split the features of the activations instead of
    gathering the matrix: then activations travel, which are far larger. Other dimensions stay free,
    for `tensor`.
    """

    def split(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.ndim < 2:
            return x
        spec = P(BATCH_AXES, *[P.UNCONSTRAINED] * (x.ndim - 1))
        return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def interceptor(next_method, args, kwargs, context: nn.module.InterceptorContext):
        del context
        return jax.tree.map(split, next_method(*args, **kwargs))

    return interceptor
