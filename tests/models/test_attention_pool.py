"""The attention pool without keys and values of all rows, against the plain one."""

import chex
import jax
import jax.numpy as jnp

from clip_jax.models.attention import float32_logits
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


def test_the_logits_gradient_multiplies_no_float32_in_a_bfloat16_step():
    keys = jax.random.split(jax.random.key(2), 3)
    q, h, d = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, [(2, 3, 8), (2, 5, 8), (2, 3, 5)], strict=True)
    )

    def plain(q, h):
        return jnp.einsum("smd,srd->smr", q, h, preferred_element_type=jnp.float32)

    def gradient(logits, dtype):
        return jax.vjp(logits, q.astype(dtype), h.astype(dtype))[1](d)

    # The same products of the same numbers.
    chex.assert_trees_all_equal(gradient(float32_logits, "float32"), gradient(plain, "float32"))
    # A bfloat16 has 8 bits: 2^-8 of the largest of a sum's terms, for each of the two roundings.
    exact = jax.tree.map(lambda x: x.astype("float32"), gradient(plain, "bfloat16"))
    rounded = jax.tree.map(lambda x: x.astype("float32"), gradient(float32_logits, "bfloat16"))
    chex.assert_trees_all_close(rounded, exact, atol=2 * 2**-8 * float(jnp.abs(d).max() * 3))
    text = str(jax.make_jaxpr(lambda: gradient(float32_logits, "bfloat16"))())
    products = [line for line in text.splitlines() if "dot_general[" in line]
    assert products and all("bf16" in line.split("=")[0] for line in products[1:])
