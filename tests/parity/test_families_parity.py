"""Families whose towers timm or transformers make: shape trees at full size, features when shallow.

open_clip builds each model from its own configuration, on a device that holds no numbers where it
has its full size. The shallow ones have few blocks and a small vocabulary at their own widths, and
random weights and running statistics.
"""

import contextlib
import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

import published  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import clip_jax  # noqa: E402
from clip_jax.models.clip import CLIP, CLIPConfig, unit_length  # noqa: E402
from clip_jax.models.states import make_states  # noqa: E402
from clip_jax.models.table import parity_case  # noqa: E402
from clip_jax.models.zoo import MODELS  # noqa: E402
from clip_jax.pretrained.infer import find_naming  # noqa: E402
from clip_jax.pretrained.layouts import import_arrays  # noqa: E402
from clip_jax.pretrained.load import CAPTIONER  # noqa: E402
from clip_jax.pretrained.open_clip_config import (  # noqa: E402
    config_from_open_clip,
    config_to_open_clip,
)
from clip_jax.pretrained.reparameterize import is_branched, reparameterize  # noqa: E402
from clip_jax.pretrained.trees import array_shapes, to_variables  # noqa: E402

VOCABULARY = 90
FASTVIT = {"layers": (1, 2, 1, 1)}
CONVNEXT = {"depths": (1, 2, 1, 1)}
# Sizes of the encoders of transformers, as their `config.json` has them.
ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
XLM_LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
NLLB = {
    "d_model": 1024,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "vocab_size": 256_206,
    "max_position_embeddings": 1024,
    "scale_embedding": True,
    "activation_function": "relu",
}
ENCODERS = {
    "roberta-base": ("roberta", {**ROBERTA, "vocab_size": 50_265}),
    "xlm-roberta-base": ("xlm-roberta", {**ROBERTA, "vocab_size": 250_002}),
    "xlm-roberta-large": (
        "xlm-roberta",
        {**ROBERTA, **XLM_LARGE, "vocab_size": 250_002, "num_hidden_layers": 24},
    ),
    "facebook/nllb-200-distilled-600M": (
        "m2m_100",
        {**NLLB, "encoder_layers": 12, "encoder_ffn_dim": 4096},
    ),
    "facebook/nllb-200-distilled-1.3B": (
        "m2m_100",
        {**NLLB, "encoder_layers": 24, "encoder_ffn_dim": 8192},
    ),
}
# The names of open_clip, each with what makes timm's tower shallow.
FAMILIES: dict[str, dict] = {
    "PE-Core-T-16-384": {"depth": 3},
    "PE-Core-S-16-384": {"depth": 2},
    "PE-Core-B-16": {"depth": 2},
    "PE-Core-L-14-336": {"depth": 2},
    "PE-Core-bigG-14-448": {"depth": 2},
    "EVA01-g-14": {"depth": 2},
    "EVA01-g-14-plus": {"depth": 2},
    "EVA02-B-16": {"depth": 3},
    "EVA02-L-14": {"depth": 2},
    "EVA02-L-14-336": {"depth": 2},
    "EVA02-E-14": {"depth": 2},
    "EVA02-E-14-plus": {"depth": 2},
    "MobileCLIP-S1": FASTVIT,
    "MobileCLIP-S2": FASTVIT,
    "MobileCLIP-B": {"depth": 2},
    "MobileCLIP2-S0": FASTVIT,
    "MobileCLIP2-S2": FASTVIT,
    "MobileCLIP2-S3": {"layers": (1, 1, 1, 1, 1)},
    "MobileCLIP2-S4": {"layers": (1, 1, 1, 1, 1)},
    "MobileCLIP2-B": {"depth": 2},
    "MobileCLIP2-L-14": {"depth": 2},
    "ViTamin-S": {"depth": 2},
    "ViTamin-S-LTT": {"depth": 2},
    "ViTamin-B": {"depth": 2},
    "ViTamin-B-LTT": {"depth": 2},
    "ViTamin-L": {"depth": 2},
    "ViTamin-L-256": {"depth": 2},
    "ViTamin-L-336": {"depth": 2},
    "ViTamin-L-384": {"depth": 2},
    "ViTamin-L2": {"depth": 2},
    "ViTamin-L2-256": {"depth": 2},
    "ViTamin-L2-336": {"depth": 2},
    "ViTamin-L2-384": {"depth": 2},
    "ViTamin-XL-256": {"depth": 2},
    "ViTamin-XL-336": {"depth": 2},
    "ViTamin-XL-384": {"depth": 2},
    "roberta-ViT-B-32": {},
    "xlm-roberta-base-ViT-B-32": {},
    "xlm-roberta-large-ViT-H-14": {},
    "nllb-clip-base": {},
    "nllb-clip-large": {},
    "nllb-clip-base-siglip": {"depth": 2},
    "nllb-clip-large-siglip": {"depth": 2},
    "coca_ViT-B-32": {},
    "coca_ViT-L-14": {},
    "convnext_tiny": CONVNEXT,
    "convnext_small": CONVNEXT,
    "convnext_base": CONVNEXT,
    "convnext_base_w": CONVNEXT,
    "convnext_base_w_320": CONVNEXT,
    "convnext_large": CONVNEXT,
    "convnext_large_d": CONVNEXT,
    "convnext_large_d_320": CONVNEXT,
    "convnext_xlarge": CONVNEXT,
    "convnext_xxlarge": CONVNEXT,
    "convnext_xxlarge_320": CONVNEXT,
}
# One of each kind for the features.
SHALLOW = (
    "PE-Core-T-16-384",
    "PE-Core-B-16",
    "PE-Core-bigG-14-448",
    "EVA01-g-14",
    "EVA02-B-16",
    "EVA02-L-14-336",
    "EVA02-E-14",
    "MobileCLIP-S1",
    "MobileCLIP-B",
    "MobileCLIP2-S3",
    "MobileCLIP2-L-14",
    "ViTamin-S",
    "ViTamin-XL-256",
    "roberta-ViT-B-32",
    "xlm-roberta-base-ViT-B-32",
    "nllb-clip-base",
    "nllb-clip-base-siglip",
    "coca_ViT-B-32",
    "coca_ViT-L-14",
    "convnext_base",
    "convnext_large_d",
    "convnext_xxlarge",
)


@contextlib.contextmanager
def timm_options(**options):
    """Let open_clip make timm's towers with these options."""
    create = timm.create_model
    timm.create_model = functools.partial(create, **options)
    try:
        yield
    finally:
        timm.create_model = create


@contextlib.contextmanager
def local_encoders(**sizes):
    """Let open_clip read the sizes of transformers' encoders here, and not from the hub."""
    read = transformers.AutoConfig.from_pretrained

    def config_of(name):
        kind, values = ENCODERS[name]
        return transformers.AutoConfig.for_model(kind, **values | sizes)

    transformers.AutoConfig.from_pretrained = config_of
    try:
        yield
    finally:
        transformers.AutoConfig.from_pretrained = read


def build(cfg: dict):
    """Return open_clip's model of a config."""
    cfg = copy.deepcopy(cfg)
    if "multimodal_cfg" in cfg:
        cfg.pop("custom_text")
        return open_clip.CoCa(**cfg)
    is_custom = cfg.pop("custom_text", False)
    if "hf_model_name" in cfg["text_cfg"]:
        is_custom, cfg["text_cfg"]["hf_model_pretrained"] = True, False
    return (open_clip.CustomTextCLIP if is_custom else open_clip.CLIP)(**cfg)


def naming_of(arrays) -> str:
    return find_naming(arrays, "open_clip's model")


def folded(arrays):
    """Return the arrays that are read of a file."""
    arrays = {key: x for key, x in arrays.items() if not key.startswith(CAPTIONER)}
    return reparameterize(arrays) if is_branched(arrays) else arrays


def shallow_config(name: str) -> CLIPConfig:
    """Return an entry of the zoo at the depth and vocabulary of the case."""
    config = MODELS[name]
    ours = {"depth": "layers", "depths": "depths", "layers": "depths"}
    shallow = {ours[key]: value for key, value in FAMILIES[name].items()} or {"layers": 2}
    vision = dataclasses.replace(config.vision, **shallow)
    end = VOCABULARY - 1 if config.text.encoder is None else config.text.eot_id
    text = dataclasses.replace(config.text, layers=2, vocab_size=VOCABULARY, eot_id=end)
    return dataclasses.replace(config, vision=vision, text=text)


def shallow_model(name: str):
    """Return open_clip's model of the same depth, its weights and statistics moved."""
    cfg = copy.deepcopy(open_clip.get_model_config(name))
    cfg["text_cfg"] |= {"layers": 2, "vocab_size": VOCABULARY}
    if not FAMILIES[name]:
        cfg["vision_cfg"]["layers"] = 2
    if "multimodal_cfg" in cfg:
        cfg["multimodal_cfg"] |= {"layers": 1, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "encoder_layers": 2, "decoder_layers": 1}
    with timm_options(**FAMILIES[name]), local_encoders(vocab_size=VOCABULARY, **small):
        return published.move(build(cfg))


def make_inputs(config: CLIPConfig):
    """Return two normalized images, and captions that end in the middle and at the end."""
    rng = np.random.default_rng(0)
    size, text = config.vision.image_size, config.text
    images = rng.standard_normal((2, size, size, 3)).astype(np.float32)
    pad_id = 0 if text.encoder is None else text.encoder.pad_id
    tokens = np.full((2, text.context_length), pad_id, np.int32)
    for row, end in zip(tokens, (9, text.context_length - 1), strict=True):
        row[:end] = rng.integers(3, VOCABULARY - 2, end)
        row[end] = text.eot_id
    return images, tokens


@functools.cache
def largest_differences(name: str) -> tuple[float, float]:
    """Return the largest differences of the unit features, of images and of texts."""
    model, config = shallow_model(name), shallow_config(name)
    images, tokens = make_inputs(config)
    arrays = folded({k: v.detach().numpy() for k, v in model.state_dict().items()})
    readers = import_arrays(arrays, array_shapes(config), naming_of(arrays), name)
    variables = to_variables({path: jnp.asarray(read()) for path, read in readers.items()})
    expected = published.reference(
        model, torch.from_numpy(images.transpose(0, 3, 1, 2)), torch.from_numpy(tokens).long()
    )
    apply = jax.jit(CLIP(config).apply, static_argnames="method")
    image = unit_length(apply(variables, images, method="encode_image"))
    text = unit_length(apply(variables, tokens, method="encode_text"))
    return tuple(
        float(np.abs(np.asarray(a) - b).max()) for a, b in zip((image, text), expected, strict=True)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shape_tree_is_open_clips(name):
    cfg = open_clip.get_model_config(name)
    with torch.device("meta"), local_encoders():
        state = build(cfg).state_dict()
    zero = np.zeros((), np.float32)
    arrays = {key: np.broadcast_to(zero, tuple(x.shape)) for key, x in state.items()}
    arrays = folded(arrays)
    config = config_from_open_clip(cfg, name)
    assert config == MODELS[name]
    import_arrays(arrays, array_shapes(config), naming_of(arrays), name)
    if not config.text.class_token:
        assert config_from_open_clip(config_to_open_clip(config), name) == config


@pytest.mark.parametrize("name", SHALLOW)
def test_features_agree(name):
    image, text = largest_differences(name)
    print(f"{name}: image {image:.1e}, text {text:.1e}")
    # Float32 rounding through a few blocks.
    assert image < 1e-5 and text < 1e-5


def test_states_of_a_roberta_and_of_convolutions_are_the_librarys():
    model, config = shallow_model("roberta-ViT-B-32"), shallow_config("roberta-ViT-B-32")
    _, tokens = make_inputs(config)
    states = tower_states(model, config, "text", tokens)
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        mask = (ids != config.text.encoder.pad_id).long()
        rows = model.text.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
    seen = mask.bool().numpy()
    np.testing.assert_allclose(np.asarray(states.rows_BLD)[seen], rows.numpy()[seen], atol=1e-4)
    mean = (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    np.testing.assert_allclose(states.pooled_BD, mean, atol=1e-4)
    for name in ("convnext_base", "MobileCLIP-S1"):
        model, config = shallow_model(name), shallow_config(name)
        images, _ = make_inputs(config)
        states = tower_states(model, config, "image", images)
        with torch.no_grad():
            maps = model.visual.trunk.forward_features(
                torch.from_numpy(images.transpose(0, 3, 1, 2))
            )
        rows = maps.flatten(2).permute(0, 2, 1).numpy()
        scale = np.abs(rows).max()
        # Of FastViT the last convolution, its squeeze and GELU count among the features.
        np.testing.assert_allclose(states.rows_BLD / scale, rows / scale, atol=1e-5)


def tower_states(model, config, tower, inputs):
    """Return our states of one tower with the library's weights."""
    arrays = folded({k: v.detach().numpy() for k, v in model.state_dict().items()})
    readers = import_arrays(arrays, array_shapes(config), naming_of(arrays), "test")
    variables = to_variables({path: jnp.asarray(read()) for path, read in readers.items()})
    return jax.jit(make_states(CLIP(config), tower, []))(variables, inputs)


def test_every_kind_has_its_features_compared():
    kinds = {parity_case(MODELS[name]) for name in FAMILIES}
    assert {parity_case(MODELS[name]) for name in SHALLOW} == kinds


# OpenVision's tiny model at 160 pixels as its folder describes it, of two blocks.
OPEN_VISION = {
    "embed_dim": 192,
    "vision_cfg": {
        "image_size": 160,
        "layers": 2,
        "width": 192,
        "patch_size": 16,
        "no_ln_pre": True,
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "norm_kwargs": {"eps": 1e-6},
        "head_width": 64,
    },
    "text_cfg": {
        "context_length": 80,
        "vocab_size": 600,
        "hf_tokenizer_name": "bert-base-uncased",
        "tokenizer_kwargs": {"strip_sep_token": True},
        "width": 192,
        "heads": 3,
        "layers": 2,
        "pool_type": "last",
        "no_causal_mask": True,
        "act_kwargs": {"approximate": "tanh"},
        "norm_kwargs": {"eps": 1e-6},
    },
}


def test_an_open_vision_folder(tmp_path):
    model = published.open_clip_model(OPEN_VISION)
    values = {"model_cfg": OPEN_VISION, "preprocess_cfg": {"resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    image, text, _ = published.difference(model, clip_jax.load(tmp_path))
    assert image < 1e-5 and text < 1e-5


@pytest.mark.parametrize(
    ("kind", "text", "vision"),
    [
        # TinyCLIP's widths; SigLIP 2's vocabulary at a fixed size; a distilled MetaCLIP 2's ends.
        ("CLIP", {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}, {}),
        ("Siglip", {"vocab_size": 2560, "projection_size": 768}, {"patch_size": 32}),
        ("MetaClip2", {"hidden_size": 384, "num_attention_heads": 6}, {"patch_size": 16}),
    ],
)
def test_folders_of_transformers_in_pickled_shards(tmp_path, kind, text, vision):
    text = {"vocab_size": 600, "eos_token_id": 599, "num_hidden_layers": 1} | text
    vision = {"num_hidden_layers": 1, "image_size": 64} | vision
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = published.move(getattr(transformers, f"{kind}Model")(config))
    config.save_pretrained(tmp_path)
    names = list(model.state_dict())
    places = {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard = f"pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({name: model.state_dict()[name] for name in part}, tmp_path / shard)
        places |= dict.fromkeys(part, shard)
    index = json.dumps({"weight_map": places})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    image, text, _ = published.difference(model, clip_jax.load(tmp_path))
    assert image < 1e-5 and text < 1e-5
