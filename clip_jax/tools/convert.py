"""Convert a checkpoint: `python -m clip_jax.convert SRC DST --to {own,open_clip,hf,peft}`.

SRC is anything that `clip_jax.load` takes: a run, a published file or folder, a published model's
name. DST is a new folder, or `hf-hub:owner/name`: a repository of the hub, with a card.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError, run_command
from clip_jax.files import check_local
from clip_jax.pretrained.repositories import HUB_PREFIX


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.convert", description=__doc__)
    add = parser.add_argument
    add("src", help="a run's work folder, or a published file, folder or name")
    add("dst", help="the folder to write, or hf-hub:owner/name; it must not hold anything")
    add(
        "--to",
        default="own",
        choices=("own", "open_clip", "hf", "peft"),
        help="own: a work folder of this project with one safetensors file; peft: of a run with "
        "adapters these alone, for transformers' model",
    )
    add("--architecture", "--model", help='of a bare file: "NAME" or "NAME:TAG"')
    add("--adapters", help="a folder of PEFT's to merge into SRC")
    add("--tokenizer", help="its tokenizer.json or SentencePiece .model")
    add("--image-size", type=int, help="interpolate to images of this size, pixels")
    add("--context-length", type=int, help="shorten to texts of this length, tokens")
    add("--private", action="store_true", help="of a new repository: its owner alone sees it")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class ConvertedModel:
    """A model that was written.

    Attributes:
      place: its folder, or the address of its repository.
      name: the model's.
      format: "own", "open_clip" or "hf".
      num_values: how many numbers it has.
    """

    place: str
    name: str
    format: str
    num_values: int


def convert(
    src: str,
    dst: str,
    *,
    to: str = "own",
    private: bool = False,
    **load: Any,
) -> ConvertedModel:
    """Read a checkpoint and write it in another format.

    Args:
      src: what `clip_jax.load` takes.
      dst: the folder to write, or "hf-hub:owner/name"; it must not hold anything.
      to: "own", "open_clip", "hf" or "peft".
      private: whether its owner alone sees a new repository.
      load: `architecture`, `tokenizer`, `image_size`, `context_length` and `adapters`, as
        `convert_to` takes them.

    Raises:
      UserError: the checkpoint cannot be read, the format has no such model, or the folder or
        repository holds something or may not be written.
    """
    check_local({"DST": dst})
    if not dst.startswith(HUB_PREFIX):
        return convert_to(src, Path(dst), to=to, **load)
    from clip_jax.pretrained.hub_upload import check_free, upload

    name = dst.removeprefix(HUB_PREFIX)
    check_free(name)  # first: a wrong name answers before a big model is read
    with tempfile.TemporaryDirectory(prefix="clip_jax-upload-") as parent:
        folder = Path(parent) / "model"
        converted = convert_to(src, folder, to=to, card_of=name, **load)
        url = upload(folder, name, private=private or None)
    return dataclasses.replace(converted, place=url)


def convert_to(
    src: str,
    folder: Path,
    *,
    to: str,
    architecture: str | None = None,
    tokenizer: str | None = None,
    image_size: int | None = None,
    context_length: int | None = None,
    adapters: str | None = None,
    card_of: str = "",
) -> ConvertedModel:
    """Read a checkpoint and write it to a folder.

    Args:
      architecture: the model of a bare file, "NAME" or "NAME:TAG".
      tokenizer: its file, where the checkpoint came without one.
      image_size, context_length: sizes to interpolate to, in pixels and tokens.
      adapters: a folder of PEFT's that is merged in.
      card_of: a repository whose card is written too; empty writes none.

    Raises:
      UserError: as `convert` has it.
    """
    from clip_jax import api
    from clip_jax.pretrained.export import WRITERS, new_folder
    from clip_jax.pretrained.trees import from_variables
    from clip_jax.pretrained.work_folder import RunDescription
    from clip_jax.tools.model_card import card_text, measured_rows
    from clip_jax.training.bucket_copy import local_copy

    if to == "peft":
        options = (architecture, tokenizer, image_size, context_length, adapters)
        if any(option is not None for option in options):
            raise UserError(
                "--to peft writes a run's own adapters as they are; it takes no --architecture, "
                "--tokenizer, --image-size, --context-length or --adapters"
            )
        return _convert_adapters(src, folder, card_of)
    # Claimed first: a wrong name answers before a big model is read.
    with new_folder(folder) as part:
        clip = api.load(
            src,
            architecture,
            tokenizer=tokenizer,
            image_size=image_size,
            context_length=context_length,
            adapters=adapters,
        )
        description = RunDescription(
            clip.name, clip.config, clip.tokenizer_spec, clip.preprocessing
        )
        arrays = from_variables(clip.params, clip.batch_stats)
        WRITERS[to](part, description, arrays)
        num_values = sum(x.size for x in arrays.values())
        if card_of:
            # Other sizes than those that were measured have no measurements.
            sized = image_size or context_length
            rows = [] if sized else measured_rows(local_copy(src), clip.scale)
            card = card_text(card_of, clip.name, clip.config, num_values, to, rows)
            (part / "README.md").write_text(card, encoding="utf-8")
    return ConvertedModel(str(folder), clip.name, to, num_values)


def _convert_adapters(src: str, folder: Path, card_of: str) -> ConvertedModel:
    """Write the adapters of a run, and a card where `card_of` names a repository."""
    from clip_jax.pretrained.export import new_folder
    from clip_jax.pretrained.peft import write_peft
    from clip_jax.pretrained.work_folder import read_description
    from clip_jax.tools.model_card import card_text
    from clip_jax.training.adapters import read_run_adapters
    from clip_jax.training.bucket_copy import local_copy

    with new_folder(folder) as part:
        src = local_copy(src)
        description = read_description(src)
        leaves, alpha = read_run_adapters(src, description.model)
        base = str(description.config.get("model", {}).get("init_from", ""))
        num_values = write_peft(part, leaves, description.model, alpha=alpha, base=base)
        if card_of:
            name, sizes = description.model_name, description.model
            card = card_text(card_of, name, sizes, num_values, "peft", [], base=base or "BASE")
            (part / "README.md").write_text(card, encoding="utf-8")
    return ConvertedModel(str(folder), description.model_name, "peft", num_values)


def converted_text(model: ConvertedModel) -> str:
    """Return the line that the command prints."""
    return f"{model.place}: {model.name}, {model.num_values:,} numbers in the format {model.format}"


def main() -> int:
    """Parse the flags, convert and print the result; return the exit code."""
    print(converted_text(convert(**vars(parse(None)))))
    return 0


if __name__ == "__main__":
    run_command(main)
