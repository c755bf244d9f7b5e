"""CLIPA-L/16, second half: whole images and 32 tokens (Li et al. 2023, arXiv:2305.07017).

    python -m clip_jax.main --config experiments/clipa_l16_full.py \\
        --workdir runs/clipa_l16_full --config.data.train='PATH/{00000..41455}.tar'

It goes on from `experiments/clipa_l16_short.py` for 131 million pairs, as open_clip's script
`docs/script_examples/clipa/vit_l16/i37_t8_finetune.sh` does with eight GPUs' batch of 7,168.

The fewest devices that hold it whole, and the days of the run there, as compiled (`docs/fits.md`):
v5e 64: 0.1 days; v5p 16: 0.2 days; v6e 32: 0.1 days; h100 16: 0.1 days.
"""

import ml_collections

from clip_jax.experiments import clipa_l16_short


def get_config() -> ml_collections.ConfigDict:
    """Return the first half, with what differs."""
    c = clipa_l16_short.get_config()
    c.model.init_from = "runs/clipa_l16_short"
    c.model.image_size = 224
    c.model.context_length = 32
    c.train.epochs = 0.0
    c.train.batch_size = 7168
    c.train.steps = 131_072_000 // 7168
    c.optim.learning_rate = 2.24e-5
    c.optim.warmup_steps = 3571
    return c
