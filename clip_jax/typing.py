"""The letters of every shape in this project, and the types that rooms share.

A tensor of rank two or more ends in its shape, one letter a dimension:

=  =============================================================
B  rows of the global batch; `b` is one device's share of them, `c` one tile of them
L  positions in a sequence (text tokens or image patches)
D  features: a tower's width, or the shared embedding
H  image height
W  image width
C  image channels
N  attention heads
K  features of one head
V  vocabulary entries
M  classes
T  prompt templates
=  =============================================================
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Params = dict[str, Any]
"""A nested dict of arrays, as `flax.linen.Module.init` returns it under "params"."""

Images = Float[Array, "B H W 3"]
Tokens = Int[Array | np.ndarray, "B L"]
Features = Float[Array, "B D"]
Rows = Bool[Array, " B"]
Scalar = Float[Array, ""]


def path_name(path: tuple[Any, ...]) -> str:
    """Return the path of a leaf of a tree, its names joined by slashes: visual/proj."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return every leaf of a tree by its path, as `path_name` has it."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids. Rows end with `eot_id` and are filled up with `pad_id` behind it."""

    vocab_size: int
    eot_id: int
    pad_id: int

    def __call__(self, texts: Sequence[str], context_length: int = 77) -> np.ndarray:
        """Return token ids, int32 [batch, context_length]; a text too long keeps its end token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of one row of ids, up to its end token."""
        ...
