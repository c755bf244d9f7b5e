"""The report: runs in, one self-contained HTML file out, which asks nothing of the network."""

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path

from clip_jax.files import atomic_write
from clip_jax.report_page import sections
from clip_jax.report_page.load_run import Run, read_run

FILE = "report.html"


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """The page of these work folders, written to `out` or into the first of them.

    Raises:
      UserError: a folder has nothing to report, or holds a damaged file.
    """
    path = Path(out) if out else Path(folders[0]) / FILE
    page = render(unique_names([read_run(folder) for folder in folders]))
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def unique_names(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name told apart by their folders."""
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run
        for run in runs
    ]


def render(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    title = " and ".join(run.name for run in runs)
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    body = "".join(
        part(runs)
        for part in (
            sections.results,
            sections.curves,
            sections.pictures,
            sections.calibration,
            sections.ablation,
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
    parts = []
    for run in runs:
        results = run.evaluation.get("results", [])
        told = [results[0]["model"]] if results else []
        if run.curves:
            told.append(f"{max(steps[-1] for steps, _ in run.curves.values()):,} steps")
        if results:
            told.append(f"{results[0]['images']:,} images evaluated")
        skipped = sum(run.evaluation.get("skipped", {}).values())
        told += [f"{skipped:,} could not be used"] if skipped else []
        parts.append(escape(f"{run.folder}: {', '.join(told)}"))
    return "<br>".join(parts)
