"""Images and shards that several data tests share."""

import hashlib
import io
import json

import numpy as np
import webdataset
from PIL import Image

from clip_jax.data.dataset import TrainingData
from clip_jax.data.loader import make_eval_loader, make_train_loader
from clip_jax.data.order import WHOLE_BATCH
from clip_jax.data.sample_reader import DECODING, SampleShape
from clip_jax.data.skip_log import SkipLog
from clip_jax.sections import DataSection

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK")
SIZES = ((37, 53), (64, 48), (1, 9), (224, 224), (91, 30))


class ToyTokenizer:
    """One id a character, the end token 99, padding 0."""

    vocab_size, eot_id, pad_id = 100, 99, 0

    def __call__(self, texts, context_length=77):
        out = np.zeros((len(texts), context_length), np.int32)
        for row, text in enumerate(texts):
            ids = [1 + ord(c) % 98 for c in text[: context_length - 1]]
            out[row, : len(ids) + 1] = [*ids, self.eot_id]
        return out

    def decode(self, ids):
        return "".join(chr(int(i)) for i in ids)


TINY = SampleShape(image_size=8, context_length=16)


def train_loader(
    *sources,
    tokenizer=None,
    shape=TINY,
    batch_size=16,
    seed=5,
    start_step=0,
    part=WHOLE_BATCH,
    log=None,
    decoding=DECODING,
    **section,
):
    """Make a training loader of tiny samples; `section` has fields of `config.data`."""
    config = DataSection(**{"streams": 4, "window": 2, "threads": 2} | section)
    return make_train_loader(
        TrainingData([list(shards) for shards in sources], SkipLog() if log is None else log),
        config,
        tokenizer or ToyTokenizer(),
        shape=shape,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        part=part,
        decoding=decoding,
    )


def eval_loader(shards, *, batch_size, shape=TINY, threads=0, **options):
    """Make an evaluation loader of tiny samples."""
    return make_eval_loader(
        shards, ToyTokenizer(), shape=shape, batch_size=batch_size, threads=threads, **options
    )


def make_image(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw an image with edges, gradients and noise, the same in every process."""
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    noise = (x * 7919 + y * 104729 + seed * 1299709) * 2654435761 % 2**32 // 2**26
    bands = [(x * k + y * (5 - k) + noise + 60 * ((x // 5 + y // 7) % 2)) % 256 for k in range(4)]
    array = np.stack(bands, axis=-1).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    if mode == "P":
        image = Image.fromarray(array[..., 0])
        image.putpalette(bytes((i * k) % 256 for i in range(256) for k in (1, 3, 7)))
        return image
    if mode == "1":
        return Image.fromarray(array[..., 0]).convert("1", dither=Image.Dither.NONE)
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(array[..., k]) for k in (0, 1)])
    if mode == "L":
        return Image.fromarray(array[..., 0])
    return Image.merge(mode, [Image.fromarray(array[..., k]) for k in range(len(mode))])


def encode(image: Image.Image, fmt: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def digest(array: np.ndarray) -> str:
    return hashlib.blake2b(repr(array.shape).encode() + array.tobytes(), digest_size=6).hexdigest()


def write_shards(folder, sizes, prefix="s", side=20):
    """Write shards by the genuine webdataset writer; sample k of all has caption `caption k`."""
    paths, k = [], 0
    for s, size in enumerate(sizes):
        path = str(folder / f"{prefix}-{s:05d}.tar")
        with webdataset.TarWriter(path) as writer:
            for _ in range(size):
                writer.write(
                    {
                        "__key__": f"{k:06d}",
                        "png": encode(make_image("RGB", side, side + 3, seed=k), "PNG"),
                        "txt": f"caption {k}",
                        "cls": str(k % 7),
                        "json": json.dumps({"caption": f"caption {k}"}).encode(),
                    }
                )
                k += 1
        paths.append(path)
    return paths


# (mode, (width, height), n) -> digest of torchvision 0.28's Resize, CenterCrop, convert("RGB").
GOLDEN = {
    ("RGB", (37, 53), 24): "bc25bc94f199",
    ("RGB", (64, 48), 24): "b9310debcdce",
    ("RGB", (64, 48), 33): "b6f76fd2e837",
    ("RGB", (1, 9), 24): "77ca5ee1b031",
    ("RGB", (224, 224), 24): "40563ff1b851",
    ("RGB", (91, 30), 24): "f2811616518a",
    ("RGBA", (37, 53), 24): "c04402f04414",
    ("RGBA", (64, 48), 24): "e2501279f1fd",
    ("RGBA", (64, 48), 33): "443f01900b82",
    ("RGBA", (1, 9), 24): "fdfeeb9f801f",
    ("RGBA", (224, 224), 24): "0ceb44d9b4b7",
    ("RGBA", (91, 30), 24): "85b1a1b8547f",
    ("L", (37, 53), 24): "126a5323cb4b",
    ("L", (64, 48), 24): "74acfb6f58d9",
    ("L", (64, 48), 33): "5021d3b548af",
    ("L", (1, 9), 24): "25a111f83a6d",
    ("L", (224, 224), 24): "6a41e4d739b0",
    ("L", (91, 30), 24): "cd20437fc2ce",
    ("LA", (37, 53), 24): "aa7efea6a59d",
    ("LA", (64, 48), 24): "b224577d5f90",
    ("LA", (64, 48), 33): "d2e50f840208",
    ("LA", (1, 9), 24): "0c137b77414b",
    ("LA", (224, 224), 24): "e9079c6b2831",
    ("LA", (91, 30), 24): "fdb869c81e3f",
    ("P", (37, 53), 24): "af25f80f44b9",
    ("P", (64, 48), 24): "41a67eacbd74",
    ("P", (64, 48), 33): "7491db8d89f0",
    ("P", (1, 9), 24): "362b2450370a",
    ("P", (224, 224), 24): "677d4c1c11dc",
    ("P", (91, 30), 24): "6fe76339e8d0",
    ("1", (37, 53), 24): "40d79f709d76",
    ("1", (64, 48), 24): "8979ae785c03",
    ("1", (64, 48), 33): "f43c6f9bacf1",
    ("1", (1, 9), 24): "10f335064f70",
    ("1", (224, 224), 24): "3f57092e581d",
    ("1", (91, 30), 24): "ddf1018f0360",
    ("I;16", (37, 53), 24): "6b76056cc859",
    ("I;16", (64, 48), 24): "9324a9e499ce",
    ("I;16", (64, 48), 33): "70d094cff78d",
    ("I;16", (1, 9), 24): "9324a9e499ce",
    ("I;16", (224, 224), 24): "9324a9e499ce",
    ("I;16", (91, 30), 24): "9324a9e499ce",
    ("CMYK", (37, 53), 24): "66d3f935c953",
    ("CMYK", (64, 48), 24): "eb3eae42b79a",
    ("CMYK", (64, 48), 33): "ddd5b6fffe7b",
    ("CMYK", (1, 9), 24): "a74f6fb1120a",
    ("CMYK", (224, 224), 24): "8883bff3bcf4",
    ("CMYK", (91, 30), 24): "f247e06938a2",
}
