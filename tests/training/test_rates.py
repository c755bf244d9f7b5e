"""What is trained, and how fast: the table, and steps with it."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from steps import compile_step, make_all, make_batch, one_device_mesh
from tiny import CONVNET, RESNET, VIT

from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP, variable_shapes
from clip_jax.models.stack import stack_layers, unstack_layers
from clip_jax.parallel.mesh import make_mesh, place_batch
from clip_jax.sections import TrainSection
from clip_jax.training.checkpoint import Checkpoints
from clip_jax.training.optimizer import scale_by_rates
from clip_jax.training.rates import parameter_rates, rate_lines, rate_table
from clip_jax.typing import leaves_by_path

KERNEL = "transformer/resblocks_{}/mlp/c_fc/kernel"


def names_of(config, *, scan=False):
    return leaves_by_path(variable_shapes(CLIP(config, scan=scan))["params"])


def rates_of(config, *, scan=False, **fields):
    rates = parameter_rates(names_of(config, scan=scan), TrainSection(**fields))
    return {name: r[0] if len(r) == 1 else r for name, r in rates.items()}


def test_factors_fall_from_the_head_to_the_embeddings():
    rates = rates_of(VIT, image_layer_decay=0.5, rates=("text=0.1", "biases=0"))
    depths = [rates["visual/" + KERNEL.format(i)] for i in range(3)]
    assert depths == [0.125, 0.25, 0.5]
    assert rates["visual/proj"] == rates["visual/ln_post/scale"] == rates["logit_scale"] == 1
    assert rates["visual/conv1/kernel"] == rates["visual/ln_pre/scale"] == 0.0625
    # The first pattern that is found counts.
    assert rates["text/ln_final/bias"] == 0.1 and rates["visual/ln_post/bias"] == 0


def test_the_last_blocks_and_what_stands_behind_them_are_trained():
    rates = rates_of(VIT, text_last_blocks=1)
    frozen = {name for name, factor in rates.items() if not factor}
    text = {name for name in rates if name.startswith("text/")}
    assert text - frozen == {
        n for n in text if "resblocks_2/" in n or "ln_final" in n or n == "text/text_projection"
    }
    assert all(name.startswith("text/") for name in frozen)


def test_blocks_of_other_towers_have_their_depth():
    rates = rates_of(RESNET, image_layer_decay=0.5)
    depths = {name: r for name, r in rates.items() if name.startswith("visual/layer")}
    for stage in range(1, 5):
        assert {r for n, r in depths.items() if f"layer{stage}_0" in n} == {0.5 ** (5 - stage)}
    assert rates["visual/conv1/kernel"] == 0.5**5 and rates["visual/attnpool/c_proj/kernel"] == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"image_layer_decay": 0.7, "text_last_blocks": 2},
        {"rates": ("norms=1", "=0")},
        {"rates": ("image=0.1", r"resblocks_0/=0"), "text_layer_decay": 0.5},
    ],
)
def test_a_stack_has_its_blocks_factors(fields):
    single = rates_of(VIT, **fields)
    for name, factors in rates_of(VIT, scan=True, **fields).items():
        if "/resblocks/" in name:
            blocks = [name.replace("/resblocks/", f"/resblocks_{i}/") for i in range(2)]
            assert factors == tuple(single[block] for block in blocks)
        else:
            assert factors == single[name]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rates": ("image:0.1",)}, "PATTERN=FACTOR"),
        ({"rates": ("(=0.1",)}, "PATTERN=FACTOR"),
        ({"rates": ("image=-1",)}, "0 to 1000"),
        ({"rates": ("=0",)}, "leave no parameter to train"),
        ({"text_last_blocks": 4}, "has 3 blocks"),
        ({"image_layer_decay": 0.5}, "no numbered blocks"),
        ({"rates": ("text/.*resblocks_1=0",)}, "set it to False"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    config = CONVNET if "image_layer_decay" in fields else VIT
    with pytest.raises(UserError, match=message):
        rates_of(config, scan=True, **fields)


def test_the_table_counts_every_parameter_once():
    shapes = variable_shapes(CLIP(VIT, scan=True))["params"]
    section = TrainSection(image_last_blocks=2, rates=("text=0.1",))
    table = rate_table(shapes, section)
    assert [row.factor for row in table] == [1, 0.1, 0]
    assert sum(row.total for row in table) == sum(x.size for x in jax.tree.leaves(shapes))
    lines = rate_lines(table, 1e-3)
    assert len(lines) == 4 and "rate 0.0001 (x 0.1)" in lines[2] and "frozen" in lines[3]
    plain = rate_table(unstack_layers(shapes), section)
    assert plain == table


def test_an_update_is_multiplied_by_its_factor():
    rates = {"a/resblocks/kernel": (0.0, 0.25, 0.5), "b": (0.1,), "c": (1.0,)}
    two = np.ones(2, np.float32)
    updates = {"a": {"resblocks": {"kernel": np.ones((2, 3), np.float32)}}, "b": two, "c": two}
    scaled, _ = scale_by_rates(rates).update(updates, ())
    np.testing.assert_array_equal(scaled["a"]["resblocks"]["kernel"], [[0.25] * 3, [0.5] * 3])
    np.testing.assert_allclose(scaled["b"], 0.1)
    np.testing.assert_array_equal(scaled["c"], 1)


SMALL = dataclasses.replace(VIT, vision=dataclasses.replace(VIT.vision, image_size=16))
FIELDS = {"image_last_blocks": 2, "text_layer_decay": 0.5, "rates": ("norms=1", "text=0.5")}


@pytest.fixture(scope="module")
def both():
    """Blocks one by one, and a stack that is cut, on a mesh, in micro-batches, the update split."""
    results = []
    for mesh, options in (
        (one_device_mesh(), {}),
        (
            make_mesh(data=2, fsdp=2, tensor=2),
            {"scan": True, "microbatch_size": 8, "split_update": True},
        ),
    ):
        state, step = make_all(SMALL, mesh, **FIELDS, **options)
        before = jax.device_get(state.params)
        losses = []
        for i in range(3):
            state, metrics = step(state, place_batch(make_batch(SMALL, i % 2), mesh))
            losses.append(float(metrics["loss"]))
        results.append((before, state, losses))
    return results


@pytest.mark.slow
def test_a_stack_that_is_cut_trains_as_single_blocks(both):
    (_, plain, want), (_, looped, got) = both
    # The same sums in another order, which three steps of Adam pass on.
    np.testing.assert_allclose(got, want, rtol=1e-5)
    chex.assert_trees_all_close(unstack_layers(looped.params), plain.params, atol=2e-4)


@pytest.mark.parametrize("i", [0, 1])
def test_what_is_frozen_keeps_its_bits_and_has_no_state(both, i):
    before, state, _ = both[i]
    names = names_of(SMALL)
    frozen = {n for n, r in rates_of(SMALL, **FIELDS).items() if r == 0}
    after = leaves_by_path(unstack_layers(jax.device_get(state.params)))
    same = {n for n, x in leaves_by_path(unstack_layers(before)).items() if (x == after[n]).all()}
    assert "visual/" + KERNEL.format(0) in frozen and frozen <= same
    assert len(same - frozen) < 5  # a key's bias has no gradient but for rounding
    (adam,) = [s for s in state.opt_state if hasattr(s, "mu")]
    assert set(leaves_by_path(unstack_layers(adam.mu))) == set(names) - frozen


@pytest.mark.slow
def test_a_cut_stacks_state_restores_one_by_one(both, tmp_path):
    (_, plain, _), (_, looped, _) = both
    saver = Checkpoints(tmp_path)
    saver.save(looped, 3, {})
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), plain
    )
    restored, _ = saver.restore(shapes)
    saver.close()
    chex.assert_trees_all_equal(restored.params, unstack_layers(looped.params))
    chex.assert_trees_all_equal(stack_layers(restored.opt_state), looped.opt_state)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_frozen_blocks_below_have_no_backward_pass(scan):
    """By the compiler's own count; a loop's body is counted once for each of its rounds."""
    deep = dataclasses.replace(VIT, vision=dataclasses.replace(VIT.vision, layers=5))
    whole, last = (
        compile_step(deep, (1, 1, 1), scan=scan, image_last_blocks=n).flops for n in (-1, 1)
    )
    text = compile_step(deep, (1, 1, 1), scan=scan, freeze="image").flops
    assert last - text < 0.2 * (whole - text)
