"""Low-rank adapters: a product of two small matrices beside a kernel that stays as it is.

Hu et al. 2021 (arXiv:2106.09685): kernel + scale * (lora_a @ lora_b), where `lora_a` is [in, rank],
`lora_b` [rank, out] and zero at first. They are a tree of their own, `lora`, with the paths of the
kernels. The model never sees them: it is given the sum, so that every tower and every way to run it
has adapters, and what is merged is what was trained.
"""

import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clip_jax.errors import UserError
from clip_jax.models.stack import STACK
from clip_jax.typing import Params, leaves_by_path

LORA, LORA_A, LORA_B = "lora", "lora_a", "lora_b"

TARGETS = {
    "q": r"attn\w*/q_proj/kernel$",
    "k": r"attn\w*/k_proj/kernel$",
    "v": r"attn\w*/v_proj/kernel$",
    "out": r"attn/out_proj/kernel$",
    "fc": r"mlp/c_fc/kernel$",
    "proj": r"mlp/c_proj/kernel$",
    "conv": r"^visual/.*conv\w*/kernel$",
    "head": r"^(visual/proj|text/text_projection)$",
}
"""Words that stand for a pattern in `config.train.lora_targets`."""

_INPUT_AXES = (
    # How many first axes of a kernel are its input; of a convolution its window, too.
    (r"conv\w*/kernel$", 3),
    (r"attn/out_proj/kernel$", 2),
    (r"attn\w*/[qkv]_proj/kernel$", 1),
    (r"mlp/(c_fc|c_gate|c_proj)/kernel$", 1),
    (r"^(visual/proj|text/text_projection)$", 1),
)


def adapter_shapes(path: str, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the two matrices beside a kernel, an axis of blocks in front.

    Raises:
      UserError: the parameter is no matrix.
    """
    inputs = next((axes for pattern, axes in _INPUT_AXES if re.search(pattern, path)), None)
    if inputs is None:
        raise UserError(f"config.train.lora_targets: {path} is no matrix that can have an adapter")
    blocks = tuple(shape[: int(is_stacked(path))])
    kernel = shape[len(blocks) :]
    fan_in, fan_out = int(np.prod(kernel[:inputs])), int(np.prod(kernel[inputs:]))
    return (*blocks, fan_in, rank), (*blocks, rank, fan_out)


def is_stacked(path: str) -> bool:
    """Return whether a parameter is one of blocks that are stacked for a loop."""
    return f"/{STACK}/" in path


def target_paths(params: Params, targets: Sequence[str]) -> list[str]:
    """Return the paths of the kernels that words of `TARGETS` or regular expressions name.

    Raises:
      UserError: there are none.
    """
    patterns = [re.compile(TARGETS.get(target, target)) for target in targets]
    names = [name for name in leaves_by_path(params) if not name.startswith(f"{LORA}/")]
    found = [name for name in names if any(pattern.search(name) for pattern in patterns)]
    if not found:
        raise UserError(
            f"config.train.lora_targets is {tuple(targets)} and this model has no such matrix; "
            f"it takes regular expressions on paths, or {', '.join(TARGETS)}"
        )
    return found


def make_adapters(params: Params, *, rank: int, targets: Sequence[str], seed: int) -> Params:
    """Draw the adapters beside the kernels of a model, whose sum is the model as it is; traceable.

    `lora_a` is uniform in 1/sqrt(in), as the authors' code and PEFT have it.
    """
    leaves, tree = leaves_by_path(params), dict[str, Any]()
    for path in target_paths(params, targets):
        first, second = adapter_shapes(path, leaves[path].shape, rank)
        node = tree
        for name in path.split("/"):
            node = node.setdefault(name, {})
        node[LORA_A] = _draw(path, first, seed)
        node[LORA_B] = jnp.zeros(second)
    return tree


def _draw(path: str, shape: tuple[int, ...], seed: int) -> jax.Array:
    """Draw a first matrix; one of stacked blocks as each of them would by itself."""
    if is_stacked(path):
        single = [path.replace(f"/{STACK}/", f"/{STACK}_{i}/") for i in range(shape[0])]
        return jnp.stack([_draw(one, shape[1:], seed) for one in single])
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) / np.sqrt(shape[0])


def merge_adapters(params: Params, scale: float) -> Params:
    """Return the parameters of the model: every kernel with its adapter's product added."""
    if LORA not in params:
        return params
    return _merged({k: v for k, v in params.items() if k != LORA}, params[LORA], scale)


def _merged(tree: Any, adapters: Params, scale: float) -> Any:
    if LORA_A in adapters:
        product = jnp.matmul(adapters[LORA_A], adapters[LORA_B], precision=lax.Precision.HIGHEST)
        return tree + (scale * product).reshape(tree.shape)
    return {
        key: _merged(value, adapters[key], scale) if key in adapters else value
        for key, value in tree.items()
    }


def adapter_scale(rank: int, alpha: float) -> float:
    """Return what an adapter's product is multiplied by."""
    return alpha / rank if rank else 0.0
