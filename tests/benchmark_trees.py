"""Data sets in CLIP_benchmark's webdataset layout, written with the webdataset library."""

import json
from pathlib import Path

import numpy as np
import webdataset
from data_cases import encode, make_image

NAMES = ["cat", "dog", "great fish", "bird", "horse", "snail"]
TEMPLATES = ["a photo of a {c}.", "the {c}"]
SIDE = 12


def png(seed: int) -> bytes:
    return encode(make_image("RGB", SIDE + 3, SIDE, seed=seed), "PNG")


def write_tree(
    root: Path,
    kind: str = "classification",
    *,
    split: str = "test",
    images: int = 23,
    per_shard: int = 9,
    groups: int = 0,
    seed: int = 0,
) -> Path:
    """Write a split of a data set of one kind; with `groups`, each image has so many numbers."""
    rng = np.random.default_rng(seed)
    (root / split).mkdir(parents=True)
    pattern = str(root / split / "%d.tar")
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0) as sink:
        for i in range(images):
            sample = {"__key__": f"s{i:07d}", "png": png(seed + i)}
            if kind == "retrieval":
                sample["txt"] = "\n".join(f"text {i} {j}" for j in range(1 + i % 3))
            elif kind == "multilabel":
                sample["npy"] = rng.integers(0, 2, len(NAMES))
            else:
                sample["cls"] = int(rng.integers(len(NAMES)))
                if groups:
                    sample["npy"] = rng.integers(0, 3, groups)
            sink.write(sample)
        shards = sink.shard
    (root / split / "nshards.txt").write_text(f"{shards}\n")
    if kind != "classification":
        (root / "dataset_type.txt").write_text(f"{kind}\n")
    if kind != "retrieval":
        (root / "classnames.txt").write_text("\n".join(NAMES) + "\n")
        templates = root / "zeroshot_classification_templates.txt"
        templates.write_text("\n".join(TEMPLATES) + "\n")
    return root


def crepe_texts(i: int) -> list[str]:
    """Return the right and the wrong caption of image `i`."""
    return [f"a {i}", f"no {i}"][:: 1 if i % 3 else -1]


def write_choices(folder: Path) -> dict[str, Path]:
    """Write SugarCrepe's, Winoground's and WinoGAViL's layout; return the three files."""
    for name, ending in (("val2017", ".jpg"), ("images", ".png")):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            (folder / name / f"im{i}{ending}").write_bytes(png(100 + i))
    crepe = {
        str(2 * i): {
            "filename": f"im{i}.jpg",
            **dict(zip(("caption", "negative_caption"), crepe_texts(i), strict=True)),
        }
        for i in range(12)
    }
    (folder / "add_att.json").write_text(json.dumps(crepe))
    pairs = [
        {"id": i, "image_0": f"im{i}", "image_1": f"im{i + 1}", "caption_0": f"a b {i}",
         "caption_1": f"b a {i} more", "tag": "x"}
        for i in range(11)
    ]  # fmt: skip
    cues = [
        {"cue": f"Owl {n}", "candidates": [f"im{(n + j) % 12}" for j in range(n)],
         "associations": [f"im{n % 12}", f"im{(n + 2) % 12}"]}
        for n in (5, 6, 10, 12)
    ]  # fmt: skip
    for name, rows in (("examples.jsonl", pairs), ("winogavil.jsonl", cues)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"sugar_crepe": "add_att.json", "winoground": "examples.jsonl"}
    names["winogavil"] = "winogavil.jsonl"
    return {key: folder / name for key, name in names.items()}
