"""Show what in an image a caption is about: `python -m clip_jax.relevance --model MODEL
--image FILE --caption "a red bird" --out map.png`.

The PNG has the image as the model sees it, and beside it the same under a map of the patches
that raise its cosine with the caption.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from clip_jax.errors import UserError, run_command
from clip_jax.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

SIDE = 448  # of the image in the PNG, about
STRENGTH = 0.65  # of the map's color where it is largest


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.relevance", description=__doc__)
    parser.add_argument("--model", required=True, help="a run, or a published model")
    parser.add_argument("--architecture", help='of a bare file: "NAME" or "NAME:TAG"')
    parser.add_argument("--tokenizer", help="its tokenizer.json or SentencePiece .model")
    parser.add_argument("--image", required=True, metavar="FILE", help="JPEG, PNG or WebP")
    parser.add_argument("--caption", required=True, help="words")
    parser.add_argument("--out", default="map.png", help="the PNG")
    return parser.parse_args(argv)


def overlay(
    pixels_HWC: UInt8[np.ndarray, "H W 3"], gain_HW: Float[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "H W 3"]:
    """The image under a map of another size, colored from nothing to the map's largest."""
    import matplotlib
    from PIL import Image

    height, width, _ = pixels_HWC.shape
    most = float(gain_HW.max())
    share_HW = np.asarray(gain_HW / most if most > 0 else gain_HW, np.float32)
    smooth = Image.fromarray(share_HW).resize((width, height), Image.Resampling.BICUBIC)
    share_HW = np.clip(np.asarray(smooth), 0, 1)
    colour_HWC = matplotlib.colormaps["turbo"](share_HW)[..., :3] * 255
    weight_HW1 = (STRENGTH * share_HW)[..., None]
    return np.round(pixels_HWC * (1 - weight_HW1) + colour_HWC * weight_HW1).astype(np.uint8)


def open_picture(path: str) -> "Image.Image":
    """An image that a user names.

    Raises:
      UserError: it cannot be read.
    """
    from clip_jax.data.images import ImageError, decode_image

    try:
        return decode_image(Path(path).read_bytes())
    except (OSError, ImageError) as e:
        raise UserError(f"--image {path} cannot be read: {e}") from None


def relevance_picture(
    model: str,
    image: str,
    caption: str,
    out: str,
    *,
    architecture: str | None = None,
    tokenizer: str | None = None,
) -> str:
    """Write the PNG; returns what to tell the user.

    Raises:
      UserError: the model or the image cannot be read.
    """
    from PIL import Image

    from clip_jax import api
    from clip_jax.data.images import eval_transform

    picture = open_picture(image)
    clip = api.load(model, architecture, tokenizer=tokenizer)
    pixels_1HWC = clip.preprocess(picture)
    (gain_HW,) = np.asarray(clip.relevance(pixels_1HWC, caption))
    z_image_1D = np.asarray(clip.encode_image(pixels_1HWC))
    cosine = float(z_image_1D[0] @ np.asarray(clip.encode_text(clip.tokenize(caption)))[0])
    side = clip.config.vision.image_size * max(1, round(SIDE / clip.config.vision.image_size))
    # The same crop in more pixels.
    large_HWC = eval_transform(picture, side, clip.preprocessing)
    page = np.concatenate([large_HWC, overlay(large_HWC, gain_HW)], axis=1)
    with atomic_write(Path(out)) as partial:
        Image.fromarray(page).save(partial, "PNG")
    row, column = np.unravel_index(gain_HW.argmax(), gain_HW.shape)
    rows, columns = gain_HW.shape
    return (
        f"{out}: cosine {cosine:.4f} with {caption!r}; the patch that adds most is in row "
        f"{row + 1} of {rows}, column {column + 1} of {columns}"
    )


def main() -> int:
    """Parse and draw; the exit code."""
    args = parse(None)
    print(
        relevance_picture(
            args.model,
            args.image,
            args.caption,
            args.out,
            architecture=args.architecture,
            tokenizer=args.tokenizer,
        )
    )
    return 0


if __name__ == "__main__":
    run_command(main)
