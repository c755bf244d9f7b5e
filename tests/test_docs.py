"""The site: every page is in it, links lead somewhere, the reference has every public name."""

import ast
import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest

from clip_jax.config import known_keys

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.append(str(DOCS))

import generate  # noqa: E402

PAGES = sorted(p for p in DOCS.rglob("*.md") if not p.is_relative_to(DOCS / "generated"))
GENERATED = {"config", "commands", "experiments", "api/index"}


def toctree_entries(page: Path) -> list[Path]:
    """Return the pages that a page's toctrees name, without their ending."""
    entries = []
    for body in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
        lines = [line for line in body.splitlines() if line and not line.startswith(":")]
        entries += [(page.parent / line).resolve() for line in lines]
    return entries


def test_every_page_is_in_one_toctree():
    entries = [entry for page in PAGES for entry in toctree_entries(page)]
    notebooks = {f"notebooks/{p.stem}" for p in (ROOT / "notebooks").glob("*.ipynb")}
    generated = {DOCS / "generated" / name for name in GENERATED | notebooks}
    pages = {p.with_suffix("") for p in PAGES} - {DOCS / "index"}
    assert sorted(entries) == sorted(pages | generated)


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if target.is_relative_to(DOCS / "generated"):
            name = str(target.relative_to(DOCS / "generated").with_suffix(""))
            found = name in GENERATED | {f"api/{module}" for module in generate.public_modules()}
        else:
            found = target.exists()
        wrong += [] if found and (not anchor or anchor in anchors(target)) else [link]
    assert wrong == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_field_of_the_config_is_in_the_table():
    page = generate.config_page()
    rows = re.findall(r"^\| `config\.([\w.]+)` \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert [name for name, _, _ in rows] and {name for name, _, _ in rows} == set(known_keys())
    undescribed = [name for name, _, text in rows if len(text) < 10 and name != "seed"]
    assert undescribed == []


def test_every_public_name_has_an_entry_with_a_text():
    import clip_jax

    assert set(clip_jax.__all__) == set(generate.public_names("clip_jax"))
    missing = []
    for module in generate.public_modules():
        page = generate.module_page(module)
        entries = set(re.findall(r"[\w.]+", page))
        for name in generate.public_names(module):
            value = getattr(importlib.import_module(module), name)
            home = getattr(value, "__module__", module)
            if callable(value):
                said = value.__doc__ and {f"{module}.{name}", f"{home}.{name}"} & entries
            else:
                said = re.search(rf"py:data:: {name}\n   :module: {module}\n\n   \w", page)
            missing += [] if said else [f"{module}.{name}"]
    assert missing == []


def test_every_command_has_its_help():
    assert [c for c in generate.COMMANDS if len(generate.help_of(c)) < 100] == []


def has_examples(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return ">>>" in (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


@pytest.mark.parametrize("name", [*filter(has_examples, generate.public_modules())])
def test_the_examples_of_a_module_print_what_they_say(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert results.attempted and not results.failed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_is_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(block)
