"""What is written to this machine alone is told so in a line, and makes no folder `s3:`."""

import importlib
import os
import sys

import pytest

from clip_jax.embeddings.folder import open_embeddings
from clip_jax.errors import UserError
from clip_jax.files import atomic_write, make_folder
from clip_jax.parallel.program_cache import start_program_cache
from clip_jax.pretrained.export import new_folder

URL = "s3://bucket/place"
COMMANDS = {
    "benchmark": "--model m --dataset d --out URL",
    "convert": "m URL",
    "doctor": "--json URL",
    "embed": "--model m --data d --out URL",
    "evaluate": "--model m --data d --out URL",
    "export": "m URL",
    "plan": "--config emoji --devices 1 --json URL",
    "relevance": "--model m --image i --caption c --out URL",
    "replay": "w --step 1 --out URL",
    "report": "w --out URL",
    "wiseft": "a b --data d --keep-data k --out o --save URL",
    "data_emoji": "--out URL",
    "data_filter": "s --model m --out URL",
    "data_inspect": "s --out URL",
    "data_reinforce": "--config emoji --out URL",
    "data_shard": "s --out URL",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_that_it_writes_to_no_bucket(name, tmp_path, monkeypatch):
    words = COMMANDS[name].replace("URL", URL).split()
    option = words[-2] if words[-2].startswith("--") else words[-2].upper()
    option = {"convert": "DST", "export": "OUT"}.get(name, option)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(UserError, match=f"^{option} {URL} is in a bucket, .*name a place there"):
        importlib.import_module(f"clip_jax.tools.{name}").main()
    assert not os.listdir(tmp_path)


def test_no_folder_is_called_as_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    writers = {
        "--out": lambda path: make_folder(path, flag="--out"),
        "the file": lambda path: atomic_write(path).__enter__(),
        "the folder": lambda path: new_folder(path).__enter__(),
        "config.train.compile_cache": lambda path: start_program_cache(str(path), tmp_path),
    }
    for name, write in writers.items():
        with pytest.raises(UserError, match=f"^{name} {URL} is in a bucket"):
            write(tmp_path.__class__(URL))
    assert not os.listdir(tmp_path)


def test_embeddings_are_read_from_a_disk(tmp_path):
    for folder in (URL, tmp_path.__class__(URL)):
        with pytest.raises(
            UserError, match=f"^the folder of features {URL} is in a .*copy it there"
        ):
            open_embeddings(folder)
