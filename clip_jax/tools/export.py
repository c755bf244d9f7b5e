"""Export a model: `python -m clip_jax.export MODEL OUT --format stablehlo` or `onnx`.

OUT is a new folder with a program a tower, which runs without this package: images as uint8 pixels
or token ids in, unit features out, any number of them. Images may have any size in StableHLO, and
have the model's in ONNX. Each program is run against the model before it is written, and its file's
metadata holds the largest difference.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from clip_jax.errors import run_command
from clip_jax.files import check_local

FORMATS = ("stablehlo", "onnx")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.export", description=__doc__)
    add = parser.add_argument
    add("model", help="a run, or a published model's path or name")
    add("out", help="the folder to write; it must not hold anything")
    add("--format", default="stablehlo", choices=FORMATS, help="of the programs")
    add("--tower", choices=("image", "text"), help="export one; else both")
    add("--int8", action="store_true", help="hold matrices in int8: a quarter of the size")
    add("--architecture", help='of a bare file: "NAME" or "NAME:TAG"')
    add("--tokenizer", help="its tokenizer.json or SentencePiece .model")
    return parser.parse_args(argv)


def export_model(args: argparse.Namespace) -> list[dict[str, str]]:
    """Export what the command line says; return the metadata of each program.

    Raises:
      UserError: the model cannot be read, the folder holds something or cannot be written, the
        format's packages are missing, or a program differs from the model by more than it may.
    """
    from clip_jax import api
    from clip_jax.exporting.onnx_file import import_onnx, write_onnx
    from clip_jax.exporting.stablehlo import write_stablehlo
    from clip_jax.exporting.tower import tower_program
    from clip_jax.pretrained.export import new_folder

    check_local({"OUT": args.out})
    is_onnx = args.format == "onnx"
    if is_onnx:
        import_onnx()
    write = write_onnx if is_onnx else write_stablehlo
    # Claimed first: a wrong name answers before a big model is read.
    with new_folder(Path(args.out)) as part:
        clip = api.load(
            args.model, args.architecture, tokenizer=args.tokenizer, towers=args.tower or "both"
        )
        return [
            write(tower_program(clip, tower, resizes=not is_onnx, int8=args.int8), part)
            for tower in ((args.tower,) if args.tower else ("image", "text"))
        ]


def exported_text(out: str, values: Mapping[str, str]) -> str:
    """Return the line that the command prints of a program."""
    text = (
        f"{out}: {values['model']}, {values['tower']} tower, {values['input']} to"
        f" {values['output']}; differs from the model by {values['largest_difference']} at most"
    )
    if "onnxruntime_ms" in values:
        text += (
            f"; {values['timed_rows']} rows take onnxruntime {values['onnxruntime_ms']} ms on cpu,"
            f" the model {values['model_ms']} ms on {values['model_device']}"
        )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, export, and print what was measured; return the exit code."""
    args = parse(argv)
    for values in export_model(args):
        print(exported_text(args.out, values))
    return 0


if __name__ == "__main__":
    run_command(main)
