"""RN50x64 at 448 pixels as the paper trained it (tables 18 and 19).

    python -m clip_jax.main --config experiments/rn50x64.py --workdir runs/rn50x64 \\
        --config.data.train='PATH/{00000..41455}.tar'

Learning rate 3.6e-4; everything else is in `experiments/paper.py`. On the paper's 400 million pairs
the published weights classify ImageNet zero-shot at 73.9 %.

The fewest devices that hold it whole, and the days of the run there, as compiled (`docs/fits.md`):
v5e more than 256; v5p 256: 3.7 days; v6e more than 256; h100 256: 4.0 days in 2 micro-batches.
"""

import ml_collections

from clip_jax.experiments import paper


def get_config() -> ml_collections.ConfigDict:
    """Return the paper's settings for RN50x64."""
    c = paper.resnet_config()
    c.model.name = "RN50x64"
    c.optim.learning_rate = 3.6e-4
    return c
