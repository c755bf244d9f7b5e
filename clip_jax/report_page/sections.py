"""Make the sections of the page, each from runs; one that no run has anything for is empty."""

import math
from collections.abc import Sequence
from html import escape

from clip_jax.evaluation.results import COUNTS
from clip_jax.report_page.load_run import Run, load_thumbnails
from clip_jax.report_page.select_examples import (
    CaptionQuery,
    ImageMap,
    SimilarityBatch,
    WorstClasses,
    WrongCaption,
    first_captions,
    select_examples,
)
from clip_jax.report_page.svg import bar_chart, diagonal_chart, line_chart, scatter

# (title, metric names of metrics.jsonl, shares, logarithmic)
CURVES = (
    ("loss", ("loss",), False, True),
    ("of it the contrastive one", ("contrastive_loss",), False, True),
    ("divergence from the teachers (affinity)", ("affinity_loss",), False, True),
    ("distance from the teachers' features", ("feature_loss",), False, True),
    ("scale (1 / temperature)", ("scale",), False, False),
    ("accuracy in the batch, image to text", ("image_accuracy",), True, False),
    ("accuracy in the batch, text to image", ("text_accuracy",), True, False),
    ("zero-shot accuracy during the run", ("eval/acc1",), True, False),
    ("image recall at 1 during the run", ("eval/image_retrieval_recall@1",), True, False),
    ("learning rate", ("learning_rate",), False, False),
    ("gradient norm", ("grad_norm",), False, True),
)


def section(title: str, about: str, body: str) -> str:
    """Make one card of the page; nothing where the body is empty."""
    if not body:
        return ""
    return f"<section><h2>{escape(title)}</h2><p>{escape(about)}</p>{body}</section>"


def figure(caption: str, body: str) -> str:
    """Make a chart with its caption; nothing where the body is empty."""
    return f"<figure>{body}<figcaption>{escape(caption)}</figcaption></figure>" if body else ""


def curves(runs: Sequence[Run]) -> str:
    """Draw loss, scale, accuracies, learning rate and gradient norm by step."""
    charts = []
    for title, names, percent, log in CURVES:
        series = []
        for run in runs:
            steps, values = next((run.curves[n] for n in names if n in run.curves), ([], []))
            series.append((run.name, list(zip(steps, values, strict=True))))
        chart = line_chart(series, x_label="step", y_label=title, percent=percent, log=log)
        charts.append(figure(title, chart))
    body = "".join(charts)
    if not body:
        return ""
    return section(
        "Training",
        "By step. A new loss starts near the logarithm of the batch size.",
        legend(runs) + f'<div class="charts">{body}</div>',
    )


def legend(runs: Sequence[Run]) -> str:
    """Name the color of each run, where there are several."""
    if len(runs) < 2:
        return ""
    names = (f'<span class="c{i % 6}">{escape(r.name)}</span>' for i, r in enumerate(runs))
    return f'<div class="legend">{"".join(names)}</div>'


def results(runs: Sequence[Run]) -> str:
    """Show every figure of every run in one table, with intervals, and the same as bars."""
    rows: dict[tuple[str, str, str], dict[int, tuple[float, tuple | None]]] = {}
    for i, run in enumerate(runs):
        for result in run.evaluation.get("results", []):
            shots = result["metrics"].get("fewshot_k", -1)
            task = result["task"] + (f" ({shots:g} a class)" if shots > 0 else "")
            for name, value in result["metrics"].items():
                key = (task, result["dataset"], name)
                interval = result.get("intervals", {}).get(name)
                if value is not None:
                    rows.setdefault(key, {})[i] = (value, interval)
    if not rows:
        return ""
    head = "".join(f'<th class="n">{escape(run.name)}</th>' for run in runs)
    lines, before = [], None
    for (task, dataset, name), values in rows.items():
        if (task, dataset) != before:
            before = (task, dataset)
            lines.append(
                f'<tr><th colspan="{len(runs) + 1}">{escape(task)} on {escape(dataset)}</th></tr>'
            )
        lines.append(_result_row(name, values, len(runs)))
    body = f"<tr><th>metric</th>{head}</tr>{''.join(lines)}"
    return section(
        "Results",
        "Shares in percent; in brackets the interval of 95 % that comes of the choice of the "
        "images alone (bootstrap, 1,000 resamples). Runs whose intervals overlap a good deal "
        "cannot be told apart on this data.",
        f'<div class="wide"><table>{body}</table></div>' + _bars(runs, rows),
    )


def _result_row(name: str, values: dict[int, tuple[float, tuple | None]], runs: int) -> str:
    best = min if name == "calibration_error" else max
    top = best(value for value, _ in values.values())
    cells = []
    for i in range(runs):
        if i not in values:
            cells.append('<td class="n">-</td>')
            continue
        value, interval = values[i]
        if name in COUNTS:
            cells.append(f'<td class="n">{value:.4g}</td>')
            continue
        mark = " best" if len(values) > 1 and value == top else ""
        span = ""
        if interval:
            span = f" <small>[{100 * interval[0]:.1f} to {100 * interval[1]:.1f}]</small>"
        cells.append(f'<td class="n{mark}">{100 * value:.2f}{span}</td>')
    return f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>"


def _bars(runs: Sequence[Run], rows: dict) -> str:
    bars = [
        (f"{name} {runs[i].name}" if len(runs) > 1 else name, value, interval, i)
        for (_, _, name), values in rows.items()
        for i, (value, interval) in values.items()
        if interval
    ]
    return f"<h3>With their intervals</h3>{bar_chart(bars, label='results')}" if bars else ""


def calibration(runs: Sequence[Run]) -> str:
    """Draw how often each model is right by how sure it is."""
    charts = []
    for run in runs:
        table = run.evaluation.get("reliability", [])
        total = sum(row["images"] for row in table)
        points = [
            (row["confidence"], row["accuracy"], row["images"] / total)
            for row in table
            if row["images"]
        ]
        if points:
            charts.append(figure(run.name, diagonal_chart(points, label="reliability")))
    return section(
        "Calibration",
        "Across, the probability of the first name; up, how often it is right, with larger dots "
        "for more images. On the diagonal a probability means what it says.",
        f'<div class="charts">{"".join(charts)}</div>' if charts else "",
    )


def ablation(runs: Sequence[Run]) -> str:
    """Draw the accuracy by prompt."""
    charts = []
    for run in runs:
        rows = [(a["template"], a["acc1"], None, 0) for a in run.evaluation.get("ablation", [])]
        if rows:
            charts.append(figure(run.name, bar_chart(rows, label="accuracy by prompt")))
    return section(
        "Prompts",
        "Zero-shot accuracy with each prompt alone, and with the mean of all of them.",
        f'<div class="charts">{"".join(charts)}</div>' if charts else "",
    )


def interpolation(runs: Sequence[Run]) -> str:
    """Draw what weights between start and end know of the new task and of the kept one."""
    charts = []
    for run in runs:
        if not run.wiseft:
            continue
        metric, points = run.wiseft["metric"], run.wiseft["points"]
        series = [
            (task, [(point["alpha"], point[task][metric]) for point in points])
            for task in ("new", "kept")
        ]
        chart = line_chart(series, x_label="alpha", y_label=metric, percent=True)
        best = f"best alpha {run.wiseft['best']:g}"
        words = f"{run.name}: the new task (first color) and the kept one, {best}"
        charts.append(figure(words, chart))
    return section(
        "Between start and end",
        "Weights on the line from the start (alpha 0) to the end of the tuning (1), on both tasks.",
        "".join(charts),
    )


def examples(runs: Sequence[Run]) -> str:
    """Make the sections with images, run by run."""
    return "".join(
        _examples_of(run, f" ({run.name})" if len(runs) > 1 else "")
        for run in runs
        if run.features is not None
    )


def _examples_of(run: Run, suffix: str) -> str:
    """Make the sections with images of one run; `suffix` ends their titles."""
    selected = select_examples(run)
    uris = load_thumbnails(run, selected.positions())
    worst, batch = selected.worst, selected.batch
    return "".join(
        (
            section(
                f"Worst classes{suffix}",
                "The classes with the lowest recall, and the mean probability that their images "
                "give to the names they are taken for. The whole confusion matrix is in "
                "confusion.csv.",
                "" if worst is None else _worst_table(worst, run.class_names, uris),
            ),
            section(
                f"One batch{suffix}",
                "Cosines of some images, downwards, with their captions, across. The framed "
                "diagonal should be the strongest of its row and of its column.",
                "" if batch is None else _batch_table(batch, uris),
            ),
            section(
                f"Found by words{suffix}",
                "A caption and the ten images nearest to it, of all that were evaluated; those "
                "that have this caption are framed.",
                "".join(_query_strip(query, uris) for query in selected.queries),
            ),
            section(
                f"Nearest wrong captions{suffix}",
                "Images that are nearer to another image's caption than to their own, by the most.",
                _wrong_caption_cards(selected.wrong_captions, uris),
            ),
            section(
                f"Map{suffix}",
                f"Images by {selected.map.method}: what lies near looks alike to the model.",
                _map(run, selected.map, uris),
            ),
        )
    )


def _map(run: Run, image_map: ImageMap, uris: dict[int, str]) -> str:
    """Draw the images on their plane, each with its caption or key as a tool tip."""
    features = run.features
    assert features is not None
    captions = first_captions(features)
    points = [
        (x, y, captions[position] or features.keys[position], uris.get(position, ""))
        for position, (x, y) in zip(image_map.positions, image_map.xy.tolist(), strict=True)
    ]
    return scatter(points, label="map of the images")


def _image(uris: dict[int, str], position: int, alt: str, side: int) -> str:
    if position not in uris:
        return ""
    return f'<img src="{uris[position]}" alt="{escape(alt)}" width="{side}" height="{side}">'


def _cell(share: float, words: str, *, right: bool) -> str:
    """Make a table cell as dark as its share, framed where it is the right answer."""
    share = min(max(share, 0.0), 1.0)
    frame = " own" if right else ""
    style = f"background:rgba(var(--heat),{0.75 * share:.3f})"
    return f'<td class="cell{frame}" style="{style}">{words}</td>'


def _worst_table(worst: WorstClasses, names: Sequence[str], uris: dict[int, str]) -> str:
    head = "".join(f'<th class="top"><span>{escape(names[m])}</span></th>' for m in worst.columns)
    rows = []
    for i, m in enumerate(worst.classes):
        image = _image(uris, worst.positions[i], names[m], 46)
        about = f"{worst.recalls[i]:.0%} of {worst.images[i]}"
        cells = "".join(
            _cell(math.sqrt(share), f"{share:.0%}" if share >= 0.005 else "", right=column == m)
            for column, share in zip(worst.columns, worst.shares[i], strict=True)
        )
        rows.append(
            f'<tr><td>{image}</td><th class="name">{escape(names[m])}<br>'
            f"<small>{about}</small></th>{cells}</tr>"
        )
    return (
        f'<div class="wide"><table class="heat"><tr><td></td><th class="name">class, recall</th>'
        f"{head}</tr>{''.join(rows)}</table></div>"
    )


def _batch_table(batch: SimilarityBatch, uris: dict[int, str]) -> str:
    low, high = float(batch.cosines.min()), float(batch.cosines.max())
    head = "".join(f'<th class="top"><span>{escape(c)}</span></th>' for c in batch.captions)
    rows = []
    for i, position in enumerate(batch.positions.tolist()):
        image = _image(uris, position, batch.captions[i], 46)
        cells = "".join(
            _cell((cosine - low) / ((high - low) or 1), f"{cosine:.2f}", right=i == j)
            for j, cosine in enumerate(batch.cosines[i].tolist())
        )
        rows.append(f"<tr><td>{image}</td>{cells}</tr>")
    return (
        f'<div class="wide"><table class="heat"><tr><td></td>{head}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _query_strip(query: CaptionQuery, uris: dict[int, str]) -> str:
    shots = []
    for position, cosine, right in zip(query.positions, query.cosines, query.right, strict=True):
        mark = " right" if right else ""
        image = _image(uris, position, query.caption if right else "another image", 76)
        shots.append(f'<div class="shot{mark}">{image}{cosine:.2f}</div>')
    return (
        f'<div class="query"><b>{escape(query.caption)}</b>'
        f'<div class="strip">{"".join(shots)}</div></div>'
    )


def _wrong_caption_cards(wrong_captions: Sequence[WrongCaption], uris: dict[int, str]) -> str:
    cards = [
        f'<div class="miss">{_image(uris, wrong.position, wrong.caption, 72)}<div>'
        f'<span class="no">{escape(wrong.nearest)} {wrong.nearest_cosine:.2f}</span><br>'
        f'<span class="yes">{escape(wrong.caption)} {wrong.cosine:.2f}</span></div></div>'
        for wrong in wrong_captions
    ]
    return f'<div class="misses">{"".join(cards)}</div>' if cards else ""
