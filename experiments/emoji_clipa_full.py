"""CLIPA, second half: the last steps with whole images and captions.

    python -m clip_jax.main --config experiments/emoji_clipa_full.py \\
        --workdir runs/emoji_clipa_full

It starts from the weights of `experiments/emoji_clipa_short.py`, the positions of its 3 x 3 patches
interpolated to 6 x 6 and its 8 positions of tokens kept, with 16 behind them; the optimizer is
fresh and the learning rate lower. Of the held-out drawings 25.9 % get their own name first, 53.9 %
among five: more than the 17.6 % of 1,000 steps at the full size (`experiments/emoji_vit.py`), but
less than after the first half. At 24 pixels an emoji shows what it is; larger images bring less
here than on photographs.
"""

import ml_collections

from clip_jax.experiments import emoji_vit


def get_config() -> ml_collections.ConfigDict:
    """Return the emoji run of a Vision Transformer, with what differs."""
    c = emoji_vit.get_config()
    c.model.init_from = "runs/emoji_clipa_short"
    c.train.steps = 150
    c.optim.learning_rate = 5e-4
    c.optim.warmup_steps = 15
    return c
