"""The transforms against torchvision's own, value for value."""

import io
import itertools
import json
import os
import random
from pathlib import Path

import data_cases
import jax.numpy as jnp
import numpy as np
import pytest
from data_cases import encode, make_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data import images

torch = pytest.importorskip("torch")
transforms = pytest.importorskip("torchvision.transforms")
BICUBIC = transforms.InterpolationMode.BICUBIC


def reference(image, n):
    """Return OpenAI's preprocessing up to the scaling of values."""
    steps = [transforms.Resize(n, interpolation=BICUBIC), transforms.CenterCrop(n)]
    return np.asarray(transforms.Compose(steps)(image).convert("RGB"))


MODES = ("shortest", "longest", "squash")
FILTERS = ("bicubic", "bilinear")
GOLDEN = Path(__file__).parents[1] / "golden" / "preprocess.json"


def open_clip_reference(image, n, resize_mode, interpolation, fill=0):
    """Return open_clip's own evaluation transform up to its scaling of values."""
    from open_clip.transform import MaybeToTensor, image_transform

    steps = image_transform(
        n, False, resize_mode=resize_mode, interpolation=interpolation, fill_color=fill
    ).transforms
    assert isinstance(steps[-2], MaybeToTensor)
    for step in steps[:-2]:
        image = step(image)
    return np.asarray(image)


def eval_transform(image, n, resize_mode, interpolation, fill=0):
    preprocess = images.Preprocess(resize_mode, interpolation, fill=fill)
    return images.eval_transform(image, n, preprocess)


@pytest.mark.parametrize("case", sorted(data_cases.GOLDEN))
def test_golden_digests_are_torchvisions(case):
    mode, size, n = case
    assert data_cases.digest(reference(make_image(mode, *size), n)) == data_cases.GOLDEN[case]


def files():
    exif = Image.Exif()
    exif[0x0112] = 8
    for width, height in (*data_cases.SIZES, (3, 50), (55, 56)):
        rgb = make_image("RGB", width, height)
        yield "jpeg", encode(rgb, "JPEG")
        yield "jpeg-exif", encode(rgb, "JPEG", exif=exif)
        yield "jpeg-gray", encode(make_image("L", width, height), "JPEG")
        yield "jpeg-cmyk", encode(make_image("CMYK", width, height), "JPEG")
        yield "webp", encode(rgb, "WEBP")
        yield "webp-rgba", encode(make_image("RGBA", width, height), "WEBP", lossless=True)
        for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"):
            yield f"png-{mode}", encode(make_image(mode, width, height), "PNG")
        yield "png-P-index", encode(make_image("P", width, height), "PNG", transparency=3)
        yield "png-RGB-key", encode(rgb, "PNG", transparency=(1, 2, 3))


@pytest.mark.parametrize("n", [7, 24, 33])
@pytest.mark.parametrize("name, data", list(files()))
def test_from_bytes_to_pixels(name, data, n):
    with Image.open(io.BytesIO(data)) as image:
        expected = reference(image, n)
    np.testing.assert_array_equal(images.eval_transform(images.decode_image(data), n), expected)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("resize_mode", MODES)
def test_every_file_in_every_mode_as_open_clip(resize_mode, interpolation):
    for (name, data), n, fill in itertools.product(files(), (7, 24, 33), (0, 200)):
        with Image.open(io.BytesIO(data)) as image:
            if resize_mode == "longest" and round(min(image.size) * n / max(image.size)) == 0:
                continue  # open_clip raises
            expected = open_clip_reference(image, n, resize_mode, interpolation, fill)
        actual = eval_transform(images.decode_image(data), n, resize_mode, interpolation, fill)
        np.testing.assert_array_equal(actual, expected, f"{name} {image.size} to {n}, fill {fill}")


@pytest.mark.parametrize("resize_mode", MODES)
def test_everyday_sizes_as_open_clip(resize_mode):
    """Photographs to the models' sizes, a banner, a thread and a thumbnail to enlarge."""
    sizes = [(500, 333), (333, 500), (640, 480), (1024, 683), (2000, 11), (1, 300), (90, 61)]
    for size, n in itertools.product(sizes, (224, 378)):
        image = Image.open(io.BytesIO(encode(make_image("RGB", *size), "JPEG")))
        for interpolation in FILTERS:
            expected = open_clip_reference(image, n, resize_mode, interpolation)
            np.testing.assert_array_equal(
                eval_transform(image, n, resize_mode, interpolation), expected
            )


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(1, 64),
    st.sampled_from(data_cases.MODES),
    st.sampled_from(MODES),
    st.sampled_from(FILTERS),
    st.integers(0, 255),
)
def test_any_size_as_open_clip(width, height, n, mode, resize_mode, interpolation, fill):
    image = make_image(mode, width, height)
    settings = (resize_mode, interpolation, fill)
    try:
        expected = open_clip_reference(image, n, *settings)
    except ValueError:  # a side rounds to nothing: Pillow refuses, and we keep one pixel
        assert resize_mode == "longest" and max(image.size) / min(image.size) >= 2 * n
        assert eval_transform(image, n, *settings).shape == (n, n, 3)
    else:
        np.testing.assert_array_equal(eval_transform(image, n, *settings), expected)


def test_sizes_are_open_clips_for_every_rounding():
    """Widths and heights alone, so that real resolutions are cheap to enumerate."""
    from open_clip.transform import ResizeKeepRatio
    from torchvision.transforms.functional import _compute_resized_output_size

    rng = random.Random(0)
    for _ in range(20_000):
        width, height, n = rng.randint(1, 5000), rng.randint(1, 5000), rng.choice((224, 336, 378))
        shortest = _compute_resized_output_size((height, width), [n])[::-1]
        assert images.fitted_size(width, height, n, "shortest") == tuple(shortest)
        image = type("Sized", (), {"size": (width, height)})
        longest = ResizeKeepRatio.get_params(image, (n, n), 1.0)[::-1]
        assert images.fitted_size(width, height, n, "longest") == tuple(max(1, x) for x in longest)


def golden_cases():
    for resize_mode, interpolation in itertools.product(MODES, FILTERS):
        for mode, (width, height) in itertools.product(data_cases.MODES, ((37, 53), (91, 30))):
            yield mode, width, height, 24, resize_mode, interpolation, 130
        for width, height, n in (1, 9, 7), (224, 224, 24), (11, 8, 40), (300, 7, 33):
            yield "RGB", width, height, n, resize_mode, interpolation, 0


def test_golden_file_is_what_open_clip_says():
    """Run with WRITE_GOLDEN=1 in the environment to write it anew."""
    cases = [
        [*case, data_cases.digest(open_clip_reference(make_image(*case[:3]), *case[3:]))]
        for case in golden_cases()
    ]
    if "WRITE_GOLDEN" in os.environ:
        GOLDEN.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    assert json.loads(GOLDEN.read_text()) == cases


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow's, in torchvision
def test_palette_with_a_transparency_for_each_color():
    data = encode(make_image("P", 40, 23), "PNG", transparency=bytes(range(256)))
    with Image.open(io.BytesIO(data)) as image:
        expected = reference(image, 16)
    np.testing.assert_array_equal(images.eval_transform(images.decode_image(data), 16), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 120),
    st.integers(1, 120),
    st.integers(1, 48),
    st.sampled_from(["RGB", "RGBA", "L", "P"]),
)
def test_any_size(width, height, n, mode):
    image = make_image(mode, width, height)
    np.testing.assert_array_equal(images.eval_transform(image, n), reference(image, n))


class _Draws(np.random.Generator):
    """Log the uniform numbers, so that both samplers can be given the same ones."""

    def __init__(self, seed):
        super().__init__(np.random.PCG64(seed))
        self.log = []

    def random(self):
        self.log.append(super().random())
        return self.log[-1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 120),
    st.integers(1, 120),
    st.sampled_from([(0.08, 1.0), (0.9, 1.0), (0.5, 0.6)]),
    st.integers(0, 1000),
)
def test_random_resized_crop_with_the_same_draws(width, height, scale, seed):
    """torchvision's sampler, fed our uniform numbers, must choose the same box and pixels."""
    ratio = (3 / 4, 4 / 3)
    image, draws = make_image("RGB", width, height), _Draws(seed)
    actual = images.random_resized_crop(image, 16, draws, scale, ratio)
    numbers = iter(draws.log)

    class Uniform:
        def uniform_(self, low, high):
            # float64, where torch would round its own draw to float32
            return torch.tensor(float(low) + (float(high) - float(low)) * next(numbers)).double()

    def randint(low, high, size):
        return torch.tensor(int(next(numbers) * high))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *size: Uniform())
        patch.setattr(torch, "randint", randint)
        patch.setattr(torch, "log", lambda x: np.log(ratio))
        box = transforms.RandomResizedCrop.get_params(image, scale, ratio)
    expected = transforms.functional.resized_crop(image, *box, [16, 16], BICUBIC)
    np.testing.assert_array_equal(actual, np.asarray(expected))


def test_the_families_are_open_clips_table():
    """Each of its 196 pretrained pairs has the settings of one of our constants."""
    import open_clip

    from clip_jax.pretrained.preprocess import preprocess_from_open_clip

    families = {
        images.OPENAI: 138,
        images.SIGLIP: 30,
        images.CLIPA: 7,
        images.MOBILECLIP: 7,
        images.DFN5B: 6,
        images.PE: 5,
        images.MOBILECLIP2: 2,
        images.INCEPTION: 1,
    }
    counts = dict.fromkeys(families, 0)
    for pair in open_clip.list_pretrained():
        cfg = open_clip.get_pretrained_cfg(*pair)
        keys = ("mean", "std", "interpolation", "resize_mode")
        counts[preprocess_from_open_clip({key: cfg.get(key) for key in keys})] += 1
    assert counts == families


@pytest.mark.parametrize("name", ["OPENAI", "SIGLIP", "CLIPA", "INCEPTION", "PE"])
def test_hugging_face_reads_and_writes_the_same_settings(name, tmp_path):
    """Its PIL processors on our file: same pixels wherever its crop offset is torchvision's."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    from clip_jax.pretrained.preprocess import preprocess_from_hf, preprocess_to_hf

    preprocess = getattr(images, name)
    written = preprocess_to_hf(preprocess, 24)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(written))
    crops = preprocess.resize_mode == "shortest"
    processor = (CLIPImageProcessorPil if crops else SiglipImageProcessorPil).from_pretrained(
        tmp_path
    )
    processor.save_pretrained(tmp_path)
    assert preprocess_from_hf(json.loads(path.read_text())) == preprocess
    for size in (37, 53), (64, 48), (91, 30), (224, 224):
        image = make_image("RGB", *size)
        expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        actual = images.eval_transform(image, 24, preprocess).astype(np.float32) / 255
        actual = (actual - np.float32(preprocess.mean)) / np.float32(preprocess.std)
        # Both scale values below 5 in float32; half a level of 255 would be 7e-3.
        np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize("factors", [(0.6, 1, 1), (1.5, 1, 1), (1, 0.4, 1), (1, 1.7, 1), (1, 1, 0)])
def test_color_adjustments_are_torchvisions(factors):
    """One factor at a time and then all three in the order of `adjust_colors`."""
    from torchvision.transforms import functional

    from clip_jax.training.device_augment import adjust_colors

    rng = np.random.default_rng(0)
    x_BHWC = rng.uniform(size=(3, 9, 7, 3)).astype(np.float32)
    for each in (factors, (0.8, 1.3, 1.6)):
        expected = torch.from_numpy(x_BHWC).permute(0, 3, 1, 2)
        expected = functional.adjust_brightness(expected, each[0])
        expected = functional.adjust_contrast(expected, each[1])
        expected = functional.adjust_saturation(expected, each[2])
        actual = adjust_colors(jnp.asarray(x_BHWC), jnp.tile(jnp.array(each, jnp.float32), (3, 1)))
        # A few float32 roundings of values below 2.
        np.testing.assert_allclose(actual, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)
