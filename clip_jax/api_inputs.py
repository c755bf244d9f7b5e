"""What a notebook hands to a model: one or several images, texts, names or numbers, of many types.

A value whose meaning is clear is taken: paths, bytes and file objects of images, generators,
columns of NumPy and pandas. Any other raises UserError.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from clip_jax.data.images import ImageError, decode_image
from clip_jax.errors import UserError
from clip_jax.models.naflex import ImagePatches, own_patches

# Normalized pixels lie within 3 of 0; pixels from 0 to 255 that are not normalized reach further.
MAX_NORMALIZED = 16.0


def several(values: Any, method: str, what: str) -> list[Any]:
    """Return the items of a list, column, generator or other collection in order.

    Raises:
      UserError: it is no collection, or a dict, whose items are not its keys.
    """
    if isinstance(values, Mapping):
        raise UserError(f"{method} takes {what} and got a dict; give list(...) of its values")
    if isinstance(values, set | frozenset):
        raise UserError(f"{method} takes {what} and got a set, which has no order; give a list")
    try:
        return list(values)
    except TypeError:
        raise UserError(f"{method} takes {what} and got a {type(values).__name__}") from None


def shown(value: Any) -> str:
    """Return the beginning of a value's text, on one line."""
    return " ".join(repr(value).split())[:80]


def is_array(value: Any) -> bool:
    """Return whether the value is an array or a column: NumPy's, JAX's, pandas', PyTorch's."""
    return hasattr(value, "__array__") and not isinstance(value, Image.Image | type)


def as_array(value: Any) -> Any:
    """Return an array as NumPy's, or as JAX's if it is one.

    Raises:
      UserError: its library does not give its values.
    """
    if isinstance(value, jax.Array | np.ndarray):
        return value
    try:
        return np.asarray(value)
    except Exception as error:
        raise UserError(
            f"a {type(value).__name__} cannot be read as an array ({' '.join(str(error).split())}):"
            " give numpy arrays"
        ) from None


def image_items(images: Any, method: str) -> list[Any]:
    """Return one or several images one by one: PIL images, and arrays as they are.

    Raises:
      UserError: there is none, or a file cannot be read.
    """
    if isinstance(images, Image.Image | str | os.PathLike | bytes) or hasattr(images, "read"):
        images = [images]
    elif is_array(images) and str(getattr(images, "dtype", "")) != "object":
        images = as_array(images)
        if images.dtype != object:
            images = [images] if images.ndim < 4 else images
    items = [_image(item, method) for item in several(images, method, "images")]
    if not items:
        raise UserError(f"{method} got no image")
    return items


def _image(item: Any, method: str) -> Any:
    """Return an image as PIL's, or an array of one."""
    if isinstance(item, Image.Image):
        return item
    if is_array(item):
        return as_array(item)
    try:
        if isinstance(item, str | os.PathLike):
            with open(item, "rb") as file:
                return decode_image(file.read())
        data = item.read() if hasattr(item, "read") else item
        if isinstance(data, bytes | bytearray | memoryview):
            return decode_image(bytes(data))
    except OSError as error:
        raise UserError(f"{method}: {shown(item)} cannot be read: {error.strerror}") from None
    except (ImageError, ValueError) as error:
        raise UserError(f"{method}: {shown(item)} is no image that can be read: {error}") from None
    raise UserError(f"{method} takes images, their paths or arrays and got a {type(item).__name__}")


def pil_image(image: Any) -> Image.Image:
    """Return a PIL image, of uint8 pixels too: [height, width], or with 1, 3 or 4 channels.

    Raises:
      UserError: the array is of another type or shape.
    """
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise UserError(f"preprocess got an image of {image.width} x {image.height} pixels")
        if image.mode[:1] in "IF":
            # Conversion to RGB would cut the values at 255, or at 1.
            raise UserError(
                f"preprocess got an image of {image.mode} values, which are no 8 bits; scale them "
                "to 0 to 255 as uint8"
            )
        return image
    pixels = np.asarray(image)
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if (
        pixels.dtype != np.uint8
        or pixels.ndim not in (2, 3)
        or channels not in (1, 3, 4)
        or 0 in pixels.shape
    ):
        raise UserError(
            f"preprocess takes uint8 arrays [height, width, 3] and got {list(pixels.shape)} of "
            f"{pixels.dtype}"
        )
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels)


def check_normalized(images: Any, method: str) -> None:
    """Raise UserError for floats on the host that cannot be normalized pixels."""
    if not isinstance(images, np.ndarray) or images.dtype == np.uint8 or not images.size:
        return
    low, high = float(images.min()), float(images.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError(f"{method} got values that are not finite")
    if max(-low, high) > MAX_NORMALIZED:
        raise UserError(
            f"{method} takes normalized floats and got values from {low:g} to {high:g}; give "
            "pixels from 0 to 255 as uint8"
        )


def check_patches(images: ImagePatches, patch_size: int, method: str) -> ImagePatches:
    """Return patches whose three arrays belong to each other.

    Raises:
      UserError: a shape or type is not what the model takes, or a mask is not that of its grid.
    """
    patches, mask, grid = map(as_array, images)
    values, kind = patch_size**2 * 3, patches.dtype
    if patches.ndim != 3 or patches.shape[2] != values or not patches.size:
        raise UserError(
            f"{method} takes patches of [batch, length, {values}] and got {list(patches.shape)}; "
            "make them with preprocess()"
        )
    if kind != np.uint8 and not jax.numpy.issubdtype(kind, jax.numpy.floating):
        raise UserError(f"{method} takes uint8 or normalized floats and got {kind}")
    if mask.shape != patches.shape[:2] or grid.shape != (len(patches), 2):
        raise UserError(
            f"{method} takes a mask of {list(patches.shape[:2])} and a grid of "
            f"{[len(patches), 2]} and got {list(mask.shape)} and {list(grid.shape)}"
        )
    check_normalized(patches, method)
    if isinstance(grid, np.ndarray) and isinstance(mask, np.ndarray):
        counts = grid.astype(np.int64).prod(axis=1)
        expected = own_patches(grid.astype(np.int64), mask.shape[1])
        if grid.min() < 1 or np.max(counts) > mask.shape[1] or (expected != (mask != 0)).any():
            raise UserError(
                f"{method} got a mask that is not that of its grid: rows x columns patches come "
                "first, and what fills behind them"
            )
    return ImagePatches(patches, mask != 0, grid)


def text_items(texts: Any, method: str, what: str = "texts") -> list[str]:
    """Return one or several texts as a list.

    Raises:
      UserError: one is no text, or they are no collection.
    """
    if is_array(texts) and np.ndim(texts) == 0:
        texts = as_array(texts).tolist()
    texts = [texts] if isinstance(texts, str | bytes) else several(texts, method, what)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise UserError(
                f"{method} takes {what}, and number {number} of {len(texts)} is {shown(text)}, a "
                f"{type(text).__name__}"
            )
    return [str(text) for text in texts]


def whole_number(value: Any, what: str) -> int:
    """Return a whole number of Python's or NumPy's, or raise UserError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{what} is {shown(value)}; give a whole number")
    return int(value)


def class_names(names: Any, method: str) -> list[str]:
    """Return the names of classes; a string is one name.

    Raises:
      UserError: there is none, or one is blank or no text.
    """
    names = text_items(names, method, "class names")
    if not names:
        raise UserError("there are no class names: zero-shot classification needs at least one")
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise UserError(f"{method}: class name {number} of {len(names)} is blank")
    return names


def is_text(texts: Any) -> bool:
    """Return whether a value, or the first item of a list or column, is a text and no token id."""
    if is_array(texts):
        return texts.dtype == object or getattr(texts.dtype, "kind", "O") in "USTO"
    return not isinstance(texts, list) or not texts or isinstance(texts[0], str | bytes)


def token_ids(tokens: Any, vocab_size: int, method: str) -> Any:
    """Return token ids as an array of one or two dimensions.

    Raises:
      UserError: they are no whole numbers, rows differ in length, or an id is outside of the
        vocabulary.
    """
    try:
        tokens = as_array(tokens) if is_array(tokens) else np.asarray(tokens)
    except ValueError:
        raise UserError(f"{method} got rows of token ids of several lengths") from None
    kind = np.dtype(tokens.dtype).kind
    if kind not in "iu":
        raise UserError(f"{method} takes texts or whole token ids and got {tokens.dtype}")
    if not tokens.size:
        raise UserError(f"{method} got no text")
    if isinstance(tokens, np.ndarray):
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"{method}: token ids go from {low} to {high}, and the model has {vocab_size} "
                "tokens: another tokenizer made them"
            )
    return tokens


def block_numbers(blocks: Any, method: str) -> tuple[int, ...]:
    """Return numbers of blocks, one or several.

    Raises:
      UserError: one is no whole number.
    """
    numbers = [blocks] if isinstance(blocks, int | np.integer) else blocks
    numbers = several(numbers, method, "numbers of blocks")
    for number in numbers:
        whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
        if not whole:
            raise UserError(f"{method} takes numbers of blocks and got {shown(number)}")
    return tuple(int(number) for number in numbers)
