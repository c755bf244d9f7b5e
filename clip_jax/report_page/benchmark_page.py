"""Render the table of many models on many data sets as one HTML file."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any


def benchmark_page(
    rows: Sequence[Mapping[str, Any]],
    aggregates: Mapping[str, Mapping[str, float]],
    failed: Sequence[Mapping[str, str]],
) -> str:
    """Return the page, which asks nothing of the network.

    Args:
      rows: one a result: `label`, `dataset`, `task`, `metric`, `value` (a share, or None),
        `interval` (two shares, or None) and `images`.
      aggregates: of each model by its label, by name.
      failed: `label`, `dataset` and `error` of cells without a result.
    """
    datasets = len({row["dataset"] for row in rows})
    models = list(dict.fromkeys(row["label"] for row in [*rows, *failed]))
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    head = "".join(f"<th>{escape(model)}</th>" for model in models)
    body = "".join(_lines(rows, models)) + "".join(_aggregate_lines(aggregates, models))
    errors = "".join(
        f"<li>{escape(item['label'])} on {escape(item['dataset'])}: {escape(item['error'])}</li>"
        for item in failed
    )
    errors = f"<section><h2>Not evaluated</h2><ul>{errors}</ul></section>" if errors else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>CLIP: {_count(len(models), "model")}</title>
<link rel="icon" href="data:,">
<style>
{style}
th, td {{ text-align: right; padding: 3px 10px; border-bottom: 1px solid var(--line); }}
th:first-child, td:first-child {{ text-align: left; }}
td:nth-child(2), th:nth-child(2) {{ text-align: left; color: var(--soft); }}
tr.mean td {{ font-style: italic; }}
</style>
</head>
<body>
<header><h1>{_count(len(models), "model")}, {_count(datasets, "data set")}</h1>
<p>In percent; the best of a row is bold. The interval of 95 % shows when the pointer rests on a
figure.</p></header>
<main><section><div class="wide"><table>
<thead><tr><th>data set</th><th>figure</th>{head}</tr></thead>
<tbody>{body}</tbody>
</table></div></section>{errors}</main>
</body>
</html>
"""


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + "s" * (number != 1)


def _lines(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[str]:
    """Return a table row for each data set and figure."""
    cells: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["dataset"], row["figure"]), {})[row["label"]] = row
    lines = []
    for (dataset, figure), by_model in cells.items():
        values = [row["value"] for row in by_model.values() if row["value"] is not None]
        best = max(values, default=None)
        shown = "".join(_cell(by_model.get(model), best) for model in models)
        lines.append(f"<tr><td>{escape(dataset)}</td><td>{escape(figure)}</td>{shown}</tr>")
    return lines


def _cell(row: Mapping[str, Any] | None, best: float | None) -> str:
    if row is None or row["value"] is None:
        return "<td>-</td>"
    text = f"{100 * row['value']:.2f}"
    if row["value"] == best:
        text = f"<b>{text}</b>"
    title = f"{row['images']:,} images"
    if row["interval"]:
        low, high = row["interval"]
        title += f", {100 * low:.1f} to {100 * high:.1f}"
    return f'<td title="{title}">{text}</td>'


def _aggregate_lines(
    aggregates: Mapping[str, Mapping[str, float]], models: Sequence[str]
) -> list[str]:
    names = list(dict.fromkeys(name for values in aggregates.values() for name in values))
    lines = []
    for name in names:
        values = [aggregates.get(model, {}).get(name) for model in models]
        shown = "".join("<td>-</td>" if v is None else f"<td>{100 * v:.2f}</td>" for v in values)
        lines.append(f'<tr class="mean"><td>{escape(name)}</td><td>mean</td>{shown}</tr>')
    return lines
