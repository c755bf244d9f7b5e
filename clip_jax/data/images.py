"""From bytes to images, and from images to the uint8 squares that CLIP sees.

The transforms are torchvision's on PIL images, as OpenAI's CLIP and open_clip use them: resize
(antialiased) *before* the conversion to RGB, no turning by EXIF. For palette images and
images with transparency the order matters (up to 189 of 255 apart), so it is OpenAI's.
Hugging Face's processors convert first, and their center crop lies a pixel further up or left
when the overhang is 3, 7, 11, ... pixels; for a model read from there, too, the rules here hold.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from clip_jax.data.patches import ImageSize, PatchShape, canvas_of, patch_grid
from clip_jax.data.shards import BadSampleError
from clip_jax.errors import note
from clip_jax.files import GIT_LFS
from clip_jax.sections import DataSection

# Per-channel mean and standard deviation of OpenAI's training images, for values in [0, 1].
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_PIXELS = DataSection.max_pixels
"""The limit where no config is: Pillow warns from this size on and lets twice as much through."""

MAX_SCANS = 16
"""Scans that a JPEG of `max_pixels` may have, and a smaller one more; encoders make about 10."""

T = TypeVar("T")
ResizeMode = Literal["shortest", "longest", "squash", "patches"]
Interpolation = Literal["bicubic", "bilinear"]

_BICUBIC = Image.Resampling.BICUBIC
_FILTERS = {"bicubic": _BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@runtime_checkable
class Chance(Protocol):
    """What an augmentation draws from: `order.Uniforms`, or numpy's generator."""

    def random(self) -> float:
        """Return a number in [0, 1)."""
        ...


@dataclass(frozen=True)
class Preprocess:
    """The preprocessing that a checkpoint wants, which belongs to its weights.

    Attributes:
      resize_mode: "shortest" fits the short side and crops the center, "longest" fits the long
        side and pads with `fill`, "squash" changes the aspect, "patches" fills a grid of nearly
        the image's own proportions (and where a square is asked for does as "longest").
      interpolation: Pillow's filter of that name, always antialiased.
      mean, std: of each channel, for values in [0, 1]; applied on the device.
      fill: the padding, the same in every channel of the image's own mode (0 to 255).
    """

    resize_mode: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD
    fill: int = 0


# The settings in open_clip 3.3's table of 196 pretrained pairs, and how many pairs have each.
_HALF = (0.5, 0.5, 0.5)
OPENAI = Preprocess()  # 138: all of OpenAI, LAION, DataComp, MetaCLIP, DFN at 224, ...
SIGLIP = Preprocess(resize_mode="squash", mean=_HALF, std=_HALF)  # 30: SigLIP and SigLIP 2
CLIPA = Preprocess("squash", "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # 7
MOBILECLIP = Preprocess("shortest", "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # 7
DFN5B = Preprocess(resize_mode="squash")  # 6: DFN's ViT-H-14 and -378, MetaCLIP 2's -378
NAFLEX = Preprocess("patches", "bilinear", _HALF, _HALF)  # none: Hugging Face alone has it
PE = Preprocess("squash", "bilinear", _HALF, _HALF)  # 5: Perception Encoder
MOBILECLIP2 = Preprocess(interpolation="bilinear")  # 2: MobileCLIP2-S3 and -S4
INCEPTION = Preprocess(mean=_HALF, std=_HALF)  # 1: ViT-L-14 laion2b_s32b_b82k


IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jfif", "jpe")
"""Names of images in archives, folders, tables and records: what `image_suffix` can tell."""
UNREAD_SUFFIXES = (
    *("avif", "heic", "heif", "jxl", "jp2", "j2k", "svg", "psd", "ico", "tga", "dds", "exr", "hdr"),
    *("ppm", "pgm", "pbm", "pnm", "pcx", "dib", "apng", "cr2", "cr3", "nef", "arw", "dng", "orf"),
    *("raw", "eps", "dcm", "xcf", "ai"),
)
"""Names of images that are not read; in a folder each is counted and named."""
IMAGE_KINDS = "JPEG, PNG, WebP, GIF, BMP or TIFF"
"""The same, for messages."""


class ImageError(BadSampleError):
    """An image that cannot be used.

    Attributes:
      cause: `not_an_image`, `too_large`, `truncated`, `broken` or `empty`.
    """


def image_suffix(data: bytes) -> str:
    """Return `jpg`, `png`, `webp`, `gif`, `bmp` or `tif`, by the first bytes.

    Raises:
      ImageError: `empty` or `not_an_image`.
    """
    if not data:
        raise ImageError("empty")
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tif"
    if data[:2] == b"BM" and data[6:10] == bytes(4):
        return "bmp"
    if data.startswith(GIT_LFS):
        raise ImageError("not_an_image", "a pointer of Git LFS: `git lfs pull` fetches the image")
    raise ImageError("not_an_image", data[:8].hex())


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image's bytes (of `IMAGE_KINDS`) into a loaded image in the mode of the file.

    Of an animation or of pages it is the first. The size is checked before any pixel is decoded.

    Raises:
      ImageError: whatever is wrong with the bytes; never another exception.
    """
    image = _open(data, max_pixels)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width} x {height}")
    if costs_too_much(data, width * height, max_pixels):
        raise ImageError("too_large", f"{count_scans(data)} scans of {width} x {height}")
    _pillow(image.load)
    # It never reaches RGB, but Pillow warns about it when converting.
    image.info.pop("transparency", None)
    return image


def count_scans(data: bytes) -> int:
    """Return how many scans a JPEG says that it has, its previews' among them; of others 0.

    Inside a scan the marker's first byte is always followed by a zero.
    """
    return data.count(b"\xff\xda") if data.startswith(b"\xff\xd8\xff") else 0


def costs_too_much(data: bytes, pixels: int, max_pixels: int) -> bool:
    """Return whether a JPEG has so many scans that decoding is more work than its pixels say.

    Each scan goes over all pixels, and an empty one has few bytes: 400 kB may take half a minute.
    """
    return count_scans(data) * pixels > MAX_SCANS * max_pixels


def _pillow(call: Callable[..., T], *args: Any) -> T:
    """Call Pillow on what a file holds, and raise ImageError for whatever it raises.

    On damaged files that is a dozen types, SyntaxError, TypeError and struct.error among them, so
    the type says nothing; only the text tells a cut file. Code of our own stays outside.
    """
    try:
        return call(*args)
    except Image.DecompressionBombError as e:
        raise ImageError("too_large", str(e)) from e
    except Exception as e:
        cause = "truncated" if "truncated" in str(e).lower() else "broken"
        raise ImageError(cause, f"{type(e).__name__}: {e}") from e


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Open the bytes with the reader that the first of them ask for.

    `Image.open` would add its own size check, which warns through the process-wide warning
    filters; those must not be touched from threads.
    """
    suffix = image_suffix(data)
    file = io.BytesIO(data)
    if suffix == "jpg":
        return _pillow(JpegImageFile, file)
    if suffix == "png":
        # Pillow reads the pixels without asking for the end of the file.
        if data.rfind(b"IEND") < 0:
            raise ImageError("truncated", "no IEND chunk")
        png = _pillow(PngImageFile, file)
        if png.mode[:1] == "I":
            note(
                "PNG images of 16 bits: values above 255 become white, as in Pillow and open_clip; "
                "scale them to 8 bits"
            )
        return png
    if suffix == "gif":
        return _pillow(GifImageFile, file)
    if suffix == "bmp":
        return _pillow(BmpImageFile, file)
    if suffix == "tif":
        image = _pillow(TiffImageFile, file)
        if image.mode[:1] in "IF":
            # Conversion to RGB would cut the values at 255, or at 1.
            raise ImageError("broken", f"a TIFF of {image.mode} values, which are no 8 bits")
        return image
    if len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise ImageError("truncated", f"{len(data)} bytes")
    # Opening allocates the canvas, so its size must be known before.
    width, height = _webp_size(data)
    if width * height > max_pixels:
        raise ImageError("too_large", f"{width} x {height}")
    return _pillow(WebPImageFile, file)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return width and height from the first chunk (RFC 9649, sections 2.5 to 2.7)."""
    if len(data) < 30:
        raise ImageError("truncated", f"{len(data)} bytes")
    chunk = data[12:16]
    if chunk == b"VP8X":
        width, height = (int.from_bytes(data[i : i + 3], "little") for i in (24, 27))
        return 1 + width, 1 + height
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = (int.from_bytes(data[i : i + 2], "little") for i in (26, 28))
        return width & 0x3FFF, height & 0x3FFF
    raise ImageError("broken", f"WebP chunk {chunk!r}")


def eval_transform(
    image: Image.Image,
    image_size: ImageSize,
    preprocess: Preprocess = OPENAI,
    *,
    max_pixels: int = MAX_PIXELS,
) -> UInt8[np.ndarray, "H W 3"]:
    """Return the square of `image_size` that the model sees; `preprocess.mean`, `std` come later.

    Of a number of patches it is `patches.canvas_of` what `Siglip2ImageProcessor` makes.

    Equal to open_clip 3.3's `image_transform(..., is_train=False)` up to its scaling of values, in
    every value; with `OPENAI` to torchvision's `Resize`, `CenterCrop`, `convert("RGB")`. Where
    open_clip raises (a side that would round to nothing in "longest"), one pixel is kept.

    Raises:
      ImageError: `too_large`, when a thread-thin image would grow beyond `max_pixels`; or Pillow
        cannot resize or convert the image.
    """
    if isinstance(image_size, PatchShape):
        rows, columns = patch_grid(image.width, image.height, image_size)
        image = image if image.mode == "RGB" else _pillow(image.convert, "RGB")
        sides = columns * image_size.patch_size, rows * image_size.patch_size
        image = _resize(image, sides, preprocess.interpolation, max_pixels)
        return canvas_of(np.asarray(image), image_size)
    n = image_size
    new_width, new_height = fitted_size(image.width, image.height, n, preprocess.resize_mode)
    image = _resize(image, (new_width, new_height), preprocess.interpolation, max_pixels)
    if new_width < n or new_height < n:
        image = _pad(image, n, preprocess.fill)
    # round() takes halves to the even side, as torchvision does.
    left, top = (round((side - n) / 2.0) for side in image.size)
    return _to_rgb(image.crop((left, top, left + n, top + n)))


def _resize(
    image: Image.Image, size: tuple[int, int], interpolation: Interpolation, max_pixels: int
) -> Image.Image:
    """Return the image at this width and height, unless more than `max_pixels` would stand."""
    width, height = size
    # Pillow resizes the width first, so this many pixels stand between the two passes.
    if width * max(image.height, height) > max_pixels:
        raise ImageError("too_large", f"{image.width} x {image.height} becomes {width} x {height}")
    if size == image.size:
        return image
    return _pillow(image.resize, size, _FILTERS[interpolation])


def fitted_size(width: int, height: int, n: int, mode: ResizeMode) -> tuple[int, int]:
    """Return width and height after the resize to a square of side `n`, before crop or padding."""
    if mode == "squash":
        return n, n
    if mode in ("longest", "patches"):
        # The division by a ratio and the rounding are open_clip's `ResizeKeepRatio`.
        ratio = max(height / n, width / n)
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    short, long = sorted((width, height))
    new_long = int(n * long / short)  # torchvision truncates; rounding would move the crop
    return (n, new_long) if width <= height else (new_long, n)


def _pad(image: Image.Image, n: int, fill: int) -> Image.Image:
    """Put the image in the middle of at least `n` x `n`, the odd pixel right and below."""
    right, below = (max(0, n - side) for side in image.size)
    border = (right // 2, below // 2, (right + 1) // 2, (below + 1) // 2)
    bands = len(image.getbands())
    # One number for a palette image is a place in the palette, here as in torchvision.
    return _pillow(ImageOps.expand, image, border, (fill,) * bands if bands > 1 else fill)


def random_resized_crop(
    image: Image.Image,
    image_size: int,
    rng: Chance,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> UInt8[np.ndarray, "H W 3"]:
    """Resize a random part of the image to a square: torchvision's `RandomResizedCrop`.

    Args:
      image: any mode.
      image_size: side of the square.
      rng: the only source of chance; the draws use `rng.random()` alone.
      scale: bounds of the part's area, as a share of the image's.
      ratio: bounds of the part's width over height.

    Raises:
      ImageError: Pillow cannot crop, resize or convert the image.
    """
    box = crop_box(image.width, image.height, rng, scale, ratio)
    # Crop first: `resize(box=...)` would let the filter look beyond the crop's edge.
    part = _pillow(image.crop, box)
    return _to_rgb(_pillow(part.resize, (image_size, image_size), _BICUBIC))


def crop_box(
    width: int,
    height: int,
    rng: Chance,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw (left, top, right, bottom) of a random crop, by torchvision's sampling rule.

    Ten tries: area uniform in `scale`, log aspect uniform in log `ratio`, place uniform; if none
    fits into the image, the largest centered crop whose aspect lies within `ratio`.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.random() * (height - h + 1))
            left = int(rng.random() * (width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if image.mode != "RGB":
        image = _pillow(image.convert, "RGB")
    return np.asarray(image)
