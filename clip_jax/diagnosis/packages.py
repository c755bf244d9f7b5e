"""The installed packages: their versions, the extras, and whether JAX's parts are in step."""

import base64
import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from clip_jax import distribution

Versions = Mapping[str, str]
"""The version of each installed distribution, by its name in lower case with hyphens."""

EXTRAS = {
    "demo": "the emoji set",
    "gcs": "data and work folders by gs://",
    "s3": "data and work folders by s3://",
    "http": "data by https://",
    "search": "an index of many rows, and the page of clip_jax.search --serve",
    "onnx": "clip_jax.export --format onnx",
    "ray": "parts made on a Ray cluster, --executor ray",
    "umap": "the report's map by UMAP instead of PCA",
    "wandb": "metrics to Weights & Biases: config.train.report_to",
    "trackio": "metrics to trackio: config.train.report_to",
    "gpu": "NVIDIA GPUs",
    "tpu": "TPUs",
    "plan-gpu": "plans by the compiler of NVIDIA GPUs",
    "plan-tpu": "plans by the compiler of TPUs",
}
"""What each extra of this package adds."""

NVIDIA = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-cuda12-pjrt", "jax-cuda13-pjrt")
OTHER_PLUGINS = ("libtpu", "jax-rocm7-plugin", "jax-rocm60-plugin", "jax-metal")
SHOWN = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml-dtypes"),
    *("pillow", "tensorstore"),
)
"""The packages whose versions a report of a problem needs."""


@dataclasses.dataclass(frozen=True)
class Extra:
    """An extra of this package.

    Attributes:
      name: as in `pip install 'NAME[extra]'`.
      adds: what it is for.
      missing: the requirements that are not there, or are in another version.
    """

    name: str
    adds: str
    missing: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Packages:
    """What is installed.

    Attributes:
      versions: of this package and of those that a report of a problem needs.
      plugins: the versions of JAX's plug-ins.
      extras: the extras, present or not.
      problems: each a line that says what to do.
    """

    versions: dict[str, str]
    plugins: dict[str, str]
    extras: tuple[Extra, ...]
    problems: tuple[str, ...]


def installed_versions() -> dict[str, str]:
    """Return the version of each installed distribution; of two, the one that is imported."""
    versions: dict[str, str] = {}
    for found in importlib.metadata.distributions():
        name = found.metadata["Name"]
        if name:
            versions.setdefault(canonicalize_name(name), found.version)
    return versions


def look_at_packages() -> Packages:
    """Return what is installed, and what is wrong with it."""
    versions = installed_versions()
    own = canonicalize_name(distribution.NAME)
    requirements = tuple(importlib.metadata.requires(own) or ()) if own in versions else ()
    jax_requirements = tuple(importlib.metadata.requires("jax") or ()) if "jax" in versions else ()
    plugins = {n: versions[n] for n in (*NVIDIA, *OTHER_PLUGINS) if n in versions}
    problems = [
        *requirement_problems(requirements, versions),
        *plugin_problems(versions, jax_requirements),
        *_changed_files(own, versions),
    ]
    if not requirements:
        problems.insert(0, f"{distribution.NAME} is not installed: pip install -e . in its folder")
    mixed = distribution.mixed_files()
    return Packages(
        versions={n: versions.get(n, "not installed") for n in (own, *SHOWN)},
        plugins=plugins,
        extras=find_extras(requirements, versions),
        problems=(*problems, *([mixed] if mixed else [])),
    )


def find_extras(requirements: Sequence[str], versions: Versions) -> tuple[Extra, ...]:
    """Return the extras of `EXTRAS`, each with what it lacks.

    Args:
      requirements: this package's, as `importlib.metadata.requires` returns them; of none, nothing
        is known about extras.
      versions: what is installed.
    """
    parsed = list(map(Requirement, requirements))
    extras = []
    for name, adds in EXTRAS.items() if parsed else ():
        needed = [r for r in parsed if _belongs(r, name) and not _belongs(r, "")]
        lacking = [str(r).partition(";")[0].strip() for r in needed if not _is_met(r, versions)]
        extras.append(Extra(name, adds, tuple(lacking)))
    return tuple(extras)


def requirement_problems(requirements: Sequence[str], versions: Versions) -> list[str]:
    """Return a line for each requirement that is not met."""
    problems = []
    for requirement in map(Requirement, requirements):
        if not _belongs(requirement, "") or _is_met(requirement, versions):
            continue
        version = versions.get(canonicalize_name(requirement.name))
        state = f"is {version}" if version else "is not installed"
        wanted = f"{requirement.name}{requirement.specifier}"
        problems.append(f"{requirement.name} {state}: pip install '{wanted}'")
    return problems


def plugin_problems(versions: Versions, jax_requirements: Sequence[str]) -> list[str]:
    """Return a line for each part of JAX that is not of jax's own version.

    Args:
      versions: what is installed.
      jax_requirements: jax's, as `importlib.metadata.requires` returns them: they name the libtpu.
    """
    jax, jaxlib = versions.get("jax"), versions.get("jaxlib")
    if jax is None or jaxlib is None:
        return []
    parsed = list(map(Requirement, jax_requirements))
    problems = []
    for name in ("jaxlib", *NVIDIA, "libtpu"):
        version = versions.get(name)
        allowed = _allowed(name, parsed) or SpecifierSet(f"=={jaxlib}")
        if version is None or (name == "libtpu" and not _allowed(name, parsed)):
            continue
        if not allowed.contains(version, prereleases=True):
            extra = {"libtpu": "[tpu]", "jaxlib": ""}
            wanted = f"jax{extra.get(name, '[' + name[4:10] + ']')}=={jax}"
            problems.append(
                f"{name} {version} does not fit jax {jax}, which takes {name}{allowed}: "
                f"pip install -U '{wanted}'"
            )
    return problems


def _allowed(name: str, jax_requirements: Sequence[Requirement]) -> SpecifierSet:
    """Return the versions of a package that jax takes, in whichever of its extras they stand."""
    allowed = (r.specifier for r in jax_requirements if canonicalize_name(r.name) == name)
    return next(allowed, SpecifierSet())


def _changed_files(name: str, versions: Versions) -> list[str]:
    """Return a line if files of the installed package are not those that were installed."""
    if name not in versions:
        return []
    changed = []
    for file in importlib.metadata.files(name) or ():
        if file.hash is None or file.parts[0] != distribution.PACKAGE.name:
            continue
        try:
            digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
        except OSError:
            digest = b""
        if base64.urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value:
            changed.append(str(file))
    if not changed:
        return []
    return [
        f"{len(changed)} installed files were changed or deleted, {changed[0]} for one: install "
        f"{distribution.NAME} anew with --force-reinstall"
    ]


def _belongs(requirement: Requirement, extra: str) -> bool:
    """Return whether an extra, or "" the package itself, brings a requirement here."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _is_met(requirement: Requirement, versions: Versions) -> bool:
    """Return whether it is installed, with the plug-in of an extra of JAX."""
    version = versions.get(canonicalize_name(requirement.name))
    if version is None or not requirement.specifier.contains(version, prereleases=True):
        return False
    brings = {"cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin", "tpu": "libtpu"}
    return all(brings[extra] in versions for extra in requirement.extras if extra in brings)
