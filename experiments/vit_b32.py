"""ViT-B/32 at 224 pixels as the paper trained it (tables 18 and 20).

    python -m clip_jax.main --config experiments/vit_b32.py --workdir runs/vit_b32 \\
        --config.data.train='PATH/{00000..41455}.tar'

Learning rate 5e-4; everything else is in `experiments/paper.py`. On the paper's 400 million pairs
the published weights classify ImageNet zero-shot at 63.3 %.

The fewest devices that hold it whole, and the days of the run there, as compiled (`docs/fits.md`):
v5e 64: 1.4 days; v5p 16: 2.3 days; v6e 32: 1.4 days; h100 16: 1.1 days.
"""

import ml_collections

from clip_jax.experiments import paper


def get_config() -> ml_collections.ConfigDict:
    """Return the paper's settings for ViT-B/32."""
    c = paper.vit_config()
    c.model.name = "ViT-B/32"
    c.optim.learning_rate = 5e-4
    return c
