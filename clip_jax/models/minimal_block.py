"""A residual block with a backward pass of its own, which keeps what spares every matrix product.

Between the passes stay the block's input, queries, keys, values, the attention's output, the
residual stream behind it and the MLP's hidden features before their activation, in the dtype of
the activations: ten numbers a feature where the MLP is four times as wide. Norms, activations
and, where its kernel does so, the attention's probabilities are computed again. `jax.checkpoint`
with names keeps the same and rounds each array once more, in a pass over memory of its own.

Values and gradients are those of `layers.ResidualBlock`, to rounding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from clip_jax.models.row_sums import puts_sums_off, sum_rows_first
from clip_jax.models.target import Target

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
ROWS = (((0,), (0,)), ((), ()))
"""Dimension numbers of a product that sums over rows."""


@dataclasses.dataclass(frozen=True)
class BlockParts:
    """What a block is made of beside its matrix products.

    Attributes:
      projections: names of the projections that one product makes, side by side.
      norm: (x, scale, bias) -> (x, its layer norm).
      attend: (what each of those products makes, the biases [3, D], positions) -> the heads'
        outputs side by side. What its `jax.vjp` holds stays between the passes.
      plain_norm: the same of any rows, the norm alone.
      activation: of the MLP.
      dtype: of activations and matrix products.
      target: the devices.
      in_scan: the block is the body of a loop, see `execution.ExecConfig`.
    """

    projections: tuple[tuple[str, ...], ...]
    norm: Callable[[Array, Array, Array], tuple[Array, Array]]
    attend: Callable[..., Array]
    plain_norm: Callable[[Array, Array, Array], Array]
    activation: Callable[[Array], Array]
    dtype: DTypeLike
    target: Target
    in_scan: bool = False

    @property
    def sums_rows_first(self) -> bool:
        """Whether sums over rows are taken before the pass goes on (`row_sums`).

        A turn of a loop ends with its sums: nothing can put them off any further.
        """
        return puts_sums_off(self.target) and not self.in_scan


class Saved(NamedTuple):
    """What stays between the passes: `attend_vjp` holds queries, keys and values."""

    params: Any
    x: Array
    y: Array
    mid: Array
    hidden: Array
    attend_vjp: Any


def residual_block(
    parts: BlockParts,
    params: Any,
    x_ND: Float[Array, "N D"],
    positions_SR: Int[Array, "S R"] | None = None,
) -> Float[Array, "N D"]:
    """Return a block's output; `params` are those of `layers.ResidualBlock`.

    `positions_SR`: of ragged packing, the place of every row in its sequence.
    """

    @jax.custom_vjp
    def block(params: Any, x_ND: Array, positions_SR: Array | None) -> Array:
        return block_output(parts, params, x_ND, positions_SR, differentiated=False)[0]

    block.defvjp(
        functools.partial(block_output, parts, differentiated=True),
        functools.partial(_backward, parts),
    )
    return block(params, x_ND, positions_SR)


def _backward(parts: BlockParts, saved: Saved, d: Array) -> tuple[Any, Array, None]:
    grads, dx = block_gradients(parts, saved, d)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, saved.params), dx, None


def block_output(
    parts: BlockParts, params: Any, x: Array, positions_SR: Array | None, *, differentiated: bool
) -> tuple[Array, Saved | None]:
    """Return a block's output and, where it is differentiated, what `block_gradients` takes."""
    attn, mlp, split = params["attn"], params["mlp"], parts.target.split_rows
    with jax.named_scope("ln_1"):
        h = split(parts.norm(x, *_gain_and_bias(params["ln_1"]))[1])
    with jax.named_scope("attn"):
        projected = []
        for names in parts.projections:
            with jax.named_scope(_joint_name(names)):
                projected.append(split(h @ _side_by_side(parts, attn, names)))
        with jax.named_scope("attend"):
            attend = functools.partial(parts.attend, positions_SR=positions_SR)
            inputs = (*projected, _projection_biases(attn))
            y, attend_vjp = jax.vjp(attend, *inputs) if differentiated else (attend(*inputs), None)
        with jax.named_scope("out_proj"):
            mid = x + scaled(params, "ls_1", dense(parts, attn["out_proj"], y, inputs=2))
    mid = split(mid)
    with jax.named_scope("ln_2"):
        h = split(parts.norm(mid, *_gain_and_bias(params["ln_2"]))[1])
    with jax.named_scope("mlp/c_fc"):
        hidden = split(dense(parts, mlp["c_fc"], h, inputs=1))
    with jax.named_scope("mlp/c_proj"):
        out = dense(parts, mlp["c_proj"], parts.activation(hidden), inputs=1)
        out = split(mid + scaled(params, "ls_2", out))
    return out, Saved(params, x, y, mid, hidden, attend_vjp) if differentiated else None


def block_gradients(parts: BlockParts, saved: Saved, d: Array) -> tuple[Any, Array]:
    """Return the gradients of a block's parameters, float32, and of its input."""
    params, split = saved.params, parts.target.split_rows
    attn, mlp = params["attn"], params["mlp"]
    grads: dict[str, Any] = {"attn": {}, "mlp": {}}
    hidden, mid, d = _compute_now(parts, saved.hidden, saved.mid, d)
    with jax.named_scope("mlp/c_proj"):
        a, pull = jax.vjp(parts.activation, hidden)
        da, grads["mlp"]["c_proj"] = _dense_gradients(
            parts, params, grads, "ls_2", mlp["c_proj"], a, d, inputs=1
        )
        (dhidden,) = pull(split(da))
    with jax.named_scope("ln_2"):
        (_, h), pull = jax.vjp(parts.norm, mid, *_gain_and_bias(params["ln_2"]))
    with jax.named_scope("mlp/c_fc"):
        dh, grads["mlp"]["c_fc"] = _dense_gradients(
            parts, params, grads, "", mlp["c_fc"], h, dhidden, inputs=1
        )
    with jax.named_scope("ln_2"):
        d, *norm_grads = pull((d, split(dh)))
        grads["ln_2"] = dict(zip(("scale", "bias"), norm_grads, strict=True))
    with jax.named_scope("attn/out_proj"):
        dy, grads["attn"]["out_proj"] = _dense_gradients(
            parts, params, grads, "ls_1", attn["out_proj"], saved.y, d, inputs=2
        )
    x, dy = _compute_now(parts, saved.x, split(dy))
    with jax.named_scope("attn/attend"):
        *dprojected, dbiases = saved.attend_vjp(dy)
    with jax.named_scope("ln_1"):
        (_, h), pull = jax.vjp(parts.norm, x, *_gain_and_bias(params["ln_1"]))
    dh, kernels = jnp.zeros((), parts.dtype), []
    for i, (names, d_names) in enumerate(zip(parts.projections, dprojected, strict=True)):
        with jax.named_scope(f"attn/{_joint_name(names)}"):
            dh = dh + d_names @ _side_by_side(parts, attn, names).T
            if parts.sums_rows_first:
                (kernel, dbias), dh = _parameter_gradients(parts, h, d_names, dh)
                dbiases = dbiases.at[i].set(dbias)
            else:
                kernel = _kernel_gradient(h, d_names)
            kernels += jnp.split(kernel, len(names), axis=1)
    for name, kernel, bias in zip(PROJECTIONS, kernels, dbiases, strict=True):
        grads["attn"][name] = _like(attn[name], kernel, bias)
    with jax.named_scope("ln_1"):
        dx, *norm_grads = pull((d, split(dh)))
    if parts.sums_rows_first:
        # The devices exchange what was summed above beside the attention's backward pass.
        early = {"mlp": grads["mlp"], "ln_2": grads["ln_2"], "out_proj": grads["attn"]["out_proj"]}
        dx, early = lax.optimization_barrier((dx, early))
        grads |= {"mlp": early["mlp"], "ln_2": early["ln_2"]}
        grads["attn"]["out_proj"] = early["out_proj"]
    with jax.named_scope("ln_1"):
        grads["ln_1"] = dict(zip(("scale", "bias"), norm_grads, strict=True))
    return grads, split(dx)


def _compute_now(parts: BlockParts, *arrays: Array) -> tuple[Array, ...]:
    """Keep the compiler from holding what is made of these again since the forward pass.

    In a loop it cannot, and would copy out of the stacks what it can read there; but on a v6e the
    loop has more copies without.
    """
    is_free = parts.in_scan and parts.target.generation != "v6e"
    return arrays if is_free else lax.optimization_barrier(arrays)


def _gain_and_bias(norm: Any) -> tuple[Array, Array]:
    return norm["scale"], norm["bias"]


def matrix(dtype: DTypeLike, layer: Any, *, inputs: int) -> Array:
    """Return a dense layer's kernel as a matrix; its first `inputs` axes are the input's."""
    kernel = layer["kernel"]
    rows = 1
    for size in kernel.shape[:inputs]:
        rows *= size
    return kernel.reshape(rows, -1).astype(dtype)


def _joint_name(names: tuple[str, ...]) -> str:
    """Return qkv_proj for q_proj, k_proj and v_proj."""
    return "".join(name[0] for name in names) + "_proj"


def _side_by_side(parts: BlockParts, attn: Any, names: tuple[str, ...]) -> Array:
    """Return the kernels of these projections as one matrix."""
    kernels = [matrix(parts.dtype, attn[name], inputs=1) for name in names]
    return kernels[0] if len(kernels) == 1 else jnp.concatenate(kernels, 1)


def _like(layer: Any, kernel: Array, bias: Array) -> dict[str, Array]:
    """Return a dense layer's gradients in the shapes of its parameters."""
    gradients = {"kernel": kernel, "bias": bias}
    return {n: g.reshape(layer[n].shape) for n, g in gradients.items()}


def dense(parts: BlockParts, layer: Any, x: Array, *, inputs: int) -> Array:
    """Return a dense layer's output."""
    bias = layer["bias"].reshape(-1).astype(parts.dtype)
    return x @ matrix(parts.dtype, layer, inputs=inputs) + bias


def _projection_biases(attn: Any) -> Float[Array, "3 D"]:
    return jnp.stack([attn[name]["bias"].reshape(-1) for name in PROJECTIONS])


def scaled(params: Any, name: str, x: Array) -> Array:
    """Apply the layer scale of this name, if the block has one."""
    return x * params[name]["gamma"].astype(x.dtype) if name in params else x


def _dense_gradients(
    parts: BlockParts,
    params: Any,
    grads: dict[str, Any],
    scale: str,
    layer: Any,
    x: Array,
    d: Array,
    *,
    inputs: int,
) -> tuple[Array, dict[str, Array]]:
    """Return the gradients of a dense layer's input and of its parameters.

    A layer scale behind it, of the name `scale`, puts its own into `grads`. Of g (x W + b) that is
    the sum of d (x W + b) over rows, which needs no product of its own: with G = x^T d, the
    gradient of W without the scale, it is the sum over inputs of W G, and b times the sum of d.
    """
    weights = matrix(parts.dtype, layer, inputs=inputs)
    gamma = params[scale]["gamma"] if scale in params else None
    dx = (d if gamma is None else d * gamma.astype(d.dtype)) @ weights.T
    (dkernel, dbias), dx = _parameter_gradients(parts, x, d, dx)
    if gamma is not None:
        dgamma = jnp.sum(weights.astype(jnp.float32) * dkernel, 0) + layer["bias"] * dbias
        grads[scale] = {"gamma": dgamma}
        dkernel, dbias = dkernel * gamma, dbias * gamma
    return dx, _like(layer, dkernel, dbias)


def _parameter_gradients(
    parts: BlockParts, x: Array, d: Array, waiting: Array
) -> tuple[tuple[Array, ...], Array]:
    """Return the gradients of a kernel and of its bias, float32, and `waiting`."""

    def sums(x: Array, d: Array) -> tuple[Array, Array]:
        return _kernel_gradient(x, d), _row_sum(parts.target, d)

    if not parts.sums_rows_first:
        return sums(x, d), waiting
    return sum_rows_first(parts.target, sums, (x, d), waiting)


def _kernel_gradient(x: Array, d: Array) -> Array:
    """Return the gradient of a kernel as a float32 matrix."""
    return lax.dot_general(x, d, ROWS, preferred_element_type=jnp.float32)


def _row_sum(target: Target, d: Array) -> Array:
    """Return the sum over all rows, float32; on a TPU by a product with ones, twice as fast."""
    # libtpu 0.0.42 fails where such a product's result is summed and split over `fsdp`.
    is_split = target.mesh is not None and target.mesh.shape["fsdp"] > 1
    if target.platform != "tpu" or is_split:
        return jnp.sum(d.astype(jnp.float32), 0)
    return _kernel_gradient(jnp.ones((len(d), 8), d.dtype), d)[0]
