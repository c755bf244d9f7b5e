"""Draw charts as SVG text, colored by the page's style sheet, which follows dark and light."""

import math
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]
Series = tuple[str, Sequence[Point]]

WIDTH, HEIGHT = 520, 260
# On the right, half of the longest number under the axis.
LEFT, RIGHT, TOP, BOTTOM = 58, 28, 12, 40
# Points of a curve: more cannot be told apart at this width.
MAX_POINTS = 400


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
    log: bool = False,
) -> str:
    """Draw curves over a common axis; points that are not finite leave a gap.

    Args:
      series: (name, points); the position in the list is the color.
      percent: y are shares, written in percent; log: a logarithmic axis, where all y are above 0.
    """
    shown = [(name, _thin(points)) for name, points in series]
    finite = [(x, y) for _, points in shown for x, y in points if math.isfinite(y)]
    if not finite:
        return ""
    log = log and min(y for _, y in finite) > 0
    xs, ys = zip(*finite, strict=True)
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    move = math.log10 if log else float
    x_range = min(*xs, x_ticks[0]), max(*xs, x_ticks[-1])
    y_range = move(min(*ys, y_ticks[0])), move(max(*ys, y_ticks[-1]))

    def at(x: float, y: float) -> Point:
        return (
            LEFT + (x - x_range[0]) / ((x_range[1] - x_range[0]) or 1) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM
            - (move(y) - y_range[0]) / ((y_range[1] - y_range[0]) or 1) * (HEIGHT - TOP - BOTTOM),
        )  # fmt: skip

    parts = []
    for y in y_ticks:
        _, py = at(x_range[0], y)
        parts.append(f'<path class="grid" d="M{LEFT} {py:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(text(LEFT - 7, py + 4, number(y, percent=percent), anchor="end"))
    for x in x_ticks:
        px, _ = at(x, y_ticks[0])
        parts.append(text(px, HEIGHT - BOTTOM + 17, number(x), anchor="middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_label, anchor="middle"))
    for color, (name, points) in enumerate(shown):
        for stretch in _stretches(points):
            path = "L".join("{:.1f} {:.1f}".format(*at(*p)) for p in stretch)
            title = f"<title>{escape(name)}</title>"
            parts.append(f'<path class="line c{color % 6}" d="M{path}">{title}</path>')
    return frame(WIDTH, HEIGHT, y_label, parts)


def _thin(points: Sequence[Point]) -> list[Point]:
    """Take every n-th point and the last."""
    step = max(1, -(-len(points) // MAX_POINTS))
    return [*points[:-1][::step], *points[-1:]]


def _stretches(points: Sequence[Point]) -> list[list[Point]]:
    """Split points where one is not finite."""
    stretches: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            stretches[-1].append((x, y))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def bar_chart(
    rows: Sequence[tuple[str, float, tuple[float, float] | None, int]], *, label: str
) -> str:
    """Draw shares as bars across, from rows of (name, share, interval, color)."""
    row_height, name_width = 24, 190
    top = max([share for _, share, _, _ in rows] + [i[1] for _, _, i, _ in rows if i] + [1e-9])
    scale = (WIDTH - name_width - 70) / top
    parts = []
    for i, (name, share, interval, color) in enumerate(rows):
        y = 6 + i * row_height
        parts.append(text(name_width - 8, y + 15, shorten(name, 27), anchor="end", title=name))
        parts.append(
            f'<rect class="bar c{color % 6}" x="{name_width}" y="{y + 3}" '
            f'width="{share * scale:.1f}" height="{row_height - 7}"/>'
        )
        end = share
        if interval:
            a, b = (name_width + v * scale for v in interval)
            end = max(share, interval[1])
            parts.append(f'<path class="whisker" d="M{a:.1f} {y + 11.5}H{b:.1f}"/>')
        parts.append(text(name_width + end * scale + 6, y + 15, f"{share:.1%}"))
    return frame(WIDTH, 12 + len(rows) * row_height, label, parts)


def scatter(points: Sequence[tuple[float, float, str, str]], *, label: str, size: int = 26) -> str:
    """Draw a map of points (x, y, title, image as a data URI or ""); without an image, a ring."""
    width, height, pad = 760, 520, 24
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_span, y_span = (max(xs) - min(xs)) or 1, (max(ys) - min(ys)) or 1
    parts = []
    for x, y, title, image in points:
        px = pad + (x - min(xs)) / x_span * (width - 2 * pad)
        py = pad + (y - min(ys)) / y_span * (height - 2 * pad)
        tip = f"<title>{escape(title)}</title>"
        if image:
            parts.append(
                f'<image x="{px - size / 2:.1f}" y="{py - size / 2:.1f}" width="{size}" '
                f'height="{size}" href="{image}">{tip}</image>'
            )
        else:
            parts.append(f'<circle class="ring" cx="{px:.1f}" cy="{py:.1f}" r="4">{tip}</circle>')
    return frame(width, height, label, parts)


def diagonal_chart(points: Sequence[tuple[float, float, float]], *, label: str) -> str:
    """Draw reliability, (confidence, accuracy, share of the images), against the diagonal."""
    side, pad = 260, 40

    def at(v: float) -> float:
        return pad + v * (side - pad - 12)

    def down(v: float) -> float:
        return side - at(v)

    parts = [f'<path class="grid" d="M{at(0)} {down(0)}L{at(1)} {down(1)}"/>']
    for v in (0.0, 0.5, 1.0):
        parts.append(text(at(v), side - 22, f"{v:.0%}", anchor="middle"))
        parts.append(text(pad - 6, down(v) + 4, f"{v:.0%}", anchor="end"))
    parts.append(text(side / 2 + 14, side - 6, "how sure", anchor="middle"))
    line = "L".join(f"{at(c):.1f} {down(a):.1f}" for c, a, _ in points)
    parts.append(f'<path class="line c0" d="M{line}"/>')
    parts += [
        f'<circle class="dot c0" cx="{at(c):.1f}" cy="{down(a):.1f}" r="{2 + 6 * share**0.5:.1f}">'
        f"<title>{share:.1%} of the images</title></circle>"
        for c, a, share in points
    ]
    return frame(side, side, label, parts)


def frame(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """Make an SVG that fills its column, with a name for screen readers."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", title: str = "") -> str:
    """Make a line of text, with the whole of it as a tool tip where it was cut."""
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}{tip}</text>'


def shorten(words: str, length: int) -> str:
    """Return at most so many characters, with an ellipsis where some are missing."""
    return words if len(words) <= length else words[: length - 1].rstrip() + "…"


def number(value: float, *, percent: bool = False) -> str:
    """Write a tick's number in few characters."""
    if percent:
        return f"{100 * value:.3g} %"
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers from at or below `low` to at or above `high`."""
    # Numbers that cannot be told apart, or are as good as 0, get an axis all the same.
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-30):
        high = low + max(abs(low), 1e-30) if abs(low) > 1e-30 else 1.0
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step / unit, 6) * unit for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10, ... around the numbers; powers of ten alone where there are many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    candidates = [
        m * 10.0**e for e in exponents for m in ((1,) if len(exponents) > 3 else (1, 2, 5))
    ]
    inside = [t for t in candidates if low <= t <= high]
    below = [t for t in candidates if t < low][-1:]
    return below + inside + [t for t in candidates if t > high][:1]
