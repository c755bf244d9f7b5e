"""Preprocessing settings survive every dialect of JSON, and nonsense in one is a line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import images
from clip_jax.data.images import IMAGE_MEAN, IMAGE_STD, OPENAI, SIGLIP, Preprocess
from clip_jax.errors import UserError
from clip_jax.pretrained.preprocess import (
    preprocess_from_hf,
    preprocess_from_json,
    preprocess_from_open_clip,
    preprocess_to_hf,
    preprocess_to_json,
    preprocess_to_open_clip,
)

NUMBERS = st.floats(-10, 10, allow_nan=False)
PREPROCESSES = st.builds(
    Preprocess,
    st.sampled_from(["shortest", "longest", "squash"]),
    st.sampled_from(["bicubic", "bilinear"]),
    st.tuples(NUMBERS, NUMBERS, NUMBERS),
    st.tuples(*[st.floats(1e-3, 10)] * 3),
    st.integers(0, 255),
)
NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)

# The files beside openai/clip-vit-base-patch32 and google/siglip-base-patch16-224, and SigLIP 2's.
HF_CLIP = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
    "resample": 3,
    "size": 224,
}
HF_SIGLIP = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}


@settings(max_examples=80, deadline=None)
@given(PREPROCESSES, st.integers(1, 1000))
def test_settings_survive_every_dialect(preprocess, size):
    def through_text(value):
        return json.loads(json.dumps(value))

    assert preprocess_from_json(through_text(preprocess_to_json(preprocess))) == preprocess
    cfg = through_text(preprocess_to_open_clip(preprocess, size))
    assert preprocess_from_open_clip(cfg) == preprocess
    if preprocess.resize_mode == "longest":
        with pytest.raises(UserError, match="no Hugging Face processor"):
            preprocess_to_hf(preprocess, size)
    else:
        # Neither processor pads, so the fill is lost and never used.
        back = preprocess_from_hf(through_text(preprocess_to_hf(preprocess, size)))
        assert preprocess_to_json(back) | {"fill": preprocess.fill} == preprocess_to_json(
            preprocess
        )


def test_files_as_they_are_published():
    assert preprocess_from_hf(HF_CLIP) == OPENAI
    new = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    assert preprocess_from_hf(HF_CLIP | new) == OPENAI
    assert preprocess_from_hf(HF_SIGLIP) == SIGLIP
    assert preprocess_from_hf(HF_SIGLIP | {"resample": 2}) == images.PE  # SigLIP 2's files
    fast = {"image_processor_type": "SiglipImageProcessorFast"}
    assert preprocess_from_hf(HF_SIGLIP | fast) == SIGLIP
    assert preprocess_from_hf({"image_processor_type": "SiglipImageProcessor"}) == SIGLIP
    assert preprocess_from_hf({}) == OPENAI
    assert preprocess_from_hf({"do_normalize": False}) == images.Preprocess(
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    )
    assert preprocess_from_open_clip({}) == OPENAI
    # open_clip: null is absent, one number is three channels, other keys are passed over.
    cfg = {"mean": 0.5, "std": 0.5, "resize_mode": None, "interpolation": "random", "crop_pct": 1}
    assert preprocess_from_open_clip(cfg) == images.INCEPTION
    assert preprocess_from_open_clip({"resize_mode": "longest", "fill_color": 9}).fill == 9


@pytest.mark.parametrize(
    "parse, fields, message",
    [
        (preprocess_from_json, {"sizes": 3}, "sizes.*is not among"),
        (preprocess_from_json, [], "is not among"),
        (preprocess_from_json, {"resize_mode": "crop"}, "shortest, longest, squash"),
        (preprocess_from_json, {"interpolation": "nearest"}, "bicubic, bilinear"),
        (preprocess_from_json, {"mean": [0.5, 0.5]}, "three finite numbers"),
        (preprocess_from_json, {"std": [0.5, 0.0, 0.5]}, "numbers above 0"),
        (preprocess_from_json, {"mean": [float("nan"), 0, 0]}, "three finite numbers"),
        (preprocess_from_json, {"mean": 10**400}, "three finite numbers"),
        (preprocess_from_json, {"fill": 256}, "from 0 to 255"),
        (preprocess_from_json, {"fill": True}, "from 0 to 255"),
        (preprocess_from_open_clip, {"mode": "L"}, "preprocess_cfg.mode is 'L'"),
        (preprocess_from_open_clip, {"size": [224, 336]}, "only squares"),
        (preprocess_from_open_clip, {"fill_color": [1, 2, 3]}, "from 0 to 255"),
        (preprocess_from_open_clip, "x", "must be a JSON object"),
        (preprocess_from_hf, {"image_processor_type": "ViTImageProcessor"}, "processor is 'ViT"),
        (preprocess_from_hf, {"do_resize": False}, "do_resize is off"),
        (preprocess_from_hf, {"resample": 0}, "resample is 0"),
        (preprocess_from_hf, {"rescale_factor": 1 / 127.5}, "only 1/255"),
        (preprocess_from_hf, HF_CLIP | {"size": {"shortest_edge": 256}}, "differs from the resize"),
        (preprocess_from_hf, HF_CLIP | {"do_center_crop": False}, "do_center_crop is off"),
        (preprocess_from_hf, HF_SIGLIP | {"size": {"height": 224}}, "only squares"),
        (preprocess_from_hf, HF_SIGLIP | {"image_mean": None}, "three finite numbers"),
    ],
)
def test_nonsense_is_named(parse, fields, message):
    with pytest.raises(UserError, match=message) as error:
        parse(fields)
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([preprocess_from_json, preprocess_from_open_clip, preprocess_from_hf]),
    st.sampled_from([*HF_CLIP, *HF_SIGLIP, "interpolation", "resize_mode", "mean", "fill_color"]),
    NONSENSE,
)
def test_any_json_is_settings_or_one_line(parse, key, value):
    for fields in (value, {key: value}, HF_SIGLIP | {key: value}):
        try:
            assert isinstance(parse(fields), Preprocess)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
