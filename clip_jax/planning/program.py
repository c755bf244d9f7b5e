"""The step of a run, compiled for a mesh of devices that need not be there; no array is made."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from clip_jax.errors import UserError, short
from clip_jax.losses.tiled import choose_tiling
from clip_jax.models.clip import CLIPConfig
from clip_jax.parallel.mesh import batch_shards
from clip_jax.planning.bundles import read_kernel_cycles
from clip_jax.planning.compilers import Compiler, StartedCompiler
from clip_jax.planning.counts import Collective, find_collectives, matmul_flops
from clip_jax.planning.cycles import Timing, time_step, uncounted_names
from clip_jax.planning.hardware import find_device
from clip_jax.planning.hlo import Program, parse_program
from clip_jax.planning.memory import Memory, measure_memory
from clip_jax.planning.refusal import DoesNotFitError, parse_refusal
from clip_jax.planning.roofline import roofline_flops, time_by_roofline
from clip_jax.sections import Config
from clip_jax.training.batch_feed import packed_shapes, trimmed_batch_shapes
from clip_jax.training.optimizer import ELEMENTWISE
from clip_jax.training.setup import RunComponents, build_run, make_step, pair_flops
from clip_jax.training.state import parameter_counts


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """Costs of a run's compiled step; bytes and operations are one device's.

    Attributes:
      compiler: whose program they are read from.
      mesh: the number of devices along each axis.
      parameters: the number of parameters by tower.
      rows: the rows of the batch on one device.
      memory: bytes by kind.
      temp_bytes: the bytes of temporaries, all kinds together.
      flops: operations of matrix products and convolutions in the compiled program, its loops run
        out; None where kernels and libraries hide them.
      needed_flops: the same by `models.flops` and `loss_flops`, nothing computed twice.
      collectives: the exchanges between devices.
      timing: of a TPU's program the compiler's own estimate of time, of a GPU's a roofline; None
        where there is neither.
    """

    compiler: Compiler
    mesh: dict[str, int]
    parameters: dict[str, int]
    rows: int
    memory: Memory
    temp_bytes: int
    flops: int | None
    needed_flops: float
    collectives: list[Collective]
    timing: Timing | None


def batch_shapes(
    mesh: Mesh, config: CLIPConfig, batch_size: int, *, negatives: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a global batch as the step takes it, texts at their full length."""
    length = config.text.context_length
    return trimmed_batch_shapes(mesh, config, batch_size, length, negatives=negatives)


class CompiledProgram(NamedTuple):
    """A program that was compiled, and what is read from it.

    Attributes:
      compiled: the program.
      program: its parsed text.
      flops, timing: see `StepCosts`.
    """

    compiled: jax.stages.Compiled
    program: Program
    flops: int | None
    timing: Timing | None


def compile_program(
    lowered: jax.stages.Lowered, started: StartedCompiler, *, utilization: float
) -> CompiledProgram:
    """Compile a program that was lowered for a compiler's devices.

    Args:
      lowered: the program.
      started: the compiler.
      utilization: the share of a GPU's peak that matrix products are taken to reach.

    Raises:
      UserError: the compiler failed.
      DoesNotFitError: it refused the program, because that needs too much memory.
    """
    name, device = started.compiler.name, find_device(started.device_name)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = parse_refusal(str(error))
        if refusal is None:
            raise UserError(f"{name} could not compile the program: {short(error)}") from None
        raise DoesNotFitError(refusal) from None
    program = parse_program(compiled.as_text() or "")
    if started.compiler.platform == "cpu":
        return CompiledProgram(compiled, program, matmul_flops(program), None)
    if started.compiler.platform == "cuda":
        timing = time_by_roofline(program, device, utilization)
        return CompiledProgram(compiled, program, roofline_flops(program), timing)
    kernels = read_kernel_cycles(started.dump, uncounted_names(program))
    timing = time_step(program, started.device_name, device, kernels)
    return CompiledProgram(compiled, program, None, timing)


def batch_of_run(run: RunComponents) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a run's batches: captions packed if the config gives their shares."""
    config = run.config
    shapes = batch_shapes(
        run.mesh,
        run.model.config,
        config.train.batch_size,
        negatives=bool(config.data.negatives),
    )
    packing = run.caption_packing
    return shapes if packing is None else packed_shapes(shapes, packing)


def compile_run(
    config: Config, steps: int, started: StartedCompiler, *, utilization: float
) -> StepCosts:
    """Compile the step of a run, and read its costs from the program.

    Args:
      config: the run.
      steps: how many it has.
      started: the compiler, with the devices of the run.
      utilization: the share of a GPU's peak that matrix products are taken to reach.

    Raises:
      UserError: the config does not fit the devices, or the compiler failed.
      DoesNotFitError: the compiler refused the program, because it needs too much memory.
    """
    if started.compiler.platform == "cpu":
        config = settled_for_accelerators(config)
    run = build_run(config, steps, devices=started.devices)
    sizes, pairs, shards = run.model.config, config.train.batch_size, batch_shards(run.mesh)
    step: Any = make_step(run)
    lowered = step.lower(run.shapes, batch_of_run(run))
    compiled, program, flops, timing = compile_program(lowered, started, utilization=utilization)
    stats: Any = compiled.memory_analysis()
    length = run.caption_packing or sizes.text.context_length
    tower_flops = pairs * pair_flops(run, length) / run.mesh.size
    return StepCosts(
        compiler=started.compiler,
        mesh=dict(run.mesh.shape),
        parameters=parameter_counts(run.shapes.params),
        rows=pairs // shards,
        memory=measure_memory(
            compiled,
            program,
            run.shapes,
            embed_dim=sizes.embed_dim,
            rows=(config.train.microbatch_size or pairs) // shards,
        ),
        temp_bytes=stats.temp_size_in_bytes,
        flops=flops,
        needed_flops=tower_flops
        + loss_flops(
            pairs,
            shards,
            sizes.embed_dim,
            platform=run.model.target.platform,
            tile_size=config.train.loss_tile,
        ),
        collectives=find_collectives(program, run.mesh.size),
        timing=timing,
    )


def settled_for_accelerators(config: Config) -> Config:
    """Return a config whose fields of "auto" say what they stand for on TPUs and GPUs.

    The CPU's compiler stands in for theirs: its program shall keep and share what theirs does.
    """
    model, optim = config.model, config.optim
    if model.remat == "auto":
        model = dataclasses.replace(model, remat="minimal")
    if optim.split == "auto" and optim.name in ELEMENTWISE:
        optim = dataclasses.replace(optim, split="on")
    return dataclasses.replace(config, model=model, optim=optim)


def loss_flops(pairs: int, shards: int, embed_dim: int, *, platform: str, tile_size: int) -> int:
    """Count one device's operations in the loss.

    They are those of the logits, of their products with both sides, and of the logits a second
    time where the loss does not save their cosines. Devices along `tensor` hold copies of the
    rows and compute the loss each for itself. A `tile_size` of 0 is the rule's choice.
    """
    rows = pairs // shards
    tiling = choose_tiling(rows, pairs, embed_dim, platform, tile_size=tile_size)
    return (3 if tiling.save_cosines else 4) * 2 * rows * pairs * embed_dim
