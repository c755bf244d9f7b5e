"""How far a command on data has come."""

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
) -> tqdm:
    """Count, rate and time left, on stderr, over `items` or moved by hand; redrawn rarely where
    that is a file, in which one redrawn often is noise."""
    pace = 0.1 if sys.stderr.isatty() else 10.0
    # Looks at the clock at every move: what is told between two items is shown in its time too.
    return tqdm(
        items,
        title,
        total,
        unit=unit,
        initial=initial,
        mininterval=pace,
        miniters=0,
        disable=not shown,
    )
