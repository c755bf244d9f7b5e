"""The text encoders of transformers that open_clip builds its models from, by their names there.

Sizes are those of their `config.json`: vocabulary, width, depth, heads, MLP, places.
"""

from clip_jax.models.text import EncoderForm, TextConfig

ROBERTA = EncoderForm(norms="after", positions=514, pool="mean", projection="mlp")
NLLB = EncoderForm(norms="before", positions=0, pool="first", projection="linear")


def roberta(width: int, layers: int, heads: int, vocab_size: int) -> TextConfig:
    """Return a RoBERTa (Liu et al. 2019; Conneau et al. 2020), pooled by its mean."""
    return TextConfig(
        width,
        layers,
        heads,
        vocab_size=vocab_size,
        eot_id=2,
        activation="gelu",
        causal=False,
        encoder=ROBERTA,
    )


def nllb(layers: int, mlp_ratio: float) -> TextConfig:
    """Return the encoder of an NLLB-200 (Costa-jussà et al. 2022), pooled at its language token."""
    return TextConfig(
        1024,
        layers,
        16,
        vocab_size=256_206,
        eot_id=2,
        mlp_ratio=mlp_ratio,
        activation="relu",
        causal=False,
        encoder=NLLB,
    )


TEXT_ENCODERS: dict[str, TextConfig] = {
    "roberta-base": roberta(768, 12, 12, 50_265),
    "xlm-roberta-base": roberta(768, 12, 12, 250_002),
    "xlm-roberta-large": roberta(1024, 24, 16, 250_002),
    "facebook/nllb-200-distilled-600M": nllb(12, 4.0),
    "facebook/nllb-200-distilled-1.3B": nllb(24, 8.0),
}
