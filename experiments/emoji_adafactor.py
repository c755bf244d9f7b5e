"""Adafactor instead of AdamW: a quarter of the optimizer's memory (arXiv:1804.04235, 2106.04560).

    python -m clip_jax.main --config experiments/emoji_adafactor.py --workdir runs/emoji_adafactor

big_vision's form: rows and columns for a matrix's second moment, momentum in bfloat16. What
big_vision's configs call `wd` is multiplied by the schedule but not by the learning rate `lr`: it
is `weight_decay` = wd / lr here.
"""

import ml_collections

from clip_jax.experiments import emoji_vit


def get_config() -> ml_collections.ConfigDict:
    """Return the emoji run of a Vision Transformer, with what differs."""
    c = emoji_vit.get_config()
    c.optim.name = "adafactor"
    c.optim.beta2 = 0.999
    return c
