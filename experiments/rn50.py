"""RN50 at 224 pixels as the paper trained it (tables 18 and 19).

    python -m clip_jax.main --config experiments/rn50.py --workdir runs/rn50 \\
        --config.data.train='PATH/{00000..41455}.tar'

Learning rate 5e-4; everything else is in `experiments/paper.py`. On the paper's 400 million pairs
the published weights classify ImageNet zero-shot at 59.8 %.

The fewest devices that hold it whole, and the days of the run there, as compiled (`docs/fits.md`):
v5e 128: 0.9 days; v5p 16: 3.3 days; v6e 64: 0.9 days; h100 32: 1.0 days.
"""

import ml_collections

from clip_jax.experiments import paper


def get_config() -> ml_collections.ConfigDict:
    """Return the paper's settings for RN50."""
    c = paper.resnet_config()
    c.model.name = "RN50"
    c.optim.learning_rate = 5e-4
    return c
