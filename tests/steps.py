"""The step of a tiny model, compiled without arrays: what the compiler made of it can be read."""

import dataclasses

import jax

from clip_jax.augment import make_draws
from clip_jax.losses import make_loss
from clip_jax.mesh import make_mesh
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.optim import make_optimizer, make_schedule
from clip_jax.planning.counts import Collective, collectives, matmul_flops
from clip_jax.planning.hlo import Program, parse_program
from clip_jax.planning.program import batch_shapes
from clip_jax.state import TrainState, state_shapes
from clip_jax.step import make_train_step


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
        return collectives(self.program, self.shapes.step.sharding.mesh.size)


def compile_step(
    config: CLIPConfig,
    mesh_shape: tuple[int, int, int],
    *,
    pairs: int = 64,
    microbatch_size: int = 0,
    mask_equal_captions: bool = True,
    **how,
) -> CompiledStep:
    """On as many of the devices as the mesh has."""
    if mesh_shape == (1, 1, 1):
        mesh = jax.sharding.Mesh([[jax.devices()[:1]]], ("data", "fsdp", "tensor"))
    else:
        mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), mesh_shape, strict=True)))
    model = CLIP(config, **how)
    schedule = make_schedule(1e-3, 5, 40)
    optimizer = make_optimizer(
        schedule,
        weight_decay=0.2,
        beta1=0.9,
        beta2=0.98,
        eps=1e-6,
        clip_norm=0.0,
        max_logit_scale=100.0,
    )
    shapes = state_shapes(model, optimizer, mesh)
    loss_fn = make_loss("softmax", mesh=mesh, tile_size=16, mask_equal_captions=mask_equal_captions)
    half = (0.5, 0.5, 0.5)
    step = make_train_step(
        model,
        loss_fn,
        optimizer,
        schedule,
        shapes,
        mesh=mesh,
        image_mean=half,
        image_std=half,
        draws=make_draws(seed=0),
        microbatch_size=microbatch_size,
    )
    batch = batch_shapes(mesh, config, pairs)
    compiled = step.lower(shapes, batch).compile()
    return CompiledStep(config, shapes, batch, compiled, parse_program(compiled.as_text()))
