"""The name that this package is installed by, which is not the name that it is imported by.

On PyPI `clip-jax` is another project, whose import package has this one's name: both in one
environment write into one folder, and the later one overwrites what the earlier one has.
"""

from pathlib import Path

NAME = "clip-jax-research"
OTHER = "clip-jax"

PACKAGE = Path(__file__).parent


def install_command(extra: str) -> str:
    """Return the command that adds what an extra needs to what is installed."""
    return f"pip install '{NAME}[{extra}]'"


def version() -> str:
    """Return the installed version; "not installed" where the code is imported from a folder."""
    import importlib.metadata  # takes 20 ms, which `import clip_jax` does not

    try:
        return importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def mixed_files(package: Path = PACKAGE) -> str | None:
    """Return a line on another distribution that has files in this package's folder, or None.

    Args:
      package: the folder; beside it lie the records of what is installed.
    """
    prefix = OTHER.replace("-", "_") + "-"
    for record in package.parent.glob(f"{prefix}*.dist-info/RECORD"):
        try:
            lines = record.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            continue
        if any(line.startswith(f"{package.name}/") for line in lines):
            release = record.parent.name.removeprefix(prefix).removesuffix(".dist-info")
            return (
                f"{OTHER} {release} is installed too, and has files in {package}: one of the two "
                f"is broken; pip uninstall {OTHER}, then install {NAME} anew with --force-reinstall"
            )
    return None
