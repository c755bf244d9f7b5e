"""Show what in an image a caption is about: `python -m clip_jax.relevance --model MODEL
--image FILE --caption "a red bird" --out map.png`.

The PNG has the image as the model sees it, and beside it the same under a map of the patches
that raise its cosine with the caption.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from clip_jax.errors import UserError, run_command
from clip_jax.files import atomic_write, check_local

if TYPE_CHECKING:
    from PIL import Image

SIDE = 448
"""The pixels of a side of the image in the PNG, rounded to a multiple of the model's size."""
OPACITY = 0.65
"""Of the map's color where it is largest."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.relevance", description=__doc__)
    parser.add_argument("--model", required=True, help="a run, or a published model's path or name")
    parser.add_argument("--architecture", help='of a bare file: "NAME" or "NAME:TAG"')
    parser.add_argument("--tokenizer", help="its tokenizer.json or SentencePiece .model")
    parser.add_argument("--image", required=True, metavar="FILE", help="JPEG, PNG or WebP")
    parser.add_argument("--caption", required=True, help="words")
    parser.add_argument("--out", default="map.png", help="the PNG")
    return parser.parse_args(argv)


def overlay(
    pixels_HWC: UInt8[np.ndarray, "H W 3"], gain_HW: Float[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Return the image under a map of another size, colored from nothing to the map's largest."""
    import matplotlib
    from PIL import Image

    height, width, _ = pixels_HWC.shape
    largest = float(gain_HW.max())
    share_HW = np.asarray(gain_HW / largest if largest > 0 else gain_HW, np.float32)
    smooth = Image.fromarray(share_HW).resize((width, height), Image.Resampling.BICUBIC)
    share_HW = np.clip(np.asarray(smooth), 0, 1)
    color_HWC = matplotlib.colormaps["turbo"](share_HW)[..., :3] * 255
    alpha_HW1 = (OPACITY * share_HW)[..., None]
    return np.round(pixels_HWC * (1 - alpha_HW1) + color_HWC * alpha_HW1).astype(np.uint8)


def open_image(path: str) -> "Image.Image":
    """Open an image that a user names.

    Raises:
      UserError: it cannot be read.
    """
    from clip_jax.data.images import ImageError, decode_image

    try:
        return decode_image(Path(path).read_bytes())
    except (OSError, ImageError) as e:
        raise UserError(f"--image {path} cannot be read: {e}") from None


@dataclasses.dataclass(frozen=True)
class RelevanceMap:
    """The relevance of an image's patches to a caption.

    Attributes:
      pixels_HWC: the image as the model sees it, about `SIDE` pixels a side.
      gain_HW: what each patch adds to the cosine, nothing below zero.
      cosine: of the image and the caption.
    """

    pixels_HWC: UInt8[np.ndarray, "H W 3"]
    gain_HW: Float[np.ndarray, "h w"]
    cosine: float


def relevance_map(
    model: str,
    image: str,
    caption: str,
    *,
    architecture: str | None = None,
    tokenizer: str | None = None,
) -> RelevanceMap:
    """Compute the map of an image file and a caption.

    Raises:
      UserError: the model or the image cannot be read.
    """
    from clip_jax import api
    from clip_jax.data.images import eval_transform

    opened = open_image(image)
    clip = api.load(model, architecture, tokenizer=tokenizer)
    pixels_1HWC = clip.preprocess(opened)
    (gain_HW,) = np.asarray(clip.relevance(pixels_1HWC, caption))
    z_image_1D = np.asarray(clip.encode_image(pixels_1HWC))
    cosine = float(z_image_1D[0] @ np.asarray(clip.encode_text(clip.tokenize(caption)))[0])
    size = clip.config.vision.image_size
    # The same crop in more pixels.
    large_HWC = eval_transform(opened, size * max(1, round(SIDE / size)), clip.preprocessing)
    return RelevanceMap(large_HWC, gain_HW, cosine)


def write_png(path: Path, result: RelevanceMap) -> None:
    """Write the image, and beside it the same under the map.

    Raises:
      UserError: the file cannot be written.
    """
    from PIL import Image

    page = np.concatenate([result.pixels_HWC, overlay(result.pixels_HWC, result.gain_HW)], axis=1)
    with atomic_write(path) as partial:
        Image.fromarray(page).save(partial, "PNG")


def map_text(result: RelevanceMap, caption: str, out: str) -> str:
    """Return the line that the command prints."""
    row, column = np.unravel_index(np.argmax(result.gain_HW), result.gain_HW.shape)
    rows, columns = result.gain_HW.shape
    return (
        f"{out}: cosine {result.cosine:.4f} with {caption!r}; the patch that adds most is in row "
        f"{row + 1} of {rows}, column {column + 1} of {columns}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, compute and write the map; return the exit code."""
    args = parse(argv)
    check_local({"--out": args.out})
    result = relevance_map(
        args.model,
        args.image,
        args.caption,
        architecture=args.architecture,
        tokenizer=args.tokenizer,
    )
    write_png(Path(args.out), result)
    print(map_text(result, args.caption, args.out))
    return 0


if __name__ == "__main__":
    run_command(main)
