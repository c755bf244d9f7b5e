"""The state that a step changes, made in place on the mesh."""

import contextlib
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from clip_jax.models.clip import CLIP, init_variables
from clip_jax.models.lora import LORA, make_adapters
from clip_jax.models.projection import (
    PROJECTIONS,
    Projections,
    make_projections,
    without_projections,
)
from clip_jax.parallel.jax_internals import draws_as_gpu_kernels
from clip_jax.parallel.sharding import partition_spec, tree_shardings, update_spec
from clip_jax.sections import TrainSection
from clip_jax.training.rates import split_frozen
from clip_jax.typing import Params


@flax.struct.dataclass
class TrainState:
    """The state of a run after `step` updates.

    Attributes:
      step: int32 scalar.
      params: the model's parameters, float32; with them adapters and a distillation's projections.
      batch_stats: a ResNet's running statistics; empty for a ViT.
      opt_state: the optimizer's, of the parameters that are trained.
      ema: the moving averages {"params", "batch_stats"}; empty where none is kept.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any


def state_mesh(state: TrainState) -> Mesh:
    """Return the mesh on which a state (or its shapes) is laid out."""
    sharding: Any = state.step.sharding
    return sharding.mesh


def with_extras(
    params: Params, section: TrainSection, seed: int, projections: Projections
) -> Params:
    """Return a model's parameters, with the fresh adapters and projections of a run; traceable."""
    extras: Params = {}
    if section.lora_rank:
        rank, targets = section.lora_rank, section.lora_targets
        extras[LORA] = make_adapters(params, rank=rank, targets=targets, seed=seed)
    if projections:
        extras[PROJECTIONS] = make_projections(projections, seed)
    return params | extras if extras else params


def make_state(
    variables: dict[str, Any],
    optimizer: optax.GradientTransformation,
    section: TrainSection,
    *,
    seed: int = 0,
    projections: Projections = (),
) -> TrainState:
    """Make a state before its first step; traceable.

    Args:
      variables: {"params", "batch_stats"} of the model.
      optimizer: keeps a state of the parameters that are trained.
      section: it says which those are, its `ema_decay` whether averages are kept.
      seed: of the adapters and the projections, where there are any.
      projections: of a distillation.
    """
    params = with_extras(variables["params"], section, seed, projections)
    batch_stats = variables.get("batch_stats", {})
    average = {"params": without_projections(params), "batch_stats": batch_stats}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(split_frozen(params, section)[0]),
        # Arrays of their own: the step donates its state, and one buffer cannot be given twice.
        ema=jax.tree.map(jnp.copy, average if section.ema_decay else {}),
    )


def state_shapes(
    model: CLIP,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    section: TrainSection,
    *,
    split_update: bool = False,
    projections: Projections = (),
) -> TrainState:
    """Return a state of ShapeDtypeStructs with their shardings; nothing is allocated.

    `split_update`: the optimizer's state is split over `data` too (`sharding.update_spec`).
    """
    shapes = jax.eval_shape(
        lambda: make_state(init_variables(model, 0), optimizer, section, projections=projections)
    )
    shardings = tree_shardings(shapes, mesh)
    if split_update:
        shardings = shardings.replace(
            opt_state=tree_shardings(shapes.opt_state, mesh, spec=update_spec)
        )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def update_shardings(shapes: TrainState) -> Params:
    """Return where each parameter is updated, by where the optimizer's state lies."""
    mesh = state_mesh(shapes)
    specs: list[Any] = [x.sharding.spec for x in jax.tree.leaves(shapes.opt_state)]
    is_split = any("data" in spec for spec in specs)
    return tree_shardings(
        {"params": shapes.params}, mesh, spec=update_spec if is_split else partition_spec
    )["params"]


class Init:
    """The jitted function that returns a fresh state.

    Attributes:
      function: jitted, of no arguments.
      is_whole: no parameter is cut, so a GPU draws them by kernels that cannot cut them.
    """

    def __init__(self, function: Any, is_whole: bool) -> None:
        self.function, self.is_whole = function, is_whole

    def __call__(self) -> TrainState:
        """Return the state."""
        return self.lower().compile()()

    def lower(self, **options: Any) -> jax.stages.Lowered:
        """Lower it, with the options of a traced function's `lower`."""
        with draws_as_gpu_kernels() if self.is_whole else contextlib.nullcontext():
            return self.function.trace().lower(**options)


def init_state(
    model: CLIP,
    optimizer: optax.GradientTransformation,
    shapes: TrainState,
    section: TrainSection,
    seed: int,
) -> TrainState:
    """Make a fresh state laid out as `shapes`, each device its own part of it."""
    return make_init(model, optimizer, shapes, section, seed)()


def make_init(
    model: CLIP,
    optimizer: optax.GradientTransformation,
    shapes: TrainState,
    section: TrainSection,
    seed: int,
    projections: Projections = (),
) -> Init:
    """Make the function that returns a fresh state, see `init_state`."""
    shardings = jax.tree.map(lambda x: x.sharding, shapes)

    def make() -> TrainState:
        variables = init_variables(model, seed)
        return make_state(variables, optimizer, section, seed=seed, projections=projections)

    is_whole = all(x.sharding.is_fully_replicated for x in jax.tree.leaves(shapes.params))
    return Init(jax.jit(make, out_shardings=shardings), is_whole)


def parameter_counts(params: Any) -> dict[str, int]:
    """Count the parameters of each tower, of the rest, and in all."""
    visual = sum(x.size for x in jax.tree.leaves(params["visual"]))
    text = sum(x.size for x in jax.tree.leaves(params["text"]))
    total = sum(x.size for x in jax.tree.leaves(params))
    return {"image": visual, "text": text, "other": total - visual - text, "total": total}


def device_bytes(tree: Any) -> int:
    """Count the bytes of a tree's arrays (or shapes with shardings) on one device."""
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )
