"""The compilers that a plan can ask: XLA's own for TPUs and for NVIDIA GPUs, or the CPU's.

libtpu and JAX's CUDA plugin describe devices that are not there, and compile for them on any
machine. `find_compiler` says which compiler a plan asks, `start_compiler` starts it; both before
JAX has started.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from clip_jax.distribution import install_command
from clip_jax.errors import UserError, check_choice
from clip_jax.planning.gpu_specs import GPU_SPECS, target_config

COMPILERS = ("auto", "cpu", "tpu", "cuda")

# XLA on CPUs orders a program for many threads at the cost of memory; devices order it for memory.
FOR_MEMORY = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# The machine code is never run.
UNOPTIMIZED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Tuning would need the GPU; Triton's products are chosen by tuning.
UNTUNED = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A compiler that is installed.

    Attributes:
      platform: what it compiles for: "cpu", "tpu" or "cuda".
      name: its package: "jaxlib", "libtpu" or "jax-cuda12-plugin".
      version: the version of the package.
    """

    platform: str
    name: str
    version: str

    @property
    def is_devices_own(self) -> bool:
        """Whether it is the compiler of the planned devices, and not the CPU's in its place."""
        return self.platform != "cpu"


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that holds a compiler.

    Attributes:
      name: as it is installed.
      module: as it is imported.
      jax_extra: the extra of JAX that names the version it takes.
      extra: the extra of this project that installs it.
      library: the package that holds XLA itself, and the module; of the same version.
    """

    name: str
    module: str
    jax_extra: str
    extra: str
    library: str


PACKAGES = {
    "tpu": Package("libtpu", "libtpu", "tpu", "plan-tpu", "libtpu"),
    "cuda": Package(
        "jax-cuda12-plugin", "jax_plugins.xla_cuda12", "cuda12", "plan-gpu", "jax-cuda12-pjrt"
    ),
}


def device_platform(device: str) -> str:
    """Return the platform of the compiler for a device of `hardware.DEVICES`."""
    if device in TPU_TOPOLOGIES:
        return "tpu"
    return "cuda" if device in GPU_SPECS else "cpu"


def find_compiler(device: str, choice: str = "auto") -> Compiler:
    """Return the compiler that a plan for a device asks.

    Args:
      device: its name in `hardware.DEVICES`.
      choice: one of `COMPILERS`; "auto" is the device's own where it is installed, else the CPU's.

    Raises:
      UserError: the chosen compiler is not installed, or in part; does not compile for the device;
        or its version is not the one that this JAX takes.
    """
    check_choice("--compiler", choice, COMPILERS)
    platform = device_platform(device)
    if choice not in ("auto", "cpu", platform):
        raise UserError(f"--compiler {choice} does not compile for {device}; take auto or cpu")
    package = PACKAGES.get(platform)
    if choice == "cpu" or package is None or not _is_installed(package):
        if package is not None and choice == platform:
            raise UserError(
                f"--compiler {choice} needs {package.name}, which is not installed: "
                f"{install_command(package.extra)}"
            )
        return Compiler("cpu", "jaxlib", importlib.metadata.version("jaxlib"))
    return Compiler(platform, package.name, _checked_version(package))


def _checked_version(package: Package) -> str:
    """Return the version of a package whose module is installed.

    Raises:
      UserError: a part of it is not installed, or is of another version than this JAX takes.
    """
    required = required_versions(package, importlib.metadata.requires("jax") or ())
    remedy = f"{install_command(package.extra)}, or give --compiler cpu"
    for name in dict.fromkeys((package.name, package.library)):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"the module {package.module} is there, and the package {name} is not installed: "
                f"{remedy}"
            ) from None
        if version not in required:
            raise UserError(
                f"{name} {version} is installed and jax {importlib.metadata.version('jax')} "
                f"takes {required}: {remedy}"
            )
        required &= SpecifierSet(f"=={version}")
    return version


def _is_installed(package: Package) -> bool:
    try:
        return importlib.util.find_spec(package.module) is not None
    except ModuleNotFoundError:
        return False


def required_versions(package: Package, requirements: Sequence[str]) -> SpecifierSet:
    """Return the versions of a package that JAX takes; all where its requirements name none.

    Args:
      package: one of `PACKAGES`.
      requirements: as `importlib.metadata.requires` returns them.
    """
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if (
            requirement.name == package.name
            and marker
            and marker.evaluate({"extra": package.jax_extra})
        ):
            return requirement.specifier
    return SpecifierSet()


@dataclasses.dataclass(frozen=True)
class StartedCompiler:
    """A compiler with the devices that it compiles for.

    Attributes:
      compiler: which it is.
      device_name: the name of the devices' kind in `hardware.DEVICES`.
      devices: they need not be there.
      dump: the folder that a TPU's compiler writes the schedules of kernels into.
    """

    compiler: Compiler
    device_name: str
    devices: tuple[jax.Device, ...]
    dump: str


def start_compiler(compiler: Compiler, device: str, count: int, dump: str) -> StartedCompiler:
    """Start a compiler for so many devices; JAX must not have started.

    Args:
      compiler: from `find_compiler`.
      device: the name of their kind in `hardware.DEVICES`.
      count: how many.
      dump: the folder that a TPU's compiler writes the schedules of kernels into.

    Raises:
      UserError: there is no such number of these devices.
    """
    check_count(compiler, device, count)
    start = {"cpu": _start_cpu, "tpu": _start_tpu, "cuda": _start_cuda}
    devices = start[compiler.platform](device, count, dump)
    return StartedCompiler(compiler, device, tuple(devices), dump)


def _add_flags(variable: str, *flags: str) -> None:
    os.environ[variable] = " ".join([os.environ.get(variable, ""), *flags]).strip()


def _start_cpu(device: str, count: int, dump: str) -> list[jax.Device]:
    """Make JAX start with this many CPU devices."""
    del device, dump
    _add_flags("XLA_FLAGS", FOR_MEMORY, UNOPTIMIZED)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return jax.devices()


# The shapes of slices that Google Cloud rents, chips along each axis.
PLANES = {1: "2x2", 2: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"}
PLANES |= {256: "16x16"}
CUBES = {1: "2x2x1", 2: "2x2x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
CUBES |= {128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16"}
TPU_TOPOLOGIES = {
    "tpu-v4": ("v4", CUBES, {"chip_config_name": "megacore"}),
    "tpu-v5e": ("v5e", PLANES, {}),
    "tpu-v5p": ("v5p", CUBES, {}),
    "tpu-v6e": ("v6e", PLANES, {}),
}
"""By device: libtpu's name of the generation, slices by chips, and options of the topology."""


HOST_GPUS = 8


def device_counts(device: str) -> tuple[int, ...]:
    """Return how many devices of a kind can be had: a slice's chips, or GPUs in whole machines."""
    if device in TPU_TOPOLOGIES:
        return tuple(TPU_TOPOLOGIES[device][1])
    return (1, 2, 4, *(HOST_GPUS * 2**n for n in range(9)))


def check_count(compiler: Compiler, device: str, count: int) -> None:
    """Raise UserError if a compiler has no such number of devices; that of CPUs has any."""
    if compiler.platform == "tpu" and count not in (slices := TPU_TOPOLOGIES[device][1]):
        sizes = ", ".join(str(n) for n in slices)
        raise UserError(f"--devices is {count}; a slice of {device} has one of {sizes} chips")
    if compiler.platform == "cuda" and count > HOST_GPUS and count % HOST_GPUS:
        raise UserError(f"--devices is {count}; machines of {device} hold {HOST_GPUS} of them each")


def _start_tpu(device: str, count: int, dump: str) -> list[jax.Device]:
    """Return the first `count` devices of the smallest slice that has so many."""
    generation, slices, options = TPU_TOPOLOGIES[device]
    # A training run on this machine may hold libtpu's lock; nothing is run here.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # What it would look for on a TPU's own machine, and say that it is not there.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{generation}-{count}")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    _add_flags(
        "LIBTPU_INIT_ARGS",
        f"--xla_jf_dump_to={dump}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*",
    )
    return _topology("tpu", topology_name=f"{generation}:{slices[count]}", **options)[:count]


def _start_cuda(device: str, count: int, dump: str) -> list[jax.Device]:
    """Return `count` GPUs in hosts of eight."""
    del dump
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    _add_flags("XLA_FLAGS", UNTUNED)
    importlib.import_module(PACKAGES["cuda"].module)
    hosts, local = max(1, count // HOST_GPUS), min(count, HOST_GPUS)
    return _topology(
        "cuda",
        topology_name="",
        target_config=target_config(GPU_SPECS[device]),
        topology=f"1x{hosts}x{local}",
    )


def _topology(platform: str, **options: Any) -> list[jax.Device]:
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    # A program from JAX's own cache would come without the schedules of its kernels.
    jax.config.update("jax_enable_compilation_cache", False)
    return list(topologies.get_topology_desc(platform=platform, **options).devices)
