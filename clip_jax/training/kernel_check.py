"""Our own kernels for TPUs, compared once with the plain forms when a run starts."""

import dataclasses
import math

from clip_jax.errors import short
from clip_jax.models.attention import Kernel
from clip_jax.models.clip import choose_kernels
from clip_jax.models.vit import ViTConfig
from clip_jax.parallel import distributed
from clip_jax.training.setup import RunComponents, count_kept_patches


def with_checked_kernels(run: RunComponents) -> RunComponents:
    """Return the run, or if a chip's kernels are wrong, the run with XLA's attention and norms.

    All processes call it and decide alike. On other platforms than TPUs nothing is computed.
    """
    if run.model.target.platform != "tpu":
        return run
    from clip_jax.models.kernels.check import ALLOWED

    found = distributed.gather(_largest_error(run))
    error = max(error for error, _ in found)
    if error <= ALLOWED:
        return run
    reason = next((words for _, words in found if words), "") or (
        f"they differ from the plain forms by {error:.1f} times bfloat16's rounding, and "
        f"{ALLOWED:g} is allowed"
    )
    distributed.print_on_main(
        f"the TPU kernels are not used on this {run.model.target.generation}: {reason}. XLA's are "
        "slower; please report this line"
    )
    return dataclasses.replace(run, model=run.model.clone(attention="xla"))


def _largest_error(run: RunComponents) -> tuple[float, str]:
    """Return the largest error of this process's chips, and why it is infinite, where it is."""
    from clip_jax.models.kernels.check import kernels_error

    model, num_patches, packing = run.model, count_kept_patches(run), run.caption_packing
    chosen = choose_kernels(model, num_patches)
    vision, text = model.config.vision, model.config.text
    towers: list[tuple[Kernel | None, int, int, int, bool, bool]] = [
        (chosen.text, text.width, text.heads, text.context_length, text.causal, False)
    ]
    if packing is not None:
        towers.append((chosen.text, text.width, text.heads, packing.segment_rows, True, True))
    if isinstance(vision, ViTConfig):
        rows = vision.length if num_patches is None else num_patches + vision.class_token
        towers.append((chosen.image, vision.width, vision.heads, rows, False, False))
    errors = [0.0]
    for kernel, width, heads, length, is_causal, is_ragged in towers:
        if kernel is None or kernel.name != "pallas":
            continue
        try:
            error = kernels_error(
                heads=heads,
                head_size=width // heads,
                length=length,
                is_causal=is_causal,
                is_ragged=is_ragged,
                target=model.target,
            )
        # What a compiler of kernels raises is of many types: MosaicError, NotImplementedError, ...
        except Exception as failure:
            return math.inf, f"they do not run, {short(failure):.300}"
        if not math.isfinite(error):
            return math.inf, "what they give is not finite"
        errors.append(error)
    return max(errors), ""
