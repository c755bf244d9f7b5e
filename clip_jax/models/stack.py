"""The parameters of a tower's blocks, stacked for `nn.scan` or one by one.

One by one, a transformer of L blocks has `resblocks_0` to `resblocks_{L-1}`. Stacked, it has
`resblocks`, the first L - 1 with a leading axis of layers, and `resblocks_{L-1}` as before. Both
functions take any tree that holds such dicts, of arrays or of ShapeDtypeStructs: parameters, or
an optimizer's state of the same structure. They can be traced.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

STACK = "resblocks"
FROZEN_STACK = "frozen_resblocks"
"""The first blocks of a stack, where they are not trained and the others are."""


def stack_layers(tree: Any) -> Any:
    """Return the tree with the blocks of every transformer but its last as one stack."""
    return _map_blocks(_stack_blocks, tree)


def unstack_layers(tree: Any) -> Any:
    """Return the tree with every block by itself: the inverse of `stack_layers`."""
    return _map_blocks(_unstack_blocks, tree)


def _map_blocks(function: Callable[[dict[str, Any]], dict[str, Any]], tree: Any) -> Any:
    """Apply a function to every dict of blocks in a tree."""

    def holds_blocks(tree: Any) -> bool:
        return isinstance(tree, dict) and bool(_block_numbers(tree))

    return jax.tree.map(lambda x: function(x) if holds_blocks(x) else x, tree, is_leaf=holds_blocks)


def _block_numbers(blocks: dict[str, Any]) -> list[int]:
    """Return the numbers of the blocks that stand by themselves."""
    prefix = f"{STACK}_"
    return sorted(int(name.removeprefix(prefix)) for name in blocks if name.startswith(prefix))


def _stack_blocks(blocks: dict[str, Any]) -> dict[str, Any]:
    """Return a transformer's blocks but the last as one stack.

    Where parts of the first blocks are not there, as in the state of an optimizer that does not
    train them, they are not in the stack.
    """
    *first, last = _block_numbers(blocks)
    if not first:  # one block, or stacked already
        return blocks
    stacked = _stack_trees([blocks[f"{STACK}_{i}"] for i in first])
    return {STACK: stacked, f"{STACK}_{last}": blocks[f"{STACK}_{last}"]}


def _stack_trees(trees: list[Any]) -> Any:
    """Return nested dicts, each leaf stacked over the trees that have it."""
    if not isinstance(trees[0], dict):
        return jax.tree.map(lambda *xs: _stack_leaves(xs), *trees)
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return {key: _stack_trees([tree[key] for tree in trees if key in tree]) for key in keys}


def _unstack_blocks(blocks: dict[str, Any]) -> dict[str, Any]:
    """Return a transformer's stack as blocks by themselves; a part's last one is the last below."""
    if STACK not in blocks:
        return blocks
    (last,) = _block_numbers(blocks)
    layers = {f"{STACK}_{i}": _take_layer(blocks[STACK], i - last) for i in range(last)}
    layers = {name: layer for name, layer in layers.items() if layer is not None}
    return {**layers, f"{STACK}_{last}": blocks[f"{STACK}_{last}"]}


def _stack_leaves(layers: tuple[Any, ...]) -> Any:
    """Return one leaf of all layers, which come first in its shape and are not sharded."""
    first = layers[0]
    if first.size == 1:
        # No parameter of a block: what an optimizer puts where it keeps nothing.
        return first
    if isinstance(first, jax.ShapeDtypeStruct):
        sharding = first.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, P(None, *sharding.spec))
        return jax.ShapeDtypeStruct((len(layers), *first.shape), first.dtype, sharding=sharding)
    return np.stack(layers) if isinstance(first, np.ndarray) else jnp.stack(layers)


def _take_layer(stacked: Any, i: int) -> Any:
    """Return layer i of a stack, counted from its end; None where it has no such layer."""
    if isinstance(stacked, dict):
        parts = {key: _take_layer(part, i) for key, part in stacked.items()}
        return {key: part for key, part in parts.items() if part is not None} or None
    return jax.tree.map(lambda x: _take_leaf(x, i), stacked)


def _take_leaf(stacked: Any, i: int) -> Any:
    if stacked.size == 1:
        return stacked
    if stacked.shape[0] < -i:
        return None
    if isinstance(stacked, jax.ShapeDtypeStruct):
        sharding = stacked.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
        return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype, sharding=sharding)
    return stacked[i]
