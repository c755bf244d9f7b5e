"""RN50x4 at 288 pixels as the paper trained it (tables 18 and 19).

    python -m clip_jax.main --config experiments/rn50x4.py --workdir runs/rn50x4 \\
        --config.data.train='PATH/{00000..41455}.tar'

Learning rate 5e-4; everything else is in `experiments/paper.py`. On the paper's 400 million pairs
the published weights classify ImageNet zero-shot at 66.3 %.

The fewest devices that hold it whole, and the days of the run there, as compiled (`docs/fits.md`):
v5e 256: 1.4 days; v5p 64: 2.3 days; v6e 128: 1.2 days; h100 64: 1.4 days.
"""

import ml_collections

from clip_jax.experiments import paper


def get_config() -> ml_collections.ConfigDict:
    """Return the paper's settings for RN50x4."""
    c = paper.resnet_config()
    c.model.name = "RN50x4"
    c.optim.learning_rate = 5e-4
    return c
