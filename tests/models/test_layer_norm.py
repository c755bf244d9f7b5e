"""Layer norm's form for GPUs is the plain one in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.layer_norm import layer_norm, layer_norm_for_gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offset", [0.0, 1e3], ids=["centred", "far from zero"])
def test_gpu_form(dtype, offset):
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.standard_normal((3, 17, 64)), dtype) for _ in range(2))
    x = x + jnp.asarray(offset, dtype)
    scale, bias = (jnp.asarray(rng.standard_normal(64), jnp.float32) for _ in range(2))

    def gradients(norm):
        def loss(*arguments):
            y = norm(*arguments, 1e-5)
            return jnp.sum(y.astype(jnp.float32) * weights.astype(jnp.float32)), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(x, scale, bias)

    ((_, y), (dx, *dparams)) = gradients(layer_norm_for_gpu)
    ((_, plain_y), (plain_dx, *plain_dparams)) = gradients(layer_norm)
    np.testing.assert_array_equal(y, plain_y)
    # Float32 sums in another order; rows about 1,000 have only 2^-13 of a deviation left. The
    # gradient of bfloat16 rows is rounded once, to 8 bits.
    rounding = {"float32": 2e-6 if offset == 0 else 5e-4, "bfloat16": 2**-7}[dtype]
    largest = float(jnp.abs(plain_dx.astype(jnp.float32)).max())
    np.testing.assert_allclose(
        dx.astype(jnp.float32), plain_dx.astype(jnp.float32), rtol=0, atol=rounding * largest
    )
    for d, plain_d in zip(dparams, plain_dparams, strict=True):
        np.testing.assert_allclose(d, plain_d, rtol=0, atol=1e-5 * float(jnp.abs(plain_d).max()))
