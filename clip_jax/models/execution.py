"""How a model is computed, as opposed to what it computes: nothing here changes its features.

Each choice is equal to the plain form to rounding, and tested against it in values and gradients.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import primitives
from jax.typing import DTypeLike

from clip_jax.errors import check_choice
from clip_jax.models.row_sums import puts_sums_off, sum_rows_first
from clip_jax.models.target import ONE_CPU, Target

DTYPES = ("float32", "bfloat16")
ATTENTION = ("auto", "xla", "cudnn", "pallas")
REMAT = ("auto", "none", "minimal", "dots", "blocks", "full")


@dataclasses.dataclass(frozen=True)
class ExecConfig:
    """How both towers are computed.

    Attributes:
      pool_last_block: compute each tower's last block at the pooled position alone.
      dtype: of activations and matrix products; parameters stay float32.
      attention: "xla", "cudnn" (NVIDIA GPUs), "pallas" (TPUs), or "auto": what can run there.
      remat: what the backward pass computes again instead of keeping it; the later, the less
        memory. "none"; all but the matrix products of a transformer's blocks ("minimal", see
        `models.minimal_block`); all but matrix products and convolutions ("dots"); all inside a
        block ("blocks"); whole towers, and their blocks once more while a tower is gone through
        ("full"), so that one tower's blocks' inputs are there at a time. "auto": "none" on CPUs,
        "minimal" elsewhere.
      scan: a transformer's blocks but the last are one block in a loop, their parameters stacked
        (`models.stack`).
      in_scan: a block is the body of such a loop. There the compiler cannot undo a recomputation
        by merging it with the forward pass, and need not be kept from it.
      target: the devices that the program is traced for.
    """

    pool_last_block: bool = True
    dtype: DTypeLike = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    scan: bool = False
    in_scan: bool = False
    target: Target = ONE_CPU

    def __post_init__(self) -> None:
        check_choice("attention", self.attention, ATTENTION)
        check_choice("remat", self.remat, REMAT)

    @property
    def is_minimal(self) -> bool:
        """Whether the blocks of a transformer keep what spares their matrix products alone."""
        is_auto = self.remat == "auto" and self.target.platform != "cpu"
        return is_auto or self.remat == "minimal"


DEFAULT_EXEC_CONFIG = ExecConfig()


def products_saveable(primitive: Any, *_: Any, **params: Any) -> bool:
    """Return whether a primitive's result is saved: the policy of `jax.checkpoint` for "dots".

    Saved is what matrix products and convolutions return. Products with batch dimensions, which
    attention alone has, are computed again: their result grows with the square of the length and
    costs little.
    """
    if primitive is primitives.dot_general_p:
        (_, _), (batch, _) = params["dimension_numbers"]
        return not batch
    return primitive is primitives.conv_general_dilated_p


def remat_block(
    block: Callable[..., Any],
    exec_config: ExecConfig,
    static_argnums: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Wrap a block so that the backward pass computes it again as far as `exec_config.remat` says.

    Args:
      block: a module's class, or a function whose first argument is a module.
      exec_config: how the tower is computed.
      static_argnums: as `nn.remat` takes them; the module itself is 0.
    """
    if exec_config.remat in ("auto", "none", "minimal"):
        return block
    saves_products = exec_config.remat == "dots"
    policy = products_saveable if saves_products else jax.checkpoint_policies.nothing_saveable
    prevent_cse = not exec_config.in_scan
    return nn.remat(block, policy=policy, prevent_cse=prevent_cse, static_argnums=static_argnums)


def remat_tower(
    tower: Callable[..., Any], exec_config: ExecConfig, static_argnums: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Wrap a tower so that the backward pass computes it again if `exec_config.remat` is "full"."""
    return nn.remat(tower, static_argnums=static_argnums) if exec_config.remat == "full" else tower


def dense_product(exec_config: ExecConfig) -> Callable[..., Any]:
    """Return the `dot_general` of dense layers.

    On a CPU it is `merged_product`, on several GPUs `product_with_early_gradient` but in a loop,
    whose turns end with their sums anyway, and else JAX's own.
    """
    target = exec_config.target
    if target.platform == "cpu":
        return merged_product
    if puts_sums_off(target) and not exec_config.in_scan:
        return functools.partial(product_with_early_gradient, target)
    return jax.lax.dot_general


def product_with_early_gradient(
    target: Target, x: Any, kernel: Any, dimension_numbers: Any, **options: Any
) -> Any:
    """Return a dense layer's `dot_general` whose backward pass waits for the kernel's gradient.

    See `row_sums`: without, what `remat` computes again is held until the sums are taken.
    """
    multiply = _matrix_product(**options)

    def backward(saved: tuple[Any, Any], dy_NM: Any) -> tuple[Any, Any]:
        x_NK, kernel_KM = saved
        dx = multiply(dy_NM, kernel_KM.T).astype(x_NK.dtype)
        dkernel, dx = sum_rows_first(target, lambda x, dy: (multiply(x.T, dy),), (x_NK, dy_NM), dx)
        return dx, dkernel[0].astype(kernel_KM.dtype)

    early = jax.custom_vjp(multiply)
    early.defvjp(lambda x, kernel: (multiply(x, kernel), (x, kernel)), backward)
    return _with_merged_axes(early, x, kernel, dimension_numbers)


def merged_product(x: Any, kernel: Any, dimension_numbers: Any, **options: Any) -> Any:
    """Return a dense layer's `dot_general` as a product of two matrices, axes merged.

    The sums are the same. A CPU's compiler gives two matrices to its library as they are,
    transposed for the gradients too. Of more axes it lays out a copy for the kernel's gradient, in
    a loop into which it fuses all that the operand was made of: the whole residual stream, once a
    layer.
    """
    return _with_merged_axes(_matrix_product(**options), x, kernel, dimension_numbers)


def _matrix_product(**options: Any) -> Callable[..., Any]:
    """Return `dot_general` for the product of two matrices."""
    matrices = (((1,), (0,)), ((), ()))
    return functools.partial(jax.lax.dot_general, dimension_numbers=matrices, **options)


def _with_merged_axes(
    multiply: Callable[[Any, Any], Any], x: Any, kernel: Any, dimension_numbers: Any
) -> Any:
    """Return the product that `dimension_numbers` names, of two matrices by `multiply`."""
    (x_axes, kernel_axes), _ = dimension_numbers
    size = math.prod(x.shape[axis] for axis in x_axes)
    rows, columns = x.shape[: x_axes[0]], kernel.shape[len(kernel_axes) :]
    product = multiply(x.reshape(-1, size), kernel.reshape(size, -1))
    return product.reshape(*rows, *columns)
