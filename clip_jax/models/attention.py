"""Attention, its kernel chosen when a program is traced.

There are two kernels: XLA's, which makes the logits of all heads, and cuDNN's flash attention,
which never holds them. cuDNN takes a causal mask and lengths of sequences, but no mask array at an
odd length in training (jax 0.10, `jax/_src/cudnn/fused_attention_stablehlo.py`,
check_is_flash_attention); 77, 197 and 257 are odd. So no mask array is ever made, and odd lengths
get one more row, which the causal mask or the lengths hide.
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
    """The kind of device that a program runs on.

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
      note: the reason for xla, or cudnn's padding; empty where there is none.
    """

    name: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name


def this_accelerator() -> Accelerator:
    """Return the kind of the first device."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return Accelerator(device.platform)
    if "cuda" not in device.client.platform_version:
        return Accelerator("rocm")
    major, minor = device.compute_capability.split(".")
    return Accelerator("cuda", (int(major), int(minor)))


def choose_kernel(
    implementation: str,
    accelerator: Accelerator,
    *,
    dtype: DTypeLike,
    head_size: int,
    queries: int,
    keys: int,
) -> Kernel:
    """Return the kernel of an attention of so many query and key rows; a function of these alone.

    Args:
      implementation: "xla", "cudnn", or "auto": cudnn where it can run and saves memory.
      accelerator: the kind of device.
      dtype: of queries, keys and values.
      head_size: features of one head.
      queries, keys: rows of a sequence.

    Raises:
      UserError: "cudnn" is asked for where it cannot run.
    """
    if implementation == "xla":
        return Kernel("xla")
    reason = _cudnn_unsupported_reason(accelerator, jnp.dtype(dtype), head_size)
    if reason and implementation == "cudnn":
        raise UserError(
            f'config.model.attention is "cudnn", which cannot run here: {reason}; '
            'choose "auto" or "xla"'
        )
    if reason:
        return Kernel("xla", reason)
    if queries == 1:
        # Its logits are one row a head: there is nothing to save.
        return Kernel("xla", "one query")
    odd = [length for length in dict.fromkeys((queries, keys)) if length % 2]
    return Kernel("cudnn", ", ".join(f"{length} padded to {length + 1}" for length in odd))


def _cudnn_unsupported_reason(
    accelerator: Accelerator, dtype: jnp.dtype, head_size: int
) -> str | None:
    """Return why cuDNN's kernel cannot run, None where it can."""
    largest = 256 if accelerator.capability >= (9, 0) else 128
    version = ".".join(map(str, accelerator.capability))
    conditions = (
        (accelerator.platform == "cuda", f"no NVIDIA GPU but {accelerator.platform}"),
        (
            accelerator.capability >= (8, 0),
            f"a GPU of compute capability {version}, below 8.0",
        ),
        (dtype.itemsize == 2, f"{dtype} activations; it takes bfloat16"),
        (head_size % 8 == 0, f"heads of {head_size} features, no multiple of 8"),
        (head_size <= largest, f"heads of {head_size} features, more than {largest}"),
    )
    return next((reason for holds, reason in conditions if not holds), None)


def attend(
    q_BLNK: Float[Array, "B l N K"],
    k_BLNK: Float[Array, "B L N K"],
    v_BLNK: Float[Array, "B L N K"],
    *,
    is_causal: bool = False,
    key_lengths_B: Int[Array, " B"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B l N K"]:
    """Return softmax attention, scaled by K^-1/2; the softmax is in float32 whatever the dtype.

    Args:
      q_BLNK, k_BLNK, v_BLNK: queries, keys and values of N heads.
      is_causal: a query sees the keys up to its own position.
      key_lengths_B: how many leading keys the queries of each sequence see; None is all.
      implementation: see `choose_kernel`.

    Raises:
      UserError: "cudnn" is asked for where it cannot run.
    """
    kernel = choose_kernel(
        implementation,
        this_accelerator(),
        dtype=q_BLNK.dtype,
        head_size=q_BLNK.shape[-1],
        queries=q_BLNK.shape[1],
        keys=k_BLNK.shape[1],
    )
    if kernel.name == "cudnn" and key_lengths_B is None:
        return attend_padded(q_BLNK, k_BLNK, v_BLNK, is_causal=is_causal, implementation="cudnn")
    return jax.nn.dot_product_attention(
        q_BLNK,
        k_BLNK,
        v_BLNK,
        is_causal=is_causal,
        key_value_seq_lengths=key_lengths_B,
        implementation="xla",
    )


def attend_padded(
    q_BLNK: Float[Array, "B l N K"],
    k_BLNK: Float[Array, "B L N K"],
    v_BLNK: Float[Array, "B L N K"],
    *,
    is_causal: bool,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "B l N K"]:
    """Return attention over sequences padded to an even length by a row of zeros behind them.

    Equal to attention without the row. Keys: under a causal mask the row comes after every true
    query; else the lengths hide it. Queries: the row's result is cut off, so its cotangent is zero,
    and with it what it adds to the gradients of keys and values.
    """
    queries, keys = q_BLNK.shape[1], k_BLNK.shape[1]
    needs_lengths = (queries % 2 or keys % 2) and not is_causal
    batch = q_BLNK.shape[0]
    y_BLNK = jax.nn.dot_product_attention(
        _pad_to_even(q_BLNK),
        _pad_to_even(k_BLNK),
        _pad_to_even(v_BLNK),
        is_causal=is_causal,
        query_seq_lengths=jnp.full(batch, queries, jnp.int32) if needs_lengths else None,
        key_value_seq_lengths=jnp.full(batch, keys, jnp.int32) if needs_lengths else None,
        implementation=implementation,
    )
    return y_BLNK[:, :queries]


def _pad_to_even(x_BLNK: Array) -> Array:
    """Return sequences with a row of zeros behind them where their length is odd."""
    return jnp.pad(x_BLNK, ((0, 0), (0, x_BLNK.shape[1] % 2), (0, 0), (0, 0)))
