"""The training step of a tiny model: made, run, or compiled without arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from model_cases import make_tokens
from tiny import VIT

from clip_jax.data.images import Preprocess
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.parallel.mesh import make_mesh, place_batch
from clip_jax.planning.counts import Collective, find_collectives, matmul_flops
from clip_jax.planning.hlo import Program, parse_program
from clip_jax.planning.program import batch_shapes
from clip_jax.sections import DataSection, ModelSection, OptimSection, TrainSection
from clip_jax.training.device_augment import make_draws
from clip_jax.training.optimizer import make_optimizer, make_schedule
from clip_jax.training.setup import loss_of_section, rates_of
from clip_jax.training.state import TrainState, init_state, state_shapes
from clip_jax.training.step import make_train_step

B = 16


def make_batch(config, seed=0):
    """Return a batch of B random pairs, one of them invalid, some of equal captions."""
    rng = np.random.default_rng(seed)
    size = config.vision.image_size
    return {
        "image": rng.integers(0, 256, (B, size, size, 3)).astype(np.uint8),
        "text": make_tokens(rng, B),
        "caption_id": rng.integers(0, 12, B).astype(np.uint32),
        "valid": np.arange(B) != 5,
    }


HALF = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def make_parts(
    model,
    mesh,
    *,
    optimizer="adamw",
    jitter=False,
    patch_dropout=0.0,
    drop_path=0.0,
    erasing=0.0,
    wrap_loss=lambda loss_fn: loss_fn,
    split_update=False,
    **train,
):
    """Return (optimizer, section, the state's shapes, step); `train` are the section's fields."""
    section = TrainSection(**{"loss_tile": 8, "mask_equal_captions": True} | train)
    optim = OptimSection(name=optimizer, learning_rate=1e-3, warmup_steps=5)
    schedule = make_schedule(optim, 40)
    transformation = make_optimizer(schedule, optim, rates_of(model, section))
    shapes = state_shapes(model, transformation, mesh, section, split_update=split_update)
    loss_fn = loss_of_section(section, mesh, model.target)
    draws = make_draws(
        ModelSection(patch_dropout=patch_dropout, drop_path=drop_path, text_drop_path=drop_path),
        DataSection(
            color_jitter=(0.2, 0.2, 0.2) if jitter else (0.0, 0.0, 0.0),
            random_erasing=erasing,
            erasing_mode="rand",
        ),
        seed=0,
        patches=model.config.vision.grid_size**2 if patch_dropout else 0,
        layers=model.config.vision.layers if drop_path else 0,
        text_layers=model.config.text.layers,
    )
    step = make_train_step(
        model,
        wrap_loss(loss_fn),
        transformation,
        schedule,
        shapes,
        section,
        preprocess=HALF,
        draws=draws,
    )
    return transformation, section, shapes, step


def make_all(
    config, mesh, *, loss="softmax", dtype=jnp.float32, remat="none", scan=False, **options
):
    """Return (a fresh state, step)."""
    bias = -10.0 if loss == "sigmoid" else None
    sizes = dataclasses.replace(config, init_logit_bias=bias)
    model = CLIP(sizes, dtype=dtype, remat=remat, scan=scan)
    optimizer, section, shapes, step = make_parts(model, mesh, loss=loss, **options)
    return init_state(model, optimizer, shapes, section, seed=0), step


def one_device_mesh():
    """Return the mesh of the first device alone."""
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))


def run(config, mesh, steps=6, **kwargs):
    """Train on two batches in turn; return (the last state, its metrics, every step's loss)."""
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
        """Return the operations of one device's matrix products and convolutions."""
        return matmul_flops(self.program)

    @property
    def exchanges(self) -> list[Collective]:
        """Return the collectives of the program."""
        return find_collectives(self.program, self.shapes.step.sharding.mesh.size)


def compile_step(
    config: CLIPConfig,
    mesh_shape: tuple[int, int, int],
    *,
    pairs: int = 64,
    microbatch_size: int = 0,
    mask_equal_captions: bool = True,
    freeze: str = "",
    image_last_blocks: int = -1,
    patch_dropout: float = 0.0,
    **exec_config,
) -> CompiledStep:
    """Compile the step on as many of the devices as the mesh has."""
    if mesh_shape == (1, 1, 1):
        mesh = one_device_mesh()
    else:
        mesh = make_mesh(**dict(zip(("data", "fsdp", "tensor"), mesh_shape, strict=True)))
    _, _, shapes, step = make_parts(
        CLIP(config, **exec_config),
        mesh,
        loss_tile=16,
        mask_equal_captions=mask_equal_captions,
        microbatch_size=microbatch_size,
        freeze=freeze,
        image_last_blocks=image_last_blocks,
        patch_dropout=patch_dropout,
    )
    batch = batch_shapes(mesh, config, pairs)
    compiled = step.lower(shapes, batch).compile()
    return CompiledStep(config, shapes, batch, compiled, parse_program(compiled.as_text()))


PAIRS = 160  # no other dimension is that long
LOOPED = {"scan": True, "remat": "blocks"}
FORMS = {
    "fsdp": ((2, 4, 1), {}),
    "fsdp and tensor": ((2, 2, 2), {}),
    # More rows than a tower is wide: of fewer, the compiler gathers the one row of each that the
    # last block's query is read at, instead of summing its matrix's gradient, which is larger then.
    "fsdp, looped, micro-batches": ((1, 8, 1), LOOPED | {"microbatch_size": 80}),
}


def shallow(config, layers):
    """The same model with so many blocks in each tower."""
    towers = {name: getattr(config, name) for name in ("vision", "text")}
    return dataclasses.replace(
        config, **{k: dataclasses.replace(v, layers=layers) for k, v in towers.items()}
    )


@functools.cache
def step_of(form: str) -> CompiledStep:
    mesh_shape, how = FORMS[form]
    return compile_step(shallow(VIT, 3 if "scan" in how else 1), mesh_shape, pairs=PAIRS, **how)
