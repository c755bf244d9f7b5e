"""AdamW as the paper trains with it, and the temperature's clip, both as optax transformations."""

import math

import jax
import jax.numpy as jnp
import optax

NOT_DECAYED = (
    *("scale", "gamma"),
    *("bias", "text_projection_bias"),
    *("logit_scale", "logit_bias"),
    *("class_embedding", "probe"),
)
"""Leaf names of gains, biases, the temperature, and learned tokens: vectors like a bias."""


def leaf_name(path: tuple) -> str:
    """The last name of a parameter's path."""
    return str(getattr(path[-1], "key", path[-1]))


def decay_mask(params: optax.Params) -> optax.Params:
    """True where weight decay applies: "all weights that are not gains or biases" (section 2.5)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: leaf_name(path) not in NOT_DECAYED, params
    )


def make_schedule(learning_rate: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear from 0 over `warmup_steps`, then a cosine to 0 at `steps`.

    A run too short for its warm-up warms up over a tenth of its steps.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=learning_rate,
        warmup_steps=min(warmup_steps, steps // 10),
        decay_steps=steps,
    )


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


def make_optimizer(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    clip_norm: float,
    max_logit_scale: float,
) -> optax.GradientTransformation:
    """AdamW with decoupled decay; `clip_norm` 0 leaves gradients alone."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity(),
        optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
        clip_logit_scale(max_logit_scale),
    )
