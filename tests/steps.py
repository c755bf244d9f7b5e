"""The step of a tiny model: made, run, or compiled without arrays, so that it can be read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from test_models import make_tokens
from tiny import ADAMW

from clip_jax.losses import make_loss
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.parallel.mesh import BATCH_AXES, make_mesh, place_batch
from clip_jax.planning.counts import Collective, find_collectives, matmul_flops
from clip_jax.planning.hlo import Program, parse_program
from clip_jax.planning.program import batch_shapes
from clip_jax.training.device_augment import make_draws
from clip_jax.training.optimizer import make_optimizer, make_schedule
from clip_jax.training.state import TrainState, init_state, state_shapes
from clip_jax.training.step import make_train_step

B = 16


def make_batch(config, seed=0):
    rng = np.random.default_rng(seed)
    size = config.vision.image_size
    return {
        "image": rng.integers(0, 256, (B, size, size, 3)).astype(np.uint8),
        "text": make_tokens(rng, B),
        "caption_id": rng.integers(0, 12, B).astype(np.uint32),
        "valid": np.arange(B) != 5,
    }


def make_parts(
    model,
    mesh,
    *,
    loss="softmax",
    optimizer="adamw",
    tile_size=8,
    mask_equal_captions=True,
    jitter=False,
    patch_dropout=0.0,
    **options,
):
    """(optimizer, the state's shapes, step); `options` are `make_train_step`'s."""
    schedule = make_schedule(1e-3, 5, 40)
    made = make_optimizer(schedule, name=optimizer, **ADAMW)
    averaged = options.get("ema_decay", 0.0) > 0
    shapes = state_shapes(model, made, mesh, freeze=options.get("freeze", ""), ema=averaged)
    half = (0.5, 0.5, 0.5)
    step = make_train_step(
        model,
        make_loss(
            loss,
            mesh=mesh,
            batch_axes=BATCH_AXES,
            tile_size=tile_size,
            mask_equal_captions=mask_equal_captions,
        ),
        made,
        schedule,
        shapes,
        image_mean=half,
        image_std=half,
        mesh=mesh,
        draws=make_draws(
            seed=0,
            color_jitter=(0.2, 0.2, 0.2) if jitter else (0.0, 0.0, 0.0),
            patches=model.config.vision.grid_size**2 if patch_dropout else 0,
            patch_dropout=patch_dropout,
        ),
        **options,
    )
    return made, shapes, step


def make_all(
    config, mesh, *, loss="softmax", dtype=jnp.float32, remat="none", scan=False, **options
):
    """(a fresh state, step)."""
    bias = -10.0 if loss == "sigmoid" else None
    sizes = dataclasses.replace(config, init_logit_bias=bias)
    model = CLIP(sizes, dtype=dtype, remat=remat, scan=scan)
    optimizer, shapes, step = make_parts(model, mesh, loss=loss, **options)
    freeze = options.get("freeze", "")
    return init_state(model, optimizer, shapes, seed=0, freeze=freeze), step


def one_device_mesh():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))


def run(config, mesh, steps=6, **kwargs):
    state, step = make_all(config, mesh, **kwargs)
    losses = []
    for i in range(steps):
        state, metrics = step(state, place_batch(make_batch(config, i % 2), mesh))
        losses.append(float(metrics["loss"]))
    return state, metrics, losses


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled step and the shapes of its arguments."""

    config: CLIPConfig
    shapes: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    compiled: jax.stages.Compiled
    program: Program

    @property
    def flops(self) -> int:
        return matmul_flops(self.program)

    @property
    def exchanges(self) -> list[Collective]:
        return find_collectives(self.program, self.shapes.step.sharding.mesh.size)


def compile_step(
    config: CLIPConfig,
    mesh_shape: tuple[int, int, int],
    *,
    pairs: int = 64,
    microbatch_size: int = 0,
    mask_equal_captions: bool = True,
    freeze: str = "",
    patch_dropout: float = 0.0,
    **how,
) -> CompiledStep:
    """On as many of the devices as the mesh has."""
    if mesh_shape == (1, 1, 1):
        mesh = one_device_mesh()
    else:
        mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), mesh_shape, strict=True)))
    _, shapes, step = make_parts(
        CLIP(config, **how),
        mesh,
        tile_size=16,
        mask_equal_captions=mask_equal_captions,
        microbatch_size=microbatch_size,
        freeze=freeze,
        patch_dropout=patch_dropout,
    )
    batch = batch_shapes(mesh, config, pairs)
    compiled = step.lower(shapes, batch).compile()
    return CompiledStep(config, shapes, batch, compiled, parse_program(compiled.as_text()))
