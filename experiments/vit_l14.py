"""ViT-L/14 at 224 pixels as the paper trained it (tables 18 and 20).

    python -m clip_jax.main --config experiments/vit_l14.py --workdir runs/vit_l14 \\
        --config.data.train='PATH/{00000..41455}.tar'

Learning rate 4e-4; everything else is in `experiments/paper.py`. On the paper's 400 million pairs
the published weights classify ImageNet zero-shot at 75.5 %.

The fewest devices that hold it whole, and the days of the run there, as compiled (`docs/fits.md`):
v5e 256: 4.1 days in 2 micro-batches; v5p 64: 5.5 days; v6e 256: 1.5 days; h100 128: 1.5 days.
"""

import ml_collections

from clip_jax.experiments import paper


def get_config() -> ml_collections.ConfigDict:
    """Return the paper's settings for ViT-L/14."""
    c = paper.vit_config()
    c.model.name = "ViT-L/14"
    c.optim.learning_rate = 4e-4
    return c
