"""No message of the program names an option that does not exist."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from clip_jax import api, sections
from clip_jax.data.formats.options import Options

PACKAGE = Path(__file__).parent.parent / "clip_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
ERRORS = {"UserError", "ShardError", "BadFileError", "damaged", "unreadable", "note", "_problem"}


def texts_of(node):
    """Yield the constant texts of an expression, holes of an f-string as `{}`."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.JoinedStr):
            yield "".join(
                str(v.value) if isinstance(v, ast.Constant) else "{}" for v in inner.values
            )
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


def messages():
    """Return (file, text) of every message of an error or a note."""
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            name = (
                getattr(getattr(node, "func", None), "id", "") if isinstance(node, ast.Call) else ""
            )
            if name in ERRORS:
                found += [(path.name, text) for arg in node.args for text in texts_of(arg)]
    return found


MESSAGES = messages()


def config_fields():
    """Return the names of the config's fields, as a user writes them."""
    fields = {"config.default", "config.a.b"}  # the function, and what any field looks like
    fields |= {f"config.{section.name}" for section in dataclasses.fields(sections.Config)}
    for name in dir(sections):
        kind = getattr(sections, name)
        if name.endswith("Section") and dataclasses.is_dataclass(kind):
            prefix = name.removesuffix("Section").lower()
            fields |= {f"config.{prefix}.{field.name}" for field in dataclasses.fields(kind)}
    return fields


def flags():
    """Return every flag that some command takes."""
    found = {"--config", "--workdir"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            names = [a.value for a in node.args if isinstance(a, ast.Constant)]
            if name in ("add_argument", "add"):
                found |= {flag for flag in names if str(flag).startswith("--")}
            elif name.startswith("DEFINE_"):
                found |= {f"--{flag}" for flag in names[:1]}
    return found


def test_there_are_messages_to_walk():
    assert len(MESSAGES) > 300


def test_every_config_field_of_a_message_is_there():
    known = config_fields()
    named = {
        (file, name.rstrip("."))
        for file, text in MESSAGES
        for name in re.findall(r"\bconfig(?:\.[a-z_]+)+", text)
    }
    assert len(named) > 20
    assert {(file, name) for file, name in named if name not in known} == set()


def test_every_flag_of_a_message_is_there():
    known = flags()
    named = {
        (file, flag)
        for file, text in MESSAGES
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", text)
    }
    assert len(named) > 10
    foreign = {
        "--siglip",
        "--force-reinstall",
        "--file_format",
        "--head",
    }  # open_clip, pip, tfds, ray
    assert {(file, flag) for file, flag in named if flag not in known | foreign} == set()


def test_every_argument_of_a_message_is_one_that_a_user_gives():
    import inspect

    public = [api.load, api.create, *(vars(api.LoadedCLIP).values())]
    known = {
        name
        for call in public
        if inspect.isfunction(call)
        for name in inspect.signature(call).parameters
    }
    known |= {field.name for field in dataclasses.fields(Options)}
    named = {
        (file, name)
        for file, text in MESSAGES
        for name in re.findall(
            r"(?:give|set|with|raise|lower) (?:load\(\.\.\., )?`?([a-z_]+)=", text
        )
    }
    assert {(file, name) for file, name in named if name not in known} == set()


def test_every_command_and_function_of_a_message_is_there():
    import clip_jax

    commands, functions = set(), set()
    for _, text in MESSAGES:
        commands |= set(re.findall(r"python -m clip_jax((?:\.[a-z_]+)+)", text))
        functions |= set(re.findall(r"(?<!-m )clip_jax\.(\w+)\(", text))
    assert len(commands) > 2 and functions
    for command in commands:
        assert (PACKAGE / f"{command[1:].replace('.', '/')}.py").is_file(), command
    assert {name for name in functions if not hasattr(clip_jax, name)} == set()


def test_every_option_of_a_source_in_a_message_is_there():
    known = {field.name for field in dataclasses.fields(Options)} | {"txt", "where"}
    named = {name for _, text in MESSAGES for name in re.findall(r"#([a-z_]+)=", text)}
    assert named and named <= known, named - known


DOCS = [
    PACKAGE.parent / "README.md",
    *sorted((PACKAGE.parent / "docs").glob("*.md")),
    *sorted((PACKAGE.parent / "docs").glob("[th]*/*.md")),  # tutorials and how-to pages
]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_field_and_command_of_a_page_is_there(path):
    text = path.read_text()
    fields = {n.rstrip(".") for n in re.findall(r"\bconfig(?:\.[a-z_]+){2}", text)}
    assert {name for name in fields if name not in config_fields()} == set()
    for command in set(re.findall(r"python -m clip_jax((?:\.[a-z_]+)+)", text)):
        assert (PACKAGE / f"{command[1:].replace('.', '/')}.py").is_file(), command


@pytest.mark.parametrize("name", ["num_streams", "by key"])
def test_names_that_no_user_can_set_are_not_advice(name):
    assert [text for _, text in MESSAGES if name in text] == []
