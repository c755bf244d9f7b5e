"""The page of an uploaded model: what it is, how it is loaded, what was measured."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clip_jax.models.clip import CLIPConfig

LOADING = {
    "own": ("clip_jax", 'import clip_jax\n\nclip = clip_jax.load("hf-hub:{name}")'),
    "open_clip": (
        "open_clip",
        "import clip_jax\n\n"
        'clip = clip_jax.load("hf-hub:{name}")\n\n'
        "import open_clip\n\n"
        'model, preprocess = open_clip.create_model_from_pretrained("hf-hub:{name}")',
    ),
    "hf": (
        "transformers",
        "import clip_jax\n\n"
        'clip = clip_jax.load("hf-hub:{name}")\n\n'
        "import transformers\n\n"
        'model = transformers.AutoModel.from_pretrained("{name}")',
    ),
    "peft": (
        "peft",
        "import clip_jax\nimport huggingface_hub\n\n"
        'folder = huggingface_hub.snapshot_download("{name}")\n'
        'clip = clip_jax.load("{base}", adapters=folder)',
    ),
}
"""For each format, the library that the hub names for it, and how it is loaded."""


def measured_rows(workdir: str | Path, scale: float) -> list[dict[str, Any]]:
    """Return the results in a run's `eval.json`; none where they are of other weights.

    Args:
      workdir: the run.
      scale: the model's factor of the cosines, which no two checkpoints of a run share.
    """
    from clip_jax.evaluation.results import RESULTS

    try:
        values = json.loads((Path(workdir) / RESULTS).read_text(encoding="utf-8"))
        same = math.isclose(float(values["scale"]), scale, rel_tol=1e-6)
        return list(values["results"]) if same else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def card_text(
    name: str,
    model: str,
    sizes: "CLIPConfig",
    values: int,
    to: str,
    rows: Sequence[Mapping],
    base: str = "",
) -> str:
    """Return the card, in Markdown.

    Args:
      name: the repository.
      model: the model's name in the zoo.
      sizes: the model's.
      values: how many numbers it has.
      to: the format it is written in.
      rows: as `measured_rows` returns them.
      base: the checkpoint that adapters belong to.
    """
    library, lines = LOADING[to]
    head = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: zero-shot-image-classification",
        "tags:",
        "- clip",
        "- jax",
        "---",
        f"# {name.split('/')[-1]}",
        "",
        f"`{model}`: images of {sizes.vision.image_size} pixels and captions of "
        f"{sizes.text.context_length} tokens into {sizes.embed_dim} dimensions; {values / 1e6:.1f} "
        f"million numbers{' of adapters' if base else ''}. Trained or converted with clip_jax.",
        "",
        "```python",
        *lines.format(name=name, base=base).split("\n"),
        "```",
        "",
    ]
    measured = [] if base else ["## Measured", "", *_table(rows)]
    return "\n".join([*head, *measured]) + "\n"


def _table(rows: Sequence[Mapping]) -> list[str]:
    if not rows:
        return ["Nothing was measured with these weights when they were uploaded."]
    from clip_jax.evaluation.results import COUNTS

    lines = [
        "| task | data | images | metric | value | 95 % |",
        "| --- | --- | ---: | --- | ---: | --- |",
    ]
    for row in rows:
        for metric, value in row["metrics"].items():
            if value is None:
                continue
            shown, interval = f"{value:.4g}", ""
            if metric not in COUNTS:
                shown = f"{100 * value:.2f} %"
            if metric in row.get("intervals", {}):
                low, high = row["intervals"][metric]
                interval = f"{100 * low:.1f} to {100 * high:.1f}"
            lines.append(
                f"| {row['task']} | {row['dataset']} | {row['images']:,} | {metric} | {shown} | "
                f"{interval} |"
            )
    return lines
