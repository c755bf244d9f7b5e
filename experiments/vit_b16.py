"""ViT-B/16 at 224 pixels as the paper trained it (tables 18 and 20).

    python -m clip_jax.main --config experiments/vit_b16.py --workdir runs/vit_b16 \\
        --config.data.train='PATH/{00000..41455}.tar'

Learning rate 5e-4; everything else is in `experiments/paper.py`. On the paper's 400 million pairs
the published weights classify ImageNet zero-shot at 68.3 %.

The fewest devices that hold it whole, and the days of the run there, as compiled (`docs/fits.md`):
v5e 128: 1.7 days; v5p 32: 2.9 days; v6e 64: 1.7 days; h100 32: 1.5 days.
"""

import ml_collections

from clip_jax.experiments import paper


def get_config() -> ml_collections.ConfigDict:
    """Return the paper's settings for ViT-B/16."""
    c = paper.vit_config()
    c.model.name = "ViT-B/16"
    c.optim.learning_rate = 5e-4
    return c
