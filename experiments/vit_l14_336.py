"""ViT-L/14@336px: one more epoch of ViT-L/14 at 336 pixels (paper, section 2.5).

    python -m clip_jax.main --config experiments/vit_l14_336.py --workdir runs/vit_l14_336 \\
        --config.data.train='PATH/{00000..41455}.tar' --config.model.init_from=runs/vit_l14

Learning rate 2e-5 for one epoch, from the weights of `experiments/vit_l14.py` (or of OpenAI's file
`ViT-L-14.pt`), their positions interpolated from 16 x 16 patches to 24 x 24. The published model
classifies ImageNet zero-shot at 76.2 % (table 11).

The fewest devices that hold it whole, and the days of the run there, as compiled (`docs/fits.md`):
v5e more than 256; v5p 128: 0.2 days; v6e more than 256; h100 256: 0.1 days.
"""

import ml_collections

from clip_jax.experiments import paper


def get_config() -> ml_collections.ConfigDict:
    """Return the paper's fine-tuning at 336 pixels."""
    c = paper.vit_config()
    c.model.name = "ViT-L/14@336px"
    c.model.init_from = "runs/vit_l14"
    c.train.epochs = 1.0
    c.optim.learning_rate = 2e-5
    return c
