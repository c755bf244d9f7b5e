"""A run's plan as a value: what its step costs, whether it fits, and how long the run takes."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

from clip_jax.planning.compilers import Compiler
from clip_jax.planning.estimate import Change, StepTime, advise, fits, step_time
from clip_jax.planning.hardware import Device
from clip_jax.planning.program import StepCosts
from clip_jax.planning.refusal import Refusal
from clip_jax.sections import Config
from clip_jax.training.setup import steps_of_run


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run on so many devices of a kind.

    Attributes:
      config: the run.
      device_name: the name of the device in `hardware.DEVICES`.
      device: its memory and bandwidths.
      utilization: the share of the published peak that matrix products are taken to reach.
      costs: the compiled step's mesh, memory by kind, operations and collectives, of one device.
      time: the seconds of a step.
      changes: what would make it fit, the most telling first; nothing where it does.
      steps: the optimizer steps of the run; None where that takes the pairs of an epoch.
    """

    config: Config
    device_name: str
    device: Device
    utilization: float
    costs: StepCosts
    time: StepTime
    changes: tuple[Change, ...]
    steps: int | None

    @property
    def devices(self) -> int:
        """The number of devices."""
        return math.prod(self.costs.mesh.values())

    @property
    def fits(self) -> bool:
        """Whether the step fits the memory that a program can count on."""
        return fits(self.costs, self.device)

    @property
    def memory_share(self) -> float:
        """The memory of the step over that of the device."""
        return self.costs.memory.total / self.device.memory

    @property
    def flops(self) -> int | None:
        """The operations of a step on all devices, where they can be counted."""
        return None if self.costs.flops is None else self.costs.flops * self.devices

    @property
    def needed_flops(self) -> float:
        """The operations of a step on all devices, nothing computed twice."""
        return self.costs.needed_flops * self.devices

    @property
    def is_counted(self) -> bool:
        """Whether the compiler itself estimates the time."""
        return self.costs.compiler.platform == "tpu"

    @property
    def step_seconds(self) -> float:
        """The estimate of a step's time without its exchanges: cycles, or from published rates."""
        timing = self.costs.timing
        return timing.seconds if timing else self.time.compute + self.time.update

    @property
    def exposed_seconds(self) -> float:
        """The seconds of a step in which a device waits for others, from published rates."""
        exposed, _ = self._exchanges
        return exposed

    @property
    def exposed_share(self) -> float:
        """The share of the exchanged bytes for whose time the schedule runs nothing beside."""
        collectives = self.costs.collectives
        everything = sum(c.times * c.bytes for c in collectives)
        return self._exchanges[1] / everything if everything else 0.0

    @functools.cached_property
    def _exchanges(self) -> tuple[float, float]:
        """Seconds and bytes that nothing hides."""
        collectives, timing = self.costs.collectives, self.costs.timing
        needs = [c.wire_bytes / self.device.bandwidth(c.group) for c in collectives]
        # Without an estimate of what runs beside them, anything hides them.
        hidden = needs
        if timing:
            hidden = hidden_seconds(needs, [c.beside for c in collectives], timing.seconds_each())
        seconds = size = 0.0
        for c, need, beside in zip(collectives, needs, hidden, strict=True):
            exposed = 1 - beside / need if c.beside and need else 1.0
            seconds += c.times * need * exposed
            size += c.times * c.bytes * exposed
        return seconds, size

    def pairs_per_second(self, step_seconds: float) -> float:
        """Return the rate of all devices at this many seconds a step."""
        return self.config.train.batch_size / step_seconds

    def model_flop_utilization(self, step_seconds: float) -> float:
        """Return the share of the peak that the needed operations reach.

        This is the MFU of Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, section 4.1).
        """
        peak = self.device.peak(self.config.model.dtype)
        return self.costs.needed_flops / peak / step_seconds


def hidden_seconds(
    needs: Sequence[float], beside: Sequence[Sequence[str]], each: Mapping[str, float]
) -> list[float]:
    """Return of each exchange the seconds that computation runs beside it.

    Exchanges at one time share the links: an instruction beside several hides the one that is due
    first, and of the next with what is left of it.

    Args:
      needs: the seconds that an exchange takes alone.
      beside: the instructions between its start and its end.
      each: the seconds of all instructions, in the order of the program.
    """
    place = {name: i for i, name in enumerate(each)}
    due = [max((place.get(name, -1) for name in names), default=-1) for names in beside]
    waiting: dict[str, list[int]] = {}
    for i in sorted(range(len(needs)), key=lambda i: due[i]):
        for name in beside[i]:
            waiting.setdefault(name, []).append(i)
    left = list(needs)
    for name, seconds in each.items():
        for i in waiting.get(name, ()):
            taken = min(left[i], seconds)
            left[i] -= taken
            seconds -= taken
    return [need - rest for need, rest in zip(needs, left, strict=True)]


@dataclasses.dataclass(frozen=True)
class RefusedPlan:
    """A run whose program the compiler refused, because it does not fit the devices' memory.

    Attributes:
      config: the run.
      device_name: the name of the device in `hardware.DEVICES`.
      device: its memory and bandwidths.
      mesh: the number of devices along each axis.
      compiler: which refused it.
      refusal: the memory that it would take, and its largest arrays.
      steps: as a plan's.
    """

    config: Config
    device_name: str
    device: Device
    mesh: dict[str, int]
    compiler: Compiler
    refusal: Refusal
    steps: int | None

    @property
    def devices(self) -> int:
        """The number of devices."""
        return math.prod(self.mesh.values())


def make_plan(
    costs: StepCosts,
    config: Config,
    device_name: str,
    device: Device,
    *,
    utilization: float,
    pairs: int | None,
) -> Plan:
    """Make the plan of a run from its step's costs.

    Args:
      pairs: the pairs of an epoch, for a run given in epochs.

    Raises:
      UserError: no rate is published for the config's dtype on this device.
    """
    return Plan(
        config,
        device_name,
        device,
        utilization,
        costs,
        step_time(costs, device, dtype=config.model.dtype, utilization=utilization),
        tuple(advise(costs, config, device)),
        run_steps(config, pairs),
    )


def run_steps(config: Config, pairs: int | None) -> int | None:
    """Return the optimizer steps of the whole run; None where that takes the pairs of an epoch."""
    return (config.train.steps or None) if pairs is None else steps_of_run(config, pairs)


def days(steps: int, step_seconds: float) -> float:
    """Return the days of a run at this many seconds a step."""
    return steps * step_seconds / 86_400
