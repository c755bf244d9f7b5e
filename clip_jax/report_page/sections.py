"""The parts of the page, each from runs to HTML; empty where a run has nothing for it."""

import math
from collections.abc import Sequence
from html import escape

from clip_jax.evaluation.results import COUNTS
from clip_jax.report_page import select_examples
from clip_jax.report_page.load_run import Run, thumbnails
from clip_jax.report_page.svg import bar_chart, diagonal_chart, line_chart, scatter

# (title, metric names of metrics.jsonl, shares, logarithmic)
CURVES = (
    ("loss", ("loss",), False, True),
    ("temperature (logit scale)", ("scale",), False, False),
    ("accuracy in the batch, image to text", ("image_accuracy",), True, False),
    ("accuracy in the batch, text to image", ("text_accuracy",), True, False),
    ("zero-shot accuracy during the run", ("eval/acc1",), True, False),
    ("image recall at 1 during the run", ("eval/image_retrieval_recall@1",), True, False),
    ("learning rate", ("learning_rate",), False, False),
    ("gradient norm", ("grad_norm",), False, True),
)


def section(title: str, about: str, body: str) -> str:
    """One card of the page; nothing where the body is empty."""
    if not body:
        return ""
    return f"<section><h2>{escape(title)}</h2><p>{escape(about)}</p>{body}</section>"


def figure(caption: str, body: str) -> str:
    """A chart with the words under it."""
    return f"<figure>{body}<figcaption>{escape(caption)}</figcaption></figure>" if body else ""


def curves(runs: Sequence[Run]) -> str:
    """Loss, temperature, accuracies, learning rate and gradient norm by step."""
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
    """Which color is which run, where there are several."""
    if len(runs) < 2:
        return ""
    names = (f'<span class="c{i % 6}">{escape(r.name)}</span>' for i, r in enumerate(runs))
    return f'<div class="legend">{"".join(names)}</div>'


def results(runs: Sequence[Run]) -> str:
    """Every figure of every run in one table, with intervals, and the same as bars."""
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
    for (task, dataset, name), found in rows.items():
        if (task, dataset) != before:
            before = (task, dataset)
            lines.append(
                f'<tr><th colspan="{len(runs) + 1}">{escape(task)} on {escape(dataset)}</th></tr>'
            )
        lines.append(_result_row(name, found, len(runs)))
    body = f"<tr><th>metric</th>{head}</tr>{''.join(lines)}"
    return section(
        "Results",
        "Shares in percent; in brackets the interval of 95 % that comes of the choice of the "
        "images alone (bootstrap, 1,000 resamples). Runs whose intervals overlap a good deal "
        "cannot be told apart on this data.",
        f'<div class="wide"><table>{body}</table></div>' + _bars(runs, rows),
    )


def _result_row(name: str, found: dict[int, tuple[float, tuple | None]], runs: int) -> str:
    best = min if name == "calibration_error" else max
    top = best(value for value, _ in found.values())
    cells = []
    for i in range(runs):
        if i not in found:
            cells.append('<td class="n">-</td>')
            continue
        value, interval = found[i]
        if name in COUNTS:
            cells.append(f'<td class="n">{value:.4g}</td>')
            continue
        mark = " best" if len(found) > 1 and value == top else ""
        span = ""
        if interval:
            span = f" <small>[{100 * interval[0]:.1f} to {100 * interval[1]:.1f}]</small>"
        cells.append(f'<td class="n{mark}">{100 * value:.2f}{span}</td>')
    return f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>"


def _bars(runs: Sequence[Run], rows: dict) -> str:
    bars = [
        (f"{name} {runs[i].name}" if len(runs) > 1 else name, value, interval, i)
        for (_, _, name), found in rows.items()
        for i, (value, interval) in found.items()
        if interval
    ]
    return f"<h3>With their intervals</h3>{bar_chart(bars, label='results')}" if bars else ""


def calibration(runs: Sequence[Run]) -> str:
    """How often the model is right when it is so sure."""
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
    """Accuracy by prompt."""
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


def pictures(runs: Sequence[Run]) -> str:
    """The sections with images, run by run."""
    return "".join(_pictures_of(run, len(runs) > 1) for run in runs if run.features is not None)


def _pictures_of(run: Run, several: bool) -> str:
    features = run.features
    assert features is not None
    texts = len(features.captions) > 0
    batch = select_examples.similarity_batch(features) if texts else None
    queries = select_examples.gallery(features) if texts else []
    misses = select_examples.nearest_wrong(features) if texts else []
    worst = None
    if run.class_MD is not None:
        worst = select_examples.worst_classes(features, run.class_MD, run.evaluation["scale"])
    how, flat_B2 = select_examples.flat_map(features.z_image_BD[: select_examples.MOST_SEARCHED])
    shown = list(range(0, len(flat_B2), max(1, len(flat_B2) // 150)))
    places = [*shown, *(m.place for m in misses), *(p for q in queries for p in q.places)]
    places += [] if batch is None else batch.places.tolist()
    places += [] if worst is None else worst.places
    pictures = thumbnails(run, places)
    captions = select_examples.captions_of(features)
    names = [captions[i] or features.keys[i] for i in range(len(features))]
    of = f" ({run.name})" if several else ""
    points = [
        (float(flat_B2[i, 0]), float(flat_B2[i, 1]), names[i], pictures.get(i, "")) for i in shown
    ]
    return "".join(
        (
            section(
                f"Worst classes{of}",
                "The classes with the lowest recall, and the mean probability that their images "
                "give to the names they are taken for. The whole confusion matrix is in "
                "confusion.csv.",
                "" if worst is None else _worst(run, worst, pictures),
            ),
            section(
                f"One batch{of}",
                "Cosines of some images, downwards, with their captions, across. The framed "
                "diagonal should be the strongest of its row and of its column.",
                "" if batch is None else _batch(batch, pictures),
            ),
            section(
                f"Found by words{of}",
                "A caption and the ten images nearest to it, of all that were evaluated; those "
                "that have this caption are framed.",
                "".join(_query(query, pictures) for query in queries),
            ),
            section(
                f"Nearest wrong captions{of}",
                "Images that are nearer to another image's caption than to their own, by the most.",
                _misses(misses, pictures),
            ),
            section(
                f"Map{of}",
                f"Images by {how}: what lies near looks alike to the model.",
                scatter(points, label="map of the images"),
            ),
        )
    )


def _image(pictures: dict[int, str], place: int, alt: str, side: int) -> str:
    if place not in pictures:
        return ""
    return f'<img src="{pictures[place]}" alt="{escape(alt)}" width="{side}" height="{side}">'


def _cell(share: float, words: str, *, own: bool) -> str:
    """A table cell as dark as its share."""
    share = min(max(share, 0.0), 1.0)
    own_class = " own" if own else ""
    style = f"background:rgba(var(--heat),{0.75 * share:.3f})"
    return f'<td class="cell{own_class}" style="{style}">{words}</td>'


def _worst(run: Run, worst: select_examples.Worst, pictures: dict[int, str]) -> str:
    names = run.class_names
    head = "".join(f'<th class="top"><span>{escape(names[m])}</span></th>' for m in worst.columns)
    rows = []
    for i, m in enumerate(worst.classes):
        image = _image(pictures, worst.places[i], names[m], 46)
        about = f"{worst.recalls[i]:.0%} of {worst.images[i]}"
        cells = "".join(
            _cell(math.sqrt(share), f"{share:.0%}" if share >= 0.005 else "", own=column == m)
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


def _batch(batch: select_examples.Batch, pictures: dict[int, str]) -> str:
    low, high = float(batch.cosines.min()), float(batch.cosines.max())
    head = "".join(f'<th class="top"><span>{escape(c)}</span></th>' for c in batch.captions)
    rows = []
    for i, place in enumerate(batch.places.tolist()):
        image = _image(pictures, place, batch.captions[i], 46)
        cells = "".join(
            _cell((cosine - low) / ((high - low) or 1), f"{cosine:.2f}", own=i == j)
            for j, cosine in enumerate(batch.cosines[i].tolist())
        )
        rows.append(f"<tr><td>{image}</td>{cells}</tr>")
    return (
        f'<div class="wide"><table class="heat"><tr><td></td>{head}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _query(query: select_examples.Query, pictures: dict[int, str]) -> str:
    shots = []
    for place, cosine, right in zip(query.places, query.cosines, query.right, strict=True):
        mark = " right" if right else ""
        image = _image(pictures, place, query.caption if right else "another image", 76)
        shots.append(f'<div class="shot{mark}">{image}{cosine:.2f}</div>')
    return (
        f'<div class="query"><b>{escape(query.caption)}</b>'
        f'<div class="strip">{"".join(shots)}</div></div>'
    )


def _misses(misses: Sequence[select_examples.Miss], pictures: dict[int, str]) -> str:
    cards = [
        f'<div class="miss">{_image(pictures, miss.place, miss.caption, 72)}<div>'
        f'<span class="no">{escape(miss.nearest)} {miss.nearest_cosine:.2f}</span><br>'
        f'<span class="yes">{escape(miss.caption)} {miss.cosine:.2f}</span></div></div>'
        for miss in misses
    ]
    return f'<div class="misses">{"".join(cards)}</div>' if cards else ""
