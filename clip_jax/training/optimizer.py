"""Optimizers, what decays, the schedule, and the temperature's clip, as optax transformations.

Every optimizer is the same chain with another middle: clip the gradient's norm, scale it (the row
of `SCALERS`), add decoupled decay, multiply by the schedule, project the temperature.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax import MaskedNode
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from clip_jax.sections import OptimSection
from clip_jax.training.rates import Rates
from clip_jax.typing import path_name

NOT_DECAYED = (
    *("scale", "gamma"),
    *("bias", "text_projection_bias"),
    *("logit_scale", "logit_bias"),
    *("class_embedding", "probe"),
)
"""Leaf names of gains, biases, the temperature, and learned tokens: vectors like a bias."""

SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt")
EXTENDABLE = ("constant", "inverse_sqrt")
"""Schedules that do not depend on the end but for their cool-down."""

FACTORED_FROM = 32
"""Smallest side of a matrix whose second moment Adafactor keeps as rows and columns."""

MUON_MOMENTUM = 0.95
MUON_RMS = 0.2
"""Root mean square of a Muon update before the learning rate: that of an update of Adam, so that
both kinds of parameters share learning rate and decay (Liu et al. 2025, arXiv:2502.16982, 2.2)."""

MUON_MATRICES: tuple[tuple[str, MuonDimensionNumbers], ...] = (
    # Paths that Muon trains, and which axes are the input and the output of the matrix. Axes count
    # from the end: an axis of stacked layers in front of them makes a batch of matrices.
    (r"(attn|attnpool)/[qkv]_proj/kernel$", MuonDimensionNumbers((-3,), (-2, -1))),
    (r"attn/out_proj/kernel$", MuonDimensionNumbers((-3, -2), (-1,))),
    (r"mlp/(c_fc|c_proj)/kernel$", MuonDimensionNumbers((-2,), (-1,))),
    # All convolutions but the one that sees the image.
    (
        r"^(?!visual/conv1/).*(conv\d|downsample_0)/kernel$",
        MuonDimensionNumbers((-4, -3, -2), (-1,)),
    ),
)


def leaf_name(path: tuple) -> str:
    """Return the last name of a parameter's path."""
    return str(getattr(path[-1], "key", path[-1]))


def decay_mask(params: optax.Params) -> optax.Params:
    """Mark where weight decay applies: "all weights that are not gains or biases" (section 2.5)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaf_name(path) not in NOT_DECAYED, params
    )


def warmup_of(section: OptimSection, steps: int) -> int:
    """Return the steps of warm-up; a run too short for it warms up over a tenth of its steps."""
    return min(section.warmup_steps, steps // 10)


def cooldown_start(section: OptimSection, steps: int) -> int | None:
    """Return the step from which a run of so many cools down; None where it does not."""
    if section.schedule not in EXTENDABLE or not section.cooldown_steps:
        return None
    return max(steps - section.cooldown_steps, warmup_of(section, steps))


def make_schedule(section: OptimSection, steps: int) -> optax.Schedule:
    """Make the schedule: linear from 0 over `warmup_steps`, then as `section.schedule` says.

    "cosine" and "linear" fall to 0 at `steps`. "constant" and "inverse_sqrt" (by the square root
    of the step, Vaswani et al. 2017, arXiv:1706.03762, 5.3) know nothing of the end but for a
    cool-down, linear to 0 over the last `cooldown_steps` (Zhai et al. 2021, arXiv:2106.04560, 3.5).
    """
    peak, warmup = section.learning_rate, warmup_of(section, steps)
    if section.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0, peak_value=peak, warmup_steps=warmup, decay_steps=steps
        )
    start = cooldown_start(section, steps)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        rate = jnp.where(step < warmup, peak * step / max(warmup, 1), peak)
        if section.schedule == "inverse_sqrt":
            rate = rate * jnp.sqrt(max(warmup, 1) / jnp.maximum(step, max(warmup, 1)))
        if section.schedule == "linear":
            rate = rate * jnp.clip((steps - step) / max(steps - warmup, 1), 0, 1)
        if start is not None:
            rate = rate * jnp.clip((steps - step) / max(steps - start, 1), 0, 1)
        return rate

    return schedule


def decay_to_start(decay: float) -> optax.GradientTransformation:
    """Add a decoupled decay towards the weights of the beginning, which are kept in the state.

    L2-SP (Li et al. 2018, arXiv:1802.01483) as AdamW has its decay: on every trained parameter but
    the temperature, multiplied by the learning rate.
    """

    def update(updates, state, params=None):
        def pull(path, update, param, start):
            if leaf_name(path) in ("logit_scale", "logit_bias"):
                return update
            return update + decay * (param - start)

        return jax.tree_util.tree_map_with_path(pull, updates, params, state["start"]), state

    # Arrays of their own: the step donates its state.
    return optax.GradientTransformation(lambda p: {"start": jax.tree.map(jnp.copy, p)}, update)


def clip_logit_scale(max_scale: float) -> optax.GradientTransformation:
    """Hold exp(logit_scale) at or below `max_scale`, by projecting after the update.

    The paper clips the logits' scale at 100 (section 2.5). A clip in the forward pass instead
    would zero the gradient and the parameter would never come back.
    """
    limit = math.log(max_scale)

    def update(updates, state, params=None):
        def project(path, update, param):
            if leaf_name(path) != "logit_scale":
                return update
            return jnp.minimum(param + update, limit) - param

        return jax.tree_util.tree_map_with_path(project, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adafactor(*, momentum: float, beta2_cap: float) -> optax.GradientTransformation:
    """Make Adafactor as big_vision trains with it (Zhai et al. 2021, arXiv:2106.04560, 3.4).

    Rows and columns instead of a matrix's second moment, whose decay grows towards `beta2_cap`;
    momentum in bfloat16; no scaling by the parameter's size and no clip of an update's size.
    """

    def decay(step, exponent):
        return jnp.minimum(beta2_cap, 1 - (step + 1.0) ** -exponent)

    rms = optax.scale_by_factored_rms(
        min_dim_size_to_factor=FACTORED_FROM, decay_rate=0.8, decay_rate_fn=decay
    )
    return optax.chain(
        layer_by_layer(rms),
        optax.ema(momentum, debias=False, accumulator_dtype=jnp.bfloat16),
    )


def layer_by_layer(rms: optax.GradientTransformation) -> optax.GradientTransformation:
    """Make `scale_by_factored_rms` take a stack of layers for what it is, not for one array.

    Else a stack of vectors would be factored as a matrix, and a scan over layers would train
    differently. The state has the parameters' structure either way, so that a checkpoint can be
    read with its layers stacked or single.
    """

    def init(params):
        single, stacked = split_stacks(params)
        state = rms.init(single)
        if not jax.tree.leaves(stacked):
            return state
        layer = jax.eval_shape(rms.init, jax.tree.map(lambda x: x[0], stacked))
        # Where nothing is kept optax has one zero.
        axes = jax.tree.map(lambda x: None if x.shape in ((), (1,)) else 0, layer)
        return join_stacks(state, jax.vmap(rms.init, out_axes=axes)(stacked))

    def update(updates, state, params):
        single, stacked = split_stacks(updates)
        single_state, stacked_state = split_stacks(state)
        single_params, stacked_params = split_stacks(params)
        single, single_state = rms.update(single, single_state, single_params)
        if not jax.tree.leaves(stacked):
            return single, single_state
        stacked_state = stacked_state._replace(count=state.count)
        axes = jax.tree.map(lambda x: 0 if x.ndim > 1 else None, stacked_state)
        update_layers = jax.vmap(rms.update, in_axes=(0, axes, 0), out_axes=(0, axes))
        stacked, stacked_state = update_layers(stacked, stacked_state, stacked_params)
        return join_stacks(single, stacked), join_stacks(single_state, stacked_state)

    return optax.GradientTransformation(init, update)


def split_stacks(tree):
    """Return the tree with its single parameters, and with its stacks; the others are masked."""

    def mask(stacked: bool):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if ("/resblocks/" in path_name(path)) == stacked else MaskedNode(),
            tree,
        )

    return mask(False), mask(True)


def join_stacks(single, stacked):
    """Undo `split_stacks`."""
    return jax.tree.map(
        lambda x, y: y if isinstance(x, MaskedNode) else x,
        single,
        stacked,
        is_leaf=lambda x: isinstance(x, MaskedNode),
    )


def muon_matrix(path: str) -> MuonDimensionNumbers | None:
    """Return which axes make a parameter the matrix that Muon orthogonalizes; None: Adam's."""
    return next((axes for pattern, axes in MUON_MATRICES if re.search(pattern, path)), None)


def scale_by_muon_or_adam(
    *, beta1: float, beta2: float, eps: float
) -> optax.GradientTransformation:
    """Make Muon for the matrices inside the towers, and Adam for everything else.

    Muon is for hidden layers: Jordan (kellerjordan.github.io/posts/muon, github.com/KellerJordan/
    Muon) leaves embeddings, output heads, gains, biases and the first convolution to Adam. Here
    those are the token, class and position embeddings, the patches' convolution, and what projects
    into the shared space.
    """

    def axes(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: muon_matrix(path_name(path)), tree)

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "adam" if muon_matrix(path_name(path)) is None else "muon", params
        )

    muon = scale_by_muon(beta=MUON_MOMENTUM, weight_dimension_numbers=axes)
    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps)
    return optax.partition(
        {"muon": optax.chain(muon, scale_to_rms(MUON_RMS)), "adam": adam}, labels
    )


def scale_to_rms(rms: float) -> optax.GradientTransformation:
    """Give orthogonalized matrices one root mean square, whatever their shape.

    An orthogonal [in, out] has min(in, out) singular values of 1, so its root mean square is
    max(in, out)^-1/2.
    """

    def update(updates, state, params=None):
        def scale(path, update):
            sides = muon_matrix(path_name(path)) or ()
            longest = max(math.prod(update.shape[axis] for axis in side) for side in sides)
            return rms * math.sqrt(longest) * update

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_rates(rates: Rates) -> optax.GradientTransformation:
    """Multiply each parameter's update by its factor of the learning rate, decay included.

    Of a stack of blocks each has its own factor; of one that is cut the last ones are there.
    """

    def update(updates, state, params=None):
        def scale(path, update):
            factors = rates[path_name(path)]
            if len(set(factors)) == 1:
                return update if factors[0] == 1 else factors[0] * update
            rows = jnp.asarray(factors[-update.shape[0] :], update.dtype)
            return rows.reshape(-1, *[1] * (update.ndim - 1)) * update

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


ELEMENTWISE = ("adamw", "lion")
"""Optimizers whose update of a number needs no other: copies of the model can share it."""
SPLIT = ("auto", "on", "off")

SCALERS: dict[str, Callable[[float, float, float], optax.GradientTransformation]] = {
    # Each of (beta1, beta2, eps).
    "adamw": lambda b1, b2, eps: optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    "lion": lambda b1, b2, eps: optax.scale_by_lion(b1=b1, b2=b2),
    "adafactor": lambda b1, b2, eps: scale_by_adafactor(momentum=b1, beta2_cap=b2),
    "muon": lambda b1, b2, eps: scale_by_muon_or_adam(beta1=b1, beta2=b2, eps=eps),
}


def make_optimizer(
    schedule: optax.Schedule, section: OptimSection, rates: Rates | None = None
) -> optax.GradientTransformation:
    """Make an optimizer with decoupled decay; a `clip_norm` of 0 leaves gradients alone.

    The decay is multiplied by the learning rate, as PyTorch's AdamW does it.

    The name is a key of `SCALERS`. "lion" (Chen et al. 2023, arXiv:2302.06675) wants a learning
    rate 3 to 10 times lower than AdamW's and a decay as many times higher; "adafactor" and "muon"
    take AdamW's. beta1, beta2 and eps are Adam's. In Lion they weigh the gradient of the update
    and of the momentum. In Adafactor beta1 is the momentum and beta2 the highest decay of the
    second moment. In Muon they belong to the parameters that Adam trains.

    Args:
      schedule: the learning rate of a step.
      section: everything but the learning rate and its warm-up.
      rates: factors of the learning rate, by a parameter's path; None is 1 for all.
    """
    clip_norm = section.clip_norm
    has_factors = any(
        factor not in (0, 1) for factors in (rates or {}).values() for factor in factors
    )
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity(),
        SCALERS[section.name](section.beta1, section.beta2, section.eps),
        optax.add_decayed_weights(section.weight_decay, mask=decay_mask),
        *([decay_to_start(section.start_decay)] if section.start_decay else []),
        *([scale_by_rates(rates)] if rates is not None and has_factors else []),
        optax.scale_by_learning_rate(schedule),
        clip_logit_scale(section.max_logit_scale),
    )
