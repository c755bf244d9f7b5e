"""The rooms may import downwards only, and importing the package is cheap."""

import ast
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from checked_rooms import CHECKED

PACKAGE = Path(__file__).parent.parent / "clip_jax"

# Rooms by level; a room may import rooms of lower levels.
LEVELS = [
    {"distribution"},
    {"errors"},
    {"files", "host_memory", "gpu_memory", "protobuf", "typing", "progress_bar", "sections"},
    {"models", "losses", "data", "tokenizers", "executors"},
    {"parallel", "pretrained"},
    {"evaluation", "api_inputs"},
    {"training"},
    {"api", "config"},
    {"planning", "embeddings", "exporting", "report_page", "experiments"},
    {"search_page", "diagnosis"},
    {"tools"},
    {"main", "__main__"},
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


def test_the_page_has_these_stairs():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (`.*`) \|$", page, re.MULTILINE)
    stairs = {int(stair): set(re.findall(r"`(\w+)`", rooms)) for stair, rooms in rows}
    assert stairs == dict(enumerate(LEVELS))


def test_only_the_parity_tests_import_torch():
    tests = (PACKAGE.parent / "tests").rglob("*.py")
    for path in [*FILES, *(test for test in tests if "parity" not in test.parts)]:
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


def test_private_jax_stands_in_one_file():
    users = [str(path.relative_to(PACKAGE)) for path in FILES if "jax._src" in path.read_text()]
    assert users == ["parallel/jax_internals.py"]


LONGEST = 60
"""Lines of a function, its docstring left out: what can be seen at once."""


def function_lengths(path: Path) -> dict[str, int]:
    """Lines of every function of a file, those inside others too, without the docstring."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0] if ast.get_docstring(node) is not None else None
            skipped = doc.end_lineno - doc.lineno + 1 if doc is not None else 0
            found[f"{node.name}, line {node.lineno}"] = node.end_lineno - node.lineno + 1 - skipped
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_stay_short_and_files_say_what_they_are(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)) or not text, f"{path} has no docstring"
    long = {name: n for name, n in function_lengths(path).items() if n > LONGEST}
    assert not long, long


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
        "from clip_jax.parallel.jax_internals import devices_started\nassert not devices_started()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_array_types_are_checked_where_there_are_any(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    if "from jaxtyping import" in path.read_text() and module != "typing":
        assert any(f"{module}.".startswith(f"{room}.") for room in CHECKED)
