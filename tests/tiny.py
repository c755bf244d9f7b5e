"""Models small enough for tests."""

from clip_jax.models.clip import CLIPConfig
from clip_jax.models.convnet import ConvNetConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

TEXT = TextConfig(width=32, layers=3, heads=4, context_length=24, vocab_size=64, eot_id=63)
VIT = CLIPConfig(16, ViTConfig(image_size=32, patch_size=8, width=48, layers=3, heads=4), TEXT)
RESNET = CLIPConfig(16, ResNetConfig(image_size=64, layers=(1, 1, 1, 1), width=8), TEXT)
CONVNET = CLIPConfig(16, ConvNetConfig(image_size=32, patch_size=4, features=(16, 32)), TEXT)
TINY = {"vit": VIT, "resnet": RESNET, "convnet": CONVNET}
