"""The rooms may import downwards only, and importing the package is cheap."""

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "clip_jax"

# Rooms by level; a room may import rooms of lower levels.
LEVELS = [
    {"errors"},
    {"files", "host_memory", "protobuf", "typing", "progress_bar"},
    {"models", "losses", "data", "tokenizers", "config"},
    {"parallel", "pretrained"},
    {"evaluation"},
    {"training"},
    {"api"},
    {"planning", "embeddings", "report_page"},
    {"search_page"},
    {"tools"},
    {"main"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(parts: Sequence[str]) -> str:
    """The room of a module below the package, its path in parts."""
    command = ".".join(parts[:2])
    return command if command in LEVEL else parts[0]


def room(path: Path) -> str:
    return room_of(path.relative_to(PACKAGE).with_suffix("").parts)


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clip_jax"):
            parts = node.module.split(".")[1:]
            rooms |= {room_of([*parts, alias.name]) for alias in node.names}
        if isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names if a.name.startswith("clip_jax.")]
            rooms |= {room_of(name[1:]) for name in names}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_stairs(path):
    here = room(path)
    if here == "__init__":
        return
    for other in imported_rooms(path) - {here}:
        assert LEVEL[other] < LEVEL[here], f"{path.name} ({here}) imports {other}"


def test_only_the_parity_tests_import_torch():
    for path in [
        *FILES,
        *(p for p in PACKAGE.parent.rglob("tests/**/*.py") if "parity" not in p.parts),
    ]:
        tree = ast.parse(path.read_text())
        names = {
            n.split(".")[0]
            for node in ast.walk(tree)
            for n in (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not names & {"torch", "torchvision", "open_clip", "transformers"}, path


def test_files_and_functions_stay_small():
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") < 400, path
        assert ast.get_docstring(ast.parse(text)) or not text, f"{path} has no docstring"


def test_import_starts_no_device_and_stays_light():
    code = (
        "import sys, clip_jax; heavy = {'jax', 'flax', 'optax', 'orbax', 'grain', 'PIL', 'numpy',"
        " 'matplotlib', 'tokenizers'} & set(sys.modules); assert not heavy, heavy;"
        "print(clip_jax.list_models()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "RN50"


def test_importing_every_room_starts_no_device():
    modules = [
        "clip_jax." + str(p.relative_to(PACKAGE))[:-3].replace("/", ".").removesuffix(".__init__")
        for p in FILES
        if p.name != "__init__.py"
    ]
    code = (
        f"import importlib\nfor m in {modules}: importlib.import_module(m)\n"
        "from jax._src import xla_bridge\nassert not xla_bridge._backends"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
