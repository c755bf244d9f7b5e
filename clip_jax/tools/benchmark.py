"""Compare models on data sets: `python -m clip_jax.benchmark --model M --dataset D --out DIR`.

Each flag takes several. Every model is evaluated on every data set, and DIR gets one table as
results.csv, results.json and results.html. What is done is not done again: the same command goes on
where it was stopped, and one with other models or data sets adds theirs. A data set is a folder in
CLIP_benchmark's webdataset layout or another source of images, SugarCrepe's or Winoground's file, a
name with --dataset-root, a collection (vtab, vtab+, retrieval, imagenet_robustness, sugar_crepe,
datacomp), or a .txt with one of these a line.
"""

import argparse
import csv
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from clip_jax.errors import UserError, check_counts, run_command
from clip_jax.executors.parts import Executor
from clip_jax.tools.executor_flags import add_executor_flags, executor_of, pop_executor_flags

if TYPE_CHECKING:
    from clip_jax.evaluation.cells import Cell

TABLE = "results"
_FIELDS = ("label", "model", "pretrained", "dataset", "task", "language", "figure", "value")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.benchmark", description=__doc__)
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="runs, or published models' paths or names")
    add("--dataset", nargs="+", required=True, help="folders, files, names or collections")
    add("--dataset-root", default="", help="of names: {dataset}, or {dataset_cleaned} with -")
    add("--split", default="test", help="of data sets' folders")
    add("--task", default="", help="for all, with commas; by default each data set's own")
    add("--train-split", default="train", help="that linear_probe, knn and few_shot learn from")
    add("--val-split", default="", help="that chooses C; by default a fifth of the training split")
    add("--batch-size", type=int, default=256, help="images at a time")
    add("--dtype", default="float32", help="float32, or bfloat16: half the memory")
    add("--keep-features", action="store_true", help="leave each cell's features in its folder")
    add(
        "--join-equal-captions",
        action="store_true",
        help="in retrieval an equal caption of another image is right; CLIP_benchmark counts it as "
        "wrong, and so does the table",
    )
    add("--out", required=True, help="the folder of the table and of all cells")
    add_executor_flags(parser)
    return parser.parse_args(argv)


@dataclass
class Progress:
    """The cells so far, and the time that those of this call took.

    Attributes:
      total: all cells.
      results: of each done cell, by model and data set.
      failed: the error of each cell that could not be evaluated.
      seconds: of each cell that this call evaluated.
      earlier: rows of the table by other calls, whose cells this one does not name.
    """

    total: int
    results: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    earlier: list[dict[str, Any]] = field(default_factory=list)

    def line(self, cell: "Cell", text: str) -> str:
        """Return the line of a cell, with how many there are and the time left."""
        done = len(self.results) + len(self.failed)
        line = f"[{done}/{self.total}] {cell.label} on {cell.dataset}: {text}"
        if self.seconds and done < self.total:
            left = (self.total - done) * sum(self.seconds) / len(self.seconds)
            shown = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
            line += f" ({self.seconds[-1]:.0f} s; {shown} left)"
        return line


def plan_cells(args: argparse.Namespace) -> tuple[list["Cell"], dict[tuple[str, str], str]]:
    """Return the cells, model by model, and the errors of those whose data cannot be used.

    Raises:
      UserError: a model or a data set is named that cannot be, or two have one name.
    """
    from clip_jax.evaluation.cells import Cell, make_spec, named_sources, slug
    from clip_jax.evaluation.tasks import check_tasks
    from clip_jax.tools.evaluate import model_label

    tasks = [task for task in args.task.split(",") if task]
    check_tasks(tasks)
    sources = named_sources(args.dataset, args.dataset_root, args.split)
    labels = [model_label(model.rstrip("/")) for model in args.model]
    names = [label for label, _ in labels]
    cells, failed = [], {}
    for model, (name, pretrained) in zip(args.model, labels, strict=True):
        label = name if names.count(name) == 1 else slug(model)
        for dataset, source in sources.items():
            try:
                spec = make_spec(
                    source,
                    dataset=dataset,
                    tasks=tasks,
                    pretrained=pretrained,
                    batch_size=args.batch_size,
                    confuse_equal_captions=not args.join_equal_captions,
                    split=args.split,
                    train_split=args.train_split,
                    val_split=args.val_split,
                )
                folder = Path(args.out) / slug(label) / slug(dataset)
                cells.append(Cell(model, label, dataset, spec, folder, args.dtype))
            except UserError as error:
                failed[label, dataset] = str(error)
    if len({cell.folder for cell in cells}) < len(cells):
        raise UserError("a model or a data set is named twice")
    return cells, failed


def run_cells(args: argparse.Namespace, executor: Executor | None = None) -> Progress:
    """Evaluate all cells that are not done, and write the table after each.

    Args:
      executor: whose workers evaluate them, a cell each; None is this process.

    Raises:
      UserError: a model or a data set is named that cannot be.
    """
    from clip_jax.files import check_local, make_folder
    from clip_jax.tools.cells_elsewhere import run_cells_elsewhere

    check_local({"--out": args.out})
    cells, failed = plan_cells(args)
    make_folder(args.out, flag="--out")
    progress = Progress(len(cells) + len(failed), failed=failed)
    progress.earlier = earlier_rows(args.out, {(cell.label, cell.dataset) for cell in cells})
    for cell in cells:
        if (results := cell.results()) is not None:
            progress.results[cell.label, cell.dataset] = results
    if progress.results:
        print(f"{len(progress.results)} of {progress.total} are done already", flush=True)
    write_tables(args.out, cells, progress)
    missing = [cell for cell in cells if (cell.label, cell.dataset) not in progress.results]
    if executor is not None:

        def on_cell(cell: "Cell", error: str) -> None:
            _record(args.out, cell, error, cells, progress)

        run_cells_elsewhere(
            executor, missing, args.out, keep_features=args.keep_features, on_cell=on_cell
        )
        return progress
    for label in dict.fromkeys(cell.label for cell in missing):
        of_model = [cell for cell in missing if cell.label == label]
        _run_model(args, of_model, cells, progress)
    return progress


def earlier_rows(out: str | Path, named: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the rows of the table in a folder whose cells are there and are not named now."""
    from clip_jax.evaluation.cells import CELL_FILENAME, slug

    out = Path(out)
    try:
        rows = json.loads((out / f"{TABLE}.json").read_text(encoding="utf-8"))["results"]
        return [
            row
            for row in rows
            if (row["label"], row["dataset"]) not in named
            and (out / slug(row["label"]) / slug(row["dataset"]) / CELL_FILENAME).is_file()
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _run_model(
    args: argparse.Namespace,
    missing: Sequence["Cell"],
    cells: Sequence["Cell"],
    progress: Progress,
) -> None:
    """Load a model, evaluate its missing cells, and let go of it."""
    import jax

    from clip_jax.api import load_encoders
    from clip_jax.evaluation.cells import run_cell

    try:
        encoders = load_encoders(missing[0].model, dtype=args.dtype)
    except UserError as error:
        progress.failed |= {(cell.label, cell.dataset): str(error) for cell in missing}
        write_tables(args.out, cells, progress)
        print(f"{missing[0].label}: {error}", flush=True)
        return
    for cell in missing:
        start, text = time.perf_counter(), ""
        try:
            run_cell(encoders, cell, keep_features=args.keep_features)
        except UserError as error:
            text = str(error)
        else:
            progress.seconds.append(time.perf_counter() - start)
        _record(args.out, cell, text, cells, progress)
    del encoders
    jax.clear_caches()
    gc.collect()


def _record(
    out: str | Path, cell: "Cell", error: str, cells: Sequence["Cell"], progress: Progress
) -> None:
    """Take in a cell that is done, or why it is not; write the table and print a line."""
    results = None if error else cell.results()
    if results is None:
        text = progress.failed[cell.label, cell.dataset] = error or (
            "it was evaluated with other files than this command sees: models and data must lie at "
            "the same paths on every machine, and not change"
        )
    else:
        progress.results[cell.label, cell.dataset] = results
        figures = [row for row in table_rows([cell], progress) if row["value"] is not None]
        text = ", ".join(f"{row['figure']} {100 * row['value']:.2f} %" for row in figures)
    write_tables(out, cells, progress)
    tqdm.write(progress.line(cell, text))  # above a bar, if there is one
    sys.stdout.flush()


def table_rows(cells: Sequence["Cell"], progress: Progress) -> list[dict[str, Any]]:
    """Return a row for each result of the done cells, with the figure that stands for it."""
    from clip_jax.evaluation.datasets import MAIN_METRICS, main_value

    rows = []
    for cell in cells:
        for result in progress.results.get((cell.label, cell.dataset), ()):
            is_first = result["task"] == cell.spec.tasks[0]
            metric = cell.metric if is_first else MAIN_METRICS[result["task"]]
            shots = result["metrics"].get("fewshot_k")
            shot = f" of {shots:g}" if shots is not None and shots > 0 else ""
            rows.append(
                {
                    **result,
                    "label": cell.label,
                    "dataset": cell.dataset,
                    "figure": metric + shot,
                    "value": main_value(metric, result["metrics"]),
                    "interval": result["intervals"].get(metric),
                }
            )
    return rows


def write_tables(out: str | Path, cells: Sequence["Cell"], progress: Progress) -> list[Path]:
    """Write what is done so far as CSV, JSON and HTML; return the files."""
    from clip_jax.evaluation.datasets import aggregates
    from clip_jax.files import atomic_write
    from clip_jax.report_page.benchmark_page import benchmark_page

    rows = [*progress.earlier, *table_rows(cells, progress)]
    done = {(row["label"], row["dataset"]) for row in rows}
    means: dict[str, dict[str, float]] = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label and row["value"] is not None]
        means[label] = aggregates({row["dataset"]: row["value"] for row in own})
    common = [
        dataset
        for dataset in dict.fromkeys(row["dataset"] for row in rows)
        if all((label, dataset) in done for label in means)
    ]
    if len(common) > 1:
        for label in means:
            values = [r["value"] for r in rows if r["label"] == label and r["dataset"] in common]
            known = [value for value in values if value is not None]
            means[label][f"{len(common)} data sets"] = sum(known) / max(1, len(known))
    failed = [
        {"label": label, "dataset": dataset, "error": error}
        for (label, dataset), error in progress.failed.items()
    ]
    texts = {
        "json": json.dumps(
            {"results": rows, "aggregates": means, "failed": failed}, indent=1, ensure_ascii=False
        )
        + "\n",
        "html": benchmark_page(rows, means, failed),
    }
    paths = [Path(out) / f"{TABLE}.{ending}" for ending in ("csv", "json", "html")]
    for ending, text in texts.items():
        with atomic_write(Path(out) / f"{TABLE}.{ending}") as partial:
            partial.write_text(text, encoding="utf-8")
    metrics = sorted({name for row in rows for name in row["metrics"]})
    with atomic_write(paths[0]) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_FIELDS, "images", *metrics])
        for row in rows:
            values = [row["metrics"].get(name) for name in metrics]
            writer.writerow([*(row[name] for name in _FIELDS), row["images"], *values])
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, evaluate what is missing, and print where the table is.

    Raises:
      UserError: some cells could not be evaluated; all others are in the table.
    """
    args = parse(argv)
    check_counts({"--batch-size": args.batch_size})
    with executor_of(pop_executor_flags(args)) as executor:
        progress = run_cells(args, executor)
    folder = Path(args.out)
    paths = ", ".join(str(folder / f"{TABLE}.{ending}") for ending in ("csv", "json", "html"))
    print(f"{len(progress.results)} of {progress.total} evaluated; written: {paths}")
    if progress.failed:
        (label, dataset), error = next(iter(progress.failed.items()))
        raise UserError(
            f"{len(progress.failed)} of {progress.total} could not be evaluated, the first "
            f"{label} on {dataset}: {error}"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
