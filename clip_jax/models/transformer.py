"""A stack of residual blocks, one by one or in a loop."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clip_jax.models.execution import ExecConfig, remat_block
from clip_jax.models.formed_block import BlockInputs, FormedBlock
from clip_jax.models.layers import (
    BlockConfig,
    ResidualBlock,
    block_parts,
    gather_rows,
    stream_packing,
)
from clip_jax.models.packing import Packing
from clip_jax.models.shared_loop import shared_loop, shares_kernels
from clip_jax.models.stack import FROZEN_STACK, STACK

NO_INPUTS = BlockInputs()


class Transformer(nn.Module):
    """A stack of residual blocks.

    With `exec_config.scan` all blocks but the last are one block in a loop, `resblocks`, its
    parameters those of `resblocks_0`, `resblocks_1`, ... stacked. The last keeps its own name and
    parameters: it may be computed at one position, which the loop's body cannot be. Parameters
    whose first blocks are `frozen_resblocks` have two loops, of which the first needs no gradient.
    """

    layers: int
    block: BlockConfig
    exec_config: ExecConfig

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        pool_index_B: Int[Array, " B"] | None = None,
        positions_BL: Int[Array, "B L"] | None = None,
        inputs: BlockInputs = NO_INPUTS,
        path_scale_BK2: Float[Array, "B K 2"] | None = None,
    ) -> Float[Array, "B l D"]:
        """Return all rows, or with `pool_index_B` that one of every sequence: l is L or 1.

        With `positions_BL` the rows are segments of shorter sequences, see `ResidualBlock`, which
        blocks of a form do not take. They alone read `inputs`. `path_scale_BK2`: factors of both
        branches of each block, of which none has its own backward pass then.

        Without `exec_config.pool_last_block` the last block is computed for all rows, one of which
        is then gathered: the plain form.
        """
        last, packing = self.layers - 1, None
        is_own_form = self.block.form is not None
        # Parameters are drawn by the modules of the plain block.
        is_minimal = self.exec_config.is_minimal and path_scale_BK2 is None
        if is_minimal and not is_own_form and not self.is_initializing():
            is_ragged = positions_BL is not None
            packing = stream_packing(self.block, self.exec_config, x_BLD.shape, is_ragged=is_ragged)
        x = x_BLD if packing is None else packing.flatten(x_BLD)
        # A packing is no array, which a loop could hand to its body.
        static: tuple[Any, ...] = () if is_own_form else (packing,)
        arrays: tuple[Any, ...] = (inputs,) if is_own_form else (positions_BL,)
        # One for each block; () where no branch has factors.
        paths = () if path_scale_BK2 is None else tuple(path_scale_BK2.transpose(1, 0, 2))
        if self.exec_config.scan and last > 0:
            frozen = _count_stacked(self.variables.get("params", {}).get(FROZEN_STACK))
            if frozen:
                x = self._loop(x, static, arrays, paths[:frozen], frozen, FROZEN_STACK)
            x = self._loop(x, static, arrays, paths[frozen:last], last - frozen, STACK)
        block = self._block(self.exec_config, is_minimal=is_minimal)
        for i in range(0 if not self.exec_config.scan else last, last):
            layer = block(self.block, self.exec_config, name=f"resblocks_{i}")
            x = layer(x, None, *static, *arrays, *paths[i : i + 1])
        last_block = block(self.block, self.exec_config, name=f"resblocks_{last}")
        pool_in_block_B = pool_index_B if self.exec_config.pool_last_block else None
        x = last_block(x, pool_in_block_B, *static, *arrays, *paths[last:])
        if pool_in_block_B is not None:
            return x
        x_BLD = x if packing is None else packing.unflatten(x)
        return x_BLD if pool_index_B is None else gather_rows(x_BLD, pool_index_B)

    def _block(self, exec_config: ExecConfig, *, is_minimal: bool) -> Any:
        """Return the class of the blocks, which may be computed again in the backward pass."""
        is_own_form = self.block.form is not None
        if exec_config.is_minimal and (is_own_form or not is_minimal):
            # It has no backward pass of its own then, and keeps its matrix products.
            exec_config = dataclasses.replace(exec_config, remat="dots")
        block = FormedBlock if is_own_form else ResidualBlock
        return remat_block(block, exec_config)

    def _loop(
        self,
        x: Array,
        static: tuple[Any, ...],
        arrays: tuple[Any, ...],
        paths: tuple[Array, ...],
        times: int,
        name: str,
    ) -> Array:
        """Apply the stacked blocks of that name, `times` of them; `paths` are one for each."""
        packing = static[0] if static else None
        target = self.exec_config.target
        if packing and not paths and shares_kernels(target, packing.batch, x.shape[-1]):
            return self._shared_loop(x, packing, arrays[0], name)
        loop = nn.scan(
            lambda block, x, arrays, paths: (block(x, None, *static, *arrays, *paths), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=times,
        )
        exec_config = dataclasses.replace(self.exec_config, in_scan=True)
        block = self._block(exec_config, is_minimal=exec_config.is_minimal and not paths)
        stacked = (jnp.stack(paths),) if paths else ()
        x, _ = loop(block(self.block, exec_config, name=name), x, arrays, stacked)
        return x

    def _shared_loop(
        self, x_ND: Array, packing: Packing, positions_SR: Array | None, name: str
    ) -> Array:
        """Apply the stacked blocks of that name, whose kernels the devices share."""
        target = self.exec_config.target
        own = dataclasses.replace(packing, batch=packing.batch // target.batch_shards)
        exec_config = dataclasses.replace(self.exec_config, target=target.alone, in_scan=True)
        parts = block_parts(self.block, exec_config, own, x_ND.shape[-1])
        stacked = self.variables["params"][name]
        with jax.named_scope(name):
            return shared_loop(parts, target, stacked, x_ND, positions_SR)


def _count_stacked(stack: Any) -> int:
    """Return the blocks of a stack of parameters; 0 without one."""
    return jax.tree.leaves(stack)[0].shape[0] if stack else 0
