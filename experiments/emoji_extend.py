"""A run that can be made longer: constant rate, a cool-down, and the state before it is kept.

    python -m clip_jax.main --config experiments/emoji_extend.py --workdir runs/emoji_extend
    python -m clip_jax.main --config experiments/emoji_extend.py --workdir runs/emoji_extend \\
        --config.train.steps=300
"""

import ml_collections

from experiments import emoji


def get_config() -> ml_collections.ConfigDict:
    """Return the emoji run, with what differs."""
    c = emoji.get_config()
    c.train.steps = 200
    c.train.batch_size = 32
    c.optim.schedule = "constant"
    c.optim.cooldown_steps = 50
    c.optim.warmup_steps = 20
    c.optim.learning_rate = 1e-3
    c.train.log_every = 1
    return c
