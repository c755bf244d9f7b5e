"""Pairs a second, ours against open_clip's own pipeline: `python -m benchmarks.data --pairs 4000`.

It also passes over the set three times with our loader and tells the memory after each.

Both read the same tar shards on the same machine in the same run, in turns, each in a process of
its own, with the same number of workers: webdataset, Pillow, open_clip's training transform and
its tokenizer in torch's worker processes there, our loader's threads here. `--pairs 100000
--shards 100` is the size the claim is made for. The images are scikit-learn's two photographs,
cut at random and re-encoded as JPEG at 300 to 600 pixels a side; a set-up that was broken off goes
on from its last whole shard. Needs `make parity`.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import interleaved

WORDS = ("photo", "old", "red", "temple", "quiet", "lake", "flowers", "under", "blue", "sky")
BATCH = 256


def write_set(folder: str, pairs: int, shards: int) -> None:
    """Write the shards, unless they are there."""
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
                image = photographs[k % 2]
                share = rng.uniform(0.5, 1.0)
                w, h = int(image.width * share), int(image.height * share)
                x, y = rng.integers(image.width - w + 1), rng.integers(image.height - h + 1)
                side = tuple(int(v) for v in rng.integers(300, 601, 2))
                out = io.BytesIO()
                cut = image.crop((x, y, x + w, y + h)).resize(side, Image.Resampling.BICUBIC)
                cut.save(out, "JPEG", quality=int(rng.integers(80, 96)))
                caption = " ".join(rng.choice(WORDS, int(rng.integers(5, 20)))) + f" {k}"
                writer.write({"__key__": f"{k:09d}", "jpg": out.getvalue(), "txt": caption})
        os.rename(path + ".part", path)


def ours(folder: str, workers: int, passes: int = 1):
    """Yield the rows of each batch of our training loader, opened as a run opens them."""
    from clip_jax.data.dataset import TrainingData, open_sources
    from clip_jax.data.loader import make_train_loader
    from clip_jax.data.sample_reader import SampleShape
    from clip_jax.data.skip_log import SkipLog
    from clip_jax.sections import DataSection
    from clip_jax.tokenizers import make_tokenizer

    log = SkipLog()
    data = TrainingData(
        open_sources(folder, log=log, cached_shards=128, workdir=f"{folder}/run"), log
    )
    pairs = sum(map(len, data.shards))
    config = DataSection(threads=workers, repeat=passes > 1)
    shape = SampleShape(image_size=224, context_length=77)
    tokenizer = make_tokenizer("clip")
    with make_train_loader(
        data, config, tokenizer, shape=shape, batch_size=BATCH, seed=0
    ) as loader:
        for batch in itertools.islice(loader, -(-passes * pairs // BATCH)):
            yield int(batch["valid"].sum())


def theirs(folder: str, workers: int):
    """Yield the rows of each batch of open_clip's `get_wds_dataset`, its steps on webdataset."""
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


def tree_bytes(pid: int) -> int:
    """Return the memory of a process and its children, a shared page counted once (PSS)."""
    total = 0
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total = 1024 * int(text.split("\nPss:")[1].split()[0])
        for task in Path(f"/proc/{pid}/task").iterdir():
            children = (task / "children").read_text().split()
            total += sum(tree_bytes(int(child)) for child in children)
    return total


class PeakMemory:
    """The most that this process and its children had at once, looked at four times a second."""

    def __enter__(self) -> "PeakMemory":
        self.bytes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.25):
            self.bytes = max(self.bytes, tree_bytes(os.getpid()))

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()


def measure(side: str, folder: str, workers: int) -> dict:
    """Measure one pass of one side: rate from the first batch on, CPU time, and memory."""
    start, first, pairs, early = time.perf_counter(), 0.0, 0, 0
    with PeakMemory() as peak:
        for count in {"ours": ours, "open_clip": theirs}[side](folder, workers):
            pairs += count
            if not first:
                first, early = time.perf_counter(), count
        end = time.perf_counter()
    usage = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "side": side,
        "pairs": pairs,
        "pairs/s": round((pairs - early) / (end - first), 1),
        "with start": round(pairs / (end - start), 1),
        "cpu ms a pair": round(1e3 * sum(u.ru_utime + u.ru_stime for u in usage) / pairs, 2),
        "MiB of all processes": round(peak.bytes / 2**20),
    }


def memory_over_passes(folder: str, workers: int, pairs: int, passes: int = 3) -> dict:
    """Measure the memory of our loader's process after each of some passes over the set."""
    after: list[int] = []
    seen = 0
    for count in ours(folder, workers, passes):
        seen += count
        if seen >= (len(after) + 1) * pairs:
            after.append(round(tree_bytes(os.getpid()) / 2**20))
    return {"side": "passes", "MiB after each pass": after}


def in_own_process(side: str, folder: str, workers: int, pairs: int) -> dict:
    """Return what `--side` prints, from a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.data", "--side", side]
    command += ["--folder", folder, "--workers", str(workers), "--pairs", str(pairs)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    line = done.stdout.strip().splitlines()[-1]
    print(line, flush=True)
    return json.loads(line)


def main() -> None:
    """Write the set; measure both sides in turns, then our passes."""
    parser = interleaved.make_parser(__doc__, warmup=0, repeats=3)
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", default="data/bench")
    parser.add_argument("--side", choices=("ours", "open_clip", "passes"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "passes":
        print(json.dumps(memory_over_passes(args.folder, args.workers, args.pairs)))
        return
    if args.side:
        print(json.dumps(measure(args.side, args.folder, args.workers)))
        return
    folder = os.path.join(args.folder, f"{args.pairs}-{args.shards}")
    write_set(folder, args.pairs, args.shards)
    found: dict[str, list[dict]] = {"open_clip": [], "ours": []}
    for turn in range(args.warmup + args.repeats):
        for side, rounds in found.items():
            result = in_own_process(side, folder, args.workers, args.pairs)
            if turn >= args.warmup:
                rounds.append(result)
    passes = in_own_process("passes", folder, args.workers, args.pairs)
    rows = [
        {"side": side}
        | {key: interleaved.spread([r[key] for r in rounds]) for key in rounds[0] if key != "side"}
        for side, rounds in found.items()
    ]
    rates = {side: [r["pairs/s"] for r in rounds] for side, rounds in found.items()}
    interleaved.report(
        "data",
        args,
        rows,
        times_as_many_pairs=interleaved.ratio(rates["ours"], rates["open_clip"]),
        our_MiB_after_each_pass=passes["MiB after each pass"],
    )


if __name__ == "__main__":
    main()
