"""The compiled step: what travels between devices, and how often it computes."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from steps import FORMS, PAIRS, compile_step, shallow, step_of
from tiny import TINY, VIT

from clip_jax.losses import make_loss
from clip_jax.models.clip import CLIP
from clip_jax.models.zoo import model_config
from clip_jax.parallel.mesh import AXES, BATCH_AXES, make_mesh
from clip_jax.parallel.sharding import partition_spec
from clip_jax.planning.counts import matmul_flops
from clip_jax.planning.hlo import parse_program
from clip_jax.sections import OptimSection, TrainSection
from clip_jax.training.optimizer import make_optimizer, make_schedule
from clip_jax.training.state import device_bytes, state_shapes
from clip_jax.typing import path_name

SLOW = ("fsdp and tensor", "fsdp, looped, micro-batches")


def forms(*names):
    marks = {name: [pytest.mark.slow] for name in SLOW}
    chosen = [pytest.param(name, marks=marks.get(name, [])) for name in names or FORMS]
    return pytest.mark.parametrize("form", chosen)


def squeezed(dims):
    return tuple(n for n in dims if n > 1)


def arrays(step, kind):
    return [
        (squeezed(shape.dims), exchange)
        for exchange in step.exchanges
        for shape in exchange.instruction.shapes
        if exchange.kind == kind
    ]


@forms()
def test_the_loss_gathers_texts_once_and_scatters_their_gradient_once(form):
    step = step_of(form)
    features = (PAIRS, VIT.embed_dim)
    gathered = [x for dims, x in arrays(step, "all-gather") if dims == features]
    assert [x.times for x in gathered] == [1]
    assert gathered[0].instruction.op_name.endswith("shard_map/all_gather_invariant")
    (scattered,) = arrays(step, "reduce-scatter")
    shards = step.shapes.step.sharding.mesh.shape
    rows = PAIRS // (shards["data"] * shards["fsdp"])
    assert scattered[0] == (rows, VIT.embed_dim) and scattered[1].times == 1


@forms()
def test_no_logits_travel(form):
    """What is as long as the batch has one number a row, or is the gathered texts."""
    for exchange in step_of(form).exchanges:
        for shape in exchange.instruction.shapes:
            if PAIRS in shape.dims:
                assert squeezed(shape.dims) in {(PAIRS, VIT.embed_dim), (PAIRS,)}


def as_matrices(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the matrices a kernel may be multiplied as: its first axes merged, and its last."""
    return [(math.prod(shape[:at]), math.prod(shape[at:])) for at in range(1, len(shape))]


@forms("fsdp", "fsdp, looped, micro-batches")
def test_fsdp_gathers_one_matrix_at_a_time_and_no_activations(form):
    step = step_of(form)
    params = jax.tree_util.tree_leaves_with_path(step.shapes.params)
    # Of a stack, one layer at a time.
    shapes = [x.shape[1:] if "/resblocks/" in path_name(path) else x.shape for path, x in params]
    whole = {squeezed(form) for shape in shapes for form in (shape, *as_matrices(shape))}
    whole |= {(PAIRS, VIT.embed_dim), (PAIRS,)}
    for dims, exchange in arrays(step, "all-gather"):
        assert dims in whole, (dims, exchange.instruction.op_name)
        assert len(exchange.instruction.shapes) == 1
    assert not arrays(step, "collective-permute")


def test_parameters_and_moments_are_overwritten_where_they_lie():
    step = compile_step(shallow(VIT, 1), (1, 1, 1))
    matrices = {x.shape for x in jax.tree.leaves(step.shapes.params) if x.ndim > 1}
    lines = [line for lines in step.program.computations.values() for line in lines.values()]
    copies = [line for line in lines if line.opcode == "copy" and line.shapes]
    assert not [line for line in copies if tuple(line.shapes[0].dims) in matrices]


@forms("fsdp")
def test_every_gradient_is_summed_over_all_rows(form):
    """By all-reduce and a cut on CPUs, whose compiler makes no reduce-scatter of the two."""
    step = step_of(form)
    # The compiler may hold a matrix the other way round.
    summed = [sorted(dims) for dims, _ in arrays(step, "all-reduce")]
    for path, x in jax.tree_util.tree_leaves_with_path(step.shapes.params):
        if x.ndim > 1:
            forms = [sorted(squeezed(form)) for form in (x.shape, *as_matrices(x.shape))]
            assert any(form in summed for form in forms), path_name(path)


def optimizer_of(name="adamw"):
    section = OptimSection(name=name, learning_rate=1e-3, warmup_steps=5)
    return make_optimizer(make_schedule(section, 40), section)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("scan", [False, True])
def test_moments_lie_as_their_parameters(name, scan):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shapes = state_shapes(CLIP(TINY[name], scan=scan), optimizer_of(), mesh, TrainSection())
    want = [x.sharding for x in jax.tree.leaves(shapes.params)]
    adam = next(s for s in jax.tree.leaves(shapes.opt_state, is_leaf=is_adam) if is_adam(s))
    for moments in (adam.mu, adam.nu):
        assert [x.sharding for x in jax.tree.leaves(moments)] == want


def is_adam(x):
    return hasattr(x, "mu")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("scan", [False, True])
def test_every_leaf_that_can_be_is_split(name, scan):
    """Over `fsdp`; heads and hidden features over `tensor` too; never the layers of a stack."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model = CLIP(TINY[name], scan=scan)
    shapes = state_shapes(model, optimizer_of(), mesh, TrainSection()).params
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        label, spec = path_name(path), x.sharding.spec
        stacked = "/resblocks/" in label
        assert not (stacked and spec and spec[0])
        if any(n % 2 == 0 for n in x.shape[stacked:]) and "bias" not in label:
            assert "fsdp" in spec, label
        over_heads = ("q_proj", "c_fc", "out_proj/kernel", "mlp/c_proj/kernel")
        # 179 is the odd hidden width of the tiny SigLIP.
        if any(part in label for part in over_heads) and 179 not in x.shape:
            assert "tensor" in spec, label


@pytest.mark.parametrize(
    ("fsdp", "scan"), [(64, True), pytest.param(128, True, marks=pytest.mark.slow)]
)
def test_bigg_is_split_evenly(fsdp, scan):
    """Parameters and optimizer of a device within 2 % of an exact division."""
    mesh = jax.sharding.AbstractMesh((256 // fsdp, fsdp, 1), AXES)
    model = CLIP(model_config("ViT-bigG-14"), scan=scan)
    shapes = state_shapes(model, optimizer_of(), mesh, TrainSection())
    for tree in (shapes.params, shapes.opt_state):
        exact = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / fsdp
        assert exact <= device_bytes(tree) <= 1.02 * exact


def test_an_axis_that_divides_nothing_leaves_the_array_whole():
    mesh = jax.sharding.AbstractMesh((1, 64, 1), AXES)
    assert partition_spec("text/ln_final/scale", (63,), mesh) == jax.P()
    # The row's dimension is not divided; another one is.
    assert partition_spec("mlp/c_fc/kernel", (63, 128), mesh) == jax.P(None, "fsdp")
    # With one device along `fsdp` nothing is split over it.
    one = jax.sharding.AbstractMesh((8, 1, 1), AXES)
    assert partition_spec("text/ln_final/scale", (64,), one) == jax.P()
    assert partition_spec("mlp/c_fc/kernel", (64, 128), one) == jax.P()


def two_block_loss(mesh, *, recompute):
    """Make the usual form: both modalities gathered, and a [b, B] block for each direction."""

    def some_rows(rows, z_all_BD, scale):
        z_rD, own_r = rows
        logits_rB = scale * z_rD @ z_all_BD.T
        own = jnp.take_along_axis(logits_rB, own_r[:, None], axis=1)[:, 0]
        return jnp.sum(jax.nn.logsumexp(logits_rB, axis=1) - own)

    def direction(z_bD, z_all_BD, scale, own_b):
        if not recompute:
            return some_rows((z_bD, own_b), z_all_BD, scale)
        # A quarter of the rows at a time, and computed again in the backward pass.
        parts = z_bD.reshape(4, -1, z_bD.shape[1]), own_b.reshape(4, -1)
        part = jax.checkpoint(lambda rows: some_rows(rows, z_all_BD, scale))
        return jnp.sum(lax.map(part, parts))

    def local(z_image_bD, z_text_bD, scale):
        images_BD, texts_BD = (
            lax.all_gather(z, BATCH_AXES, tiled=True) for z in (z_image_bD, z_text_bD)
        )
        own_b = lax.axis_index(BATCH_AXES) * len(z_image_bD) + jnp.arange(len(z_image_bD))
        both = direction(z_image_bD, texts_BD, scale, own_b)
        both += direction(z_text_bD, images_BD, scale, own_b)
        return lax.psum(both, BATCH_AXES) / (2 * len(texts_BD))

    rows = jax.P(BATCH_AXES)
    return jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, jax.P()), out_specs=jax.P())


def loss_program(function, mesh):
    rows = jax.ShapeDtypeStruct(
        (512, 64), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(BATCH_AXES))
    )
    step = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2)))
    return parse_program(step.lower(rows, rows, jnp.float32(14)).compile().as_text())


def test_one_pass_computes_half_of_the_two_block_form():
    """Across 8 devices, both in bounded memory: no block outlives the forward pass.

    One pass: the logits forward and again backward, and two products: 4. Two blocks: twice that.
    Keeping both blocks between the passes saves their recomputation: 6.
    """
    mesh = make_mesh(data=8, fsdp=1, tensor=1)
    loss_fn = make_loss(
        "softmax",
        mesh=mesh,
        batch_axes=BATCH_AXES,
        platform="cpu",
        tile_size=128,
        mask_equal_captions=False,
    )
    valid_B, ids_B = jnp.ones(512, bool), jnp.arange(512, dtype=jnp.uint32)

    def one_pass(z_image_BD, z_text_BD, scale):
        return loss_fn(z_image_BD, z_text_BD, scale, jnp.float32(0), valid_B, ids_B).loss

    forms = [one_pass, *(two_block_loss(mesh, recompute=r) for r in (True, False))]
    once, recomputed, kept = (matmul_flops(loss_program(f, mesh)) for f in forms)
    unit = 2 * 64 * 512 * 64
    assert (once, recomputed, kept) == (4 * unit, 8 * unit, 6 * unit)
    assert once <= 0.55 * recomputed
