"""Test that the notebook runs from top to bottom."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from quick import QUICK

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# In a process of its own: nbclient's event loop warns in ways that are none of ours.
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
texts = [o.get("text", "") for c in notebook.cells for o in c.get("outputs", [])]
print("".join(texts))
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_runs(path, tmp_path):
    environment = {
        **os.environ,
        "WORKDIR": str(tmp_path),
        "MODEL": "ConvNet-48",
        "XLA_FLAGS": QUICK,
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "random weights" in done.stdout and "red circle" in done.stdout
