"""The table in `docs/reliability.md`: a row for each kind of fault, each by itself."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from faults.trials import Trial

MARK = "<!-- what follows is written by `make faults`, row by row -->"
COLUMNS = ("fault", "tried", "of a whole campaign", "survived", "minutes", "seed", "date")
COMMON = 6
"""Outcomes that a row names."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What was tried of one kind of fault.

    Attributes:
      title: the kind, as the table's first column has it.
      trials: what came of each.
      whole: how many a whole campaign has.
      seconds: how long they took.
      seed: of the kind's draws.
      date: as YYYY-MM-DD.
    """

    title: str
    trials: Sequence[Trial]
    whole: int
    seconds: float
    seed: int
    date: str

    def __str__(self) -> str:
        """Return the line of the table."""
        survived = sum(trial.survived for trial in self.trials)
        counts = [f"{len(self.trials):,}", f"{self.whole:,}", f"{survived:,}"]
        cells = [*counts, f"{self.seconds / 60:.1f}", str(self.seed), self.date]
        return f"| {' | '.join([self.title, *cells, outcomes_text(self.trials)])} |"


def outcomes_text(trials: Sequence[Trial]) -> str:
    """Return how often each outcome came, the most common ones first."""
    outcomes = Counter(trial.outcome.split(", exit code")[0] for trial in trials)
    if len(outcomes) > COMMON + 2:
        outcomes = Counter(outcome.partition(":")[2] or outcome for outcome in outcomes.elements())
    common = outcomes.most_common(COMMON)
    rest = outcomes.total() - sum(n for _, n in common)
    told = [f"{n:,} {outcome.strip()}" for outcome, n in common]
    return "; ".join(told + [f"{rest:,} others"] * (rest > 0)).replace("|", "/")


def updated(page: str, rows: Mapping[str, str], order: Sequence[str]) -> str:
    """Return the page with these lines in its table; the others stay, and what follows it.

    Args:
      page: its text.
      rows: the lines, by their first column.
      order: of the first columns.
    """
    head, mark, rest = page.partition(MARK)
    lines = rest.lstrip("\n").splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    tail = lines[count:] if mark else []
    found = {line.split("|")[1].strip(): line for line in lines[2:count]} | dict(rows)
    known = [title for title in order if title in found]
    others = [title for title in found if title not in order]
    table = [f"| {' | '.join([*COLUMNS, 'what came of them'])} |"]
    table.append("| --- |" + " ---: |" * 5 + " --- | --- |")
    table += [found[title] for title in [*known, *others]]
    return "\n".join([f"{head}{MARK}", *table, *tail]).rstrip("\n") + "\n"
