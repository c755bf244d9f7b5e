"""A spike of the loss is traced to the shard that makes it, by one command."""

import dataclasses
import io
import json
import random
import sys

import numpy as np
import pytest
import webdataset
from pairs import NAMES, run_losses, tiny_config, write_data
from PIL import Image
from tiny import VIT

from clip_jax import main
from clip_jax.models import zoo
from clip_jax.tools import replay

TINY = dataclasses.replace(
    VIT,
    vision=dataclasses.replace(VIT.vision, layers=1),
    text=dataclasses.replace(VIT.text, layers=1, context_length=16),
)
SHARDS, NOISE = 6, 2


def write_noise(path, samples):
    """Write a shard of noise, its captions in any order."""
    rng, captions = np.random.default_rng(1), [NAMES[i % len(NAMES)] for i in range(samples)]
    random.Random(1).shuffle(captions)
    with webdataset.TarWriter(str(path)) as writer:
        for i, caption in enumerate(captions):
            out = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(out, "PNG")
            writer.write({"__key__": f"{i:06d}", "png": out.getvalue(), "txt": caption})


@pytest.mark.slow
def test_replay_names_the_shard_of_noise_that_a_spike_comes_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(zoo.MODELS, "tiny", TINY)
    data = write_data(tmp_path / "data", shards=SHARDS)
    write_noise(tmp_path / "data" / f"{NOISE:05d}.tar", 48)
    # Two streams of three shards: a shard fills half of the batches for six steps.
    options = {"data__streams": 2, "data__window": 1, "checkpoint__every": 20}
    config = tiny_config(data, train__steps=144, data__log_keys=True, **options)
    workdir = tmp_path / "run"
    assert main.run(config, str(workdir)) == 0

    lines = (workdir / "keys-0.jsonl").read_text().splitlines()
    keys = {line["step"]: line["keys"] for line in map(json.loads, lines)}
    late = {step: loss for step, loss in run_losses(workdir) if step > 108}
    has_noise = {s: sum(f"{NOISE:05d}.tar" in key for key in keys[s]) >= 4 for s in late}
    with_noise = [loss for step, loss in late.items() if has_noise[step]]
    without = [loss for step, loss in late.items() if not has_noise[step]]
    assert np.median(with_noise) > 1.3 * np.median(without)
    spike = max(late, key=lambda step: late[step])
    capsys.readouterr()

    argv = ["replay", str(workdir), "--step", str(spike), "--around", "8"]
    monkeypatch.setattr(sys, "argv", argv)
    assert replay.main() == 0
    text = capsys.readouterr().out
    print(text)
    assert "equal to the bit" in text
    shards = json.loads((workdir / f"replay-{spike}" / "step.json").read_text())
    sums = {}
    for sample in shards["samples"]:
        loss = (sample["image_loss"] + sample["text_loss"]) / 2
        sums.setdefault(sample["key"].partition("/")[0], []).append(loss)
    means = {shard: np.mean(losses) for shard, losses in sums.items()}
    assert len(means) > 1 and max(means, key=means.get) == f"{NOISE:05d}.tar"
    table = text[text.index("shard") :]
    first = min(means, key=table.find)
    assert first == f"{NOISE:05d}.tar"
