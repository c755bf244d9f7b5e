"""Both towers against open_clip's on the same random weights: features, gradients, batch norm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")

from clip_jax.models.clip import CLIP, CLIPConfig  # noqa: E402
from clip_jax.models.resnet import ResNetConfig  # noqa: E402
from clip_jax.models.text import TextConfig  # noqa: E402
from clip_jax.models.vit import ViTConfig  # noqa: E402

TEXT = TextConfig(width=64, layers=3, heads=2, context_length=20, vocab_size=90, eot_id=89)
CASES = {
    "vit": CLIPConfig(24, ViTConfig(32, 8, 64, 3, 2), TEXT),
    "vit-gelu": CLIPConfig(
        24,
        ViTConfig(42, 14, 64, 2, 4, 3.0, activation="gelu"),
        dataclasses.replace(TEXT, activation="gelu"),
    ),
    "resnet": CLIPConfig(24, ResNetConfig(64, (1, 2, 1, 1), 8), TEXT),
}


def reference(config: CLIPConfig):
    """open_clip's model of the same sizes, its weights moved off their special starts."""
    v, t = config.vision, config.text
    if isinstance(v, ResNetConfig):
        # open_clip gives the attention pool width * 32 / head_width heads.
        vision = {"image_size": v.image_size, "layers": list(v.layers), "width": v.width}
    else:
        vision = {
            "image_size": v.image_size,
            "layers": v.layers,
            "width": v.width,
            "head_width": v.width // v.heads,
            "patch_size": v.patch_size,
            "mlp_ratio": v.mlp_ratio,
        }
    text = {k: getattr(t, k) for k in ("context_length", "vocab_size", "width", "heads", "layers")}
    torch.manual_seed(0)
    model = open_clip.CLIP(config.embed_dim, vision, text, quick_gelu=t.activation == "quick_gelu")
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
    """open_clip's names and layouts as ours."""
    flat = {k: v.detach().numpy().astype(np.float32) for k, v in model.state_dict().items()}
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
        if key == "logit_scale":
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


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    config = CASES[request.param]
    rng = np.random.default_rng(0)
    size, length = config.vision.image_size, config.text.context_length
    images = rng.standard_normal((3, size, size, 3)).astype(np.float32)
    tokens = np.zeros((3, length), np.int32)
    for row, end in zip(tokens, (4, 11, length - 1), strict=True):
        row[:end] = rng.integers(1, TEXT.eot_id, end)
        row[end] = TEXT.eot_id
    model = reference(config)
    return config, model, to_flax(model, config), jnp.asarray(images), jnp.asarray(tokens)


def to_torch(x):
    return torch.from_numpy(np.array(x))


def test_trees_are_the_same(case):
    config, _, variables, images, tokens = case
    shapes = jax.eval_shape(CLIP(config).init, jax.random.key(0), images, tokens)
    got = jax.tree.map(jnp.shape, variables)
    want = {"batch_stats": {}} | jax.tree.map(jnp.shape, dict(shapes))
    assert got == want


def test_features_agree(case):
    """5e-6: float32 rounding through a few blocks on features of size one."""
    config, model, variables, images, tokens = case
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


def test_training_gradients_and_batch_statistics_agree(case):
    config, model, variables, images, tokens = case
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
