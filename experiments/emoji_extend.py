"""A run that can be made longer: constant rate, a cool-down, and the state before it is kept.

    python -m clip_jax.main --config experiments/emoji_extend.py --workdir runs/emoji_extend
    python -m clip_jax.main --config experiments/emoji_extend.py --workdir runs/emoji_extend \\
        --config.train.steps=300

The second command goes on from step 150, before the cool-down of the first. Measured on a CPU, mean
loss of ten steps of 32 pairs:

| steps | 200 long | then 300 long | 300 long from the beginning |
| --- | ---: | ---: | ---: |
| 141 to 150, before the cool-down | 2.052 | | 2.052 |
| 191 to 200 | 1.775 | 1.888 | 1.888 |
| 291 to 300 | | 1.494 | 1.494 |

All 300 losses of the run that was made longer are those of the long run, to the last digit.
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
