"""ViT-S/16 at 224 pixels, sized for one GPU and about a day.

    python -m clip_jax.main --config experiments/vit_s16.py --workdir runs/vit_s16 \\
        --config.data.train='PATH/{00000..00331}.tar'

Meant for a set like CC3M (3 million pairs): 32 epochs at a batch of 1,024 are 94,000 steps, and
96 million pairs. A training step costs 3 x (8.6 + 3.1) GFLOP a pair at the full 77 tokens, so the
run is 3.4e18 FLOP: nine and a half hours at 100 TFLOP/s sustained, as reckoned. As compiled for an
H100 a step takes 30 GB; on a smaller GPU lower the batch.

The fewest devices that hold it whole, and the days of the run there, as compiled (`docs/fits.md`):
v5e 4: 0.2 days; v5p 1: 0.4 days; v6e 2: 0.3 days; h100 1: 0.1 days.
"""

import ml_collections

from clip_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Return the paper's optimizer at a batch one GPU holds."""
    c = default()
    c.model.name = "ViT-S/16"
    c.model.dtype = "bfloat16"
    c.train.epochs = 32.0
    c.train.batch_size = 1024
    c.train.log_every = 50
    c.optim.learning_rate = 1e-3
    c.optim.warmup_steps = 2000
    c.data.train = "data/cc3m/{00000..00331}.tar"
    c.data.streams = 16
    c.data.threads = -1
    return c
