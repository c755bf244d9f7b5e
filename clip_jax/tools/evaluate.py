"""Evaluate a model: `python -m clip_jax.evaluate --model MODEL --task TASKS --data SOURCE`.

MODEL is what `clip_jax.load` reads: a run's work folder or a published file or folder. What a run's
own config names need not be said again: `python -m clip_jax.evaluate --model runs/emoji`.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_jax.errors import UserError, run_command
from clip_jax.sections import EvalSection

if TYPE_CHECKING:
    from clip_jax.evaluation.run import EvalSpec, Evaluation


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what it leaves out comes from the run's own config."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.evaluate", description=__doc__)
    parser.add_argument("--model", "--workdir", required=True, help="a run, or a published model")
    parser.add_argument("--architecture", help='of a bare file: "NAME" or "NAME:TAG"')
    parser.add_argument("--tokenizer", help="its tokenizer.json or SentencePiece .model")
    parser.add_argument("--data", help="tar shards; .cls members hold the classes")
    parser.add_argument("--task", action="append", help="one or several, joined by commas")
    parser.add_argument(
        "--dataset", help='a data set whose names and prompts are shipped: "imagenet1k", "pets"'
    )
    parser.add_argument("--classnames", help="class names: one a line, or a JSON list")
    parser.add_argument(
        "--template",
        action="append",
        help='a prompt with {}, "imagenet_1", "imagenet_7", "imagenet_80", or a file; repeatable',
    )
    parser.add_argument("--train-data", help="labeled shards that probes learn from")
    parser.add_argument(
        "--val-data", help="labeled shards that choose C of linear_probe and few_shot"
    )
    parser.add_argument("--ablate", action="append", help="prompts to compare, as --template")
    parser.add_argument("--neighbours", type=int, default=20, help="of knn")
    parser.add_argument("--shots", default="1,2,4,8,16", help="of few_shot")
    parser.add_argument("--batch-size", type=int, help="images at a time")
    parser.add_argument("--out", help="where results go; the model's folder, or eval-NAME")
    parser.add_argument(
        "--confuse-equal-captions",
        action="store_true",
        help="as CLIP_benchmark: an equal caption of another image is a wrong answer",
    )
    return parser.parse_args(argv)


def evaluate_model(model: str, request: "EvalSpec", out: str | Path, **load: Any) -> "Evaluation":
    """Evaluate what `clip_jax.load` reads; the seconds are those of loading and evaluating."""
    from clip_jax.api import encoders_of, load_over_devices
    from clip_jax.evaluation.run import run_evaluation

    start = time.perf_counter()
    clip, mesh = load_over_devices(model, **load)
    evaluation = run_evaluation(encoders_of(clip, mesh), request, folder=out, mesh=mesh)
    return dataclasses.replace(evaluation, seconds=time.perf_counter() - start)


def evaluate_workdir(
    workdir: str,
    *,
    data: str | None = None,
    classnames: str | None = None,
    templates: Sequence[str] | None = None,
    batch_size: int | None = None,
    **more: Any,
) -> "Evaluation":
    """Evaluate the newest checkpoint of a run as its config says.

    Args:
      more: other fields of `evaluation.run.EvalSpec` to set, and `out`.

    Raises:
      UserError: the folder is no work folder, or there is nothing to evaluate on.
    """
    from clip_jax.evaluation.run import EvalSpec
    from clip_jax.pretrained.work_folder import read_description

    description = read_description(workdir)
    # A model that was converted names nothing to evaluate on; an older run lacks newer fields.
    section = dataclasses.asdict(EvalSection()) | (description.config.get("eval") or {})
    if not (data or section["data"]):
        raise UserError(f"the run in {workdir} names no evaluation data; give --data")
    out = more.pop("out", None) or workdir
    own = {
        "data": data or section["data"],
        "classnames": classnames or section["classnames"],
        "templates": templates or section["templates"],
        "batch_size": batch_size or section["batch_size"],
        "tasks": section["tasks"],
        "train_data": section["train_data"],
        "ablate": section["ablate"],
        "pretrained": Path(workdir).name,
    }
    request = EvalSpec(**own | {name: value for name, value in more.items() if value})
    return evaluate_model(workdir, request, out)


def evaluation_text(evaluation: "Evaluation") -> str:
    """Return the lines to print: each share with its interval of 95 %, and the files written."""
    from clip_jax.evaluation.results import COUNTS

    lines = [f"evaluation in {evaluation.seconds:.0f} s:"]
    for result in evaluation.results:
        lines.append(f"  {result['task']} on {result['dataset']}, {result['images']:,} images")
        for name, value in result["metrics"].items():
            if name in COUNTS:
                lines.append(f"    {name:<28} {value:8.4g}")
                continue
            line = f"    {name:<28} {100 * value:6.2f} %"
            if name in result["intervals"]:
                low, high = result["intervals"][name]
                line += f"   {100 * low:.1f} to {100 * high:.1f}"
            lines.append(line)
    return "\n".join([*lines, f"written: {', '.join(map(str, evaluation.paths))}"])


def _shot_counts(text: str) -> list[int]:
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise UserError(f"--shots {text!r} is no list of whole numbers such as 1,2,4") from None


def _request_fields(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of `evaluation.run.EvalSpec`, by field.

    Raises:
      UserError: a number is no count, or a data set without shipped names has none of its own.
    """
    from clip_jax.evaluation.prompts import load_templates, shipped_class_names, shipped_templates
    from clip_jax.evaluation.tasks import ZERO_SHOT

    shots = _shot_counts(args.shots)
    counts = (args.neighbours, args.batch_size, *shots)
    if min(n for n in counts if n is not None) < 1:
        raise UserError("--neighbours, --batch-size and --shots must be at least 1")

    def prompts(items: Sequence[str] | None) -> list[str]:
        return [
            t
            for item in items or ()
            for t in (load_templates([item]) if "{" in item else load_templates(item))
        ]

    tasks = [name for item in args.task or () for name in item.split(",")]
    fields = {
        "data": args.data,
        "classnames": args.classnames,
        "templates": prompts(args.template),
        "ablate": prompts(args.ablate),
        "tasks": tasks,
        "train_data": args.train_data,
        "val_data": args.val_data,
        "batch_size": args.batch_size,
        "dataset": args.dataset,
        "neighbours": args.neighbours,
        "shots": shots,
        "confuse_equal_captions": args.confuse_equal_captions,
    }
    if args.dataset in shipped_class_names() and not args.classnames:
        fields["classnames"] = args.dataset
    elif args.dataset and not args.classnames and (not tasks or ZERO_SHOT in tasks):
        # Else a run's own names would be taken for another data set's classes.
        raise UserError(
            f"no class names are shipped for --dataset {args.dataset}; give --classnames, or one "
            f"of {', '.join(sorted(shipped_class_names()))}"
        )
    if args.dataset in shipped_templates() and not args.template:
        fields["templates"] = load_templates(args.dataset)
    return {name: value for name, value in fields.items() if value}


def main() -> int:
    """Parse and evaluate; the exit code."""
    from clip_jax.evaluation.run import EvalSpec
    from clip_jax.evaluation.tasks import LEARNING, check_tasks
    from clip_jax.pretrained.work_folder import is_work_folder

    args = parse(None)
    fields = _request_fields(args)
    tasks = check_tasks(fields.get("tasks", ()))
    if is_work_folder(args.model):
        print(evaluation_text(evaluate_workdir(args.model, out=args.out, **fields)))
        return 0
    if "data" not in fields:
        raise UserError(f"--data is missing: {args.model} names no evaluation data of its own")
    if "classnames" not in fields and not set(tasks) & {*LEARNING, "zeroshot_retrieval"}:
        raise UserError("classification needs class names; give --classnames or --dataset")
    out = args.out or f"eval-{Path(args.model).stem}"
    load = {"architecture": args.architecture, "tokenizer": args.tokenizer}
    print(evaluation_text(evaluate_model(args.model, EvalSpec(**fields), out, **load)))
    return 0


if __name__ == "__main__":
    run_command(main)
