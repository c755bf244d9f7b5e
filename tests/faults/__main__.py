"""Run the campaign: `python -m faults [KIND ...] [--share 0.1] [--seed 1] [--out PAGE]`."""

import argparse
import datetime
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

from faults.kinds import KINDS
from faults.trials import Campaign, Trial, begin

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
MARK = "<!-- what follows is written by `make faults` -->"


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


def table(results: dict[str, tuple[list[Trial], float]], whole: dict[str, int]) -> str:
    """Return the table of what was tried and what came of it."""
    lines = ["| fault | tried | of a whole campaign | survived | minutes | what came of them |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    for name, (trials, seconds) in results.items():
        outcomes = Counter(trial.outcome.split(", exit code")[0] for trial in trials)
        if len(outcomes) > 8:
            outcomes = Counter(
                outcome.partition(":")[2] or outcome for outcome in outcomes.elements()
            )
        common = outcomes.most_common(6)
        told = "; ".join(f"{n} {outcome.strip()}" for outcome, n in common)
        survived = sum(trial.survived for trial in trials)
        lines.append(
            f"| {KINDS[name][2]} | {len(trials):,} | {whole[name]:,} | {survived:,} | "
            f"{seconds / 60:.1f} | {told} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the kinds, and write the page; return 1 if a trial was not survived."""
    args = parse()
    names = args.kinds or list(KINDS)
    results: dict[str, tuple[list[Trial], float]] = {}
    with tempfile.TemporaryDirectory(prefix="clip_jax_faults_") as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/programs"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        needs_run = set(names) - {"mutants", "configs"}
        place = Path(folder)
        campaign = begin(place) if needs_run else Campaign(place, place, place, [])
        for name in names:
            function, whole, _ = KINDS[name]
            begun = time.monotonic()
            trials = function(campaign, max(1, round(whole * args.share)), args.seed)
            results[name] = trials, time.monotonic() - begun
            lost = [trial.outcome for trial in trials if not trial.survived]
            print(f"{name}: {len(trials) - len(lost)} of {len(trials)} survived", *lost, sep="\n  ")
    share = "" if args.share == 1 else f" --share {args.share:g}"
    text = (
        f"`make faults` with `--seed {args.seed}{share}`, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.\n\n"
        f"{table(results, {name: KINDS[name][1] for name in results})}\n"
    )
    head = args.out.read_text().partition(MARK)[0] if args.out.exists() else ""
    args.out.write_text(f"{head}{MARK}\n{text}")
    return int(any(not trial.survived for trials, _ in results.values() for trial in trials))


if __name__ == "__main__":
    raise SystemExit(main())
