"""Parts of the step, by the scopes in the names of its compiled instructions."""

import re

from clip_jax.training.step import LOSS, TOWERS, UPDATE

# A scope is an element of the path in an instruction's `op_name`, at times under transformations:
# "jit(step)/transpose(jvp(towers))/CLIP/...". Where XLA joins instructions it joins their names:
# "jit(step)/(jvp(loss)/add:transpose(jvp(towers))/CLIP/mul)". A jitted function is no scope.
_SCOPE = re.compile(rf"(?:^|[/:(])(?<!jit\()({TOWERS}|{LOSS}|{UPDATE})(?=[/:)]|$)")


def step_scopes(op_name: str) -> frozenset[str]:
    """Return the scopes of `training.step` that an instruction was made in.

    Empty where the instruction stands outside of all of them, or the compiler gave it no name.
    Several where the compiler joined instructions of several parts.
    """
    return frozenset(_SCOPE.findall(op_name))


def in_loss(op_name: str) -> bool:
    """Return whether an instruction belongs to the loss alone.

    The compiler sums the gradient of the logit scale, of 4 bytes, together with those of the
    towers, and gives what it made the names of both: that is not the loss's.
    """
    return step_scopes(op_name) == {LOSS}
