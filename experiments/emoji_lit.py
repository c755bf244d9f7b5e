"""Locked-image tuning: only the text tower learns (Zhai et al. 2021, arXiv:2111.07991).

    python -m clip_jax.main --config experiments/emoji_vit.py --workdir runs/emoji_vit
    python -m clip_jax.main --config experiments/emoji_lit.py --workdir runs/emoji_lit

Both towers start from the first run. The image tower gets no gradients, no optimizer state and no
decay: its parameters are the same bits at the end.
"""

import ml_collections

from clip_jax.experiments import emoji_vit


def get_config() -> ml_collections.ConfigDict:
    """Return the emoji run of a Vision Transformer, with what differs."""
    c = emoji_vit.get_config()
    c.model.init_from = "runs/emoji_vit"
    c.train.freeze = "image"
    c.train.steps = 300
    c.optim.learning_rate = 5e-4
    c.optim.warmup_steps = 30
    return c
