"""Evaluate a moving average of the parameters instead of the last ones.

    python -m clip_jax.main --config experiments/emoji_ema.py --workdir runs/emoji_ema

A checkpoint keeps both; the evaluation and `clip_jax.load` take the average.
"""

import ml_collections

from clip_jax.experiments import emoji_vit


def get_config() -> ml_collections.ConfigDict:
    """Return the emoji run of a Vision Transformer, with what differs."""
    c = emoji_vit.get_config()
    c.train.ema_decay = 0.99
    return c
