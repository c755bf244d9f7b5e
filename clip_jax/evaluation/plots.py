"""Draw a model's guesses under example images, captions under images, and training curves."""

import json
import math
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from clip_jax.errors import UserError
from clip_jax.evaluation.fonts import Font, PageFonts
from clip_jax.files import atomic_write

# Lengths, pixels.
IMAGE_SIDE = 192
CELL_WIDTH = 236
PAD = 14
LINE = 21
FONT_SIZE = 14
# Colors, red green blue.
INK, GRAY, GREEN = (32, 36, 42), (96, 103, 112), (11, 122, 61)
BAR, GREEN_BAR, FRAME = (226, 231, 238), (196, 232, 207), (214, 218, 224)

Guesses = Sequence[tuple[str, float]]

CURVES = ("loss", "image_accuracy", "text_accuracy", "learning_rate", "logit_scale", "scale")


def prediction_grid(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    truths: Sequence[str],
    guesses: Sequence[Guesses],
    path: str | Path,
    *,
    columns: int = 6,
) -> Path:
    """Write a PNG of images with their true name and first five guesses, right ones green.

    Args:
      images: of any sizes, uint8.
      truths: the right name of each.
      guesses: for each, (name, probability) pairs, likeliest first.

    Raises:
      UserError: there is no image.
    """
    if not len(images):
        raise UserError("there are no images for a grid of predictions")
    lines = 1 + max(len(image_guesses[:5]) for image_guesses in guesses)
    page, draw, corners = _image_page(images, columns, lines)
    names = [name for image_guesses in guesses for name, _ in image_guesses[:5]]
    fonts = PageFonts(["%…", *truths, *names], FONT_SIZE)
    width = CELL_WIDTH - PAD
    for (x, y), truth, image_guesses in zip(corners, truths, guesses, strict=True):
        font = fonts.font_of(truth)
        # Twice, half a pixel apart: the built-in font has no bold.
        for shift in (0, 0.5):
            draw.text((x + shift, y), _fit(draw, truth, font, width), INK, font)
        for i, (name, probability) in enumerate(image_guesses[:5], 1):
            corner = x, y + i * LINE
            _draw_guess(draw, fonts, name, probability, name == truth, corner, width)
    fonts.tell_missing(Path(path))
    return _save(page, Path(path))


def caption_grid(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    captions: Sequence[str],
    path: str | Path,
    *,
    columns: int = 6,
    lines: int = 3,
) -> Path:
    """Write a PNG of images with their captions below, each on so many lines at most.

    Raises:
      UserError: there is no image.
    """
    if not len(images):
        raise UserError("there are no images for a grid of samples")
    page, draw, corners = _image_page(images, columns, lines)
    fonts = PageFonts(["…", *captions], FONT_SIZE)
    for (x, y), caption in zip(corners, captions, strict=True):
        font = fonts.font_of(caption)
        for i, line in enumerate(_wrap(draw, caption, font, CELL_WIDTH - PAD, lines)):
            draw.text((x, y + i * LINE), line, INK, font)
    fonts.tell_missing(Path(path))
    return _save(page, Path(path))


def _image_page(
    images: Sequence[np.ndarray], columns: int, lines: int
) -> tuple[Image.Image, ImageDraw.ImageDraw, list[tuple[int, int]]]:
    """Draw images as a grid; return the page, and where the lines of text under each begin."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell_height = IMAGE_SIDE + lines * LINE + 2 * PAD
    page = Image.new("RGB", (columns * CELL_WIDTH + PAD, rows * cell_height + PAD), "white")
    draw = ImageDraw.Draw(page)
    corners = []
    for i, image_HWC in enumerate(images):
        x, y = PAD + i % columns * CELL_WIDTH, PAD + i // columns * cell_height
        _draw_image(page, draw, image_HWC, x, y)
        corners.append((x, y + IMAGE_SIDE + PAD // 2))
    return page, draw, corners


def _wrap(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: Font,
    width: int,
    lines: int,
) -> list[str]:
    """Break the text into so many lines at most; what does not fit is cut with an ellipsis."""
    words = text.encode("utf-8", "replace").decode("utf-8").split()
    wrapped: list[str] = []
    while words and len(wrapped) < lines - 1:
        count = 1
        while count < len(words) and draw.textlength(" ".join(words[: count + 1]), font) <= width:
            count += 1
        wrapped.append(_fit(draw, " ".join(words[:count]), font, width))
        words = words[count:]
    return [*wrapped, _fit(draw, " ".join(words), font, width)] if words else wrapped


def _draw_image(
    page: Image.Image, draw: ImageDraw.ImageDraw, image_HWC: np.ndarray, x: int, y: int
) -> None:
    """Draw an image, framed, in the middle of a square with this upper left corner."""
    image = Image.fromarray(image_HWC)
    scale = IMAGE_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    x += (CELL_WIDTH - PAD - image.width) // 2
    y += (IMAGE_SIDE - image.height) // 2
    page.paste(image, (x, y))
    draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=FRAME)


def _draw_guess(
    draw: ImageDraw.ImageDraw,
    fonts: PageFonts,
    name: str,
    probability: float,
    right: bool,
    corner: tuple[int, int],
    width: int,
) -> None:
    """Draw a name on a bar as long as its probability."""
    x, y = corner
    ink, bar = (GREEN, GREEN_BAR) if right else (GRAY, BAR)
    draw.rectangle((x, y, x + max(2, round(width * probability)), y + LINE - 3), fill=bar)
    share = f"{probability:.1%}"
    font, share_font = fonts.font_of(name), fonts.font_of(share)
    share_width = round(draw.textlength(share, share_font))
    draw.text((x + 4, y + 1), _fit(draw, name, font, width - share_width - 16), ink, font)
    draw.text((x + width - share_width - 4, y + 1), share, ink, share_font)


def _fit(
    draw: ImageDraw.ImageDraw,
    text: str,
    font: Font,
    width: int,
) -> str:
    """Return the text on one line, cut with an ellipsis where it would pass `width` pixels."""
    # Pillow raises on lone surrogates and measures no text of several lines.
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    shown = text
    while shown and draw.textlength(shown, font) > width:
        text = text[:-1]
        shown = text.rstrip() + "…"
    return shown


def _save(page: Image.Image, path: Path) -> Path:
    with atomic_write(path) as partial:
        page.save(partial, format="PNG")
    return path


def loss_curve(metrics_jsonl_path: str | Path, png_path: str | Path) -> Path:
    """Write a PNG of a run's loss, both accuracies, learning rate and scale by step.

    The file holds JSON lines with `step` and any of `loss`, `image_accuracy`, `text_accuracy`,
    `learning_rate`, and `logit_scale` (a logarithm) or `scale`. A panel without numbers is left
    out. Values that are not finite leave a gap; a last line cut off in writing is passed over.

    Raises:
      UserError: the file cannot be read or has no step of training.
    """
    # A second to import, and a window system looked for: only where curves are drawn.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = read_curves(Path(metrics_jsonl_path), CURVES)
    if "logit_scale" in curves:
        steps, logs = curves["logit_scale"]
        # Bounded: a run that diverges may log a logarithm beyond what `exp` can hold.
        curves["scale"] = steps, [math.exp(v) if v < 100 else math.nan for v in logs]
    panels = [
        ("loss", {"loss": "contrastive loss"}),
        (
            "accuracy in the batch",
            {"image_accuracy": "image to text", "text_accuracy": "text to image"},
        ),
        ("learning rate", {"learning_rate": "learning rate"}),
        ("scale (1 / temperature)", {"scale": "scale"}),
    ]
    panels = [(label, names) for label, names in panels if any(n in curves for n in names)]
    figure = Figure(figsize=(10, 3.1 * -(-len(panels) // 2)), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    for i, (label, names) in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // 2), min(2, len(panels)), i + 1)
        for name, legend in names.items():
            if name in curves:
                axes.plot(*curves[name], label=legend, linewidth=1.3)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            axes.legend(frameon=False)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if label == "learning rate":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    path = Path(png_path)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png")
    return path


def read_curves(
    path: Path, names: Container[str] | None = None
) -> dict[str, tuple[list[int], list[float]]]:
    """Return, for each number in a metrics file or each of `names`, its steps and values.

    Raises:
      UserError: the file cannot be read, is damaged, or holds none of them.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the metrics {path}: {error.strerror}") from error
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
            # `float` reads the strings "NaN" and "Infinity" that stand for such numbers.
            wanted = {k: v for k, v in values.items() if names is None or k in names}
            numbers = {k: float(v) for k, v in wanted.items() if v is not None}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not a line of metrics: {error}") from error
        for name, value in numbers.items():
            steps, points = curves.setdefault(name, ([], []))
            steps.append(step)
            points.append(value if math.isfinite(value) else math.nan)
    if not curves:
        raise UserError(f"{path} has no training step yet: there is no curve to draw")
    return curves
