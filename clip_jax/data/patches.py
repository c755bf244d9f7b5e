"""From an image of any shape to a fixed number of patches, for SigLIP 2's NaFlex towers.

The rule is transformers' `Siglip2ImageProcessor`: conversion to RGB first, then one resize to the
largest grid of whole patches that the image fills with nearly its own proportions.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8

# Of the search for the scale: its first bounds, and how near they come.
SMALLEST_SCALE, LARGEST_SCALE, SCALE_STEP = 1e-6, 100.0, 1e-5


@dataclasses.dataclass(frozen=True)
class PatchShape:
    """The size of a model's images where it is a number of patches.

    Attributes:
      patch_size: side of a square patch, pixels.
      max_patches: patches of one image, at most.
    """

    patch_size: int
    max_patches: int

    @property
    def canvas(self) -> tuple[int, int, int]:
        """The shape of `image_canvas`."""
        return (self.max_patches + 1) * self.patch_size, self.patch_size, 3

    @property
    def side(self) -> int:
        """The side of a square image of about so many patches, pixels."""
        return self.patch_size * max(1, math.isqrt(self.max_patches))


ImageSize = int | PatchShape
"""The side of a square, pixels, or a number of patches."""


def image_shape(size: ImageSize) -> tuple[int, int, int]:
    """Return the shape of the array that one image becomes."""
    return size.canvas if isinstance(size, PatchShape) else (size, size, 3)


def patch_grid(width: int, height: int, shape: PatchShape) -> tuple[int, int]:
    """Return (rows, columns) of the grid that an image is resized to.

    Sides are the image's times one scale, rounded up to whole patches. The scale is the largest
    that a bisection finds within the limit; so the grid is the processor's for every size.
    """

    def grid(scale: float) -> tuple[int, int]:
        rows, columns = (math.ceil(side * scale / shape.patch_size) for side in (height, width))
        return max(1, rows), max(1, columns)

    low, high = SMALLEST_SCALE, LARGEST_SCALE
    while high - low >= SCALE_STEP:
        middle = (low + high) / 2
        rows, columns = grid(middle)
        if rows * columns <= shape.max_patches:
            low = middle
        else:
            high = middle
    return grid(low)


def canvas_of(
    pixels_HWC: UInt8[np.ndarray, "H W 3"], shape: PatchShape
) -> UInt8[np.ndarray, "R P 3"]:
    """Return the patches of a resized image one below another, row by row, then zeros, then a
    patch that begins with the grid: rows and columns, each two bytes, the low one first.

    So an image is one array of one shape, as loaders and batches hold it;
    `models.naflex.canvas_patches` reads it.
    """
    size = shape.patch_size
    rows, columns = pixels_HWC.shape[0] // size, pixels_HWC.shape[1] // size
    canvas_RPC = np.zeros(shape.canvas, np.uint8)
    x = pixels_HWC.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    canvas_RPC[: rows * columns * size] = x.reshape(-1, size, 3)
    grid = np.array([rows, columns], "<u2").view(np.uint8)
    canvas_RPC[-size:].reshape(-1)[:4] = grid
    return canvas_RPC
