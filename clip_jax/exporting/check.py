"""Run an exported program against the model that it was made of."""

from collections.abc import Callable, Iterator

import numpy as np

from clip_jax.errors import UserError
from clip_jax.exporting.tower import TowerProgram

BOUNDS = {"float32": 1e-4, "int8": 0.05}
"""The largest difference of a number of a unit vector that an export may have."""
SIZES = ((270, 360, 2), (150, 100, 1))
"""Height, width and number of the images: larger and smaller than most models take."""
CAPTIONS = (
    "a photo of a dog",
    "two red circles beside a blue square",
    "",
    "an old lighthouse on a rocky coast at dusk, seen from a small boat, in the rain",
)


def sample_images() -> Iterator[np.ndarray]:
    """Yield batches of images, uint8 [B, H, W, 3]: waves, edges and noise, always the same."""
    rng = np.random.default_rng(0)
    for height, width, count in SIZES:
        y, x = np.mgrid[:height, :width]
        images = []
        for _ in range(count):
            pixels = np.empty((height, width, 3))
            for channel in range(3):
                a, b, phase = rng.uniform((-0.1, -0.1, 0), (0.1, 0.1, 6.3))
                pixels[..., channel] = 127 + 90 * np.sin(a * x + b * y + phase)
            top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
            pixels[top : top + height // 3, left : left + width // 3] = rng.integers(0, 256, 3)
            pixels += rng.normal(0, 12, pixels.shape)
            images.append(np.clip(pixels, 0, 255).astype(np.uint8))
        yield np.stack(images)


def largest_difference(program: TowerProgram, run: Callable[[np.ndarray], np.ndarray]) -> float:
    """Return the largest difference between an export's unit features and the model's.

    Args:
      run: the exported program: a batch in, unit features out.

    Raises:
      UserError: it is above the bound, or what came is not finite.
    """
    clip = program.clip
    largest = 0.0
    if program.tower == "text":
        tokens = clip.tokenize(CAPTIONS)
        batches = [(tokens, clip.encode_text(tokens)), (tokens[:1], clip.encode_text(tokens[:1]))]
    else:
        batches = []
        for images in sample_images():
            prepared = np.asarray(clip.preprocess(images))
            batch = images if program.resizes else prepared
            batches.append((batch, clip.encode_image(prepared)))
    for batch, z_BD in batches:
        difference = np.max(np.abs(run(batch) - np.asarray(z_BD)))
        largest = max(largest, float(difference)) if np.isfinite(difference) else np.inf
    bound = BOUNDS[weight_dtype(program)]
    if largest > bound:
        raise UserError(
            f"the export of {clip.name}'s {program.tower} tower differs from the model by"
            f" {largest:.1e} and may by {bound:.0e}; nothing was written"
            + ("; leave out --int8" if program.is_int8 else "")
        )
    return largest


def weight_dtype(program: TowerProgram) -> str:
    """Return what the matrices are held in."""
    return "int8" if program.is_int8 else "float32"


def metadata(program: TowerProgram, difference: float) -> dict[str, str]:
    """Return what is stored in an export's file: how to call it, and what was measured."""
    clip = program.clip
    preprocessing = clip.preprocessing
    values = {
        "model": clip.name,
        "tower": program.tower,
        "input": f"{np.dtype(program.dtype)} [{', '.join(program.dimensions)}]",
        "output": f"float32 [batch, {clip.config.embed_dim}], unit length",
        "weights": weight_dtype(program),
        "largest_difference": f"{difference:.2e}",
        "largest_difference_allowed": f"{BOUNDS[weight_dtype(program)]:.0e}",
        "scale": repr(clip.scale),
        "bias": repr(clip.bias),
    }
    if program.tower == "image":
        values["resize_mode"] = preprocessing.resize_mode
        values["interpolation"] = preprocessing.interpolation
        values["image_size"] = str(clip.config.vision.image_size)
    elif clip.tokenizer_spec is not None:
        values["tokenizer"] = clip.tokenizer_spec.kind
    return values
