"""Our own kernels for TPUs, compared with the plain forms before a model is computed with them."""

import math
from collections.abc import Callable

from clip_jax.errors import UserError, short
from clip_jax.models.clip import CLIP
from clip_jax.models.kernels.forms import noted_forms
from clip_jax.parallel import distributed


def with_checked_kernels(model: CLIP, trace: Callable[[CLIP], object]) -> CLIP:
    """Return the model, or if a chip's kernels are wrong, the model with XLA's attention and norms.

    All processes call it and decide alike. On other platforms than TPUs nothing is computed.

    Args:
      model: whose target are these devices.
      trace: traces what will be computed with the model; each form of a kernel that it takes is
        compared once.
    """
    if model.target.platform != "tpu" or model.attention == "xla":
        return model
    from clip_jax.models.kernels.check import ALLOWED

    found = distributed.gather(_largest_error(model, trace))
    error = max(error for error, _ in found)
    if error <= ALLOWED:
        return model
    reason = next((words for _, words in found if words), "") or (
        f"they differ from the plain forms by {error:.1f} times bfloat16's rounding, and "
        f"{ALLOWED:g} is allowed"
    )
    distributed.print_on_main(
        f"the TPU kernels are not used on this {model.target.generation}: {reason}. XLA's are "
        "slower; please report this line"
    )
    return model.clone(attention="xla")


def _largest_error(model: CLIP, trace: Callable[[CLIP], object]) -> tuple[float, str]:
    """Return the largest error of this process's chips, and why it is infinite, where it is."""
    from clip_jax.models.kernels.check import kernel_error

    errors = [0.0]
    # What a compiler of kernels raises is of many types: MosaicError, NotImplementedError, ...
    try:
        with noted_forms() as forms:
            trace(model)
        for form in sorted(forms, key=repr):
            error = kernel_error(form, model.target)
            if not math.isfinite(error):
                return math.inf, "what they give is not finite"
            errors.append(error)
    except UserError:
        raise
    except Exception as failure:
        return math.inf, f"they do not run, {short(failure):.300}"
    return max(errors), ""
