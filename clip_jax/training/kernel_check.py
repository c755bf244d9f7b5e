"""Our own kernels for TPUs, compared once with the plain forms when a run starts."""

import dataclasses
import math

import jax

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

    error = max(distributed.gather(_largest_error(run)))
    if error <= ALLOWED:
        return run
    distributed.print_on_main(
        f"the TPU kernels differ from the plain forms on this {run.model.target.generation} "
        f"({error:.1f} times bfloat16's rounding, {ALLOWED:g} is allowed), so that XLA's are used, "
        "which are slower; please report this line"
    )
    return dataclasses.replace(run, model=run.model.clone(attention="xla"))


def _largest_error(run: RunComponents) -> float:
    """Return the largest error of this process's chips; infinite where a kernel does not run."""
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
        except jax.errors.JaxRuntimeError:
            return math.inf
        errors.append(error if math.isfinite(error) else math.inf)
    return max(errors)
