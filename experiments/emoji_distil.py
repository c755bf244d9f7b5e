"""A student of a quarter of the emoji model's size, taught by it.

    python -m clip_jax.main --config experiments/emoji.py --workdir runs/emoji
    python -m clip_jax.main --config experiments/emoji_distil.py --workdir runs/emoji_distil

The student alone is the same command with --config.distill.teachers='()'.
"""

import ml_collections

from experiments import emoji


def get_config() -> ml_collections.ConfigDict:
    """Return the emoji run, with what differs."""
    c = emoji.get_config()
    c.model.name = "ConvNet-48-S"
    c.distill.teachers = ("runs/emoji",)
    return c
