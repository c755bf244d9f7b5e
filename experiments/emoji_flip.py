"""FLIP: half of every training image's patches left out (Li et al. 2022, arXiv:2212.00794).

    python -m clip_jax.main --config experiments/emoji_flip.py --workdir runs/emoji_flip

The image tower sees 18 of 36 patches, drawn anew for every image and step, and its class token;
evaluation shows whole images.
"""

import ml_collections

from clip_jax.experiments import emoji_vit


def get_config() -> ml_collections.ConfigDict:
    """Return the emoji run of a Vision Transformer, with what differs."""
    c = emoji_vit.get_config()
    c.model.patch_dropout = 0.5
    return c
