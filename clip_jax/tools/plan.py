"""Plan a run: `python -m clip_jax.plan --config experiments/X.py --devices 256 --device h100`.

Compiles the run's real step for that many devices, without data and without making an array, and
prints what it would take: memory, operations, collectives, time and cost. It asks XLA's compiler
for TPUs or NVIDIA GPUs where that is installed, else the CPU's. Fields of the config are set as
for training, `--config.mesh.fsdp=8` say.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clip_jax.config import resolve
from clip_jax.errors import EXIT_ERROR, UserError, check_choice, run_command
from clip_jax.files import (
    atomic_write,
    check_folder_writable,
    check_local,
    check_writable,
    make_folder,
)
from clip_jax.sections import Config, MeshSection
from clip_jax.tools.config_flags import parse as parse_config

if TYPE_CHECKING:
    from clip_jax.planning.plan import Plan, RefusedPlan

ANY_STEPS = 1000
"""Steps of a run whose length is not known; the program is the same for any number."""
UTILIZATION = 0.5
AXES = ("mesh", "remat", "microbatch", "scan", "attention")
"""What a search can vary."""


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
    parser.add_argument("--pairs", type=_whole, help="pairs of an epoch, for a run given in epochs")
    parser.add_argument(
        "--compiler",
        default="auto",
        help="auto (the devices' own where it is installed), tpu, cuda or cpu",
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan's figures there too")
    parser.add_argument(
        "--top", type=int, default=0, help="print so many of the instructions that take longest"
    )
    search = parser.add_argument_group("the search for settings")
    search.add_argument("--search", action="store_true", help="compile settings and rank them")
    search.add_argument("--vary", default=",".join(AXES), help="what to vary, with commas")
    search.add_argument("--days", type=float, help="find how many devices make the run in so many")
    search.add_argument("--cache", metavar="FOLDER", help="keep plans there, ~/.cache/clip_jax")
    return parser.parse_known_args(argv[1:])


def _whole(text: str) -> int:
    """Return a whole number that may be written as 4e8."""
    number = float(text)
    if not number.is_integer():  # nor is infinity
        raise ValueError(text)
    return int(number)


def _check(config: Config, devices: int | None, utilization: float, pairs: int | None) -> None:
    """Check the numbers that a plan and a search are given.

    Raises:
      UserError: one is out of range.
    """
    if devices is not None and devices < 1:
        raise UserError(f"--devices is {devices}; give how many devices there are, 1 or more")
    if not 0 < utilization <= 1:
        raise UserError(f"--utilization is {utilization:g}; it takes 0 < share <= 1, 0.5 say")
    if pairs is not None and pairs < config.train.batch_size:
        raise UserError(
            f"--pairs is {pairs:,}; it takes config.train.batch_size "
            f"{config.train.batch_size:,} or more"
        )


def plan(
    config: Config,
    devices: int,
    device: str,
    *,
    utilization: float = UTILIZATION,
    pairs: int | None = None,
    compiler: str = "auto",
) -> "Plan | RefusedPlan":
    """Plan a run on so many devices of a kind; JAX must not have started.

    Args:
      config: the run.
      devices: how many devices.
      device: the name of their kind in `planning.hardware.DEVICES`.
      utilization: the share of the published peak that matrix products are taken to reach, where
        the compiler does not estimate their time.
      pairs: the pairs of an epoch, for a run given in epochs.
      compiler: one of `planning.compilers.COMPILERS`; "auto" is the devices' own where it is
        installed, else the CPU's.

    Raises:
      UserError: a number is out of range, the config does not fit the devices, or the compiler is
        not there.
    """
    _check(config, devices, utilization, pairs)
    from clip_jax.parallel.mesh import mesh_shape
    from clip_jax.planning.compilers import find_compiler, start_compiler
    from clip_jax.planning.hardware import find_device
    from clip_jax.planning.plan import RefusedPlan, make_plan, run_steps
    from clip_jax.planning.refusal import DoesNotFitError

    device, hardware = device.lower(), find_device(device)
    hardware.peak(config.model.dtype)  # fails before the compiler starts
    steps = run_steps(config, pairs)
    asked = find_compiler(device, compiler)
    with tempfile.TemporaryDirectory(prefix="clip_jax_plan_") as dump:
        started = start_compiler(asked, device, devices, dump)
        # What is imported above starts no devices.
        from clip_jax.planning.program import compile_run

        try:
            costs = compile_run(config, steps or ANY_STEPS, started, utilization=utilization)
        except DoesNotFitError as error:
            mesh = mesh_shape(devices, **dataclasses.asdict(config.mesh))
            return RefusedPlan(config, device, hardware, mesh, asked, error.refusal, steps)
    return make_plan(costs, config, device, hardware, utilization=utilization, pairs=pairs)


def _check_settings(config: Config, devices: int, vary: frozenset[str]) -> None:
    """Check that a search has settings for so many devices.

    Raises:
      UserError: it has none; the line is that of a plan.
    """
    from clip_jax.parallel.mesh import mesh_shape
    from clip_jax.planning.candidates import make_candidates
    from clip_jax.training.setup import check_batch_sizes

    if not make_candidates(config, devices, vary):
        mesh = MeshSection() if "mesh" in vary else config.mesh
        check_batch_sizes(config.train, mesh_shape(devices, **dataclasses.asdict(mesh)))


def search(args: argparse.Namespace, config: Config) -> int:
    """Search the settings of a run; return the exit code: 1 where none fits or is quick enough.

    Raises:
      UserError: a flag is wrong, the config does not fit the devices, or no number of them is
        enough.
    """
    from clip_jax.planning.compilers import check_count, find_compiler
    from clip_jax.planning.hardware import find_device
    from clip_jax.tools.plan_search import (
        Cache,
        Search,
        counts_for_days,
        least_devices,
        search_record,
        search_text,
        size_of_run,
        write_record,
    )

    vary = frozenset(args.vary.split(","))
    for axis in vary:
        check_choice("--vary", axis, AXES)
    if (args.devices is None) == (args.days is None):
        raise UserError("--search takes --devices, or --days of the whole run, and not both")
    _check(config, args.devices, args.utilization, args.pairs)
    if args.days is not None and not args.days > 0:
        raise UserError(f"--days is {args.days:g}; give how many days the run may take, 1.5 say")
    device, hardware = args.device.lower(), find_device(args.device)
    hardware.peak(config.model.dtype)
    compiler = find_compiler(device, args.compiler)
    if args.days is None:
        check_count(compiler, device, args.devices)
        _check_settings(config, args.devices, vary)
    path = args.json or "search.json"
    check_writable(path, flag="--json")
    size = size_of_run(config, args.pairs)
    counts = [args.devices]
    if args.days is not None:
        if size.steps is None:
            raise UserError("--days needs --pairs, the pairs of an epoch, or config.train.steps")
        counts = counts_for_days(config, device, hardware, size, args.days, vary)
    folder = Path(args.cache or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "clip_jax"))
    plans = make_folder(folder.expanduser() / "plans", flag="--cache")
    check_folder_writable(plans, flag="--cache")
    cache = Cache(plans, compiler, device, args.utilization)
    made = Search(config, device, hardware, compiler, cache, vary, size.parameters)
    most_days = math.inf if args.days is None else args.days
    found = made.run(counts, lambda best: size.days(best.seconds) <= most_days)
    print(search_text(found, config, device, compiler, size, args.days))
    write_record(path, search_record(found, config, size.steps))
    holds = "the best settings, which --config takes" if found.ranked else "no settings to take"
    print(f"{path}: {holds}, and all that were compiled")
    return 0 if least_devices(found, size, most_days) else EXIT_ERROR


def main() -> int:
    """Parse the flags, resolve the config and print the plan; return the exit code."""
    args, rest = parse(sys.argv)
    check_local({"--json": args.json, "--cache": args.cache})
    config = resolve(parse_config([sys.argv[0], *rest]))
    if args.top < 0:
        raise UserError(f"--top is {args.top}; it takes how many to print, 0 or more")
    if args.search:
        return search(args, config)
    if args.devices is None:
        raise UserError("--devices is missing; for example --devices 256 --device h100")
    if args.json:
        check_writable(args.json, flag="--json")
    result = plan(
        config,
        args.devices,
        args.device,
        utilization=args.utilization,
        pairs=args.pairs,
        compiler=args.compiler,
    )
    from clip_jax.planning.record import plan_record
    from clip_jax.planning.text import plan_text

    print(plan_text(result, top=args.top))
    if args.json:
        with atomic_write(Path(args.json)) as partial:
            partial.write_text(json.dumps(plan_record(result), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_command(main)
