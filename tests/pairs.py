"""A small image-text set in genuine shards, written with the webdataset library, and runs on it."""

import io
import json
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from clip_jax.config import default, resolve
from clip_jax.sections import Config
from clip_jax.tokenizers.train import train as train_tokenizer

COLORS = ("red", "green", "blue", "black")
SHAPES = ("square", "bar", "dot")
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
_RGB = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "black": (9, 9, 9)}


def draw(label: int, rng: np.random.Generator) -> bytes:
    """Draw a 40-pixel PNG of one of the named things, somewhere on a noisy page."""
    color, shape = NAMES[label].split()
    page = rng.integers(200, 256, (40, 40, 3)).astype(np.uint8)
    height, width = {"square": (16, 16), "bar": (6, 24), "dot": (6, 6)}[shape]
    top, left = rng.integers(2, 38 - height), rng.integers(2, 38 - width)
    page[top : top + height, left : left + width] = _RGB[color]
    out = io.BytesIO()
    Image.fromarray(page).save(out, "PNG")
    return out.getvalue()


def write_pairs(folder: Path, *, shards: int = 2, samples: int = 48) -> str:
    """Write shards and `names.txt`; return the data pattern that names the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for i in range(samples):
                label = (shard * samples + i) % len(NAMES)
                writer.write(
                    {
                        "__key__": f"{shard:03d}{i:06d}",
                        "png": draw(label, rng),
                        "txt": NAMES[label],
                        "cls": str(label),
                    }
                )
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


def write_data(folder: Path, **pairs: int) -> tuple[Path, str]:
    """Write pairs and a tokenizer `t.model` of their names; return (folder, the data pattern)."""
    pattern = write_pairs(folder, **pairs)
    train_tokenizer(str(folder / "names.txt"), str(folder / "t.model"), 280)
    return folder, pattern


def tiny_config(data: tuple[Path, str], **changes) -> Config:
    """Return a run of the model "tiny" on `write_data`'s; `train__loss="sigmoid"` sets a field."""
    folder, pattern = data
    c = default()
    c.model.name = "tiny"
    c.train.steps = 3
    c.train.batch_size = 16
    c.train.mask_equal_captions = True
    c.train.log_every = 1
    c.optim.learning_rate = 3e-3
    c.optim.warmup_steps = 2
    c.data.train = pattern
    c.data.tokenizer = str(folder / "t.model")
    c.data.threads = 2
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            c[section][field] = value
        else:
            c[section] = value
    return resolve(c)


def run_losses(workdir: str | Path) -> list[tuple[int, float]]:
    """Return (step, loss) of every step in a run's metrics."""
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]
