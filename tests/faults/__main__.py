"""Run the campaign: `python -m faults [KIND ...] [--share 0.1] [--seed 1] [--out PAGE]`.

A kind's row of the page's table is written when the kind is done, or interrupted, with what was
tried until then; the rows of other kinds stay.
"""

import argparse
import datetime
import os
import signal
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from faults.kinds import KINDS
from faults.page import Row, updated
from faults.trials import Campaign, Trial, begin, kill_started

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all")
    parser.add_argument("--share", type=float, default=1.0, help="of a whole campaign's trials")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    args = parser.parse_args()
    unknown = set(args.kinds) - KINDS.keys()
    if unknown:
        parser.error(f"unknown kinds {', '.join(unknown)}")
    return args


def collect(trials: Iterable[Trial], found: list[Trial]) -> bool:
    """Gather the trials as they come; return whether all came, and no Ctrl-C or SIGTERM."""
    try:
        found.extend(trials)
    except KeyboardInterrupt:
        return False
    return True


def write_row(path: Path, title: str, row: Row) -> None:
    """Replace a kind's row of a page's table."""
    page = path.read_text() if path.exists() else ""
    path.write_text(updated(page, {title: str(row)}, [title for _, _, title in KINDS.values()]))


def main() -> int:
    """Run the kinds, and write the page; return 1 if a trial was not survived."""
    args = parse()
    names = args.kinds or list(KINDS)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    all_survived, all_came = True, True
    with tempfile.TemporaryDirectory(prefix="clip_jax_faults_") as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/programs"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        place = Path(folder)
        needs_run = set(names) - {"mutants", "configs"}
        campaign = begin(place) if needs_run else Campaign(place, place, place, [])
        for name in names:
            function, whole, title = KINDS[name]
            begun, trials = time.monotonic(), list[Trial]()
            count = max(1, round(whole * args.share))
            all_came = collect(function(campaign, count, args.seed), trials)
            seconds, today = time.monotonic() - begun, datetime.datetime.now(datetime.UTC)
            row = Row(title, trials, whole, seconds, args.seed, f"{today:%Y-%m-%d}")
            if trials:
                write_row(args.out, title, row)
            lost = [trial.outcome for trial in trials if not trial.survived]
            all_survived &= not lost
            print(f"{name}: {len(trials) - len(lost)} of {len(trials)} survived", *lost, sep="\n  ")
            if not all_came:
                kill_started()
                break
    return 130 if not all_came else int(not all_survived)


if __name__ == "__main__":
    raise SystemExit(main())
