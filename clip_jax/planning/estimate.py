"""Estimates from a step's costs: how long it takes, and what would make it fit."""

from typing import Any, NamedTuple

from clip_jax import gpu_memory
from clip_jax.planning.hardware import Device
from clip_jax.planning.memory import STATE
from clip_jax.planning.program import StepCosts
from clip_jax.planning.scopes import in_loss
from clip_jax.sections import Config

USABLE = gpu_memory.SHARE
"""Share of a device's memory that a program can have: its code, the runtime and gaps take some."""


class StepTime(NamedTuple):
    """Seconds of one step.

    Attributes:
      compute: matrix products at the stated share of the peak: those of the program, or the needed
        ones where it hides them.
      update: reading and writing the state and the gradients at the memory's bandwidth.
      loss: collectives inside the loss; nothing can run beside them.
      others: all other collectives: of parameters and gradients, and of activations under `tensor`.
    """

    compute: float
    update: float
    loss: float
    others: float

    @property
    def overlapped(self) -> float:
        """The step where the other collectives run entirely beside the computation."""
        return max(self.compute, self.others) + self.update + self.loss

    @property
    def serial(self) -> float:
        """The step where nothing runs beside anything else."""
        return self.compute + self.others + self.update + self.loss


def step_time(costs: StepCosts, device: Device, *, dtype: str, utilization: float) -> StepTime:
    """Estimate the parts of a step on this device.

    Args:
      utilization: the share of the published peak that matrix products reach.

    Raises:
      UserError: no rate is published for the dtype.
    """
    memory = costs.memory
    # The state and the gradients are each read and written once.
    moved = 2 * memory.sum_of(*STATE) + 2 * memory.sum_of("parameters")
    seconds = [
        (in_loss(c.instruction.op_name), c.times * c.wire_bytes / device.bandwidth(c.group))
        for c in costs.collectives
    ]
    return StepTime(
        compute=(costs.flops or costs.needed_flops) / (utilization * device.peak(dtype)),
        update=moved / device.memory_bandwidth,
        loss=sum(s for of_loss, s in seconds if of_loss),
        others=sum(s for of_loss, s in seconds if not of_loss),
    )


class Change(NamedTuple):
    """A change of the config that makes a step take less memory.

    Attributes:
      field: the field of the config, "train.microbatch_size" say.
      value: what to set it to.
      memory: the bytes that a device's step then takes, where they can be estimated.
    """

    field: str
    value: Any
    memory: float | None = None


def fits(costs: StepCosts, device: Device) -> bool:
    """Return whether the step fits the memory that a program can count on.

    A TPU's compiler refuses what does not.
    """
    if costs.compiler.platform == "tpu":
        return True
    return costs.memory.total <= USABLE * device.memory


def advise(costs: StepCosts, config: Config, device: Device) -> list[Change]:
    """Return what to change, the most telling first; nothing where the step fits."""
    if fits(costs, device):
        return []
    usable, mesh, memory = USABLE * device.memory, costs.mesh, costs.memory
    of_rows = memory.sum_of("activations", "other temporaries")
    fixed = memory.total - of_rows
    changes = []
    if config.model.dtype == "float32" and device.kind != "V100-SXM2":
        changes.append(Change("model.dtype", "bfloat16"))
    if fixed > usable / 2 and mesh["data"] > 1:
        changes.append(Change("mesh.fsdp", _more_fsdp(mesh)))
    microbatch = _microbatch(costs, config, usable - fixed, of_rows)
    if microbatch:
        changes.append(microbatch)
    if config.model.remat in ("auto", "none", "minimal", "dots"):
        changes.append(Change("model.remat", "blocks"))
    # In a loop what is kept is stacked, which takes more memory where a block keeps more than its
    # input (docs/performance.md).
    if not config.model.scan and config.model.remat == "blocks":
        changes.append(Change("model.scan", True))
    return changes


def _more_fsdp(mesh: dict[str, int]) -> int:
    """Return the next larger size of the axis that divides the devices."""
    devices = mesh["fsdp"] * mesh["data"]
    sizes = (8, 16, 32, 64, 128, 256)
    return next((n for n in sizes if mesh["fsdp"] < n <= devices and devices % n == 0), devices)


def _microbatch(costs: StepCosts, config: Config, room: float, of_rows: int) -> Change | None:
    """Find the largest micro-batch that fits; None where none does.

    Args:
      room: the bytes that are left for what grows with the rows.
      of_rows: the bytes of that now, taken to be in proportion to the rows.
    """
    batch = config.train.batch_size
    rows = config.train.microbatch_size or batch
    shards = costs.mesh["data"] * costs.mesh["fsdp"]
    for parts in range(2, rows // shards + 1):
        size = rows // parts
        divides = rows % parts == 0 and batch % size == 0 and size % shards == 0
        if divides and of_rows / parts <= room:
            memory = costs.memory.total - of_rows * (1 - 1 / parts)
            return Change("train.microbatch_size", size, memory)
    return None
