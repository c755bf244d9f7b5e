"""Loading a checkpoint against reading its bytes, side by side in one process: time and memory.

    python -m benchmarks.load --model ViT-L/14

A file of random weights is written in each format, then read and loaded in alternation; from our
own format in bfloat16 and one tower at a time as well. The file is in the page cache from the first
round on, for both. Memory is the process's own: pages of a mapped file are not counted
(`private_memory.py`).
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import clip_jax
from benchmarks.interleaved import make_parser, ratio, report, spread
from benchmarks.private_memory import measure_call
from clip_jax.data.images import OPENAI
from clip_jax.models.zoo import model_config
from clip_jax.pretrained.export import WRITERS
from clip_jax.pretrained.trees import array_shapes
from clip_jax.pretrained.work_folder import RunDescription
from clip_jax.tokenizers import TokenizerSpec

WEIGHTS = {
    "own": "model.safetensors",
    "open_clip": "open_clip_model.safetensors",
    "hf": "model.safetensors",
}
CASES: list[tuple[str, dict[str, str]]] = [
    *((form, {}) for form in WEIGHTS),
    ("own", {"dtype": "bfloat16"}),
    ("own", {"towers": "image"}),
    ("own", {"towers": "text"}),
    ("own", {"dtype": "bfloat16", "towers": "text"}),
]
"""The format, and what `clip_jax.load` is given beside the folder."""


def load_params(folder: Path, **given: str) -> Any:
    """Load a model, and return its parameters when they are there."""
    return jax.block_until_ready(clip_jax.load(folder, **given).params)


def main(argv: list[str] | None = None) -> None:
    """Measure and print one table."""
    parser = make_parser(__doc__, warmup=0, repeats=5)
    parser.add_argument("--model", default="ViT-L/14")
    options = parser.parse_args(argv)
    config = model_config(options.model)
    rng = np.random.default_rng(0)
    arrays = {
        path: rng.standard_normal(shape, np.float32) for path, shape in array_shapes(config).items()
    }
    description = RunDescription(options.model, config, TokenizerSpec(), OPENAI)
    weights_mb = sum(x.nbytes for x in arrays.values()) / 1e6
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for form in WEIGHTS:
            (Path(folder) / form).mkdir()
            WRITERS[form](Path(folder) / form, description, arrays)
        arrays.clear()
        for form, given in CASES:
            folder_of_form, name = Path(folder) / form, WEIGHTS[form]
            reads, loads, memory = [], [], []
            for _ in range(options.repeats):
                reads.append(measure_call((folder_of_form / name).read_bytes)[0])
                seconds, peak = measure_call(
                    functools.partial(load_params, folder_of_form, **given)
                )
                loads.append(seconds)
                memory.append(peak / (folder_of_form / name).stat().st_size)
            title = " ".join([form, *given.values()])
            row = {"format": title, "read, s": spread(reads), "load, s": spread(loads)}
            rows.append(row | {"load / read": ratio(loads, reads), "memory": max(memory)})
    report("load", options, rows, weights_MB=weights_mb, memory="most above the start / weights")


if __name__ == "__main__":
    main()
