"""Families whose towers timm or transformers make: shape trees at full size, features when shallow.

open_clip builds each model from its own configuration, on a device that holds no numbers where it
has its full size. The shallow ones have few blocks and a small vocabulary at their own widths, and
random weights and running statistics.
"""

import contextlib
import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

import published  # noqa: E402

from clip_jax.models.clip import CLIP, CLIPConfig, unit_length  # noqa: E402
from clip_jax.models.table import parity_case  # noqa: E402
from clip_jax.models.zoo import MODELS  # noqa: E402
from clip_jax.pretrained.infer import find_naming  # noqa: E402
from clip_jax.pretrained.layouts import import_arrays  # noqa: E402
from clip_jax.pretrained.open_clip_config import (  # noqa: E402
    config_from_open_clip,
    config_to_open_clip,
)
from clip_jax.pretrained.reparameterize import is_branched, reparameterize  # noqa: E402
from clip_jax.pretrained.trees import array_shapes, to_variables  # noqa: E402

VOCABULARY = 90
FASTVIT = {"layers": (1, 2, 1, 1)}
CONVNEXT = {"depths": (1, 2, 1, 1)}
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


def build(cfg: dict):
    """Return open_clip's model of a config."""
    cfg = copy.deepcopy(cfg)
    kind = open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP
    return kind(**cfg)


def naming_of(arrays) -> str:
    return find_naming(arrays, "open_clip's model")


def folded(arrays):
    return reparameterize(arrays) if is_branched(arrays) else arrays


def shallow_config(name: str) -> CLIPConfig:
    """Return an entry of the zoo at the depth and vocabulary of the case."""
    config = MODELS[name]
    ours = {"depth": "layers", "depths": "depths", "layers": "depths"}
    shallow = {ours[key]: value for key, value in FAMILIES[name].items()}
    vision = dataclasses.replace(config.vision, **shallow)
    text = dataclasses.replace(config.text, layers=2, vocab_size=VOCABULARY, eot_id=VOCABULARY - 1)
    return dataclasses.replace(config, vision=vision, text=text)


def shallow_model(name: str):
    """Return open_clip's model of the same depth, its weights and statistics moved."""
    cfg = copy.deepcopy(open_clip.get_model_config(name))
    cfg["text_cfg"] |= {"layers": 2, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    with timm_options(**FAMILIES[name]):
        return published.move(build(cfg))


def make_inputs(config: CLIPConfig):
    """Return two normalized images, and captions that end in the middle and at the end."""
    rng = np.random.default_rng(0)
    size, text = config.vision.image_size, config.text
    images = rng.standard_normal((2, size, size, 3)).astype(np.float32)
    tokens = np.zeros((2, text.context_length), np.int32)
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
    with torch.device("meta"):
        state = build(cfg).state_dict()
    zero = np.zeros((), np.float32)
    arrays = {key: np.broadcast_to(zero, tuple(x.shape)) for key, x in state.items()}
    arrays = folded(arrays)
    config = config_from_open_clip(cfg, name)
    assert config == MODELS[name]
    import_arrays(arrays, array_shapes(config), naming_of(arrays), name)
    assert config_from_open_clip(config_to_open_clip(config), name) == config


@pytest.mark.parametrize("name", SHALLOW)
def test_features_agree(name):
    image, text = largest_differences(name)
    print(f"{name}: image {image:.1e}, text {text:.1e}")
    # Float32 rounding through a few blocks.
    assert image < 1e-5 and text < 1e-5


def test_every_kind_has_its_features_compared():
    kinds = {parity_case(MODELS[name]) for name in FAMILIES}
    assert {parity_case(MODELS[name]) for name in SHALLOW} == kinds
