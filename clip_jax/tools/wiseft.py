"""Weigh what a model has learned against what it forgot: `python -m clip_jax.wiseft START TUNED`.

Weights between START and TUNED (WiSE-FT, arXiv:2109.01903) are evaluated on the new task, --data,
and on one that shall not be forgotten, --keep-data. The curve goes into `wiseft.json` and
`wiseft.csv` in the folder --out, or in TUNED where that is a work folder, whose report shows it.
With --save the weights of the best point, which loses at most --max-loss of the kept task, are
written as a model of their own.
"""

import argparse
import contextlib
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_jax.data.formats.remote import is_url
from clip_jax.errors import UserError, run_command
from clip_jax.sections import EvalSection

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from clip_jax.api import LoadedCLIP
    from clip_jax.evaluation.interpolate import CurvePoint


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.wiseft", description=__doc__)
    add = parser.add_argument
    add("start", help="where the tuning began: a run, or a published model's path or name")
    add("tuned", help="what came of it: a model of the same sizes")
    add("--data", required=True, help="images of the new task")
    add("--keep-data", required=True, help="images of the task that shall not be forgotten")
    add("--classnames", default="", help="file of class names, or a shipped data set")
    add("--keep-classnames", help="those of the kept task; the same by default")
    add("--template", action="append", help='prompt, "{}" by default; may be repeated')
    add("--alphas", default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", help="with commas")
    add("--metric", default="acc1", help="by which the best point is chosen")
    add("--max-loss", type=float, default=0.01, help="of the kept task, as a share")
    add("--batch-size", type=int, default=256, help="images at a time")
    add("--out", help="the folder of the curve")
    add("--save", help="a new folder for the best point's weights")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Curve:
    """A measured curve, and the files it was written to."""

    points: "list[CurvePoint]"
    best: "CurvePoint"
    metric: str
    paths: list[Path]


def _evaluator(
    clip: "LoadedCLIP", args: argparse.Namespace, mesh: "Mesh", *, data: str, classnames: str
) -> Callable[[Any], dict[str, float]]:
    """Make the evaluation of a task on weights."""
    from clip_jax.evaluation.in_training import make_evaluator
    from clip_jax.evaluation.spec import EvalSpec

    section = EvalSection(
        data=data,
        classnames=classnames,
        templates=tuple(args.template or ("{}",)),
        tasks=("zeroshot_classification",),
        batch_size=args.batch_size,
    )
    encode_image, encode_text = clip.encoders_of_variables()
    evaluate = make_evaluator(
        encode_image,
        encode_text,
        EvalSpec.from_section(section),
        mesh,
        config=clip.config,
        tokenizer=clip.known_tokenizer(),
        preprocess=clip.preprocessing,
        without_names="--classnames (--keep-classnames of the kept task) names no file; name one",
    )

    def measure_task(weights: Any) -> dict[str, float]:
        metrics = evaluate(weights)
        if args.metric not in metrics:
            raise UserError(f"--metric {args.metric}: there are {', '.join(sorted(metrics))}")
        return metrics

    return measure_task


def measure(args: argparse.Namespace) -> Curve:
    """Measure the curve, and write it.

    Raises:
      UserError: the models are not of the same sizes, or a task cannot be evaluated.
    """
    from clip_jax import api
    from clip_jax.evaluation.interpolate import best_point, interpolate, measure_curve
    from clip_jax.files import check_local, make_folder
    from clip_jax.parallel.mesh import make_mesh
    from clip_jax.pretrained.export import new_folder
    from clip_jax.pretrained.work_folder import is_work_folder

    check_local({"--out": args.out, "--save": args.save})
    if args.out is None and (is_url(args.tuned) or not is_work_folder(args.tuned)):
        raise UserError(
            "--out is missing: TUNED is no work folder of this machine, where the curve could lie"
        )
    alphas = _alphas(args.alphas)
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)
    start, tuned = (api.load(path, mesh=mesh) for path in (args.start, args.tuned))
    if start.config != tuned.config:
        raise UserError(f"{args.tuned} is not of the sizes of {args.start}: nothing lies between")
    folder = make_folder(Path(args.out or args.tuned), flag="--out")
    first, last = (
        {"params": clip.params, "batch_stats": clip.batch_stats} for clip in (start, tuned)
    )
    kept_names = args.keep_classnames or args.classnames
    # Claimed first: a wrong name answers before anything is measured.
    with new_folder(Path(args.save)) if args.save else contextlib.nullcontext() as part:
        points = measure_curve(
            first,
            last,
            alphas,
            new=_evaluator(start, args, mesh, data=args.data, classnames=args.classnames),
            kept=_evaluator(start, args, mesh, data=args.keep_data, classnames=kept_names),
        )
        best = best_point(points, args.metric, args.max_loss)
        paths = _write(folder, points, best, args)
        if part is not None:
            _save(part, start, interpolate(first, last, best.alpha))
            paths.append(Path(args.save))
    return Curve(points, best, args.metric, paths)


def _alphas(text: str) -> list[float]:
    try:
        alphas = sorted({float(alpha) for alpha in text.split(",")})
    except ValueError:
        raise UserError(f"--alphas {text!r}: numbers with commas, such as 0,0.5,1") from None
    if not all(0 <= alpha <= 1 for alpha in alphas):
        raise UserError(f"--alphas {text!r}: each lies in 0..1")
    return [0.0, *alphas] if alphas[0] > 0 else alphas


def _write(
    folder: Path, points: "Sequence[CurvePoint]", best: "CurvePoint", args: argparse.Namespace
) -> list[Path]:
    from clip_jax.evaluation.interpolate import CURVE_FILENAME, curve_to_json
    from clip_jax.files import atomic_write

    path, table = folder / CURVE_FILENAME, folder / "wiseft.csv"
    names = ("start", "tuned", "data", "keep_data", "metric", "max_loss")
    fields = {name: getattr(args, name) for name in names}
    text = json.dumps(curve_to_json(points, best, **fields), indent=1)
    with atomic_write(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    metrics = [m for m in points[0].new if m in points[0].kept]
    with atomic_write(table) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["alpha", *(f"{task}_{m}" for m in metrics for task in ("new", "kept"))])
        for point in points:
            values = [v for m in metrics for v in (point.new[m], point.kept[m])]
            writer.writerow([point.alpha, *values])
    return [path, table]


def _save(folder: Path, clip: "LoadedCLIP", weights: dict[str, Any]) -> None:
    """Write weights as a work folder."""
    from clip_jax.pretrained.trees import from_variables
    from clip_jax.pretrained.work_folder import RunDescription, write_work_folder

    description = RunDescription(clip.name, clip.config, clip.tokenizer_spec, clip.preprocessing)
    arrays = from_variables(weights["params"], weights["batch_stats"])
    write_work_folder(folder, description, arrays)


def curve_text(curve: Curve) -> str:
    """Return the lines to print."""
    metric = curve.metric
    lines = [f"{'alpha':>6} {'new ' + metric:>12} {'kept ' + metric:>12}"]
    for point in curve.points:
        chosen = "  best" if point is curve.best else ""
        new, kept = 100 * point.new[metric], 100 * point.kept[metric]
        lines.append(f"{point.alpha:6.2f} {new:10.2f} % {kept:10.2f} %{chosen}")
    return "\n".join([*lines, f"written: {', '.join(map(str, curve.paths))}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, measure and print the curve; return the exit code."""
    print(curve_text(measure(parse(argv))))
    return 0


if __name__ == "__main__":
    run_command(main)
