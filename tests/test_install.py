"""What a newcomer meets: the list of commands, their help, experiments by name, a mixed folder."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from clip_jax import distribution, experiments
from clip_jax.errors import UserError
from clip_jax.tools import commands, config_flags

PACKAGE = Path(commands.__file__).parents[1]
ROOT = PACKAGE.parent


def test_every_command_is_listed():
    no_commands = {"__main__", "models.table"}
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "tools" and '__name__ == "__main__"' in path.read_text()
    } | {"__main__"}
    assert modules - no_commands == set(commands.COMMANDS)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_of_every_command(name, monkeypatch, capsys):
    file = commands.COMMANDS[name]
    module = importlib.import_module("clip_jax." + file.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(sys, "argv", [f"python -m clip_jax.{name}", "--help"])
    parameters = inspect.signature(module.main).parameters.values()
    argv = [["--help"]] if any(p.default is p.empty for p in parameters) else []
    try:
        code = module.main(*argv)
    except SystemExit as exit:
        code = exit.code
    assert code == 0
    out = capsys.readouterr().out
    assert f"clip_jax.{name}" in " ".join(out.split()) and "--" in out


def test_the_list_has_a_line_for_each_and_imports_no_library():
    code = (
        "import sys; from clip_jax.tools.commands import main; main([]);"
        "heavy = {'jax', 'numpy', 'flax', 'absl', 'ml_collections'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in commands.COMMANDS:
        assert f"  {name} " in done.stdout and 4 < len(commands.summary(name)) < 70
    for name in experiments.names():
        assert name in done.stdout


def test_the_list_takes_no_argument():
    with pytest.raises(UserError, match=r"python -m clip_jax\.plan$"):
        commands.main(["plan"])


@pytest.mark.parametrize("name", experiments.names())
def test_experiments_are_found_by_name(name):
    assert config_flags._with_files(["main", "--config", name])[2] == str(experiments.find(name))
    assert config_flags._with_files(["main", f"--config={name}"])[1].endswith(f"/{name}.py")
    config = importlib.import_module(f"clip_jax.experiments.{name}").get_config()
    assert config.model.name and len(experiments.summary(name)) < 100


def test_what_is_no_experiment(monkeypatch, tmp_path):
    assert experiments.find("paper") is None and experiments.find("../setup") is None
    with pytest.raises(UserError, match=r"no such file or experiment .* --config vit_b32\?"):
        config_flags.parse(["main", "--config", "vit_b23"])
    # A file in the current folder goes before the name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").write_text("")
    assert config_flags._with_files(["main", "--config", "emoji"])[2] == "emoji"


# What ml_collections reads a config file with.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"model": {', r"is no JSON \(Expecting .*: line 1 column 12 \(char 11\)\)"),
        (b"", r"is no JSON \(Expecting value: line 1 column 1"),
        (b'{"a": "\xff"}', r"is no JSON \('utf-8' codec can't decode byte 0xff in position 7"),
        (b"[1, 2]", "is no object of fields; give"),
        (b"3", "is no object of fields; give"),
        (b'{"config": [1]}', 'its "config" is no object'),
        (b'{"model": 3}', "config.model is no object of fields"),
        (b'{"model": {"nme": "x"}}', "config.model.nme does not exist; did you mean config.model"),
        (b'{"model": {"name": 3}}', "config.model.name: .*int"),
        (b'{"train": {"steps": {"a": 1}}}', "config.train.steps: .*"),
    ],
)
def test_a_config_in_json_that_is_none(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=f"^--config {path}:? ?{message}") as raised:
        config_flags.parse(["main", "--config", str(path)])
    assert "\n" not in str(raised.value)


def test_a_folder_that_two_distributions_write_into(tmp_path):
    package = tmp_path / "clip_jax"
    assert distribution.mixed_files(package) is None
    own = tmp_path / "clip_jax_research-0.1.0.dist-info"
    other = tmp_path / "clip_jax-0.0.6.dist-info"
    for folder in (own, other):
        folder.mkdir()
        (folder / "RECORD").write_text("clip_jax-0.0.6.dist-info/RECORD,,\n")
    (own / "RECORD").write_text("clip_jax/__init__.py,,\n")
    # An editable installation has a record, and no files.
    assert distribution.mixed_files(package) is None
    (other / "RECORD").write_text("clip_jax/__init__.py,sha256=x,1\nclip_jax/modeling.py,,\n")
    message = distribution.mixed_files(package)
    assert "clip-jax 0.0.6 is installed too" in message and "\n" not in message
