"""The small experiments train: each file's own config, on a tiny model and tiny data."""

import dataclasses
import importlib
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest
from pairs import run_losses, write_data
from tiny import VIT

import clip_jax
from clip_jax import main
from clip_jax.config import resolve
from clip_jax.models import zoo

# What each is there for is also tested in seconds elsewhere; here the whole file runs.
FRESH = ["flip", "siglip", "lion", "adafactor", "muon", "ema"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of data and a tokenizer; the runs that others start from come to lie here."""
    made, _ = write_data(tmp_path_factory.mktemp("experiments"))
    text = dataclasses.replace(VIT.text, layers=1, context_length=16)
    vision = dataclasses.replace(VIT.vision, layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.MODELS, "tiny", dataclasses.replace(VIT, vision=vision, text=text))
        yield made


def train_experiment(name, folder, *, steps):
    """Run `experiments/emoji_NAME.py` on a tiny model; return its losses."""
    c = importlib.import_module(f"experiments.emoji_{name}").get_config()
    c.model.name = "tiny"
    c.train.steps = steps
    c.train.batch_size = 16
    c.train.log_every = 1
    c.data.train = f"{folder}/{{00000..00001}}.tar"
    c.data.tokenizer = str(folder / "t.model")
    c.data.window = 8
    c.eval.data = ""
    if c.model.init_from:
        c.model.init_from = str(folder / Path(c.model.init_from).name)
    workdir = folder / f"emoji_{name}"
    assert main.run(resolve(c), str(workdir)) == 0
    return [loss for _, loss in run_losses(workdir)]


@pytest.mark.slow
@pytest.mark.parametrize("name", FRESH)
def test_it_trains(name, folder):
    losses = train_experiment(name, folder, steps=40)
    # Of 12 captions a random model is wrong by about log 10.
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    shutil.rmtree(folder / f"emoji_{name}")


@pytest.mark.slow
def test_tuning_goes_on_from_another_run(folder):
    """Locked-image tuning and another image size: lower from the first step, and falling."""
    first = train_experiment("vit", folder, steps=40)
    for name in ("lit", "finetune"):
        losses = train_experiment(name, folder, steps=12)
        assert losses[0] < np.mean(first[:4])
        assert np.mean(losses[-4:]) < 0.8 * np.mean(first[:4])
    before = clip_jax.load(folder / "emoji_vit").params
    after = clip_jax.load(folder / "emoji_lit").params
    chex.assert_trees_all_equal(before["visual"], after["visual"])
    assert clip_jax.load(folder / "emoji_finetune").config.vision.image_size == 64


@pytest.mark.slow
def test_clipa_goes_from_short_to_full(folder):
    short = train_experiment("clipa_short", folder, steps=40)
    full = train_experiment("clipa_full", folder, steps=20)
    assert np.mean(short[-4:]) < 0.7 * np.mean(short[:4])
    assert full[0] < np.mean(short[:4]) and np.mean(full[-4:]) < full[0]
    for name, sizes in (("short", (24, 8)), ("full", (32, 16))):
        config = clip_jax.load(folder / f"emoji_clipa_{name}").config
        assert (config.vision.image_size, config.text.context_length) == sizes
