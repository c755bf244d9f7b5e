"""What every evaluator does with an encoder: call it on equal batches, take unit vectors."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32

from clip_jax.errors import UserError

# uint8 [b, H, W, 3] -> [b, D], and int32 [b, L] -> [b, D]: JAX or numpy, of any length.
EncodeImage = Callable[[np.ndarray], Any]
EncodeText = Callable[[np.ndarray], Any]


def unit_rows(z_BD: Any) -> Float32[np.ndarray, "B D"]:
    """Rows of length one, x / max(|x|, 1e-12) as torch's `normalize` has it, on the host.

    Raises UserError for values that are not finite: they would win or lose every comparison.
    """
    z_BD = np.asarray(z_BD, np.float32)
    bad = int((~np.isfinite(z_BD)).any(axis=1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(z_BD)} features are not finite: the model's weights are damaged or "
            "its training has diverged"
        )
    return z_BD / np.maximum(np.linalg.norm(z_BD, axis=1, keepdims=True), 1e-12)


def encode_padded(
    encode_text: EncodeText, tokens_BL: np.ndarray, batch_size: int
) -> Float32[np.ndarray, "B D"]:
    """Unit features of any number of token rows, encoded `batch_size` at a time.

    The last batch is filled up with its last row: a jitted encoder meets one shape only.
    """
    parts = []
    for start in range(0, len(tokens_BL), batch_size):
        part_bL = tokens_BL[start : start + batch_size]
        padded_bL = np.pad(part_bL, ((0, batch_size - len(part_bL)), (0, 0)), mode="edge")
        parts.append(unit_rows(encode_text(padded_bL))[: len(part_bL)])
    return np.concatenate(parts)
