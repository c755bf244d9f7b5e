"""RN50x16 at 384 pixels as the paper trained it (tables 18 and 19).

    python -m clip_jax.main --config experiments/rn50x16.py --workdir runs/rn50x16 \\
        --config.data.train='PATH/{00000..41455}.tar'

Learning rate 4e-4; everything else is in `experiments/paper.py`. On the paper's 400 million pairs
the published weights classify ImageNet zero-shot at 70.7 %.

The fewest devices that hold it whole, and the days of the run there, as compiled (`docs/fits.md`):
v5e more than 256; v5p 128: 3.0 days; v6e 256: 1.6 days; h100 256: 1.0 days.
"""

import ml_collections

from clip_jax.experiments import paper


def get_config() -> ml_collections.ConfigDict:
    """Return the paper's settings for RN50x16."""
    c = paper.resnet_config()
    c.model.name = "RN50x16"
    c.optim.learning_rate = 4e-4
    return c
