"""Make a step of a run again and look into it: `python -m clip_jax.replay WORKDIR --step N`.

It prints the loss beside the logged one, which it equals to the bit on the same devices, the
samples, the norms of gradients by module and, where something was not finite, where that began.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_jax.data.formats.remote import is_url
from clip_jax.errors import check_counts, plain, run_command
from clip_jax.files import atomic_write, check_local, make_folder

if TYPE_CHECKING:
    from clip_jax.training.replay import Replay, ReplayedSample

SHOWN_IMAGES, SHOWN_ROWS, BAR = 48, 5, 40


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m clip_jax.replay", description=__doc__)
    parser.add_argument("workdir", metavar="WORKDIR", help="the work folder of the run, or its URL")
    parser.add_argument("--step", type=int, required=True, help="the step, from 1")
    parser.add_argument(
        "--around", type=int, default=0, help="make so many steps before and after, for their curve"
    )
    parser.add_argument("--data", default="", help="where the training data lie now, if they moved")
    parser.add_argument(
        "--out", help="folder of the results; WORKDIR/replay-N, or replay-NAME-N of a URL"
    )
    return parser.parse_args(argv)


def write_replay(result: "Replay", out: Path) -> list[Path]:
    """Write the numbers and the images of a replay; return the files.

    Raises:
      UserError: they cannot be written.
    """
    from clip_jax.evaluation.plots import caption_grid
    from clip_jax.training.metrics import to_json

    make_folder(out, flag="--out")
    values = dataclasses.asdict(dataclasses.replace(result, images_BHWC=None))  # type: ignore[arg-type]
    del values["images_BHWC"]
    path = out / "step.json"
    with atomic_write(path) as partial:
        # JSON has no number that is not finite.
        values = to_json(values | {"is_equal": result.is_equal})
        partial.write_text(json.dumps(values, indent=1) + "\n")
    worst = by_loss(result)[:SHOWN_IMAGES]
    captions = [
        f"{mean_loss(s):.3f} (i {s.image_loss:.3f}, t {s.text_loss:.3f}) {s.key} {s.caption}"
        for _, s in worst
    ]
    images = [result.images_BHWC[i] for i, _ in worst]
    return [path, caption_grid(images, captions, out / "samples.png")] if worst else [path]


def mean_loss(sample: "ReplayedSample") -> float:
    """Return the mean of a sample's losses in both directions."""
    return (sample.image_loss + sample.text_loss) / 2


def by_loss(result: "Replay") -> list[tuple[int, "ReplayedSample"]]:
    """Return the valid samples with their rows, those that are not finite and the worst first."""
    valid = [(i, sample) for i, sample in enumerate(result.samples) if sample.valid]

    def rank(item: tuple[int, "ReplayedSample"]) -> float:
        loss = mean_loss(item[1])
        return -loss if math.isfinite(loss) else -math.inf

    return sorted(valid, key=rank)


def shard_losses(result: "Replay") -> dict[str, tuple[float, int]]:
    """Return each shard's mean loss and number of samples, the worst first."""
    losses: dict[str, list[float]] = {}
    for sample in result.samples:
        if sample.valid:
            losses.setdefault(sample.key.partition("/")[0], []).append(mean_loss(sample))
    means = {shard: (sum(rows) / len(rows), len(rows)) for shard, rows in losses.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1][0]))


def replay_text(result: "Replay") -> str:
    """Return the lines to print."""
    m = result.metrics
    equal = {True: "equal to the bit", False: "not equal", None: "the run did not log this step"}
    logged = "" if result.logged is None else f", logged {result.logged['loss']}"
    here, there = result.devices
    lines = [
        f"step {result.step}, made again from step {result.start}",
        f"loss {m['loss']}{logged}: {equal[result.is_equal]}",
        f"learning rate {m['learning_rate']:.4g}  scale {math.exp(m['logit_scale']):.4g}  "
        f"gradient norm {m['grad_norm']:.4g}  valid {m['ok']:.1%}",
    ]
    if there and here != there:
        lines.append(f"made on {here}, the run on {there}: equal up to rounding")
    for number, (stage, place) in enumerate(result.not_finite.items()):
        lines.append(f"{'not finite first' if not number else 'then'}: {stage}, {place}")
    lines.append("samples, the highest losses first (image to text, text to image):")
    for _, s in by_loss(result)[:SHOWN_ROWS]:
        lines.append(f"  {s.image_loss:9.4f} {s.text_loss:9.4f}  {s.key}  {s.caption[:60]}")
    lines.append("shards, the highest mean losses first:")
    for shard, (loss, count) in list(shard_losses(result).items())[:SHOWN_ROWS]:
        lines.append(f"  {loss:9.4f}  {shard} ({count} samples)")
    lines.append("gradient norms by module (and the parameters'):")
    for name, norm in result.gradient_norms.items():
        lines.append(f"  {norm:9.3g} {result.parameter_norms[name]:9.3g}  {name}")
    return "\n".join([*lines, *curve_lines(result.curve, result.step)])


def curve_lines(curve: Sequence[Mapping[str, Any]], step: int) -> list[str]:
    """Return a line for each step, its loss as a bar; none for a single step."""
    if len(curve) < 2:
        return []
    finite = [point["loss"] for point in curve if math.isfinite(point["loss"])]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    lines = ["step       loss  gradient  learning rate"]
    for point in curve:
        loss = point["loss"]
        share = (loss - low) / ((high - low) or 1.0) if math.isfinite(loss) else 1.0
        mark = ">" if point["step"] == step else " "
        lines.append(
            f"{mark}{int(point['step']):<7} {loss:7.4f} {point['grad_norm']:9.3g} "
            f"{point['learning_rate']:9.3g} {'#' * round(share * BAR)}"
        )
    return lines


def main() -> int:
    """Parse the flags, make the step again and print what it was; return the exit code."""
    args = parse(None)
    check_counts({"--step": args.step})
    from clip_jax.training.bucket_workdir import place_name
    from clip_jax.training.replay import replay

    check_local({"--out": args.out})
    out = args.out
    if out is None and is_url(args.workdir):
        out = f"replay-{place_name(args.workdir)}-{args.step}"
    result = replay(args.workdir, args.step, around=args.around, data=args.data)
    files = write_replay(result, Path(out or Path(args.workdir) / f"replay-{args.step}"))
    print(plain(replay_text(result)))
    print(f"written: {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    run_command(main)
