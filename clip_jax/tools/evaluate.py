"""Evaluate a model: `python -m clip_jax.evaluate --model MODEL --task TASKS --data SOURCE`.

MODEL is what `clip_jax.load` takes: a run's work folder, or a published file, folder or name, such
as ViT-B-32:laion2b_s34b_b79k or hf-hub:owner/name. What a run's own config names need not be said
again: `python -m clip_jax.evaluate --model runs/emoji`.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_jax.data.formats.remote import is_url
from clip_jax.errors import UserError, note, run_command
from clip_jax.executors.parts import Executor
from clip_jax.sections import EvalSection
from clip_jax.tools.executor_flags import add_executor_flags, executor_of, pop_executor_flags

if TYPE_CHECKING:
    from clip_jax.evaluation.run import Evaluation
    from clip_jax.evaluation.spec import EvalSpec


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; what it leaves out comes from the run's own config.

    The flags that say what to evaluate are stored by the names of `evaluation.spec.EvalSpec`.
    """
    parser = argparse.ArgumentParser(prog="python -m clip_jax.evaluate", description=__doc__)
    parser.add_argument("--model", "--workdir", help="a run, or a published model's path or name")
    parser.add_argument(
        "--embeddings", help="in place of --data: a folder of clip_jax.embed; nothing is encoded"
    )
    parser.add_argument("--train-embeddings", help="the same, that probes learn from")
    parser.add_argument("--labels", help="of --embeddings: a .npy, or a number a line")
    parser.add_argument("--class-embeddings", help="a .npy [classes, features]: needs no model")
    parser.add_argument("--architecture", help='of a bare file: "NAME" or "NAME:TAG"')
    parser.add_argument("--tokenizer", help="its tokenizer.json or SentencePiece .model")
    parser.add_argument("--dtype", default="float32", help="float32, or bfloat16: half the memory")
    parser.add_argument(
        "--data",
        help="tar shards, whose .cls members hold the classes; a data set's folder in "
        "CLIP_benchmark's layout; or SugarCrepe's, Winoground's or WinoGAViL's file",
    )
    parser.add_argument("--split", default="test", help="of a data set's folder")
    parser.add_argument("--train-split", default="train", help="that probes learn from")
    parser.add_argument("--val-split", default="", help="that chooses C")
    parser.add_argument(
        "--task", dest="tasks", action="append", help="one or several, joined by commas"
    )
    parser.add_argument(
        "--dataset", help='a data set whose names and prompts are shipped: "imagenet1k", "pets"'
    )
    parser.add_argument("--classnames", help="class names: one a line, or a JSON list")
    parser.add_argument(
        "--template",
        dest="templates",
        action="append",
        help='a prompt with {}, "imagenet_1", "imagenet_7", "imagenet_80", or a file; repeatable',
    )
    parser.add_argument("--train-data", help="labeled shards that probes learn from")
    parser.add_argument(
        "--val-data", help="labeled shards that choose C of linear_probe and few_shot"
    )
    parser.add_argument("--ablate", action="append", help="prompts to compare, as --template")
    parser.add_argument("--neighbors", type=int, help="of knn")
    # Its spelling in earlier versions.
    parser.add_argument("--neighbours", dest="neighbors", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--shots", help="of few_shot, such as 1,2,4")
    parser.add_argument("--batch-size", type=int, help="images at a time")
    parser.add_argument("--out", help="where results go; the model's folder, or eval-NAME")
    parser.add_argument(
        "--confuse-equal-captions",
        action="store_true",
        help="as CLIP_benchmark: an equal caption of another image is a wrong answer",
    )
    add_executor_flags(parser)
    return parser.parse_args(argv)


def evaluate_model(
    model: str,
    spec: "EvalSpec",
    out: str | Path,
    *,
    executor: Executor | None = None,
    **load: Any,
) -> "Evaluation":
    """Evaluate what `clip_jax.load` reads; the seconds are those of loading and evaluating.

    Args:
      executor: whose workers encode the images; None is this process.
      load: `architecture`, `tokenizer` and `dtype`, as `api.load_encoders` takes them.

    Raises:
      UserError: the model, the data or the names cannot be read, or do not fit each other.
    """
    from clip_jax.api import load_encoders
    from clip_jax.evaluation.run import run_evaluation
    from clip_jax.tools.encode_elsewhere import encode_elsewhere

    start = time.perf_counter()
    encoders = load_encoders(model, **load)
    if executor is not None:
        elsewhere = encode_elsewhere(executor, {"model": model, **load})
        encoders = dataclasses.replace(encoders, encode_elsewhere=elsewhere)
    evaluation = run_evaluation(encoders, spec, folder=out)
    return dataclasses.replace(evaluation, seconds=time.perf_counter() - start)


def evaluate_workdir(
    workdir: str,
    *,
    out: str | Path | None = None,
    dtype: str = "float32",
    executor: Executor | None = None,
    **changes: Any,
) -> "Evaluation":
    """Evaluate the newest checkpoint of a run as its config says.

    Args:
      out: where the results go; None is the work folder.
      dtype: of the model's products.
      executor: as `evaluate_model`.
      changes: fields of `evaluation.spec.EvalSpec` other than the config's.

    Raises:
      UserError: the folder is no work folder, or there is nothing to evaluate on.
    """
    spec = workdir_spec(workdir, **changes)
    return evaluate_model(workdir, spec, out or workdir, executor=executor, dtype=dtype)


def workdir_spec(workdir: str, **changes: Any) -> "EvalSpec":
    """Return what the config of a run evaluates, with changes."""
    from clip_jax.evaluation.caption_choice import CHOICE
    from clip_jax.evaluation.run import source_class_names
    from clip_jax.evaluation.spec import EvalSpec
    from clip_jax.evaluation.tasks import ZERO_SHOT
    from clip_jax.pretrained.work_folder import read_description

    # A model that was converted names nothing to evaluate on; an older run lacks newer fields.
    saved = read_description(workdir).config.get("eval") or {}
    known = {field.name for field in dataclasses.fields(EvalSection)}
    section = EvalSection(**{name: value for name, value in saved.items() if name in known})
    needs_names = ZERO_SHOT in section.tasks and CHOICE not in changes.get("tasks", ())
    if "data" in changes and "classnames" not in changes and needs_names:
        if source_class_names(changes["data"]):
            changes["classnames"] = ""  # the data's own
        elif section.classnames and changes["data"] != section.data:
            note(
                f"class names are those of the run, {section.classnames}; --classnames gives others"
            )
    spec = EvalSpec.from_section(section, **{"pretrained": Path(workdir).name} | changes)
    if not spec.data:
        raise UserError(f"the run in {workdir} names no evaluation data; give --data")
    return spec


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


def spec_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `evaluation.spec.EvalSpec` that the command line gives.

    Raises:
      UserError: a number is no count, or a data set without shipped names has none of its own.
    """
    from clip_jax.evaluation.benchmark_folder import find_benchmark_folder
    from clip_jax.evaluation.prompts import load_templates, shipped_class_names, shipped_templates
    from clip_jax.evaluation.spec import EvalSpec
    from clip_jax.evaluation.tasks import ZERO_SHOT

    values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(EvalSpec)}
    values["shots"] = shots = _shot_counts(args.shots)
    counts = [args.neighbors, args.batch_size, *shots]
    if any(n is not None and n < 1 for n in counts):
        raise UserError("--neighbors, --batch-size and --shots must be at least 1")
    values["templates"] = _load_prompts(args.templates)
    values["ablate"] = _load_prompts(args.ablate)
    values["tasks"] = tasks = [name for item in args.tasks or () for name in item.split(",")]
    has_own = find_benchmark_folder(args.data or "", args.split) or args.class_embeddings
    if args.dataset in shipped_class_names() and not args.classnames:
        values["classnames"] = args.dataset
    elif args.dataset and not (args.classnames or has_own) and (not tasks or ZERO_SHOT in tasks):
        # Else a run's own names would be taken for another data set's classes.
        raise UserError(
            f"no class names are shipped for --dataset {args.dataset}; give --classnames, or one "
            f"of {', '.join(sorted(shipped_class_names()))}"
        )
    if args.dataset in shipped_templates() and not args.templates:
        values["templates"] = load_templates(args.dataset)
    return {name: value for name, value in values.items() if value}


def _shot_counts(text: str | None) -> list[int]:
    try:
        return [int(n) for n in text.split(",")] if text is not None else []
    except ValueError:
        raise UserError(f"--shots {text!r} is no list of whole numbers such as 1,2,4") from None


def _load_prompts(items: Sequence[str] | None) -> list[str]:
    """Return the prompts of `--template` or `--ablate`: prompts, names of lists, and files."""
    from clip_jax.evaluation.prompts import load_templates

    return [
        template
        for item in items or ()
        for template in (load_templates([item]) if "{" in item else load_templates(item))
    ]


def model_label(model: str) -> tuple[str, str]:
    """Return what a model is called in file names, and its tag (or repository) in the results.

    Raises:
      UserError: it is nearly the name of a published model, and of none.
    """
    from clip_jax.pretrained.by_name import parse_name

    name = parse_name(model)
    if name is None:
        return Path(model).stem, ""
    return f"{name.label}-{name.pretrained}" if name.pair else name.label, name.pretrained


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, evaluate and print the results; return the exit code."""
    args = parse(argv)
    with executor_of(pop_executor_flags(args)) as executor:
        print(evaluation_text(evaluate(args, executor)))
    return 0


def evaluate(args: argparse.Namespace, executor: Executor | None) -> "Evaluation":
    """Evaluate what a command line names.

    Raises:
      UserError: something is missing, or does not fit.
    """
    from clip_jax.evaluation.benchmark_folder import describe_source
    from clip_jax.evaluation.caption_choice import CHOICE
    from clip_jax.evaluation.run import source_class_names
    from clip_jax.evaluation.spec import EvalSpec
    from clip_jax.evaluation.tasks import RETRIEVAL, TRAINED_TASKS, check_tasks
    from clip_jax.files import check_local
    from clip_jax.pretrained.work_folder import is_work_folder
    from clip_jax.tools.evaluate_embeddings import evaluate_embeddings
    from clip_jax.training.bucket_copy import local_copy
    from clip_jax.training.bucket_workdir import place_name

    check_local({"--out": args.out})
    if args.model and is_url(args.model):
        args.out = args.out or f"eval-{place_name(args.model)}"
        args.model = local_copy(args.model)
    changes = spec_changes(args)
    if args.embeddings:
        check_tasks(changes.get("tasks", ()))
        if executor is not None:
            raise UserError("--embeddings encodes nothing: leave --executor out")
        return evaluate_embeddings(args, changes)
    if not args.model:
        raise UserError("--model is missing; only --embeddings can do without")
    if "data" in changes:
        splits = {"train_split": args.train_split, "val_split": args.val_split}
        changes = describe_source(changes, split=args.split, **splits)
    tasks = changes.get("tasks", ())
    check_tasks(tasks)
    if is_work_folder(args.model):
        elsewhere = {"executor": executor, "dtype": args.dtype}
        return evaluate_workdir(args.model, out=args.out, **elsewhere, **changes)
    if "data" not in changes:
        raise UserError(f"--data is missing: {args.model} names no evaluation data of its own")
    needs_names = "classnames" not in changes and not set(tasks) & {
        *TRAINED_TASKS,
        RETRIEVAL,
        CHOICE,
    }
    if needs_names and not source_class_names(changes["data"]):
        raise UserError("classification needs class names; give --classnames or --dataset")
    label, tag = model_label(args.model)
    spec = EvalSpec.from_section(EvalSection(), **{"pretrained": tag} | changes)
    out = args.out or f"eval-{label}"
    load = {"architecture": args.architecture, "tokenizer": args.tokenizer, "dtype": args.dtype}
    return evaluate_model(args.model, spec, out, executor=executor, **load)


if __name__ == "__main__":
    run_command(main)
