"""A small image-text set in genuine shards, written with the webdataset library."""

import io
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

COLOURS = ("red", "green", "blue", "black")
SHAPES = ("square", "bar", "dot")
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
_RGB = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "black": (9, 9, 9)}


def draw(label: int, rng: np.random.Generator) -> bytes:
    """A 40-pixel PNG of one of the named things, somewhere on a noisy page."""
    colour, shape = NAMES[label].split()
    page = rng.integers(200, 256, (40, 40, 3)).astype(np.uint8)
    height, width = {"square": (16, 16), "bar": (6, 24), "dot": (6, 6)}[shape]
    top, left = rng.integers(2, 38 - height), rng.integers(2, 38 - width)
    page[top : top + height, left : left + width] = _RGB[colour]
    out = io.BytesIO()
    Image.fromarray(page).save(out, "PNG")
    return out.getvalue()


def write_pairs(folder: Path, *, shards: int = 2, samples: int = 48) -> str:
    """Shards, `names.txt`, and the data pattern that names them."""
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
