"""Attention, its kernel chosen when a program is traced.

Two kernels: XLA's, which makes the logits of all heads, and cuDNN's flash attention, which never
holds them. cuDNN takes a causal mask and lengths of sequences, but no mask array at an odd length
in training (jax 0.10, `jax/_src/cudnn/fused_attention_stablehlo.py`, check_is_flash_attention);
77, 197 and 257 are odd. So no mask array is ever made, and odd lengths get one more row, which
the causal mask or the lengths hide.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from clip_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """What a program will run on.

    Attributes:
      platform: "cpu", "cuda", "rocm" or "tpu".
      capability: an NVIDIA GPU's compute capability.
    """

    platform: str
    capability: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel of one attention.

    Attributes:
      name: "xla" or "cudnn".
      note: why xla, or what cudnn's padding is; for a line to the user.
    """

    name: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name


def this_accelerator() -> Accelerator:
    """The first device."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return Accelerator(device.platform)
    if "cuda" not in device.client.platform_version:
        return Accelerator("rocm")
    major, minor = device.compute_capability.split(".")
    return Accelerator("cuda", (int(major), int(minor)))


def choose_kernel(
    wanted: str, on: Accelerator, *, dtype: DTypeLike, head_size: int, queries: int, keys: int
) -> Kernel:
    """The kernel of an attention of so many query and key rows; a function of these alone.

    Raises:
      UserError: "cudnn" is wanted where it cannot run.
    """
    if wanted == "xla":
        return Kernel("xla")
    why = _why_not_cudnn(on, jnp.dtype(dtype), head_size)
    if why and wanted == "cudnn":
        raise UserError(
            f'config.model.attention is "cudnn", which cannot run here: {why}; '
            'choose "auto" or "xla"'
        )
    if why:
        return Kernel("xla", why)
    if queries == 1:
        # Its logits are one row a head: there is nothing to save.
        return Kernel("xla", "one query")
    odd = [length for length in dict.fromkeys((queries, keys)) if length % 2]
    return Kernel("cudnn", ", ".join(f"{length} padded to {even(length)}" for length in odd))


def _why_not_cudnn(on: Accelerator, dtype: jnp.dtype, head_size: int) -> str | None:
    largest = 256 if on.capability >= (9, 0) else 128
    version = ".".join(map(str, on.capability))
    conditions = (
        (on.platform == "cuda", f"no NVIDIA GPU but {on.platform}"),
        (on.capability >= (8, 0), f"a GPU of compute capability {version}, below 8.0"),
        (dtype.itemsize == 2, f"{dtype} activations; it takes bfloat16"),
        (head_size % 8 == 0, f"heads of {head_size} features, no multiple of 8"),
        (head_size <= largest, f"heads of {head_size} features, more than {largest}"),
    )
    return next((why for holds, why in conditions if not holds), None)


def even(length: int) -> int:
    """The next even number."""
    return length + length % 2


def attend(
    q_BLNK: Float[Array, "B l N K"],
    k_BLNK: Float[Array, "B L N K"],
    v_BLNK: Float[Array, "B L N K"],
    *,
    is_causal: bool = False,
    visible_B: Int[Array, " B"] | None = None,
    wanted: str = "auto",
) -> Float[Array, "B l N K"]:
    """Softmax attention, scaled by K^-1/2; the softmax in float32 whatever the dtype.

    `visible_B`: how many leading keys the queries of a sequence may see; None is all.
    """
    kernel = choose_kernel(
        wanted,
        this_accelerator(),
        dtype=q_BLNK.dtype,
        head_size=q_BLNK.shape[-1],
        queries=q_BLNK.shape[1],
        keys=k_BLNK.shape[1],
    )
    if kernel.name == "cudnn" and visible_B is None:
        return even_attention(q_BLNK, k_BLNK, v_BLNK, is_causal=is_causal, implementation="cudnn")
    return jax.nn.dot_product_attention(
        q_BLNK,
        k_BLNK,
        v_BLNK,
        is_causal=is_causal,
        key_value_seq_lengths=visible_B,
        implementation="xla",
    )


def even_attention(
    q_BLNK: Float[Array, "B l N K"],
    k_BLNK: Float[Array, "B L N K"],
    v_BLNK: Float[Array, "B L N K"],
    *,
    is_causal: bool,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "B l N K"]:
    """Attention over sequences made even by a row of zeros behind them.

    Equal to attention without it. Keys: under a causal mask the row comes after every true query;
    else the lengths hide it. Queries: the row's result is cut off, so its cotangent is zero, and
    with it what it adds to the gradients of keys and values.
    """
    queries, keys = q_BLNK.shape[1], k_BLNK.shape[1]
    hidden = (queries % 2 or keys % 2) and not is_causal
    y_BLNK = jax.nn.dot_product_attention(
        _made_even(q_BLNK),
        _made_even(k_BLNK),
        _made_even(v_BLNK),
        is_causal=is_causal,
        query_seq_lengths=jnp.full(q_BLNK.shape[0], queries, jnp.int32) if hidden else None,
        key_value_seq_lengths=jnp.full(q_BLNK.shape[0], keys, jnp.int32) if hidden else None,
        implementation=implementation,
    )
    return y_BLNK[:, :queries]


def _made_even(x_BLNK: Array) -> Array:
    return jnp.pad(x_BLNK, ((0, 0), (0, x_BLNK.shape[1] % 2), (0, 0), (0, 0)))
