"""The site's generated pages: the config's fields, the commands' help, the experiments, the API.

    python docs/generate.py

writes them to `docs/generated`, as every build of the site does. Nothing here needs Sphinx.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from clip_jax.tools.commands import COMMANDS  # noqa: E402
from clip_jax.tools.config_flags import help_text  # noqa: E402

PUBLIC = {
    "Load and use": ("clip_jax", "clip_jax.api", "clip_jax.errors"),
    "Experiments": ("clip_jax.config", "clip_jax.sections"),
    "Models": (
        "clip_jax.models.clip",
        "clip_jax.models.zoo",
        "clip_jax.models.states",
        "clip_jax.models.relevance",
        "clip_jax.models.flops",
    ),
    "Losses": ("clip_jax.losses", "clip_jax.losses.dense", "clip_jax.losses.tiled"),
    "Tokenizers": ("clip_jax.tokenizers", "clip_jax.tokenizers.spec"),
    "Data": (
        "clip_jax.data.shards",
        "clip_jax.data.sources",
        "clip_jax.data.manifest",
        "clip_jax.data.order",
        "clip_jax.data.images",
        "clip_jax.data.loader",
    ),
    "Devices": ("clip_jax.parallel.mesh", "clip_jax.parallel.sharding"),
    "Training": (
        "clip_jax.training.trainer",
        "clip_jax.training.step",
        "clip_jax.training.state",
        "clip_jax.training.optimizer",
        "clip_jax.training.checkpoint",
    ),
    "Evaluation": (
        "clip_jax.evaluation.spec",
        "clip_jax.evaluation.zero_shot",
        "clip_jax.evaluation.retrieval",
        "clip_jax.evaluation.linear_probe",
        "clip_jax.evaluation.knn",
        "clip_jax.evaluation.calibration",
        "clip_jax.evaluation.bootstrap",
    ),
    "Embeddings and search": (
        "clip_jax.embeddings.folder",
        "clip_jax.embeddings.brute_force",
        "clip_jax.embeddings.searcher",
    ),
    "Published checkpoints": (
        "clip_jax.pretrained.load",
        "clip_jax.pretrained.export",
        "clip_jax.pretrained.tags",
    ),
    "Exported programs": ("clip_jax.exporting.stablehlo", "clip_jax.exporting.onnx_file"),
    "Plans": ("clip_jax.planning.plan", "clip_jax.planning.estimate"),
}
"""The modules of the reference. Whatever stands in them without an underscore has an entry."""


def public_modules() -> list[str]:
    """Return the modules of the reference."""
    return [module for modules in PUBLIC.values() for module in modules]


def public_names(name: str) -> list[str]:
    """Return what a public module defines, or lists in its `__all__`."""
    module = importlib.import_module(name)
    if hasattr(module, "__all__"):
        return list(module.__all__)
    tree = ast.parse(Path(inspect.getfile(module)).read_text())
    kinds = ast.FunctionDef | ast.ClassDef
    return [n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]


def module_page(name: str) -> str:
    """Return the page of a module: its docstring, and an entry for each of its public names."""
    module = importlib.import_module(name)
    texts = constant_docs(Path(inspect.getfile(module)))
    lines = [f"# {name}", "", "```{eval-rst}", f".. automodule:: {name}", ""]
    for member in public_names(name):
        value = getattr(module, member)
        home = getattr(value, "__module__", name)
        # What another page defines has its entry there.
        if home != name and home in public_modules() and member in public_names(home):
            lines += [f"`{home}.{member}`", ""]
        elif inspect.isclass(value):
            lines += [f".. autoclass:: {name}.{member}", "   :members:"]
            # Flax's own fields of every module.
            lines += ["   :exclude-members: name, parent, scope", ""]
        elif callable(value):
            lines += [f".. autofunction:: {name}.{member}", ""]
        else:
            lines += [f".. py:data:: {member}", f"   :module: {name}"]
            lines += ["", f"   {texts.get(member, '')}", ""]
    return "\n".join([*lines, "```", ""])


def constant_docs(path: Path) -> dict[str, str]:
    """Return the text under each constant of a module, by its name."""
    body = ast.parse(path.read_text()).body
    return {
        ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target): cell(
            after.value.value
        )
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr)
    }


def api_index() -> str:
    """Return the page that lists the modules."""
    lines = ["# The API", "", "What a program of yours may call, by room. `import clip_jax` alone"]
    lines += ["loads and uses a model; the rest is for those who build on the parts.", ""]
    for title, modules in PUBLIC.items():
        lines += [f"## {title}", "", "| module | |", "| --- | --- |"]
        for name in modules:
            first = inspect.getdoc(importlib.import_module(name)).split("\n\n")[0]
            lines.append(f"| [`{name}`]({name}.md) | {cell(first).replace('::', '.')} |")
        short = [f"{name.removeprefix('clip_jax.')} <{name}>" for name in modules]
        lines += ["", "```{toctree}", ":hidden:", "", *short, "```", ""]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Return a text as it stands in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def config_page() -> str:
    """Return the table of every field of the config."""
    from clip_jax.config import known_keys
    from clip_jax.sections import Config

    docs = field_docs(ROOT / "clip_jax/sections.py")
    lines = ["# Every field of the config", "", CONFIG_INTRO, ""]
    top = [f for f in dataclasses.fields(Config) if not dataclasses.is_dataclass(f.default)]
    groups = [("", Config, top)]
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.default):
            section = type(field.default)
            groups.append((field.name, section, dataclasses.fields(section)))
    rows = 0
    for section, owner, fields in groups:
        title = f"config.{section}" if section else "config"
        lines += [f"## {title}", "", inspect.getdoc(owner), ""]
        lines += ["| field | default | |", "| --- | --- | --- |"]
        for field in fields:
            notes = [cell(docs[owner.__name__, field.name])]
            if "bounds" in field.metadata:
                notes.append(f"Takes {field.metadata['bounds']}.")
            if field.metadata.get("may_change"):
                notes.append("*May change.*")
            name, text = f"`{title}.{field.name}`", " ".join(notes)
            lines.append(f"| {name} | `{field.default!r}` | {text} |")
            rows += 1
        lines.append("")
    assert rows == len(known_keys())
    return "\n".join(lines)


CONFIG_INTRO = """\
An experiment file returns `clip_jax.config.default()` with its differences, and the command line
sets a field by its name: `--config.optim.learning_rate=1e-3`, a tuple as
`--config.optim.betas="(0.9, 0.98)"`. `--dry-run` prints all of them as they are. A name that does
not exist, a wrong type and a value out of bounds are one line each, before anything starts.

A run that goes on in its work folder may have another value where the table says *May change*. Any
other field is refused, and named, unless `--allow-change optim.learning_rate` says so."""


def field_docs(path: Path) -> dict[tuple[str, str], str]:
    """Return the text under each field of a file's classes, by class and field."""
    docs = {}
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in itertools.pairwise(node.body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                docs[node.name, field.target.id] = inspect.cleandoc(after.value.value)
            elif isinstance(field, ast.AnnAssign):
                docs[node.name, field.target.id] = ""
    return docs


def commands_page() -> str:
    """Return the help of every command."""
    lines = ["# Every command", "", "Each prints this with `--help`; `python -m clip_jax`"]
    lines += ["lists them.", ""]
    for command in COMMANDS:
        lines += [f"## python -m clip_jax.{command}", "", "```", help_of(command), "```", ""]
    return "\n".join(lines)


@functools.cache
def help_of(command: str) -> str:
    """Return what a command prints for `--help`."""
    file = Path(COMMANDS[command]).with_suffix("")
    module = importlib.import_module(f"clip_jax.{'.'.join(file.parts)}")
    if command == "main":
        return help_text(inspect.getdoc(module), module.OWN_FLAGS)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), wide(), contextlib.suppress(SystemExit):
        # Twice, because `plan` takes the first for its own name.
        getattr(module, "parse", getattr(module, "main", None))(["--help", "--help"])
    return out.getvalue().strip()


@contextlib.contextmanager
def wide() -> Iterator[None]:
    """Let argparse write lines of 100 characters whatever the terminal's width."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def experiments_page() -> str:
    """Return the docstring of every experiment."""
    lines = ["# Every experiment", "", "Each is the defaults with its differences; this is what it"]
    lines += ["says of itself.", ""]
    for path in sorted((ROOT / "experiments").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text()))
        if path.stem not in ("__init__", "paper"):
            lines += [f"## experiments/{path.name}", "", text, ""]
    return "\n".join(lines)


def write_pages(folder: Path) -> list[Path]:
    """Write all generated pages; a page that has not changed is left as it is."""
    pages = {
        "config.md": config_page(),
        "commands.md": commands_page(),
        "experiments.md": experiments_page(),
        "api/index.md": api_index(),
        **{f"api/{name}.md": module_page(name) for name in public_modules()},
        **{
            f"notebooks/{path.name}": path.read_text()
            for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
        },
    }
    kept = {folder / name for name in pages}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file() and path not in kept:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return sorted(kept)


if __name__ == "__main__":
    shutil.rmtree(ROOT / "docs/generated", ignore_errors=True)
    print(len(write_pages(ROOT / "docs/generated")), "pages in docs/generated")
