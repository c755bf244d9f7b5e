"""Lion instead of AdamW: half the optimizer's memory (Chen et al. 2023, arXiv:2302.06675).

    python -m clip_jax.main --config experiments/emoji_lion.py --workdir runs/emoji_lion

Every parameter moves by the learning rate, up or down. The paper's section 5 takes a learning rate
3 to 10 times lower than AdamW's and a decay as many times higher: 5 times here.
"""

import ml_collections

from clip_jax.experiments import emoji_vit


def get_config() -> ml_collections.ConfigDict:
    """Return the emoji run of a Vision Transformer, with what differs."""
    c = emoji_vit.get_config()
    c.optim.name = "lion"
    c.optim.learning_rate = 4e-4
    c.optim.weight_decay = 1.0
    c.optim.beta2 = 0.99
    return c
