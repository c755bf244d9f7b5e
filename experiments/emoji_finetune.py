"""Fine-tuning: a trained model goes on at a higher resolution (as the paper's ViT-L/14@336px).

    python -m clip_jax.main --config experiments/emoji_vit.py --workdir runs/emoji_vit
    python -m clip_jax.main --config experiments/emoji_finetune.py --workdir runs/emoji_finetune

Images of 64 pixels instead of 48, the patches' positions interpolated from 6 x 6 to 8 x 8, a
tenth of the learning rate. `config.model.init_from` takes whatever `clip_jax.load` does: another
run, a published file or folder. Images are prepared and captions tokenized as for that model.
"""

import ml_collections

from clip_jax.experiments import emoji_vit


def get_config() -> ml_collections.ConfigDict:
    """Return the emoji run of a Vision Transformer, with what differs."""
    c = emoji_vit.get_config()
    c.model.init_from = "runs/emoji_vit"
    c.model.image_size = 64
    c.train.steps = 200
    c.optim.learning_rate = 2e-4
    c.optim.warmup_steps = 20
    return c
