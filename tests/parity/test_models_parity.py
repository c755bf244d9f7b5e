"""Both towers against open_clip's on the same random weights: features, gradients, batch norm."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

from open_clip.model import CustomTextCLIP  # noqa: E402

from clip_jax.models.clip import CLIP, CLIPConfig, unit_length  # noqa: E402
from clip_jax.models.resnet import ResNetConfig  # noqa: E402
from clip_jax.models.table import parity_case  # noqa: E402
from clip_jax.models.text import TextConfig  # noqa: E402
from clip_jax.models.vit import ViTConfig  # noqa: E402
from clip_jax.models.zoo import MODELS  # noqa: E402


def small(name: str) -> CLIPConfig:
    """A row of the zoo with two blocks of 16 features a head: its family's structure."""
    config = MODELS[name]
    text = dataclasses.replace(config.text, width=64, layers=2, heads=4, context_length=20)
    last = config.text.eot_id == config.text.vocab_size - 1
    text = dataclasses.replace(text, vocab_size=90, eot_id=89 if last else 2)
    vision = config.vision
    if isinstance(vision, ResNetConfig):
        vision = ResNetConfig(64, (1, 2, 1, 1), 8)
    else:
        vision = dataclasses.replace(vision, width=64, layers=3, heads=4, image_size=40)
        # 40 is no multiple of 14 or 16: a last, partial patch is cut.
        vision = dataclasses.replace(vision, layer_scale=vision.layer_scale and 0.1)
    return dataclasses.replace(config, embed_dim=64, vision=vision, text=text)


def shallow(name: str) -> CLIPConfig:
    """A row of the zoo at its own widths, with two blocks, few patches and few tokens."""
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
    return {"act_kwargs": {"approximate": "tanh"}} if activation == "gelu_tanh" else {}


def vision_options(v: ViTConfig | ResNetConfig) -> dict:
    """open_clip's `vision_cfg` of a tower of its own."""
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
    """open_clip's `text_cfg`."""
    names = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "proj_bias")
    end = "argmax" if t.eot_id == t.vocab_size - 1 else "eos"
    return {
        **{name: getattr(t, name) for name in names},
        "pool_type": "last" if t.pool == "last" else end,
        "eos_id": t.eot_id,
        "no_causal_mask": not t.causal,
        "proj_type": "linear" if t.project else "none",
        "norm_kwargs": {"eps": t.norm_eps},
        **activation_options(t.activation),
    }


def siglip_tower(v: ViTConfig):
    """timm's image tower, as `open_clip.timm_model` asks for it."""
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


def reference(config: CLIPConfig):
    """open_clip's model of the same sizes, its weights moved off their special starts."""
    torch.manual_seed(0)
    text = text_options(config.text)
    options = {
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
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(1 + torch.rand_like(buffer))
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


TIMM_NAMES = (
    ("trunk.patch_embed.proj", "conv1"),
    ("trunk.pos_embed", "positional_embedding"),
    ("trunk.blocks", "transformer.resblocks"),
    ("trunk.norm.", "ln_post."),
    ("trunk.attn_pool.latent", "attn_pool.probe"),
    ("trunk.attn_pool.norm", "attn_pool.ln"),
    ("trunk.attn_pool.mlp", "attn_pool.mlp"),
    ("trunk.attn_pool.proj", "attn_pool.attn.out_proj"),
    (".attn.qkv.", ".attn.in_proj_"),
    (".attn.proj.", ".attn.out_proj."),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".ls1.", ".ls_1."),
    (".ls2.", ".ls_2."),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
)


def openai_names(flat: dict) -> dict:
    """Names of a `CustomTextCLIP` with a tower of timm, as those of `CLIP`."""
    made = {}
    for key, value in flat.items():
        key = key.removeprefix("text.")
        if key.startswith("visual.trunk.attn_pool.q."):
            # The fused matrix, whose other two thirds are `kv`.
            leaf = key.rsplit(".", 1)[1]
            key = f"visual.attn_pool.attn.in_proj_{leaf}"
            value = np.concatenate([value, flat[f"visual.trunk.attn_pool.kv.{leaf}"]])
        elif key.startswith("visual.trunk.attn_pool.kv."):
            continue
        for theirs, ours in TIMM_NAMES:
            key = key.replace(theirs, ours)
        if key in ("visual.positional_embedding", "visual.attn_pool.probe"):
            value = value.reshape(-1, value.shape[-1])
        if key == "text_projection.weight":
            key, value = "text_projection", value.T
        made[key.replace("text_projection.bias", "text_projection_bias")] = value
    return made


def to_flax(model, config: CLIPConfig) -> dict:
    """open_clip's names and layouts as ours."""
    flat = {k: v.detach().numpy().astype(np.float32) for k, v in model.state_dict().items()}
    flat = openai_names(flat)
    params, stats = {}, {}

    def put(tree, path, value):
        for name in path[:-1]:
            tree = tree.setdefault(name, {})
        tree[path[-1]] = jnp.asarray(value)

    def heads(weight, n):
        return weight.T.reshape(weight.shape[1], n, -1)

    for key, value in flat.items():
        if key in ("attn_mask",) or key.endswith("num_batches_tracked"):
            continue
        in_image = key.startswith("visual.")
        tower = ("visual",) if in_image else ("text",)
        n = config.vision.heads if in_image else config.text.heads
        key = key.removeprefix("visual.")
        key = key.replace("transformer.resblocks.", "transformer.resblocks_")
        for stage in range(1, 5):
            key = key.replace(f"layer{stage}.", f"layer{stage}_")
        key = key.replace("downsample.", "downsample_")
        *path, leaf = key.split(".")
        path = [*tower, *path]
        if key in ("logit_scale", "logit_bias"):
            put(params, [key], value)
        elif leaf.startswith("in_proj"):
            for name, part in zip("qkv", np.split(value, 3), strict=True):
                is_kernel = leaf == "in_proj_weight"
                made = heads(part, n) if is_kernel else part.reshape(n, -1)
                put(params, [*path, f"{name}_proj", "kernel" if is_kernel else "bias"], made)
        elif path[-1:] == ["out_proj"] or (path[-2:-1] == ["attnpool"] and path[-1:] == ["c_proj"]):
            kernel = leaf == "weight"
            made = value.T.reshape(n, -1, value.shape[0]) if kernel else value
            put(params, [*path, "kernel" if kernel else "bias"], made)
        elif path[-2:-1] == ["attnpool"] and path[-1:] != ["attnpool"] and path[-1][1:] == "_proj":
            kernel = leaf == "weight"
            put(
                params,
                [*path, "kernel" if kernel else "bias"],
                heads(value, n) if kernel else value.reshape(n, -1),
            )
        elif leaf in ("running_mean", "running_var"):
            put(stats, [*path, leaf.removeprefix("running_")], value)
        elif path[-1:] == ["token_embedding"]:
            put(params, [*path, "embedding"], value)
        elif leaf in ("weight", "bias") and value.ndim == 1:
            put(params, [*path, "scale" if leaf == "weight" and "mlp" not in path else leaf], value)
        elif leaf == "weight" and value.ndim == 4:
            put(params, [*path, "kernel"], value.transpose(2, 3, 1, 0))
        elif leaf == "weight":
            put(params, [*path, "kernel"], value.T)
        else:
            put(params, [*path, leaf], value)
    return {"params": params, "batch_stats": stats}


def inputs(config: CLIPConfig):
    """Three normalized images, and captions that end early, in the middle and at the end."""
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
    config = CASES[name]
    model = reference(config)
    return config, model, to_flax(model, config), *inputs(config)


def to_torch(x):
    return torch.from_numpy(np.array(x))


@pytest.mark.parametrize("name", CASES)
def test_trees_are_the_same(name):
    config, _, variables, images, tokens = case(name)
    shapes = jax.eval_shape(CLIP(config).init, jax.random.key(0), images, tokens)
    got = jax.tree.map(jnp.shape, variables)
    want = {"batch_stats": {}} | jax.tree.map(jnp.shape, dict(shapes))
    assert got == want


def check_features(config, model, variables, images, tokens):
    """5e-6: float32 rounding through a few blocks on features of size one.

    Unit vectors within 1e-5 is what the project promises; their elements are smaller than one.
    """
    model.eval()
    with torch.no_grad():
        want_image = model.encode_image(to_torch(images).permute(0, 3, 1, 2))
        want_text = model.encode_text(to_torch(tokens).long())
    apply = jax.jit(CLIP(config).apply, static_argnames="method")
    got_image = apply(variables, images, method="encode_image")
    got_text = apply(variables, tokens, method="encode_text")
    for got, want in ((got_image, want_image), (got_text, want_text)):
        scale = float(want.abs().max())
        np.testing.assert_allclose(got, want.numpy(), atol=5e-6 * max(1.0, scale))
        unit = torch.nn.functional.normalize(want, dim=-1)
        np.testing.assert_allclose(unit_length(got), unit.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_features_agree(name):
    check_features(*case(name))


@pytest.mark.parametrize("name", WIDTHS)
def test_features_agree_at_the_models_own_widths(name):
    config = shallow(name)
    model = reference(config)
    check_features(config, model, to_flax(model, config), *inputs(config))


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
    gradients = reference(config)
    with torch.no_grad():
        for source, target in zip(model.parameters(), gradients.parameters(), strict=True):
            target.copy_(torch.zeros_like(target) if source.grad is None else source.grad)
    want = to_flax(gradients, config)["params"]

    def total(params):
        (z_image, z_text), updated = CLIP(config).apply(
            {**variables, "params": params},
            jnp.asarray(images),
            jnp.asarray(tokens),
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.sum(jnp.asarray(weights.numpy()) * (z_image + 2 * z_text)), updated

    got, updated = jax.jit(jax.grad(total, has_aux=True))(variables["params"])
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        error, norm = float(jnp.linalg.norm(a - b)), float(jnp.linalg.norm(b))
        # Two float32 back-propagations; batch norm over few values cancels two digits more.
        assert error <= 5e-5 * norm + 2e-6, (jax.tree_util.keystr(path), error, norm)

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
