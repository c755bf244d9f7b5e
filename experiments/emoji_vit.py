"""The embedded run with a small Vision Transformer, which other libraries can load afterwards.

    make data/emoji/tokenizer.model
    python -m clip_jax.main --config experiments/emoji_vit.py --workdir runs/emoji_vit
    python -m clip_jax.convert runs/emoji_vit exported --to hf

The convolutional tower of `experiments/emoji.py` names more drawings right in the same time, and
neither open_clip nor transformers has one like it.
"""

import ml_collections

from experiments import emoji


def get_config() -> ml_collections.ConfigDict:
    """What differs from the emoji run."""
    c = emoji.get_config()
    c.model.name = "ViT-48"
    c.train.steps = 1000
    c.optim.learning_rate = 2e-3
    return c
