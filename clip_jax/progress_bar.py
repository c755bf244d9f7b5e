"""A bar on stderr that shows how far a command has come."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress_bar(
    total: int | None,
    title: str,
    unit: str = "pair",
    *,
    items: Iterable | None = None,
    initial: int = 0,
    shown: bool = True,
    scaled: bool = False,
) -> tqdm:
    """Return a bar with count, rate and time left.

    Args:
      total: of what is counted; None if it is not known.
      title: what stands before the bar.
      unit: what is counted.
      items: what the bar iterates over; without them `update` moves it.
      initial: how many were done before.
      shown: False shows nothing.
      scaled: counts are written with k, M and G.
    """
    # In a file, a bar that is drawn often is noise.
    seconds = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        items,
        title,
        total,
        unit=unit,
        unit_scale=scaled,
        initial=initial,
        mininterval=seconds,
        miniters=0,  # the clock alone says when to draw, and is looked at in every update
        disable=not shown,
    )
