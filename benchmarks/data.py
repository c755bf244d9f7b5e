"""Pairs a second, ours against open_clip's own pipeline: `python -m benchmarks.data --pairs 4000`.

Both read the same tar shards on the same machine in the same run, in turns, each in a process of
its own, with the same number of workers: webdataset, Pillow, open_clip's training transform and
its tokenizer in torch's worker processes there, our loader's threads here. `--pairs 100000
--shards 100` is the size the claim is made for. The pictures are scikit-learn's two photographs,
cut at random and re-encoded as JPEG at 300 to 600 pixels a side. Needs `make parity`.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np
from PIL import Image

WORDS = ("photo", "old", "red", "temple", "quiet", "lake", "flowers", "under", "blue", "sky")
BATCH = 256


def write_set(folder: str, pairs: int, shards: int) -> None:
    """The shards, unless they are there."""
    import webdataset
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(a) for a in load_sample_images().images]
    os.makedirs(folder, exist_ok=True)
    for s in range(shards):
        path = os.path.join(folder, f"{s:05d}.tar")
        if os.path.exists(path):
            continue
        rng = np.random.default_rng(s)
        with webdataset.TarWriter(path + ".part") as writer:
            for k in range(s * pairs // shards, (s + 1) * pairs // shards):
                picture = photographs[k % 2]
                share = rng.uniform(0.5, 1.0)
                w, h = int(picture.width * share), int(picture.height * share)
                x, y = rng.integers(picture.width - w + 1), rng.integers(picture.height - h + 1)
                side = tuple(int(v) for v in rng.integers(300, 601, 2))
                out = io.BytesIO()
                cut = picture.crop((x, y, x + w, y + h)).resize(side, Image.Resampling.BICUBIC)
                cut.save(out, "JPEG", quality=int(rng.integers(80, 96)))
                caption = " ".join(rng.choice(WORDS, int(rng.integers(5, 20)))) + f" {k}"
                writer.write({"__key__": f"{k:09d}", "jpg": out.getvalue(), "txt": caption})
        os.rename(path + ".part", path)


def ours(folder: str, workers: int):
    """Batches of our training loader, one pass."""
    from clip_jax.data.loader import make_train_loader
    from clip_jax.data.sources import expand, index_shards
    from clip_jax.tokenizers import make_tokenizer

    with make_train_loader(
        index_shards(expand(folder)),
        make_tokenizer("clip"),
        image_size=224,
        context_length=77,
        batch_size=BATCH,
        seed=0,
        threads=workers,
        repeat=False,
    ) as loader:
        for batch in loader:
            yield int(batch["ok"].sum())


def theirs(folder: str, workers: int):
    """Batches of open_clip's pipeline: its steps, from its `get_wds_dataset`, on webdataset."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        with contextlib.suppress(RuntimeError):  # a matching build has declared them
            library.define(name)
    import open_clip
    import webdataset as wds
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(size=224), is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    shards = sorted(os.path.join(folder, f) for f in os.listdir(folder) if f.endswith(".tar"))
    dataset = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(5000, initial=1000),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH, partial=True),
    )
    loader = wds.WebLoader(
        dataset, batch_size=None, shuffle=False, num_workers=workers, persistent_workers=True
    )
    for images, _ in loader:
        yield len(images)


def measure(side: str, folder: str, workers: int) -> dict:
    """One pass of one side: rate from the first batch on, CPU time, and memory."""
    start, first, pairs, early = time.perf_counter(), 0.0, 0, 0
    for count in {"ours": ours, "open_clip": theirs}[side](folder, workers):
        pairs += count
        if not first:
            first, early = time.perf_counter(), count
    end = time.perf_counter()
    usage = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "side": side,
        "pairs": pairs,
        "pairs/s": round((pairs - early) / (end - first)),
        "with start": round(pairs / (end - start)),
        "cpu ms a pair": round(1e3 * sum(u.ru_utime + u.ru_stime for u in usage) / pairs, 2),
        "MiB, largest process": round(max(u.ru_maxrss for u in usage) / 1024),
    }


def main() -> None:
    """Write the set, then both sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", default="data/bench")
    parser.add_argument("--side", choices=("ours", "open_clip"))
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.folder, args.workers)))
        return
    folder = os.path.join(args.folder, f"{args.pairs}-{args.shards}")
    write_set(folder, args.pairs, args.shards)
    for _ in range(args.rounds):
        for side in ("open_clip", "ours"):
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.data", "--side", side]
            command += ["--folder", folder, "--workers", str(args.workers)]
            done = subprocess.run(command, capture_output=True, text=True)
            print(done.stdout.strip() or done.stderr[-2000:], flush=True)


if __name__ == "__main__":
    main()
