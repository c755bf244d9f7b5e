"""The search of `clip_jax.plan --search`: settings are compiled, kept on disk and ranked."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clip_jax.errors import Terminated, UserError
from clip_jax.files import atomic_write
from clip_jax.planning.candidates import (
    Candidate,
    is_pruned,
    least_days,
    make_candidates,
    parameter_bytes,
    with_other_kernels,
)
from clip_jax.planning.compilers import Compiler, device_counts
from clip_jax.planning.hardware import Device
from clip_jax.progress_bar import progress_bar
from clip_jax.sections import Config, MeshSection

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Ranked:
    """One setting that was compiled.

    Attributes:
      candidate: the settings.
      devices: on how many.
      record: the plan's figures, `planning.record`.
    """

    candidate: Candidate
    devices: int
    record: Record

    @property
    def seconds(self) -> float:
        """The estimate of a step, with the collectives that nothing hides."""
        return self.record["estimated_seconds"] + self.record["exposed_collective_seconds"]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search knows.

    Attributes:
      ranked: the settings that fit, the quickest first.
      refused: those that do not.
      failed: those that the compiler failed on, with its line.
      is_complete: whether nothing was left to compile.
    """

    ranked: tuple[Ranked, ...]
    refused: tuple[Ranked, ...]
    failed: tuple[tuple[Candidate, int, str], ...]
    is_complete: bool


class Cache:
    """Plans on disk, one file each, by all that they depend on.

    Attributes:
      folder: where they are.
      utilization: the share of their peak that products are taken to reach, where the compiler does
        not estimate their time.
    """

    def __init__(
        self, folder: Path, compiler: Compiler, device_name: str, utilization: float
    ) -> None:
        """Keep plans of a compiler for a kind of device in this folder."""
        self.folder = folder
        self.utilization = utilization
        self._fixed: dict[str, Any] = {
            "compiler": dataclasses.asdict(compiler),
            "jax": importlib.metadata.version("jax"),
            "flax": importlib.metadata.version("flax"),
            "code": code_digest(),
            "device": device_name,
        }
        if compiler.platform != "tpu":
            self._fixed["utilization"] = utilization

    def path(self, config: Config, devices: int) -> Path:
        """Return the file of a run's plan on so many devices."""
        key = {**self._fixed, "config": program_config(config), "devices": devices}
        text = json.dumps(key, sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def read(self, config: Config, devices: int) -> Record | None:
        """Return a plan that was kept; None where there is none."""
        try:
            record = json.loads(self.path(config, devices).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None


def code_digest() -> str:
    """Return a digest of this package's code: another version compiles other programs."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def program_config(config: Config) -> dict[str, Any]:
    """Return the fields that a step's program depends on: not where the data is, not evaluation."""
    values = dataclasses.asdict(config)
    for section in ("eval", "checkpoint"):
        del values[section]
    data = values["data"]
    fields = (
        "tokenizer",
        "color_jitter",
        "caption_packing",
        "random_erasing",
        "erasing_mode",
        "negatives",
    )
    values["data"] = {name: data[name] for name in fields}
    for name in ("log_every", "report_to", "report_project", "report_name"):
        del values["train"][name]
    return values


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """Return a config with some of its fields, by dotted names, changed."""
    for name, value in settings.items():
        section, field = name.split(".")
        changed = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def compile_in_child(
    config: Config,
    device_name: str,
    devices: int,
    compiler: Compiler,
    path: Path,
    utilization: float,
) -> str:
    """Plan a run in a process of its own and keep the plan; return the line it failed with, or "".

    The process ends with this one, an interruption included.
    """
    with tempfile.TemporaryDirectory(prefix="clip_jax_search_") as folder:
        given = Path(folder) / "config.json"
        given.write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")
        line = [sys.executable, "-m", "clip_jax.plan", "--config", str(given)]
        line += ["--device", device_name, "--devices", str(devices), "--json", str(path)]
        line += ["--compiler", compiler.platform, "--utilization", repr(utilization)]
        process = subprocess.Popen(
            line,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, errors = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if process.returncode == 0 and path.exists():
        return ""
    lines = errors.strip().splitlines()
    last = [x for x in lines if x.startswith("error: ")] or lines or ["no message"]
    return last[-1].removeprefix("error: ")


Compile = Callable[[Config, str, int, Compiler, Path, float], str]

MOST_FAILURES = 5
"""So many settings may fail on a number of devices before one is compiled there; then that number
is given up."""


@dataclasses.dataclass
class Search:
    """A search over the settings of a run on a kind of device.

    Attributes:
      config: the run.
      device_name, device: the kind.
      compiler: which is asked.
      cache: of plans.
      vary: names of `tools.plan.AXES`.
      parameters: of the model.
      compile: makes a plan and keeps it.
    """

    config: Config
    device_name: str
    device: Device
    compiler: Compiler
    cache: Cache
    vary: frozenset[str]
    parameters: int
    compile: Compile = compile_in_child
    ranked: list[Ranked] = dataclasses.field(default_factory=list)
    refused: list[Ranked] = dataclasses.field(default_factory=list)
    failed: list[tuple[Candidate, int, str]] = dataclasses.field(default_factory=list)

    def run(self, counts: list[int], is_enough: Callable[[Ranked], bool]) -> Found:
        """Compile the settings that may be the best, on each number of devices until one is enough.

        Args:
          counts: numbers of devices.
          is_enough: whether the best settings on so many devices need no more of them.
        """
        is_complete = True
        try:
            for devices in counts:
                is_complete &= self._search(devices)
                best = self._best(devices)
                if best and is_enough(best):
                    break
        except Terminated:
            raise
        except KeyboardInterrupt:
            is_complete = False
        ranked = sorted(self.ranked, key=lambda r: (r.seconds, r.devices))
        return Found(tuple(ranked), tuple(self.refused), tuple(self.failed), is_complete)

    def _best(self, devices: int) -> Ranked | None:
        here = [r for r in self.ranked if r.devices == devices]
        return min(here, key=lambda r: r.seconds, default=None)

    def _search(self, devices: int) -> bool:
        """Compile settings on so many devices; return whether none was left because of failures."""
        fits: dict[Candidate, bool] = {}
        tried: set[Candidate] = set()
        left = make_candidates(self.config, devices, self.vary)
        title = f"{devices} x {self.device_name}"
        with progress_bar(len(left), title, "program") as bar:
            while left:
                candidate = left.pop(0)
                tried.add(candidate)
                fitting = self._try(candidate, devices)
                if fitting is not None:
                    fits[candidate] = fitting
                elif self._is_given_up(devices):
                    return False
                left = [c for c in left if not is_pruned(c, fits)]
                if not left and (best := self._best(devices)):
                    others = with_other_kernels(best.candidate, self.compiler.platform, self.vary)
                    left = [c for c in others if c not in tried]
                bar.total = len(tried) + len(left)
                bar.n = len(tried)
                bar.refresh()
        return True

    def _is_given_up(self, devices: int) -> bool:
        """Return whether the compiler has failed, and done nothing else, on so many devices."""
        is_compiled = any(r.devices == devices for r in (*self.ranked, *self.refused))
        failures = sum(n == devices for _, n, _ in self.failed)
        return failures >= MOST_FAILURES and not is_compiled

    def _try(self, candidate: Candidate, devices: int) -> bool | None:
        """Compile one setting, if it was not yet; return whether it fits, None if that failed.

        A failure may have another reason than memory: nothing follows from it for other settings.
        """
        config = with_settings(self.config, candidate.settings(self.config))
        if parameter_bytes(self.parameters, candidate) > self.device.memory:
            return False
        record = self.cache.read(config, devices)
        if record is None:
            path = self.cache.path(config, devices)
            reason = self.compile(
                config, self.device_name, devices, self.compiler, path, self.cache.utilization
            )
            record = self.cache.read(config, devices)
            if record is None:
                self.failed.append((candidate, devices, reason or "it wrote nothing"))
                return None
        ranked = Ranked(candidate, devices, record)
        (self.ranked if record["fits"] else self.refused).append(ranked)
        return bool(record["fits"])


@dataclasses.dataclass(frozen=True)
class RunSize:
    """What a search must know of a run before it compiles anything.

    Attributes:
      parameters: of the model.
      flops: of a step, on all devices, nothing computed twice.
      steps: of the run; None where that takes the pairs of an epoch.
    """

    parameters: int
    flops: float
    steps: int | None

    def days(self, step_seconds: float) -> float:
        """Return the days of the run at this many seconds a step; 0 for a run of unknown length."""
        return (self.steps or 0) * step_seconds / 86_400


def size_of_run(config: Config, pairs: int | None) -> RunSize:
    """Measure a run on one CPU device, without compiling it; `pairs` are those of an epoch."""
    import jax

    from clip_jax.planning.plan import run_steps
    from clip_jax.training.setup import build_run, pair_flops
    from clip_jax.training.state import parameter_counts

    jax.config.update("jax_platforms", "cpu")
    one = dataclasses.replace(config, mesh=MeshSection())
    run = build_run(one, 1, devices=jax.devices()[:1])
    length = run.model.config.text.context_length
    return RunSize(
        parameter_counts(run.shapes.params)["total"],
        float(config.train.batch_size * pair_flops(run, length)),
        run_steps(config, pairs),
    )


def counts_for_days(
    config: Config,
    device_name: str,
    device: Device,
    size: RunSize,
    most_days: float,
    vary: frozenset[str],
) -> list[int]:
    """Return the numbers of devices that could make a run in so many days, the smallest first.

    Those for which there are no settings, `make_candidates`, are left out.

    Raises:
      UserError: no number is enough.
    """
    counts = [
        n
        for n in device_counts(device_name)
        if make_candidates(config, n, vary)
        and least_days(size.flops, n, device, config.model.dtype, size.steps or 0) <= most_days
    ]
    if not counts:
        raise UserError(
            f"--days is {most_days:g}, and no number of {device_name} that the mesh and the "
            "batch fit is enough, at nine tenths of their peak; give more days or another device"
        )
    return counts


def search_record(found: Found, config: Config, steps: int | None) -> dict[str, Any]:
    """Return the result as JSON values: the best settings' whole config, and all that is known.

    The config is None where no settings fit.
    """
    best = found.ranked[0] if found.ranked else None
    chosen = with_settings(config, best.candidate.settings(config)) if best else None
    return {
        "config": dataclasses.asdict(chosen) if chosen else None,
        "is_complete": found.is_complete,
        "ranked": [_entry(r, config, steps) for r in found.ranked],
        "refused": [_entry(r, config, None) for r in found.refused],
        "failed": [
            {"settings": c.settings(config), "devices": n, "reason": reason}
            for c, n, reason in found.failed
        ],
    }


def _entry(ranked: Ranked, config: Config, steps: int | None) -> dict[str, Any]:
    entry = {
        "settings": ranked.candidate.settings(config),
        "devices": ranked.devices,
        "plan": ranked.record,
    }
    if ranked.record["fits"]:
        entry["step_seconds"] = ranked.seconds
        entry["days"] = steps * ranked.seconds / 86_400 if steps else None
    return entry


def write_record(path: str, record: dict[str, Any]) -> None:
    """Write a result where `--config` can read it."""
    with atomic_write(Path(path)) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


SHOWN = 20
"""Settings that the table names."""


def search_text(
    found: Found,
    config: Config,
    device_name: str,
    compiler: Compiler,
    size: RunSize,
    most_days: float | None,
) -> str:
    """Return the result as a table, the quickest settings first."""
    lines = [
        f"{config.model.name}, batch {config.train.batch_size:,}, on {device_name}: "
        f"{len(found.ranked)} settings fit, {len(found.refused)} do not"
        + ("" if found.is_complete else "; it ended early, more were left to compile"),
        _ranked_by(compiler),
    ]
    if found.ranked:
        heads = ("devices", "mesh", "remat", "scan", "attention", "micro-batch")
        lines.append(
            f"{heads[0]:>8} {heads[1]:<24}{heads[2]:<9}{heads[3]:<6}{heads[4]:<10}{heads[5]:>11}"
            f"{'ms a step':>11}{'util.':>8}{'memory':>10}{'days':>9}"
        )
    lines += [_row(r, config, size) for r in found.ranked[:SHOWN]]
    for candidate, devices, reason in found.failed:
        lines.append(f"not compiled: {devices} devices, {_short(candidate)}: {reason}")
    if not found.ranked and not found.refused and found.failed:
        lines.append("nothing was compiled; python -m clip_jax.plan of one setting says more")
    elif not found.ranked:
        what = "nothing" if found.is_complete else "nothing that was compiled"
        where = "more devices" if most_days is None else "larger devices"
        lines.append(f"{what} fits; take {where}, or a smaller batch")
    elif most_days is not None:
        best = least_devices(found, size, most_days)
        lines.append(
            f"{best.devices} x {device_name} make the run in {size.days(best.seconds):.2f} days"
            if best
            else f"no number of devices that was compiled makes the run in {most_days:g} days"
        )
    return "\n".join(lines)


def least_devices(found: Found, size: RunSize, most_days: float) -> Ranked | None:
    """Return the quickest settings on the fewest devices that make a run in so many days."""
    enough = [r for r in found.ranked if size.days(r.seconds) <= most_days]
    return min(enough, key=lambda r: (r.devices, r.seconds), default=None)


def _ranked_by(compiler: Compiler) -> str:
    how = {
        "tpu": "the compiler's estimate of a step, and its collectives that nothing hides",
        "cuda": "a roofline, which is no measurement: each kernel's operations or bytes, whichever "
        "takes longer at the published rates",
        "cpu": "operations and bytes at the published rates, of a program compiled for CPUs",
    }
    return f"ranked by {how[compiler.platform]} ({compiler.name} {compiler.version})"


def _row(ranked: Ranked, config: Config, size: RunSize) -> str:
    c, record = ranked.candidate, ranked.record
    settings = c.settings(config)
    mesh = " x ".join(f"{axis}={n}" for axis, n in record["mesh"].items() if n > 1) or "1"
    days = f"{size.days(ranked.seconds):>9.2f}" if size.steps else f"{'':>9}"
    return (
        f"{ranked.devices:>8} {mesh:<24}{c.remat:<9}{'yes' if c.scan else 'no':<6}{c.attention:<10}"
        f"{settings['train.microbatch_size'] or 'whole':>11}{1e3 * ranked.seconds:>11.1f}"
        f"{100 * record['utilization']:>6.1f} %{record['memory_bytes'] / 1e9:>7.1f} GB{days}"
    )


def _short(candidate: Candidate) -> str:
    return ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(candidate).items())
