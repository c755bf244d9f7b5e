"""Render runs as one self-contained HTML file, which asks nothing of the network."""

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path

from clip_jax.files import atomic_write
from clip_jax.report_page import sections
from clip_jax.report_page.load_run import Run, load_run

REPORT_FILENAME = "report.html"


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page of these work folders to `out`, or into the first of them.

    Raises:
      UserError: a folder has nothing to report, or holds a damaged file.
    """
    path = Path(out) if out else Path(folders[0]) / REPORT_FILENAME
    page = render(unique_names([load_run(folder) for folder in folders]))
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def unique_names(runs: Sequence[Run]) -> list[Run]:
    """Name runs of one name by their folders instead."""
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run
        for run in runs
    ]


def render(runs: Sequence[Run]) -> str:
    """Return the page as HTML."""
    title = " and ".join(run.name for run in runs)
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    body = "".join(
        part(runs)
        for part in (
            sections.results,
            sections.curves,
            sections.examples,
            sections.calibration,
            sections.ablation,
            sections.interpolation,
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>CLIP: {escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{_about(runs)}</p></header>
<main>{body}</main>
</body>
</html>
"""


def _about(runs: Sequence[Run]) -> str:
    """Say in a line what each run is."""
    lines = []
    for run in runs:
        results = run.evaluation.get("results", [])
        facts = [results[0]["model"]] if results else []
        if run.curves:
            facts.append(f"{max(steps[-1] for steps, _ in run.curves.values()):,} steps")
        if results:
            facts.append(f"{results[0]['images']:,} images evaluated")
        skipped = sum(run.evaluation.get("skipped", {}).values())
        facts += [f"{skipped:,} could not be used"] if skipped else []
        lines.append(escape(f"{run.folder}: {', '.join(facts)}"))
    return "<br>".join(lines)
