"""The account of the data that could not be read: counted by cause, listed in a file, bounded."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from clip_jax.data.formats.errors import SHARD_CAUSES, ShardError
from clip_jax.errors import UserError

SKIPPED_FILENAME = "skipped.jsonl"
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
      excluded: cause -> samples that are not in the data at all, because the config says so.
      excluded_shards: (cause, name, detail) of each shard that was left out at the start.
      shard_counts: cause -> how many those are.
    """

    def __init__(self, path: Path | None = None, max_fraction: float = 1.0, *, process: int = 0):
        self.counts: Counter[str] = Counter()
        self.excluded: Counter[str] = Counter()
        self.excluded_shards: list[tuple[str, str, str]] = []
        self.shard_counts: Counter[str] = Counter()
        self._max_fraction = max_fraction
        self._process = process
        self._path = path
        if path is not None and process:
            self._path = path.with_name(f"{path.stem}-{process}{path.suffix}")
        self._listed: set[str] = set()

    def sample(self, cause: str, key: str, detail: str) -> None:
        """Take in one row that could not be used."""
        self.counts[cause] += 1
        # A shard that is lost during the run is one line, not one for each of its samples.
        self._list(cause, key.partition("/")[0] if cause in SHARD_CAUSES else key, detail)

    def shard(self, cause: str, name: str, detail: str) -> None:
        """Take in a shard that is left out, which all processes do."""
        self.shard_counts[cause] += 1
        self.excluded_shards.append((cause, name, detail))
        if not self._process:
            self._list(cause, name, detail)

    def repeated_key(self, name: str) -> None:
        """Take in a sample whose key came before, which all processes leave out."""
        self.excluded["duplicate_key"] += 1
        if not self._process:
            self._list("duplicate_key", name, "a sample with this key came before")

    def is_too_much(self, skipped: int, rows: int) -> bool:
        """Return whether a run may not go on that skipped so many of `rows`."""
        return skipped > self._max_fraction * max(rows, MIN_ROWS)

    def too_much(self, counts: Counter[str], rows: int, last: str) -> UserError:
        """Return the error of such a run, with the table of causes and the last sample's."""
        return self._too_many(counts, rows, "samples", f"the last {last}")

    def check_shards(self, opened: int) -> None:
        """Raise UserError with the table of causes if too many were left out beside the opened."""
        shards = opened + self.shard_counts.total()
        if self.shard_counts.total() > self._max_fraction * shards:
            first = next((detail for _, _, detail in self.excluded_shards if detail), "")
            raise self._too_many(self.shard_counts, shards, "shards", f"first {first}")

    def _list(self, cause: str, name: str, detail: str) -> None:
        """Write one line, unless there is one of this name."""
        # Shards of one name can lie in several folders, which the detail tells apart.
        identity = name + detail if cause in SHARD_CAUSES else name
        if self._path is None or identity in self._listed or len(self._listed) >= MAX_LINES:
            return
        self._listed.add(identity)
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
