"""The TPU kernels, interpreted, are the plain forms in values and gradients."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import INTERPRETED

from clip_jax.models.kernels import check
from clip_jax.models.kernels.attention import Heads, short_attention
from clip_jax.models.kernels.forms import AttentionForm, NormForm, noted_forms
from clip_jax.models.kernels.norm import Norm, residual_norm
from clip_jax.models.kernels.vmem import attention_fits, segments_per_program
from clip_jax.models.packing import Packing, choose_packing
from clip_jax.models.target import Target

CAUSAL = Heads(2, True, INTERPRETED)


def random_arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def kernel_attention(q, k, v, bias, heads: Heads):
    return short_attention(jnp.concatenate((q, k, v), -1), bias, heads)


def plain_attention(q, k, v, bias, heads: Heads):
    def split(x, i):
        return (x + bias[i].astype(x.dtype)).reshape(*x.shape[:2], heads.number, -1)

    y = jax.nn.dot_product_attention(
        split(q, 0), split(k, 1), split(v, 2), is_causal=heads.is_causal, implementation="xla"
    )
    return y.reshape(q.shape)


def plain_norm(x, scale, bias, norm: Norm):
    x32 = x.astype(jnp.float32)
    deviation = x32 - jnp.mean(x32, -1, keepdims=True)
    variance = jnp.mean(deviation**2, -1, keepdims=True)
    y = deviation * jax.lax.rsqrt(variance + norm.epsilon) * scale + bias
    return x, y.astype(x.dtype)


def results_and_gradients(form, arrays, weights, spec):
    """Return the results of a form, and the gradients of their sum weighted by `weights`."""

    @jax.jit
    def run(arrays, weights):
        y, pull = jax.vjp(lambda *arrays: form(*arrays, spec), *arrays)
        return y, pull(weights)

    return [np.asarray(x, np.float32) for x in jax.tree.leaves(run(arrays, weights))]


def cast(arrays, dtype):
    """Cast what has rows; biases and gains stay float32."""
    return [x.astype(dtype) if x.ndim == 3 else x for x in arrays]


def assert_equal_to_plain(kernel, plain, arrays, weights, spec, *, is_pair):
    """float32: to rounding. bfloat16: as near to float32 as the plain form in bfloat16."""

    def run(form, dtype):
        given = cast(weights, dtype)
        given = tuple(given) if is_pair else given[0]
        return results_and_gradients(form, cast(arrays, dtype), given, spec)

    exact = run(plain, jnp.float32)
    for got, want in zip(run(kernel, jnp.float32), exact, strict=True):
        np.testing.assert_allclose(got, want, atol=4e-6 * np.abs(want).max(), rtol=0)
    rough = run(plain, jnp.bfloat16)
    for got, near, want in zip(run(kernel, jnp.bfloat16), rough, exact, strict=True):
        largest = np.abs(want).max()
        error, allowed = np.sqrt(np.mean((got - want) ** 2)), np.sqrt(np.mean((near - want) ** 2))
        assert error <= 1.05 * allowed + 1e-4 * largest


@pytest.mark.parametrize(
    ("batch", "length", "number", "size", "is_causal"),
    [
        (3, 50, 4, 64, False),
        pytest.param(4, 50, 3, 64, False, marks=pytest.mark.slow),
        (2, 77, 2, 64, True),
        (1, 77, 3, 80, True),
        pytest.param(1, 196, 2, 64, False, marks=pytest.mark.slow),
        (1, 197, 2, 80, False),
        (1, 257, 1, 128, False),
        pytest.param(1, 257, 2, 64, False, marks=pytest.mark.slow),
        (5, 16, 4, 32, True),
    ],
)
def test_attention_kernel_is_plain_attention(batch, length, number, size, is_causal):
    rows = (batch, length, number * size)
    q, k, v, bias, weights = random_arrays(rows, rows, rows, (3, rows[-1]), rows)
    heads = Heads(number, is_causal, INTERPRETED)
    arrays = (q, k, v, 0.3 * bias)
    assert_equal_to_plain(
        kernel_attention, plain_attention, arrays, [weights], heads, is_pair=False
    )


PACKED = [
    (4, 50, 2, False),
    (8, 50, 1, True),
    (3, 77, 2, True),
    (2, 197, 1, False),
    (16, 5, 4, True),
]


@pytest.mark.parametrize(("batch", "length", "number", "is_causal"), PACKED)
def test_packed_sequences_are_sequences(batch, length, number, is_causal):
    packing = choose_packing(batch, length, INTERPRETED)
    assert (packing.segment, packing.stride) != (length, length)
    packed = Heads(number, is_causal, INTERPRETED, packing)

    def attention(q, k, v, bias, heads):
        rows = [packing.segments(packing.flatten(x)) for x in (q, k, v)]
        y = kernel_attention(*rows, bias, packed)
        return packing.unflatten(y.reshape(-1, y.shape[-1]))

    rows = (batch, length, number * 64)
    q, k, v, bias, weights = random_arrays(rows, rows, rows, (3, rows[-1]), rows)
    arrays = (q, k, v, 0.3 * bias)
    assert_equal_to_plain(attention, plain_attention, arrays, [weights], packed, is_pair=False)


def test_ragged_sequences_are_sequences():
    starts = [(0, 3, 4, 11), (0, 16), (0, 1, 2, 3), (0,)]
    row = np.arange(16)
    first = [np.maximum.accumulate(np.where(np.isin(row, start), row, 0)) for start in starts]
    positions = jnp.asarray(row - np.stack(first), jnp.int32)
    q, k, v, bias, dy = random_arrays(*[(4, 16, 128)] * 3, (3, 128), (4, 16, 128))

    def kernel(q, k, v, bias, heads):
        return short_attention(jnp.concatenate((q, k, v), -1), bias, heads, positions)

    def plain(q, k, v, bias, heads):
        sequences = []
        for i, start in enumerate(starts):
            bounds = [s for s in start if s < 16] + [16]
            sequences += [
                plain_attention(*(x[i : i + 1, a:b] for x in (q, k, v)), bias, heads)
                for a, b in itertools.pairwise(bounds)
            ]
        return jnp.concatenate(sequences, 1).reshape(q.shape)

    assert_equal_to_plain(kernel, plain, (q, k, v, bias), (dy,), CAUSAL, is_pair=False)


def test_rows_are_whole_tiles_and_waste_little():
    def rows(batch, length):
        packing = choose_packing(batch, length, INTERPRETED)
        assert packing.segment % 8 == 0
        assert batch % packing.sequences == 0
        return packing.stride, packing.sequences

    assert rows(256, 50) == (50, 4)
    assert rows(3, 50) == (56, 1)
    assert rows(128, 197) == (200, 1)
    assert rows(128, 257) == (264, 1)
    assert rows(256, 77) == (80, 1)
    assert rows(256, 16) == (16, 8)
    assert rows(256, 32) == (32, 4)


@pytest.mark.parametrize("shape", [(3, 50, 128), (2, 77, 80), (1, 197, 256)])
def test_norm_kernel_is_the_plain_norm(shape):
    x, around, dy, scale, bias = random_arrays(shape, shape, shape, shape[-1:], shape[-1:])
    arrays, norm = (x + 3, scale, bias), Norm(1e-5, INTERPRETED)
    assert_equal_to_plain(residual_norm, plain_norm, arrays, [around, dy], norm, is_pair=True)


def test_kernels_take_each_device_s_own_rows():
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = Target("tpu", "v5e", mesh=mesh, batch_axes=("data", "fsdp"), interpret=True)
    targets, rows = (split, INTERPRETED), (8, 12, 64)
    q, k, v, weights, bias, scale = random_arrays(rows, rows, rows, rows, (3, 64), (64,))
    for form, arrays, given, specs in (
        (kernel_attention, (q, k, v, bias), weights, [Heads(2, True, t) for t in targets]),
        (residual_norm, (q, scale, scale), (k, v), [Norm(1e-5, t) for t in targets]),
    ):
        got, want = (results_and_gradients(form, arrays, given, spec) for spec in specs)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max(), rtol=0)


def test_sizes_of_programs():
    assert segments_per_program(128, 197) == 1
    assert segments_per_program(256, 50) == 4
    assert segments_per_program(6, 50) == 3
    assert segments_per_program(7, 50) == 1
    assert all(attention_fits(257, 1024, kind) for kind in ("v5e", "v5p", "v6e"))
    assert not attention_fits(2048, 1024, "v5e")
    assert not attention_fits(577, 1024, "v4")


FORMS = {
    "padded": AttentionForm(2, 16, False, Packing(1, 197, 200)),
    "unpacked": AttentionForm(2, 16, False, Packing(1, 197, 197)),
    "causal, two sequences a segment": AttentionForm(2, 64, True, Packing(4, 20, 20, 2)),
    "three segments": AttentionForm(1, 32, False, Packing(3, 16, 16)),
    "ragged": AttentionForm(2, 64, True, Packing(3, 16, 16, is_ragged=True)),
    "norm": NormForm(2, 24, 48, 1e-6),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_check_computes_the_form_that_it_is_asked_for(name):
    with noted_forms() as noted:
        assert check.kernel_error(FORMS[name], INTERPRETED) < 1.2
    assert noted == {FORMS[name]}


def test_the_check_sees_wrong_kernels(monkeypatch):
    form = AttentionForm(2, 64, True, Packing(4, 50, 50, 4))
    wrong = dataclasses.replace(CAUSAL, is_causal=False)
    monkeypatch.setattr(check, "Heads", lambda *_: wrong)
    monkeypatch.setattr(check, "_plain_attention", lambda *a: plain_attention(*a[:4], CAUSAL))
    assert check.kernel_error(form, INTERPRETED) > 2 * check.ALLOWED
