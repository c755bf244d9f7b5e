"""Parameters of a tower's blocks: one by one, or stacked for `nn.scan`; and back.

One by one, a transformer of L blocks has `resblocks_0` to `resblocks_{L-1}`. Stacked, it has
`resblocks`, the first L - 1 with a leading axis of layers, and `resblocks_{L-1}` as before. Both
functions take any tree that holds such dicts, of arrays or of ShapeDtypeStructs: parameters, or
an optimizer's state of the same structure. They can be traced.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

STACK = "resblocks"


def stack_layers(tree: Any) -> Any:
    """The tree with the blocks of every transformer but its last as one stack."""
    return jax.tree.map(lambda x: _stack(x) if _holds_blocks(x) else x, tree, is_leaf=_holds_blocks)


def unstack_layers(tree: Any) -> Any:
    """The tree with every block by itself: the inverse of `stack_layers`."""
    return jax.tree.map(
        lambda x: _unstack(x) if _holds_blocks(x) else x, tree, is_leaf=_holds_blocks
    )


def _holds_blocks(tree: Any) -> bool:
    return isinstance(tree, dict) and bool(_numbers(tree))


def _numbers(blocks: dict[str, Any]) -> list[int]:
    """The numbers of the blocks that stand by themselves."""
    prefix = f"{STACK}_"
    return sorted(int(name.removeprefix(prefix)) for name in blocks if name.startswith(prefix))


def _stack(blocks: dict[str, Any]) -> dict[str, Any]:
    *first, last = _numbers(blocks)
    if not first:  # one block, or stacked already
        return blocks
    stacked = jax.tree.map(lambda *xs: _join(xs), *(blocks[f"{STACK}_{i}"] for i in first))
    return {STACK: stacked, f"{STACK}_{last}": blocks[f"{STACK}_{last}"]}


def _unstack(blocks: dict[str, Any]) -> dict[str, Any]:
    if STACK not in blocks:
        return blocks
    (last,) = _numbers(blocks)
    first = {
        f"{STACK}_{i}": jax.tree.map(lambda x, i=i: _part(x, i), blocks[STACK]) for i in range(last)
    }
    return {**first, f"{STACK}_{last}": blocks[f"{STACK}_{last}"]}


def _join(parts: tuple[Any, ...]) -> Any:
    first = parts[0]
    if first.size == 1:
        # Not a block's own: what an optimizer puts where it keeps nothing.
        return first
    if isinstance(first, jax.ShapeDtypeStruct):
        sharding = first.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, P(None, *sharding.spec))
        return jax.ShapeDtypeStruct((len(parts), *first.shape), first.dtype, sharding=sharding)
    return np.stack(parts) if isinstance(first, np.ndarray) else jnp.stack(parts)


def _part(stacked: Any, i: int) -> Any:
    if stacked.size == 1:
        return stacked
    if isinstance(stacked, jax.ShapeDtypeStruct):
        sharding = stacked.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
        return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype, sharding=sharding)
    return stacked[i]
