"""ViT-L/14@336px: one more epoch of ViT-L/14 at 336 pixels (paper, section 2.5).

    python -m clip_jax.main --config experiments/vit_l14_336.py --workdir runs/vit_l14_336 \\
        --config.data.train='PATH/{00000..41455}.tar'

Learning rate 2e-5 for one epoch. The paper starts it from the weights of ViT-L/14; this experiment
has the recipe and starts from random weights until a run can begin from other weights. The
published model classifies ImageNet zero-shot at 76.2 % (table 11).
"""

import ml_collections

from experiments import paper


def get_config() -> ml_collections.ConfigDict:
    """The paper's fine-tuning at 336 pixels."""
    c = paper.vit_config()
    c.model.name = "ViT-L/14@336px"
    c.train.epochs = 1.0
    c.optim.learning_rate = 2e-5
    return c
