"""Evaluate a run: `python -m clip_jax.evaluate --workdir DIR [--data SHARDS --classnames FILE]`."""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from clip_jax.config import EvalSection
from clip_jax.errors import UserError, run_command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what it leaves out comes from the run's own config."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="the work folder of a run")
    parser.add_argument("--data", help="tar shards with .cls members")
    parser.add_argument("--classnames", help="class names: one a line, or a JSON list")
    parser.add_argument("--template", action="append", help="a prompt with {}; may be repeated")
    parser.add_argument("--batch-size", type=int, help="images at a time")
    return parser.parse_args(argv)


def evaluate_workdir(
    workdir: str,
    *,
    data: str | None = None,
    classnames: str | None = None,
    templates: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> str:
    """Evaluate the newest checkpoint of a run; returns the table to print.

    Raises:
      UserError: the folder is no work folder, or there is nothing to evaluate on.
    """
    from clip_jax import api
    from clip_jax.evaluation.run import CURVE, GRID, RESULTS, run_evaluation, table
    from clip_jax.workdir import read_description

    description = read_description(workdir)
    # A model that was converted names nothing to evaluate on.
    section = description.config.get("eval") or dataclasses.asdict(EvalSection())
    data, classnames = data or section["data"], classnames or section["classnames"]
    if not data or not classnames:
        raise UserError(
            f"the run in {workdir} names no evaluation data; give --data and --classnames"
        )
    start = time.perf_counter()
    clip = api.load(workdir)
    results = run_evaluation(
        clip.encode_image,
        clip.encode_text,
        clip.known_tokenizer(),
        image_size=clip.config.vision.image_size,
        context_length=clip.config.text.context_length,
        preprocess=clip.preprocessing,
        logit_scale=clip.scale,
        model=description.model_name,
        data=data,
        classnames=classnames,
        templates=templates or section["templates"],
        batch_size=batch_size or section["batch_size"],
        workdir=workdir,
    )
    written = ", ".join(str(Path(workdir) / name) for name in (RESULTS, GRID, CURVE))
    return table(results, time.perf_counter() - start) + f"\nwritten: {written}"


def main() -> int:
    """Parse and evaluate; the exit code."""
    args = parse(None)
    print(
        evaluate_workdir(
            args.workdir,
            data=args.data,
            classnames=args.classnames,
            templates=args.template,
            batch_size=args.batch_size,
        )
    )
    return 0


if __name__ == "__main__":
    run_command(main)
