"""How long a step takes, and what would make it fit: reckoned from what the program says."""

import math
from typing import NamedTuple

from clip_jax.planning.counts import Collective
from clip_jax.planning.hardware import Device
from clip_jax.planning.program import Facts
from clip_jax.sections import Config
from clip_jax.training.setup import steps_of_run

USABLE = 0.9
"""Share of a device's memory that a program can have: its code, the runtime and gaps take some."""


class Times(NamedTuple):
    """Seconds of one step.

    Attributes:
      compute: matrix products at the stated share of the peak.
      update: reading and writing the state and the gradients at the memory's rate.
      loss: collectives inside the loss; nothing can run beside them.
      others: all other collectives: of parameters and gradients, and of activations under `tensor`.
    """

    compute: float
    update: float
    loss: float
    others: float

    @property
    def least(self) -> float:
        """Where the other collectives run entirely beside the computation."""
        return max(self.compute, self.others) + self.update + self.loss

    @property
    def most(self) -> float:
        """Where nothing runs beside anything else."""
        return self.compute + self.others + self.update + self.loss


def is_of_loss(exchange: Collective) -> bool:
    """Whether a collective stands inside the loss.

    The compiler joins the temperature's gradient, of 4 bytes, with those of the towers, and gives
    both names to what it made: that is not the loss's.
    """
    name = exchange.instruction.op_name
    return "shard_map" in name and "CLIP" not in name


def step_times(facts: Facts, device: Device, dtype: str, utilisation: float) -> Times:
    """The parts of a step on this device.

    Raises:
      UserError: no rate is published for the dtype.
    """
    kinds = facts.memory.kinds
    state = sum(kinds.get(k, 0) for k in ("parameters", "optimiser", "moving averages"))
    moved = 2 * state + 2 * kinds.get("parameters", 0)  # the gradients: written and read
    seconds = [
        (is_of_loss(x), x.times * x.wire_bytes / device.rate(x.group)) for x in facts.exchanges
    ]
    return Times(
        compute=facts.flops / (utilisation * device.peak(dtype)),
        update=moved / device.memory_rate,
        loss=sum(s for of_loss, s in seconds if of_loss),
        others=sum(s for of_loss, s in seconds if not of_loss),
    )


def advice(facts: Facts, config: Config, device: Device) -> list[str]:
    """What to change, the most telling first; empty where the run fits."""
    room, mesh = USABLE * device.memory, facts.mesh
    kinds, total = facts.memory.kinds, facts.memory.total
    if total <= room:
        return []
    lines = []
    state = sum(kinds.get(k, 0) for k in ("parameters", "optimiser", "moving averages"))
    copies = sum(kinds.get(k, 0) for k in ("gradients", "copies of parameters"))
    rows_part = kinds.get("activations", 0) + kinds.get("other temporaries", 0)
    fixed = total - rows_part
    if config.model.dtype == "float32" and device.kind != "V100-SXM2":
        lines.append("config.model.dtype=bfloat16: about half the activations")
    if fixed > room / 2 and mesh["data"] > 1:
        lines.append(_more_fsdp(state, copies, mesh))
    micro = _microbatch(facts, config, room - fixed, rows_part, mesh)
    if micro:
        size, total_then = micro
        lines.append(
            f"config.train.microbatch_size={size}: about {gigabytes(total_then)} "
            "(activations in proportion to the rows), and a third more computation"
        )
    if config.model.remat in ("none", "dots"):
        lines.append(
            "config.model.remat=blocks: the backward pass computes every block again, a third more "
            "computation; of a block only its input stays"
        )
    if not config.model.scan and config.model.remat != "none":
        lines.append("config.model.scan=True: gathered parameters live for one block at a time")
    return lines


def _more_fsdp(state: int, copies: int, mesh: dict[str, int]) -> str:
    now, most = mesh["fsdp"], mesh["fsdp"] * mesh["data"]
    sizes = [n for n in (8, 16, 32, 64, 128, 256) if now < n <= most and most % n == 0]
    wanted = sizes[0] if sizes else most
    return (
        f"config.mesh.fsdp={wanted}: parameters, moving averages and optimizer "
        f"{gigabytes(state * now / wanted)} instead of {gigabytes(state)}"
        + (f", gradients and copies of parameters {gigabytes(copies)} at most" if copies else "")
    )


def _microbatch(
    facts: Facts, config: Config, room: float, rows_part: int, mesh: dict[str, int]
) -> tuple[int, float] | None:
    """The largest micro-batch that fits, and the bytes in all then; None where none does."""
    batch = config.train.batch_size
    rows = config.train.microbatch_size or batch
    shards = mesh["data"] * mesh["fsdp"]
    for parts in range(2, rows // shards + 1):
        size = rows // parts
        fits = rows_part / parts <= room
        if fits and rows % parts == 0 and batch % size == 0 and size % shards == 0:
            return size, facts.memory.total - rows_part * (1 - 1 / parts)
    return None


def gigabytes(n: float) -> str:
    """In units of 10^9 bytes, as devices are sold."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= unit:
            return f"{n / unit:,.1f} {name}"
    return f"{n:.0f} B"


def run_steps(config: Config, pairs: int | None) -> int | None:
    """Optimizer steps of the whole run; None where that takes a number of pairs."""
    return (config.train.steps or None) if pairs is None else steps_of_run(config, pairs)


def days(steps: int, seconds: float) -> float:
    """Of a run at this many seconds a step."""
    return steps * seconds / 86_400


def rounded(seconds: float) -> str:
    """Three digits, in seconds or milliseconds."""
    digits = max(0, 2 - math.floor(math.log10(max(seconds, 1e-6))))
    return (
        f"{seconds:.{digits}f} s" if seconds >= 1 else f"{1e3 * seconds:.{max(0, digits - 3)}f} ms"
    )
