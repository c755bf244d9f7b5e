"""The attention pool without keys and values of all rows, against the plain one."""

import chex
import jax
import jax.numpy as jnp

from clip_jax.models.execution import ExecConfig
from clip_jax.models.resnet import AttentionPool
from clip_jax.models.target import ONE_CPU, Target


def test_rows_need_no_projection():
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 32))
    plain, fast = (
        AttentionPool(4, 16, ExecConfig(target=target))
        for target in (ONE_CPU, Target("tpu", "v5e"))
    )
    variables = plain.init(jax.random.key(1), x)
    # Of a size at which probabilities differ.
    variables = jax.tree.map(lambda p: 2 * p, variables)

    def loss(module):
        def of(variables, x):
            z = module.apply(variables, x)
            return jnp.sum(jnp.sin(z)), z

        return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(variables, x)

    chex.assert_trees_all_close(loss(fast), loss(plain), rtol=1e-4, atol=1e-5)
