"""The sum of shifted features against the grouped convolution, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from clip_jax.models.depthwise import DepthwiseConv, grouped_conv, separate_sum


@pytest.mark.parametrize(("size", "stride", "multiplier"), [(3, 1, 1), (7, 2, 2)])
def test_the_fast_form_is_the_convolution(size, stride, multiplier):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 9, 8, 4)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((size, size, 1, 4 * multiplier)), jnp.float32)

    def value(convolve, x, kernel):
        y = convolve(x, kernel, stride)
        return jnp.sum(jnp.cos(jnp.arange(y.size)) * y.ravel()), y

    for argument in (0, 1):
        (_, expected), wanted = jax.value_and_grad(value, 1 + argument, has_aux=True)(
            grouped_conv, x, kernel
        )
        (_, actual), gradient = jax.value_and_grad(value, 1 + argument, has_aux=True)(
            separate_sum, x, kernel
        )
        # Sums of up to 49 products of numbers around one, in another order.
        np.testing.assert_allclose(actual, expected, atol=2e-5)
        np.testing.assert_allclose(gradient, wanted, atol=2e-4)


def test_the_module_adds_a_bias():
    module = DepthwiseConv(3, multiplier=2)
    x = jnp.ones((1, 4, 4, 3))
    variables = module.init(jax.random.key(0), x)
    assert variables["params"]["kernel"].shape == (3, 3, 1, 6)
    zero = {"params": {"kernel": jnp.zeros((3, 3, 1, 6)), "bias": jnp.arange(6.0)}}
    np.testing.assert_array_equal(module.apply(zero, x)[0, 0, 0], np.arange(6))


def test_a_program_for_any_number_of_images_has_no_condition():
    (count,) = export.symbolic_shape("count")
    kernel = jnp.ones((3, 3, 1, 4))

    def conditions(batch):
        shape = jax.ShapeDtypeStruct((batch, 8, 8, 4), jnp.float32)
        program = jax.make_jaxpr(lambda x: separate_sum(x, kernel, 1))(shape)
        return [eqn.primitive.name for eqn in program.eqns].count("cond")

    assert (conditions(count), conditions(2)) == (0, 1)
