"""The flags of commands whose parts can be made on a cluster: `--executor ray`."""

import argparse
import contextlib
from collections.abc import Iterator

from clip_jax.errors import UserError, check_counts
from clip_jax.executors.parts import Executor

EXECUTORS = ("ray",)
FLAGS = ("executor", "address", "actors", "num_cpus", "num_gpus")


def add_executor_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; `--help` shows them as a group."""
    group = parser.add_argument_group("on a cluster (docs/howto/many_machines.md)")
    group.add_argument("--executor", choices=EXECUTORS, help="makes the parts; none: this process")
    group.add_argument(
        "--address", help="of the cluster: auto (the default), HOST:6379 or ray://HOST:10001"
    )
    group.add_argument("--actors", type=int, help="workers; else one a GPU, or one a machine")
    group.add_argument("--num-cpus", type=float, help="of a worker, as Ray counts them; 1")
    group.add_argument("--num-gpus", type=float, help="of a worker; 1 where there are any")


def pop_executor_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Move the flags from the command's own arguments to a namespace of their own."""
    return argparse.Namespace(**{name: vars(args).pop(name) for name in FLAGS})


@contextlib.contextmanager
def executor_of(flags: argparse.Namespace) -> Iterator[Executor | None]:
    """Join the cluster that the flags name, for as long as the block; None without one.

    Raises:
      UserError: it cannot be reached, or a flag needs another.
    """
    if flags.executor is None:
        given = [name for name in FLAGS if getattr(flags, name) is not None]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} goes with --executor ray")
        yield None
        return
    check_counts({"--actors": flags.actors})
    num_cpus = 1.0 if flags.num_cpus is None else flags.num_cpus
    if min(num_cpus, flags.num_gpus or 0) < 0:
        raise UserError("--num-cpus and --num-gpus take 0 or more")
    from clip_jax.executors.ray_executor import RayExecutor

    executor = RayExecutor(
        flags.address or "auto", actors=flags.actors, num_cpus=num_cpus, num_gpus=flags.num_gpus
    )
    try:
        yield executor
    finally:
        executor.close()
