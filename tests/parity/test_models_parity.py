"""Both towers against open_clip's of the same random weights: features, gradients, batch norm."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

from model_cases import assert_trees_close, features_and_gradients  # noqa: E402
from open_clip.model import CustomTextCLIP  # noqa: E402

from clip_jax.models.clip import CLIP, CLIPConfig, unit_length  # noqa: E402
from clip_jax.models.resnet import ResNetConfig  # noqa: E402
from clip_jax.models.table import parity_case  # noqa: E402
from clip_jax.models.text import TextConfig  # noqa: E402
from clip_jax.models.vit import ViTConfig  # noqa: E402
from clip_jax.models.zoo import MODELS  # noqa: E402
from clip_jax.pretrained.infer import find_naming  # noqa: E402
from clip_jax.pretrained.layouts import import_arrays  # noqa: E402
from clip_jax.pretrained.trees import array_shapes, to_variables  # noqa: E402


def small(name: str) -> CLIPConfig:
    """Return an entry of the zoo with few blocks of 16 features a head: its family's structure."""
    config = MODELS[name]
    text = dataclasses.replace(config.text, width=64, layers=2, heads=4, context_length=20)
    eot_is_last = config.text.eot_id == config.text.vocab_size - 1
    text = dataclasses.replace(text, vocab_size=90, eot_id=89 if eot_is_last else 2)
    vision = config.vision
    if isinstance(vision, ResNetConfig):
        vision = ResNetConfig(64, (1, 2, 1, 1), 8)
    else:
        vision = dataclasses.replace(vision, width=64, layers=3, heads=4, image_size=40)
        # 40 is no multiple of 14 or 16: a last, partial patch is cut.
        vision = dataclasses.replace(vision, layer_scale=vision.layer_scale and 0.1)
    return dataclasses.replace(config, embed_dim=64, vision=vision, text=text)


def shallow(name: str) -> CLIPConfig:
    """Return an entry of the zoo at its own widths, with two blocks, few patches and few tokens."""
    config = MODELS[name]
    side = 2 * config.vision.patch_size
    vision = dataclasses.replace(config.vision, layers=2, image_size=side)
    text = dataclasses.replace(config.text, layers=2, context_length=12, vocab_size=90, eot_id=89)
    return dataclasses.replace(config, vision=vision, text=text)


CASES = {
    parity_case(MODELS[name]): small(name)
    for name in (
        "RN50",
        "RN50-gelu",
        "ViT-B-32-quickgelu",
        "ViT-B-32",
        "ViT-M-16-alt",
        "ViT-H-14-worldwide",
        "ViT-H-14-worldwide-quickgelu",
        "ViT-L-14-CLIPA",
        "ViT-B-16-SigLIP",
        "ViT-SO400M-16-SigLIP-i18n-256",
        "ViT-B-16-SigLIP2",
        "ViT-B-32-SigLIP2-256",
    )
}
# Each kind of pooling and each activation once.
GRADIENT_CASES = (
    "resnet quick_gelu",
    "vit gelu layer scale",
    "worldwide quick_gelu",
    "clipa gelu",
    "siglip gelu/gelu_tanh",
)
# The widths, head sizes and hidden sizes that are not powers of two.
WIDTHS = (
    "ViT-B-16-plus-240",
    "ViT-bigG-14-CLIPA",
    "ViT-SO400M-14-SigLIP2",
    "ViT-gopt-16-SigLIP2-256",
)


def activation_options(activation: str) -> dict:
    """Return open_clip's options of an activation."""
    return {"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {}


def vision_options(v: ViTConfig | ResNetConfig) -> dict:
    """Return open_clip's `vision_cfg` of a tower of its own."""
    if isinstance(v, ResNetConfig):
        # open_clip gives the attention pool width * 32 / head_width heads.
        return {"image_size": v.image_size, "layers": list(v.layers), "width": v.width}
    return {
        "image_size": v.image_size,
        "layers": v.layers,
        "width": v.width,
        "head_width": v.width // v.heads,
        "patch_size": v.patch_size,
        "mlp_ratio": v.mlp_ratio,
        "ls_init_value": v.layer_scale,
        "no_ln_pre": not v.pre_norm,
        "pool_type": {"token": "tok", "average": "avg"}[v.pool],
        "final_ln_after_pool": v.norm_after_pool,
    }


def text_options(t: TextConfig) -> dict:
    """Return open_clip's `text_cfg`."""
    names = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "proj_bias")
    end_pool = "argmax" if t.eot_id == t.vocab_size - 1 else "eos"
    return {
        **{name: getattr(t, name) for name in names},
        "pool_type": "last" if t.pool == "last" else end_pool,
        "eos_id": t.eot_id,
        "no_causal_mask": not t.causal,
        "proj_type": "linear" if t.project else "none",
        "norm_kwargs": {"eps": t.norm_eps},
        **activation_options(t.activation),
    }


def siglip_tower(v: ViTConfig):
    """Return timm's image tower, made as `open_clip.timm_model` makes it."""
    return timm.models.vision_transformer.VisionTransformer(
        img_size=v.image_size,
        patch_size=v.patch_size,
        embed_dim=v.width,
        depth=v.layers,
        num_heads=v.heads,
        mlp_ratio=v.mlp_ratio,
        init_values=v.layer_scale,
        class_token=False,
        global_pool="map",
        num_classes=0,
        act_layer=v.activation,
    )


def build(config: CLIPConfig, **options):
    """Return open_clip's model of the same sizes, with the random weights that it makes itself."""
    torch.manual_seed(0)
    text = text_options(config.text)
    options |= {
        "quick_gelu": config.text.activation == "quick_gelu",
        "init_logit_scale": config.init_logit_scale,
        "init_logit_bias": config.init_logit_bias,
    }
    if isinstance(config.vision, ViTConfig) and config.vision.pool == "map":
        stand_in = {"image_size": 8, "patch_size": 8, "width": 64, "layers": 1}
        model = CustomTextCLIP(config.embed_dim, stand_in, text, **options)
        model.visual = torch.nn.ModuleDict({"trunk": siglip_tower(config.vision)})
        model.visual.forward = model.visual["trunk"].forward
    else:
        vision = vision_options(config.vision)
        model = open_clip.CLIP(config.embed_dim, vision, text, **options)
    return model


def reference(config: CLIPConfig):
    """Return open_clip's model of the same sizes, its weights moved off their special starts."""
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(1 + torch.rand_like(buffer))
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


def to_flax(model, config: CLIPConfig) -> dict:
    """Return open_clip's parameters and batch statistics as variables of ours.

    `import_arrays` raises where the two do not have the same arrays.
    """
    arrays = {k: v.detach().numpy().astype(np.float32) for k, v in model.state_dict().items()}
    naming = find_naming(arrays, "open_clip's model")
    readers = import_arrays(arrays, array_shapes(config), naming, "open_clip's model")
    return to_variables({path: jnp.asarray(read()) for path, read in readers.items()})


def make_inputs(config: CLIPConfig):
    """Return three normalized images, and captions that end early, in the middle, at the end."""
    rng = np.random.default_rng(0)
    size, t = config.vision.image_size, config.text
    images = rng.standard_normal((3, size, size, 3)).astype(np.float32)
    tokens = np.zeros((3, t.context_length), np.int32)
    for row, end in zip(tokens, (4, 9, t.context_length - 1), strict=True):
        row[:end] = rng.integers(3, 88, end)
        row[end] = t.eot_id
    return jnp.asarray(images), jnp.asarray(tokens)


@functools.cache
def case(name: str):
    """Return (config, open_clip's model, our variables, images, tokens)."""
    config = CASES[name]
    model = reference(config)
    return config, model, to_flax(model, config), *make_inputs(config)


def to_torch(x):
    """Return a copy of an array as PyTorch's tensor."""
    return torch.from_numpy(np.array(x))


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_its_place(name):
    _, model, variables, _, _ = case(name)
    counts = [x.size for x in jax.tree.leaves(variables["params"])]
    assert sum(counts) == sum(p.numel() for p in model.parameters())


def check_features(config, model, variables, images, tokens):
    """Compare the features of both libraries.

    5e-6: float32 rounding through a few blocks on features of size one. Unit vectors within 1e-5
    is what the project promises; their elements are smaller than one.
    """
    model.eval()
    with torch.no_grad():
        expected_image = model.encode_image(to_torch(images).permute(0, 3, 1, 2))
        expected_text = model.encode_text(to_torch(tokens).long())
    apply = jax.jit(CLIP(config).apply, static_argnames="method")
    image = apply(variables, images, method="encode_image")
    text = apply(variables, tokens, method="encode_text")
    for actual, expected in ((image, expected_image), (text, expected_text)):
        largest = float(expected.abs().max())
        np.testing.assert_allclose(actual, expected.numpy(), atol=5e-6 * max(1.0, largest))
        unit = torch.nn.functional.normalize(expected, dim=-1)
        np.testing.assert_allclose(unit_length(actual), unit.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_features_agree(name):
    check_features(*case(name))


@pytest.mark.parametrize("name", WIDTHS)
def test_features_agree_at_the_models_own_widths(name):
    config = shallow(name)
    model = reference(config)
    check_features(config, model, to_flax(model, config), *make_inputs(config))


def test_every_model_has_a_case():
    assert {parity_case(config) for config in MODELS.values()} - {None} == set(CASES)


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_training_gradients_and_batch_statistics_agree(name):
    config, model, variables, images, tokens = case(name)
    model = reference(config)  # a copy whose statistics may move
    model.train()
    image = model.encode_image(to_torch(images).permute(0, 3, 1, 2), normalize=True)
    text = model.encode_text(to_torch(tokens).long(), normalize=True)
    weights = torch.cos(torch.arange(image.numel(), dtype=torch.float32)).reshape(image.shape)
    (weights * (image + 2 * text)).sum().backward()
    gradients = reference(config)  # the gradients in the place of the parameters
    with torch.no_grad():
        for source, target in zip(model.parameters(), gradients.parameters(), strict=True):
            target.copy_(torch.zeros_like(target) if source.grad is None else source.grad)
    expected = to_flax(gradients, config)["params"]
    (_, updated), actual = features_and_gradients(
        CLIP(config), variables, images, tokens, True, mutable=["batch_stats"]
    )
    # Two float32 back-propagations; batch norm over few values cancels two digits more.
    assert_trees_close(actual, expected, rtol=5e-5, atol=2e-6)

    stats = to_flax(model, config)["batch_stats"]
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(updated.get("batch_stats", {})),
        jax.tree.leaves(stats),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        if "mean" in name:
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
        else:
            # PyTorch keeps the unbiased variance, n / (n - 1) larger; n is at least 12 here.
            np.testing.assert_allclose(a, b, rtol=0.1 / 11 + 1e-5, err_msg=name)
