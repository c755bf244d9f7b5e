"""The end of a run of which too much was skipped, in all processes at once."""

from collections import Counter

import numpy as np

from clip_jax.data.loader import Loader
from clip_jax.data.skip_log import SkipLog
from clip_jax.parallel import distributed, watchdog


class SkipLimit:
    """Ends a run of which too much was skipped: in all processes at the same step.

    Args:
      log: knows the limit.
      part: the part of each batch that this process loads.
      loader: counts what this process skipped.
    """

    def __init__(self, log: SkipLog, part: int, loader: Loader) -> None:
        self._log, self._part, self._loader = log, part, loader
        parts = distributed.gather(part)
        # Of processes that load the same part, the first one's numbers count.
        self._counted = [parts.index(p) for p in sorted(set(parts))]
        self._totals = np.zeros(2, np.int64)

    def check(self, counts: np.ndarray) -> None:
        """Add the (skipped, rows) of one batch from every process.

        Raises:
          UserError: it is too much by now.
        """
        self._totals += counts[self._counted].sum(axis=0, dtype=np.int64)
        if self._log.is_too_much(*map(int, self._totals)):
            watchdog.about_to_fail()
            raise self._log.too_much(*gather_skipped(self._part, self._loader))


def gather_skipped(part: int, loader: Loader) -> tuple[Counter[str], int, str]:
    """Return (skipped by cause, rows, the last skipped) of all processes; all have to call it."""
    last = loader.recent[-1] if loader.recent else ""
    gathered = distributed.gather([part, loader.skipped, loader.rows, last])
    # Processes that load the same part of each batch count once.
    parts = {part: rest for part, *rest in gathered}.values()
    skipped = sum((Counter(counts) for counts, _, _ in parts), Counter())
    last = next((text for _, _, text in parts if text), "")
    return skipped, sum(rows for _, rows, _ in parts), last
