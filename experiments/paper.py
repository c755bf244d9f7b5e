"""The settings that all nine models of the paper share (Radford et al. 2021, 2.5 and table 18).

Not an experiment of its own: `experiments/vit_b32.py` and the others state their differences.

| hyper-parameter        | value                                                        |
| ---------------------- | ------------------------------------------------------------ |
| batch size             | 32,768                                                       |
| vocabulary             | 49,408                                                       |
| epochs                 | 32                                                           |
| maximum temperature    | 100                                                          |
| weight decay           | 0.2                                                          |
| warm-up                | 2,000 steps, then a cosine to 0                              |
| Adam beta1             | 0.9                                                          |
| Adam beta2             | 0.999 (ResNet), 0.98 (ViT)                                   |
| Adam epsilon           | 1e-8 (ResNet), 1e-6 (ViT)                                    |
| augmentation           | a random square crop of the resized image                    |

The crop is open_clip's stand-in for it, RandomResizedCrop with 0.9-1.0 of the area.
"""

import ml_collections

from clip_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Return the shared part; point `config.data.train` at your shards."""
    c = default()
    c.model.dtype = "bfloat16"
    c.train.epochs = 32.0
    c.train.batch_size = 32_768
    c.train.log_every = 50
    c.optim.warmup_steps = 2000
    c.optim.weight_decay = 0.2
    c.optim.max_logit_scale = 100.0
    c.data.train = "data/pairs/{00000..41455}.tar"
    c.data.streams = 256
    c.data.threads = -1
    c.checkpoint.every = 1000
    return c


def resnet_config() -> ml_collections.ConfigDict:
    """Return the shared part with the ResNets' Adam."""
    c = get_config()
    c.optim.beta2 = 0.999
    c.optim.eps = 1e-8
    return c


def vit_config() -> ml_collections.ConfigDict:
    """Return the shared part with the ViTs' Adam."""
    c = get_config()
    c.optim.beta2 = 0.98
    c.optim.eps = 1e-6
    return c
