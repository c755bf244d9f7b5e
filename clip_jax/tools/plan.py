"""Plan a run: `python -m clip_jax.plan --config experiments/X.py --devices 256 --device h100`.

Compiles the run's real step for that many virtual devices, without data and without making an
array, and prints what it would take: memory, operations, collectives, time and cost.
"""

import os
import sys

from absl import flags

from clip_jax.config import resolve
from clip_jax.errors import UserError, run_command
from clip_jax.sections import Config
from clip_jax.tools.config_flags import parse

_DEVICES = flags.DEFINE_integer("devices", None, "How many devices; config.mesh has to fit them.")
_DEVICE = flags.DEFINE_string("device", "h100", "Their kind: h100, a100, tpu-v5e, ...")
_UTILISATION = flags.DEFINE_float(
    "utilisation", 0.5, "Share of the published peak that matrix products are taken to reach."
)
_PAIRS = flags.DEFINE_integer("pairs", None, "Pairs of an epoch, for a run given in epochs.")

# XLA on CPUs orders a program for many threads at the cost of memory; devices order it for memory.
FOR_MEMORY = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# The machine code is never run.
UNOPTIMISED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
ANY_STEPS = 1000


def start_virtual_devices(count: int) -> None:
    """Make JAX start with this many CPU devices; only before it has started."""
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} {FOR_MEMORY} {UNOPTIMISED}".strip()
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def plan(
    config: Config, devices: int, device: str, *, utilisation: float = 0.5, pairs: int | None = None
) -> str:
    """The plan of a run on so many devices of a kind, as text.

    Raises:
      UserError: a number is out of range, or the config does not fit the devices.
    """
    if devices < 1:
        raise UserError(f"--devices is {devices}; give how many devices there are, 1 or more")
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation is {utilisation:g}; it takes 0 < share <= 1, 0.5 say")
    if pairs is not None and pairs < config.train.batch_size:
        raise UserError(
            f"--pairs is {pairs:,}; it takes config.train.batch_size "
            f"{config.train.batch_size:,} or more"
        )
    from clip_jax.planning.hardware import find_device

    row = find_device(device)
    row.peak(config.model.dtype)  # a dtype without a rate answers before the compiler starts
    start_virtual_devices(devices)
    from clip_jax.planning.estimate import run_steps
    from clip_jax.planning.program import compile_run
    from clip_jax.planning.text import plan_text

    facts = compile_run(config, run_steps(config, pairs) or ANY_STEPS)
    return plan_text(facts, config, device, row, utilisation=utilisation, pairs=pairs)


def main() -> int:
    """Parse the flags, resolve the config and print the plan; the exit code."""
    config = resolve(parse(sys.argv))
    if _DEVICES.value is None:
        raise UserError("--devices is missing; for example --devices 256 --device h100")
    print(
        plan(
            config,
            _DEVICES.value,
            _DEVICE.value,
            utilisation=_UTILISATION.value,
            pairs=_PAIRS.value,
        )
    )
    return 0


if __name__ == "__main__":
    run_command(main)
