"""The residual stream as a matrix: how sequences lie in its rows.

A TPU holds arrays in tiles of eight rows. Sequences of 50 or 77 rows do not fill them, and the
compiler lays the stream out with the batch inside instead, which a kernel that takes whole
sequences cannot read: every kernel is then surrounded by copies. A matrix whose rows are whole
tiles for each kernel's program has one layout for all.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.models.target import Target

SUBLANES, LANES = 8, 128
MAX_ROWS = 256
"""Of a segment with several sequences: their logits are computed all with all."""
MAX_SEQUENCES = 16
HIDDEN = -1e30
"""The logit of a key that a query does not see: below every other, yet finite."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """The place of every row of [B, L, D] in a matrix [N, D].

    The matrix is a row of segments, each of so many sequences. Rows behind a sequence's own are
    zeros when they are made, hidden from attention, and have no gradient.

    Attributes:
      batch: sequences.
      length: rows of a sequence.
      stride: rows from one sequence's start to the next one's.
      sequences: of one segment.
      is_ragged: a segment's rows are shorter sequences of any lengths, one behind another, and an
        array says where in its sequence each row stands; else all have this length.
    """

    batch: int
    length: int
    stride: int
    sequences: int = 1
    is_ragged: bool = False

    @property
    def segment(self) -> int:
        """The number of rows of a segment."""
        return self.stride * self.sequences

    def flatten(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "N D"]:
        """Return the matrix of these sequences."""
        padding = ((0, 0), (0, self.stride - self.length), (0, 0))
        x_BLD = jnp.pad(x_BLD, padding) if self.stride > self.length else x_BLD
        return x_BLD.reshape(-1, x_BLD.shape[-1])

    def unflatten(self, x_ND: Float[Array, "N D"]) -> Float[Array, "B L D"]:
        """Return the sequences of a matrix."""
        return x_ND.reshape(self.batch, self.stride, -1)[:, : self.length]

    def segments(self, x_ND: Float[Array, "N D"]) -> Float[Array, "S R D"]:
        """Return the segments of a matrix."""
        return x_ND.reshape(-1, self.segment, x_ND.shape[-1])


def choose_packing(batch: int, length: int, target: Target) -> Packing:
    """Return the packing for kernels that take whole segments, which are whole tiles.

    Several sequences share a segment where that fills tiles (four of 50), or where it costs
    nothing: a program's logits take whole registers of 128 lanes. What still does not fill a tile
    is padded: 77 rows to 80, 197 to 200, 257 to 264.
    """
    shard = batch // target.batch_shards
    counts = [n for n in _powers_of_two(MAX_SEQUENCES) if shard % n == 0]
    exact = [n for n in counts if n * length % SUBLANES == 0 and n * length <= MAX_ROWS]
    stride = length if exact else -(-length // SUBLANES) * SUBLANES
    fitting = exact or [n for n in counts if n == 1 or n * stride <= MAX_ROWS]
    # Fewest registers of logits; of equals the largest segment, whose programs are fewest.
    sequences = min(fitting, key=lambda n: (stride * -(-n * stride // LANES), -n))
    return Packing(batch, length, stride, sequences)


def _powers_of_two(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]
