"""Fine-tuning on a seventh vendor without forgetting the six: weights between start and end.

    python -m clip_jax.main --config experiments/emoji.py --workdir runs/emoji
    python -m clip_jax.data.shard "data/emoji/heldout-{00000..00003}.tar" --per-shard 500 \\
        --out data/seventh
    python -m clip_jax.main --config experiments/emoji_wiseft.py --workdir runs/emoji_wiseft

Of the seventh vendor's drawings 500 are trained on.
"""

import ml_collections

from experiments import emoji


def get_config() -> ml_collections.ConfigDict:
    """Return the emoji run, with what differs."""
    c = emoji.get_config()
    c.model.init_from = "runs/emoji"
    c.train.steps = 120
    c.train.batch_size = 128
    c.optim.learning_rate = 3e-4
    c.optim.warmup_steps = 12
    c.data.train = "data/seventh/00000.tar"
    c.eval.data = "data/seventh/{00001..00006}.tar"
    return c
