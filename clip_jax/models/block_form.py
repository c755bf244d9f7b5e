"""What sets the residual block of a family apart from CLIP's own."""

import dataclasses

from clip_jax.errors import check_choice
from clip_jax.models.rotary import RotaryConfig
from clip_jax.models.sizes import check_sizes

NORMS = ("before", "behind", "after")
MLPS = ("plain", "swiglu", "geglu")


@dataclasses.dataclass(frozen=True)
class BlockForm:
    """The differences from a block with norms before its branches, biases and a plain MLP.

    Attributes:
      norms: a layer norm stands "before" each branch (CLIP), "behind" it and before the sum
        (EVA-02's largest), or "after" the sum (BERT).
      mlp: "plain", or gated: "swiglu" (Shazeer 2020; see `gated_mlp`), "geglu".
      mlp_norm: a norm of its own stands before the MLP, behind the block's (ViTamin).
      inner_norms: layer norms stand before the last matrix of both branches too (EVA-02).
      key_bias: keys have a bias as queries and values do.
      rotary: queries and keys turn with their places; None has no such positions.
    """

    norms: str = "before"
    mlp: str = "plain"
    mlp_norm: bool = False
    inner_norms: bool = False
    key_bias: bool = True
    rotary: RotaryConfig | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "form")
        check_choice("form.norms", self.norms, NORMS)
        check_choice("form.mlp", self.mlp, MLPS)
