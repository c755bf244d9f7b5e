"""The account of what could not be read: counted by cause, listed in a file, bounded."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from clip_jax.data.formats.errors import SHARD_CAUSES, ShardError
from clip_jax.errors import UserError

SKIPPED = "skipped.jsonl"
MAX_LINES = 100_000
"""Samples that are listed; further ones are only counted."""
MIN_ROWS = 1000
"""The share is taken of at least so many rows: one bad image among the first ten is no sign."""


class SkipLog:
    """Counts what is skipped, lists each sample once, and says when it is too much.

    Args:
      path: of `skipped.jsonl`, or None to list nothing.
      max_fraction: largest share of skipped rows, and of skipped shards.
      process: of several, each lists its own samples in a file of its own (`skipped-1.jsonl`), and
        process 0 the shards that all leave out at the start.

    Attributes:
      counts: cause -> rows handed out as placeholders.
      shards: cause -> shards that were left out at the start.
      lost: (cause, name, detail) of each of those.
      left_out: cause -> samples that are not in the data at all, because the config says so.
    """

    def __init__(self, path: Path | None = None, max_fraction: float = 1.0, *, process: int = 0):
        self.counts: Counter[str] = Counter()
        self.shards: Counter[str] = Counter()
        self.lost: list[tuple[str, str, str]] = []
        self.left_out: Counter[str] = Counter()
        self._max_fraction = max_fraction
        self._process = process
        self._path = path
        if path is not None and process:
            self._path = path.with_name(f"{path.stem}-{process}{path.suffix}")
        self._listed: set[str] = set()
        self._first = ""

    def sample(self, cause: str, key: str, detail: str) -> None:
        """Take in one row that could not be used."""
        self.counts[cause] += 1
        # A shard that is lost during the run is one line, not one for each of its samples.
        self._list(cause, key.partition("/")[0] if cause in SHARD_CAUSES else key, detail)

    def shard(self, cause: str, name: str, detail: str) -> None:
        """Take in a shard that is left out, which all processes do."""
        self.shards[cause] += 1
        self.lost.append((cause, name, detail))
        self._first = self._first or detail
        if not self._process:
            self._list(cause, name, detail)

    def repeated(self, name: str) -> None:
        """Take in a sample whose key came before, which all processes leave out."""
        self.left_out["duplicate_key"] += 1
        if not self._process:
            self._list("duplicate_key", name, "a sample with this key came before")

    def is_too_much(self, skipped: int, rows: int) -> bool:
        """Whether a run may not go on that skipped so many of `rows`."""
        return skipped > self._max_fraction * max(rows, MIN_ROWS)

    def too_much(self, counts: Counter[str], rows: int, last: str) -> UserError:
        """The error of such a run, with the table of causes and the last sample's."""
        return self._too_many(counts, rows, "samples", f"the last {last}")

    def check_shards(self, shards: int) -> None:
        """Raises UserError with the table of causes when too many of `shards` were left out."""
        skipped = self.shards.total()
        if skipped > self._max_fraction * shards:
            raise self._too_many(self.shards, shards, "shards", f"first {self._first}")

    def _list(self, cause: str, name: str, detail: str) -> None:
        # Shards of one name can lie in several folders, which the detail tells apart.
        once = name + detail if cause in SHARD_CAUSES else name
        if self._path is None or once in self._listed or len(self._listed) >= MAX_LINES:
            return
        self._listed.add(once)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        record = {"cause": cause, "name": name, "detail": detail[:500]}
        # The list goes on after a resume; a sample may then stand in it twice.
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _too_many(self, counts: Counter[str], of: int, what: str, example: str) -> UserError:
        table = ", ".join(f"{n} {cause}" for cause, n in counts.most_common())
        where = f" (listed in {self._path})" if self._path is not None else ""
        return UserError(
            f"{counts.total():,} of {of:,} {what} could not be used: {table}{where};"
            f" {example[:300]}; mend the data or raise"
            f" config.data.max_skip_fraction, now {self._max_fraction:g}"
        )


def on_shard_error(log: SkipLog) -> Callable[[str, ShardError], None]:
    """Return a callback of `sources.open_shards` that counts and names a shard that is left out."""

    def leave_out(shard: str, error: ShardError) -> None:
        log.shard(error.cause, shard, str(error))

    return leave_out
