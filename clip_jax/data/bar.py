"""How far a command on data has come."""

import sys

from tqdm import tqdm


def bar(total: int, title: str, unit: str = "pair", *, initial: int = 0) -> tqdm:
    """Count, rate and time left, on stderr; redrawn rarely where that is a file."""
    pace = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=title, unit=unit, initial=initial, mininterval=pace)
