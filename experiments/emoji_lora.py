"""Low-rank adapters on a seventh vendor: the six vendors' model stays as it is.

    python -m clip_jax.main --config experiments/emoji.py --workdir runs/emoji
    python -m clip_jax.data.shard "data/emoji/heldout-{00000..00003}.tar" --per-shard 500 \\
        --out data/seventh
    python -m clip_jax.main --config experiments/emoji_lora.py --workdir runs/emoji_lora

Adapters of rank 8 beside every convolution and every matrix of the text tower.
"""

import ml_collections

from experiments import emoji_wiseft


def get_config() -> ml_collections.ConfigDict:
    """Return the tuning on the seventh vendor, with what differs."""
    c = emoji_wiseft.get_config()
    c.train.lora_rank = 8
    c.train.lora_alpha = 8.0
    c.train.lora_targets = ("conv", "q", "k", "v", "out", "fc", "proj")
    c.optim.learning_rate = 2e-3
    return c
