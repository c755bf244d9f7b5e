"""The sigmoid loss of SigLIP instead of the softmax (Zhai et al. 2023, arXiv:2303.15343).

    python -m clip_jax.main --config experiments/emoji_siglip.py --workdir runs/emoji_siglip

Every pair is judged by itself, with a learned bias beside the temperature: they start at -10 and
log 10. SigLIP holds the temperature under no limit.
"""

import ml_collections

from clip_jax.experiments import emoji_vit


def get_config() -> ml_collections.ConfigDict:
    """Return the emoji run of a Vision Transformer, with what differs."""
    c = emoji_vit.get_config()
    c.train.loss = "sigmoid"
    c.optim.max_logit_scale = 1000.0
    return c
