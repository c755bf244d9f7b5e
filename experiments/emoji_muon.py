"""Muon for the matrices inside the towers, Adam for the rest (Jordan 2024; arXiv:2502.16982).

    python -m clip_jax.main --config experiments/emoji_muon.py --workdir runs/emoji_muon

Each matrix moves by its orthogonalized momentum, scaled to the size of Adam's updates, so that
learning rate and decay are AdamW's.
"""

import ml_collections

from clip_jax.experiments import emoji_vit


def get_config() -> ml_collections.ConfigDict:
    """Return the emoji run of a Vision Transformer, with what differs."""
    c = emoji_vit.get_config()
    c.optim.name = "muon"
    return c
