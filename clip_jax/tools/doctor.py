"""Say whether this machine is fit to train: `python -m clip_jax.doctor [--folder DIR]`.

Versions, devices, extras, memory, what the file system of DIR can do, and a few steps of a tiny
model. What it prints belongs into an issue. It exits with 1 if something is broken; each problem is
a line that says what to do.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from clip_jax.diagnosis.machine import (
    Devices,
    FileSystem,
    Machine,
    look_at_devices,
    look_at_file_system,
    look_at_machine,
)
from clip_jax.diagnosis.packages import Packages, look_at_packages
from clip_jax.distribution import install_command
from clip_jax.errors import EXIT_ERROR, plain, run_command, short
from clip_jax.files import atomic_write, check_local

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All that the doctor looked at.

    Attributes:
      machine, packages, devices, file_system: see their classes.
      steps: the fields of `TrainingSteps`; None where JAX has no device, or the step failed.
      environment: the variables that change what JAX does.
      problems: all lines on what is broken.
    """

    machine: Machine
    packages: Packages
    devices: Devices
    file_system: FileSystem
    steps: dict | None
    environment: dict[str, str]
    problems: tuple[str, ...]


def diagnose(folder: str | Path, *, train: bool = True) -> Diagnosis:
    """Look at everything; `train` False leaves the steps of a tiny model out."""
    packages = look_at_packages()
    devices = look_at_devices(bool(packages.plugins))
    file_system = look_at_file_system(folder)
    steps, step_problems = _steps() if train and devices.count else (None, ())
    return Diagnosis(
        machine=look_at_machine(),
        packages=packages,
        devices=devices,
        file_system=file_system,
        steps=steps,
        environment={
            name: value
            for name, value in sorted(os.environ.items())
            if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "LD_LIBRARY_PATH")
            or name.startswith(("JAX_", "CUDA_VISIBLE", "XLA_PYTHON"))
        },
        problems=(
            *packages.problems,
            *devices.problems,
            *file_system.problems,
            *step_problems,
        ),
    )


def _steps() -> tuple[dict | None, tuple[str, ...]]:
    """Return the fields of `TrainingSteps`, or None and why they could not be made."""
    try:
        from clip_jax.diagnosis.training_step import try_training

        steps = try_training()
    except Exception as error:  # whatever a broken installation raises is what is to be told
        return None, (f"a training step fails ({short(error)}): report this with its versions",)
    return dataclasses.asdict(steps), steps.problems


def diagnosis_text(found: Diagnosis) -> str:
    """Return what the command prints, problems last."""
    machine, devices, disk = found.machine, found.devices, found.file_system
    extras = found.packages.extras
    yes = {True: "yes", False: "no"}
    lines = [
        f"system      {machine.system}; Python {machine.python}",
        f"memory      {machine.free_bytes / GIB:.1f} of {machine.memory_bytes / GIB:.1f} GiB free, "
        f"{machine.cores} cores",
        "versions    " + _pairs(found.packages.versions),
        "plug-ins    " + (_pairs(found.packages.plugins) or "none"),
        f"devices     {devices.count} {devices.platform} ({devices.kind})"
        + (f", {devices.memory_bytes / GIB:.1f} GiB each" if devices.memory_bytes else ""),
        "environment " + (_pairs(found.environment, "=") or "no variable of JAX or XLA is set"),
        f"folder      {disk.folder}: {disk.free_bytes / GIB:.1f} GiB free, writes "
        f"{yes[disk.writes]}, fsync {yes[disk.syncs]}, locks {yes[disk.locks]}, renames "
        f"{yes[disk.renames]}",
    ]
    if found.steps:
        steps = found.steps
        lines.append(
            f"training    a tiny model's loss {steps['first_loss']:.4f} -> "
            f"{steps['last_loss']:.4f}; compiled in {steps['compile_seconds']:.1f} s, "
            f"{1000 * steps['step_seconds']:.1f} ms a step"
        )
    present = [extra.name for extra in extras if not extra.missing]
    lines.append(f"extras      {', '.join(present) or 'none'}")
    lines += [
        f"  not there {extra.name}: {extra.adds}; {install_command(extra.name)}"
        for extra in extras
        if extra.missing
    ]
    lines += [f"PROBLEM     {problem}" for problem in found.problems] or ["no problem was found"]
    return plain("\n".join(lines))


def _pairs(values: dict[str, str], between: str = " ") -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in values.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, look, and print; return the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.doctor", description=__doc__)
    parser.add_argument("--folder", default=".", help="where runs will be written; here by default")
    parser.add_argument("--no-training", action="store_true", help="leave the training step out")
    parser.add_argument("--json", metavar="FILE", help="write all of it there too")
    args = parser.parse_args(argv)
    check_local({"--folder": args.folder, "--json": args.json})
    found = diagnose(args.folder, train=not args.no_training)
    print(diagnosis_text(found))
    if args.json:
        with atomic_write(Path(args.json)) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    return EXIT_ERROR if found.problems else 0


if __name__ == "__main__":
    run_command(main)
