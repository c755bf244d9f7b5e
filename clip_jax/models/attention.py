"""Attention, its kernel chosen when a program is traced.

There are three kernels: XLA's, which makes the logits of all heads; on TPUs one of ours in Pallas,
which holds whole sequences in fast memory; and cuDNN's flash attention on NVIDIA GPUs. cuDNN takes
a causal mask and lengths of sequences, but no mask array at an odd length in training (jax 0.10,
`jax/_src/cudnn/fused_attention_stablehlo.py`, check_is_flash_attention); 77, 197 and 257 are odd.
So no mask array is ever made, and odd lengths get one more row, which the causal mask or the
lengths hide.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from clip_jax.errors import UserError
from clip_jax.models.kernels.vmem import attention_fits
from clip_jax.models.target import ONE_CPU, Target


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel of one attention.

    Attributes:
      name: "xla", "cudnn" or "pallas".
      note: the reason for xla, or cudnn's padding; empty where there is none.
    """

    name: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.note})" if self.note else self.name


def choose_kernel(
    implementation: str,
    target: Target,
    *,
    dtype: DTypeLike,
    heads: int,
    head_size: int,
    queries: int,
    keys: int,
) -> Kernel:
    """Return the kernel of an attention of so many query and key rows; a function of these alone.

    Args:
      implementation: "xla", "cudnn" (NVIDIA GPUs), "pallas" (TPUs), or "auto": on GPUs and TPUs
        their own where it can run and saves memory.
      target: the devices.
      dtype: of queries, keys and values.
      heads, head_size: the number of heads, and the features of one.
      queries, keys: rows of a sequence.

    Raises:
      UserError: "cudnn" or "pallas" is asked for where it cannot run.
    """
    if implementation == "xla":
        return Kernel("xla")
    name = implementation
    if implementation == "auto":
        name = "pallas" if target.platform == "tpu" else "cudnn"
    if name == "pallas":
        reason = _pallas_unsupported_reason(target, jnp.dtype(dtype), heads, head_size, keys)
    else:
        reason = _cudnn_unsupported_reason(target, jnp.dtype(dtype), head_size)
    if reason and implementation != "auto":
        raise UserError(
            f'config.model.attention is "{name}", which cannot run here: {reason}; '
            'choose "auto" or "xla"'
        )
    if reason:
        return Kernel("xla", reason)
    if queries == 1:
        # Its logits are one row a head: there is nothing to save.
        return Kernel("xla", "one query")
    if name == "pallas":
        return Kernel("pallas") if queries == keys else Kernel("xla", "queries of other rows")
    odd = [length for length in dict.fromkeys((queries, keys)) if length % 2]
    return Kernel("cudnn", ", ".join(f"{length} padded to {length + 1}" for length in odd))


def _pallas_unsupported_reason(
    target: Target, dtype: jnp.dtype, heads: int, head_size: int, length: int
) -> str | None:
    """Return why the TPU's kernel cannot run, None where it can."""
    conditions = (
        (target.platform == "tpu", f"no TPU but {target.platform}"),
        (dtype == jnp.bfloat16, f"{dtype} activations; it takes bfloat16"),
        (head_size % 8 == 0, f"heads of {head_size} features, no multiple of 8"),
        (target.splits_rows_alone, "heads are split over config.mesh.tensor"),
        (
            attention_fits(length, heads * head_size, target.generation),
            f"{length} rows do not fit in the fast memory of {target.generation}",
        ),
    )
    return next((reason for holds, reason in conditions if not holds), None)


def _cudnn_unsupported_reason(target: Target, dtype: jnp.dtype, head_size: int) -> str | None:
    """Return why cuDNN's kernel cannot run, None where it can."""
    largest = 256 if target.capability >= (9, 0) else 128
    version = ".".join(map(str, target.capability))
    conditions = (
        (target.platform == "cuda", f"no NVIDIA GPU but {target.platform}"),
        (
            target.capability >= (8, 0),
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
    target: Target = ONE_CPU,
) -> Float[Array, "B l N K"]:
    """Return softmax attention, scaled by K^-1/2; the softmax is in float32 whatever the dtype.

    Args:
      q_BLNK, k_BLNK, v_BLNK: queries, keys and values of N heads.
      is_causal: a query sees the keys up to its own position.
      key_lengths_B: how many leading keys the queries of each sequence see; None is all.
      implementation, target: see `choose_kernel`.

    Raises:
      UserError: "cudnn" or "pallas" is asked for where it cannot run.
    """
    kernel = choose_kernel(
        implementation,
        target,
        dtype=q_BLNK.dtype,
        heads=q_BLNK.shape[2],
        head_size=q_BLNK.shape[-1],
        queries=q_BLNK.shape[1],
        keys=k_BLNK.shape[1],
    )
    if kernel.name == "cudnn":
        return attend_padded(
            q_BLNK,
            k_BLNK,
            v_BLNK,
            is_causal=is_causal,
            key_lengths_B=key_lengths_B,
            implementation="cudnn",
        )
    if kernel.name == "pallas" and key_lengths_B is None and target.shares(len(q_BLNK)):
        return attend_short(q_BLNK, k_BLNK, v_BLNK, is_causal=is_causal, target=target)
    return jax.nn.dot_product_attention(
        q_BLNK,
        k_BLNK,
        v_BLNK,
        is_causal=is_causal,
        key_value_seq_lengths=key_lengths_B,
        implementation="xla",
    )


def attend_packed(
    q_SRNK: Float[Array, "S R N K"],
    k_SRNK: Float[Array, "S R N K"],
    v_SRNK: Float[Array, "S R N K"],
    positions_SR: Int[Array, "S R"],
) -> Float[Array, "S R N K"]:
    """Return causal attention within the sequences that lie one behind another in each segment.

    `positions_SR`: the place of every row in its sequence. No row sees one before its sequence's
    first.
    """
    row_R = jnp.arange(positions_SR.shape[1])
    behind_RR = row_R[:, None] - row_R
    seen_SRR = (behind_RR >= 0) & (behind_RR <= positions_SR[:, :, None])
    return jax.nn.dot_product_attention(
        q_SRNK, k_SRNK, v_SRNK, mask=seen_SRR[:, None], implementation="xla"
    )


def attend_short(
    q_BLNK: Float[Array, "B L N K"],
    k_BLNK: Float[Array, "B L N K"],
    v_BLNK: Float[Array, "B L N K"],
    *,
    is_causal: bool,
    target: Target,
) -> Float[Array, "B L N K"]:
    """Return attention by the TPU's kernel, which takes the heads of a row side by side."""
    # Importing Pallas takes half a second, which other devices need not spend.
    from clip_jax.models.kernels.attention import Heads, short_attention

    batch, length, heads, head_size = q_BLNK.shape
    rows = [x.reshape(batch, length, -1) for x in (q_BLNK, k_BLNK, v_BLNK)]
    no_bias_3D = jnp.zeros((3, heads * head_size), q_BLNK.dtype)
    y_BLD = short_attention(jnp.concatenate(rows, -1), no_bias_3D, Heads(heads, is_causal, target))
    return y_BLD.reshape(q_BLNK.shape)


def attend_padded(
    q_BLNK: Float[Array, "B l N K"],
    k_BLNK: Float[Array, "B L N K"],
    v_BLNK: Float[Array, "B L N K"],
    *,
    is_causal: bool,
    key_lengths_B: Int[Array, " B"] | None = None,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "B l N K"]:
    """Return attention over sequences padded to an even length by a row of zeros behind them.

    Equal to attention without the row. Keys: under a causal mask the row comes after every true
    query; else the lengths hide it. Queries: the row's result is cut off, so its cotangent is zero,
    and with it what it adds to the gradients of keys and values.
    """
    batch, queries = q_BLNK.shape[:2]
    keys = k_BLNK.shape[1]
    if key_lengths_B is None and (queries % 2 or keys % 2) and not is_causal:
        key_lengths_B = jnp.full(batch, keys, jnp.int32)
    y_BLNK = jax.nn.dot_product_attention(
        _pad_to_even(q_BLNK),
        _pad_to_even(k_BLNK),
        _pad_to_even(v_BLNK),
        is_causal=is_causal,
        query_seq_lengths=None if key_lengths_B is None else jnp.full(batch, queries, jnp.int32),
        key_value_seq_lengths=key_lengths_B,
        implementation=implementation,
    )
    return y_BLNK[:, :queries]


def _pad_to_even(x_BLNK: Array) -> Array:
    """Return sequences with a row of zeros behind them where their length is odd."""
    return jnp.pad(x_BLNK, ((0, 0), (0, x_BLNK.shape[1] % 2), (0, 0), (0, 0)))


@jax.custom_vjp
def float32_logits(
    q_SMD: Float[Array, "S M D"], h_SRD: Float[Array, "S R D"]
) -> Float[Array, "S M R"]:
    """Return each query's product with every row of its segment, in float32.

    The gradient's products are of the inputs' dtype, as attention kernels have them: by itself JAX
    makes the inputs float32 for them, and so copies the rows.
    """
    return jnp.einsum("smd,srd->smr", q_SMD, h_SRD, preferred_element_type=jnp.float32)


def _logits_forward(q_SMD: Array, h_SRD: Array) -> tuple[Array, tuple[Array, Array]]:
    return float32_logits(q_SMD, h_SRD), (q_SMD, h_SRD)


def _logits_backward(kept: tuple[Array, Array], dlogits_SMR: Array) -> tuple[Array, Array]:
    q_SMD, h_SRD = kept
    d_SMR = dlogits_SMR.astype(h_SRD.dtype)
    return (
        jnp.einsum("smr,srd->smd", d_SMR, h_SRD).astype(q_SMD.dtype),
        jnp.einsum("smr,smd->srd", d_SMR, q_SMD).astype(h_SRD.dtype),
    )


float32_logits.defvjp(_logits_forward, _logits_backward)
