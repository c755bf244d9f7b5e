"""Plan a run: `python -m clip_jax.plan --config experiments/X.py --devices 256 --device h100`.

Compiles the run's real step for that many virtual devices, without data and without making an
array, and prints what it would take: memory, operations, collectives, time and cost. Fields of
the config are set as for training, `--config.mesh.fsdp=8` say.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clip_jax.config import resolve
from clip_jax.errors import UserError, run_command
from clip_jax.sections import Config
from clip_jax.tools.config_flags import parse as parse_config

if TYPE_CHECKING:
    from clip_jax.planning.plan import Plan

# XLA on CPUs orders a program for many threads at the cost of memory; devices order it for memory.
FOR_MEMORY = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# The machine code is never run.
UNOPTIMIZED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
ANY_STEPS = 1000
"""Steps of a run whose length is not known; the program is the same for any number."""
UTILIZATION = 0.5


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; return its flags, and the rest of it for `config_flags`."""
    parser = argparse.ArgumentParser(
        prog="python -m clip_jax.plan", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--devices", type=int, help="how many; config.mesh has to fit them")
    parser.add_argument("--device", default="h100", help="their kind: h100, a100, tpu-v5e, ...")
    parser.add_argument(
        "--utilization",
        type=float,
        default=UTILIZATION,
        help="share of the published peak that matrix products are taken to reach",
    )
    # The flag's name of earlier versions.
    parser.add_argument(
        "--utilisation",
        type=float,
        dest="utilization",
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    parser.add_argument("--pairs", type=int, help="pairs of an epoch, for a run given in epochs")
    return parser.parse_known_args(argv[1:])


def start_virtual_devices(count: int) -> None:
    """Make JAX start with this many CPU devices; only before it has started."""
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} {FOR_MEMORY} {UNOPTIMIZED}".strip()
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def plan(
    config: Config,
    devices: int,
    device: str,
    *,
    utilization: float = UTILIZATION,
    pairs: int | None = None,
) -> "Plan":
    """Plan a run on so many devices of a kind; JAX must not have started.

    Args:
      config: the run.
      devices: how many devices.
      device: the name of their kind in `planning.hardware.DEVICES`.
      utilization: the share of the published peak that matrix products are taken to reach.
      pairs: the pairs of an epoch, for a run given in epochs.

    Raises:
      UserError: a number is out of range, or the config does not fit the devices.
    """
    if devices < 1:
        raise UserError(f"--devices is {devices}; give how many devices there are, 1 or more")
    if not 0 < utilization <= 1:
        raise UserError(f"--utilization is {utilization:g}; it takes 0 < share <= 1, 0.5 say")
    if pairs is not None and pairs < config.train.batch_size:
        raise UserError(
            f"--pairs is {pairs:,}; it takes config.train.batch_size "
            f"{config.train.batch_size:,} or more"
        )
    from clip_jax.planning.hardware import find_device

    hardware = find_device(device)
    hardware.peak(config.model.dtype)  # fails before the compiler starts
    start_virtual_devices(devices)
    from clip_jax.planning.plan import make_plan, run_steps
    from clip_jax.planning.program import compile_run

    costs = compile_run(config, run_steps(config, pairs) or ANY_STEPS)
    return make_plan(costs, config, device, hardware, utilization=utilization, pairs=pairs)


def main() -> int:
    """Parse the flags, resolve the config and print the plan; return the exit code."""
    args, rest = parse(sys.argv)
    config = resolve(parse_config([sys.argv[0], *rest]))
    if args.devices is None:
        raise UserError("--devices is missing; for example --devices 256 --device h100")
    result = plan(config, args.devices, args.device, utilization=args.utilization, pairs=args.pairs)
    from clip_jax.planning.text import plan_text

    print(plan_text(result))
    return 0


if __name__ == "__main__":
    run_command(main)
