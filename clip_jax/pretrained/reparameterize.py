"""Fold branches and batch norms of MobileCLIP's image towers into single convolutions, on load.

FastViT (arXiv:2303.14189) is trained with several convolutions side by side, a batch norm behind
each. Without their statistics moving, that is one convolution: batch norms scale kernels, smaller
kernels are larger ones with zeros around, and what is passed on as it is has a kernel of its own.
The names are those of timm's towers for inference (`timm.utils.reparameterize_model`). The folding
is in float64.
"""

import re
from collections.abc import Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]
Fused = tuple[np.ndarray, np.ndarray]  # a kernel, OIHW, and a bias

EPSILON = 1e-5  # of PyTorch's batch norms
_TRUNK = "visual.trunk."
# The names of the groups that become one convolution.
_GROUP = re.compile(r"(.+)\.(conv_kxk\.\d+|conv_scale|identity|large_conv|small_conv)\..+")


def is_branched(arrays: Arrays) -> bool:
    """Return whether an image tower has branches or batch norms to fold."""
    markers = ("stem.0.conv_kxk.0.conv.weight", "patch_embed.backbone.0.bn.weight")
    return any(_TRUNK + marker in arrays for marker in markers)


def reparameterize(arrays: Arrays) -> dict[str, np.ndarray]:
    """Return a file's arrays, those of the image tower folded, float32; others are as they were."""
    folded = {key: value for key, value in arrays.items() if not key.startswith(_TRUNK)}
    trunk = {key: value for key, value in arrays.items() if key.startswith(_TRUNK)}
    groups = dict.fromkeys(m[1] for key in trunk if (m := _GROUP.fullmatch(key)))
    used: set[str] = set()

    def put(name: str, fused: Fused, prefix: str) -> None:
        used.update(key for key in trunk if key.startswith(f"{prefix}."))
        kernel, bias = (np.asarray(x, np.float32) for x in fused)
        folded[f"{name}.weight"], folded[f"{name}.bias"] = kernel, bias

    for group in groups:
        # The two groups of a mixer belong together, its scale between them.
        if not group.endswith((".token_mixer.norm", ".token_mixer.mixer")):
            rest = {k: v for k, v in trunk.items() if k.startswith(f"{group}.se.")}
            put(f"{group}.reparam_conv", _fold_group(trunk, group), group)
            folded |= rest
    for key in trunk:
        if key.endswith(".token_mixer.mixer.conv_kxk.0.conv.weight"):
            mixer = key.partition(".mixer.")[0]
            put(f"{mixer}.reparam_conv", _fold_mixer(trunk, mixer), mixer)
        elif key.endswith(".pos_enc.weight"):
            name = key.removesuffix(".pos_enc.weight")
            kernel = trunk[key] + _identity(len(trunk[key]), trunk[key].shape[-1])
            put(f"{name}.reparam_conv", (kernel, trunk[f"{name}.pos_enc.bias"]), name)
    for key in trunk:
        if key.endswith(".conv.weight") and key not in used:
            name = key.removesuffix(".conv.weight")
            if f"{name}.bn.running_var" in trunk:
                put(f"{name}.conv", _fold_norm(trunk, name), name)
        elif key.endswith(".norm.running_var"):
            name = key.removesuffix(".running_var")
            gain, bias = _gain_and_bias(trunk, name)
            put(name, (gain, bias), name)
    return folded | {key: value for key, value in trunk.items() if key not in used}


def _fold_group(arrays: Arrays, group: str) -> Fused:
    """Return the one convolution of a group of convolutions, batch norms and a passing on."""
    branches = sorted(
        {m[2] for key in arrays if (m := _GROUP.fullmatch(key)) and m[1] == group} - {"identity"}
    )
    fused = [_fold_norm(arrays, f"{group}.{branch}") for branch in branches]
    size = max(kernel.shape[-1] for kernel, _ in fused)
    kernel = np.sum([_pad(kernel, size) for kernel, _ in fused], axis=0)
    bias = np.sum([bias for _, bias in fused], axis=0)
    if f"{group}.identity.weight" in arrays:
        gain, shift = _gain_and_bias(arrays, f"{group}.identity")
        kernel = kernel + _identity(len(kernel), size, kernel.shape[1]) * _column(gain)
        bias = bias + shift
    return kernel, bias


def _fold_mixer(arrays: Arrays, mixer: str) -> Fused:
    """Return x + scale (mix(x) - norm(x)) as one convolution."""
    kernel, bias = _fold_group(arrays, f"{mixer}.mixer")
    gain, shift = _gain_and_bias(arrays, f"{mixer}.norm.identity")
    same = _identity(len(kernel), kernel.shape[-1])
    scale = np.asarray(arrays[f"{mixer}.layer_scale.gamma"], np.float64).reshape(-1)
    kernel = same + _column(scale) * (kernel - same * _column(gain))
    return kernel, scale * (bias - shift)


def _fold_norm(arrays: Arrays, name: str) -> Fused:
    """Return a convolution and the batch norm behind it as one convolution."""
    gain, bias = _gain_and_bias(arrays, f"{name}.bn")
    return np.asarray(arrays[f"{name}.conv.weight"], np.float64) * _column(gain), bias


def _gain_and_bias(arrays: Arrays, norm: str) -> Fused:
    """Return what a batch norm multiplies by and adds."""
    weight, bias, mean, var = (
        np.asarray(arrays[f"{norm}.{name}"], np.float64)
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    gain = weight / np.sqrt(var + EPSILON)
    return gain, bias - mean * gain


def _identity(channels: int, size: int, fan_in: int = 1) -> np.ndarray:
    """Return the kernel that passes every channel on, [channels, fan_in, size, size]."""
    kernel = np.zeros((channels, fan_in, size, size))
    kernel[np.arange(channels), np.arange(channels) % fan_in, size // 2, size // 2] = 1
    return kernel


def _pad(kernel: np.ndarray, size: int) -> np.ndarray:
    """Return a kernel with zeros around it."""
    pad = (size - kernel.shape[-1]) // 2
    return np.pad(kernel, ((0, 0), (0, 0), (pad, pad), (pad, pad)))


def _column(x: np.ndarray) -> np.ndarray:
    return x[:, None, None, None]
