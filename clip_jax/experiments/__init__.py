"""The experiments by their names: `--config vit_b32`, `from clip_jax.experiments import paper`.

An installed package has their files, and the launch scripts, in this folder. In a repository they
lie in `experiments/` at its top, and are imported from there.
"""

import ast
from pathlib import Path

_HERE = Path(__file__).resolve().parent

FOLDER = _HERE if (_HERE / "paper.py").is_file() else _HERE.parents[1] / "experiments"
"""Where the files lie."""
LAUNCH = FOLDER / "launch"
"""Where the launch scripts of clusters lie."""

__path__ = [str(FOLDER)]


def names() -> list[str]:
    """Return the experiments' names: what `--config` takes beside files."""
    shared = {"__init__", "paper"}
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in shared)


def find(name: str) -> Path | None:
    """Return the file of an experiment; None if no experiment has that name."""
    return FOLDER / f"{name}.py" if name in names() else None


def summary(name: str) -> str:
    """Return the first line of an experiment's docstring.

    Raises:
      KeyError: no experiment has that name.
    """
    path = find(name)
    if path is None:
        raise KeyError(name)
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0]
