"""Test that the notebooks run from top to bottom."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import Repo, serve
from huggingface_hub import constants
from quick import QUICK
from tiny import VIT

import clip_jax
from clip_jax.data.images import OPENAI
from clip_jax.pretrained import download
from clip_jax.pretrained.trees import array_shapes
from clip_jax.pretrained.work_folder import RunDescription, write_work_folder
from clip_jax.tokenizers import TokenizerSpec
from clip_jax.tools.convert import convert

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "clip_jax.ipynb"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# In a process of its own: nbclient's event loop warns in ways that are none of ours.
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
texts = [o.get("text", "") for c in notebook.cells for o in c.get("outputs", [])]
print("".join(texts))
"""


@pytest.mark.slow
def test_a_kernel_runs_the_notebook(tmp_path):
    environment = {
        **os.environ,
        "WORKDIR": str(tmp_path),
        "MODEL": "ConvNet-48",
        "XLA_FLAGS": QUICK,
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(NOTEBOOK)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "random weights" in done.stdout and "red circle" in done.stdout


@pytest.fixture
def model_name(tmp_path, monkeypatch):
    """The name of a tiny model on a hub on loopback."""
    ends = {"context_length": 16, "vocab_size": 49_408, "eot_id": 49_407}
    config = dataclasses.replace(VIT, text=dataclasses.replace(VIT.text, **ends))
    rng = np.random.default_rng(0)
    arrays = {
        path: rng.normal(0, 0.1, shape).astype(np.float32)
        for path, shape in array_shapes(config).items()
    }
    run, converted = tmp_path / "run", tmp_path / "converted"
    run.mkdir()
    write_work_folder(run, RunDescription("tiny", config, TokenizerSpec(), OPENAI), arrays)
    convert(str(run), str(converted), to="open_clip")
    with serve() as hub:
        hub.repos["me/tiny"] = Repo({p.name: p.read_bytes() for p in converted.iterdir()})
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(download, "PAUSE", 0.0)
        yield "hf-hub:me/tiny"


def test_notebooks_run(model_name, tmp_path, monkeypatch, capsys):
    assert len(NOTEBOOKS) == 6
    monkeypatch.setenv("MODEL", model_name)
    monkeypatch.setenv("WORKDIR", str(tmp_path / "run"))
    monkeypatch.setattr(clip_jax, "load", functools.cache(clip_jax.load))  # compiled once
    monkeypatch.chdir(tmp_path)
    for path in NOTEBOOKS:
        names: dict = {}
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            if cell["cell_type"] == "code":
                assert not cell["outputs"]
                where = f"{path.name}, cell {number}"
                exec(compile("".join(cell["source"]), where, "exec"), names)
    printed = capsys.readouterr().out
    assert "trained weights" in printed and "pizza" in printed
    assert "red_circle.png" in printed and "text.stablehlo" in printed
