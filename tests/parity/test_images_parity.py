"""The transforms against torchvision's own, value for value."""

import io

import data_cases
import jax.numpy as jnp
import numpy as np
import pytest
from data_cases import encode, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data import images

torch = pytest.importorskip("torch")
transforms = pytest.importorskip("torchvision.transforms")
BICUBIC = transforms.InterpolationMode.BICUBIC


def reference(image, n):
    """OpenAI's preprocessing up to the scaling of values."""
    steps = [transforms.Resize(n, interpolation=BICUBIC), transforms.CenterCrop(n)]
    return np.asarray(transforms.Compose(steps)(image).convert("RGB"))


@pytest.mark.parametrize("case", sorted(data_cases.GOLDEN))
def test_golden_digests_are_torchvisions(case):
    mode, size, n = case
    assert data_cases.digest(reference(picture(mode, *size), n)) == data_cases.GOLDEN[case]


def files():
    exif = Image.Exif()
    exif[0x0112] = 8
    for width, height in (*data_cases.SIZES, (3, 50), (55, 56)):
        rgb = picture("RGB", width, height)
        yield "jpeg", encode(rgb, "JPEG")
        yield "jpeg-exif", encode(rgb, "JPEG", exif=exif)
        yield "jpeg-grey", encode(picture("L", width, height), "JPEG")
        yield "jpeg-cmyk", encode(picture("CMYK", width, height), "JPEG")
        yield "webp", encode(rgb, "WEBP")
        yield "webp-rgba", encode(picture("RGBA", width, height), "WEBP", lossless=True)
        for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"):
            yield f"png-{mode}", encode(picture(mode, width, height), "PNG")
        yield "png-P-index", encode(picture("P", width, height), "PNG", transparency=3)
        yield "png-RGB-key", encode(rgb, "PNG", transparency=(1, 2, 3))


@pytest.mark.parametrize("n", [7, 24, 33])
@pytest.mark.parametrize("name, data", list(files()))
def test_from_bytes_to_pixels(name, data, n):
    with Image.open(io.BytesIO(data)) as image:
        want = reference(image, n)
    np.testing.assert_array_equal(images.eval_transform(images.decode_image(data), n), want)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow's, in torchvision
def test_palette_with_a_transparency_for_each_colour():
    data = encode(picture("P", 40, 23), "PNG", transparency=bytes(range(256)))
    with Image.open(io.BytesIO(data)) as image:
        want = reference(image, 16)
    np.testing.assert_array_equal(images.eval_transform(images.decode_image(data), 16), want)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 120),
    st.integers(1, 120),
    st.integers(1, 48),
    st.sampled_from(["RGB", "RGBA", "L", "P"]),
)
def test_any_size(width, height, n, mode):
    image = picture(mode, width, height)
    np.testing.assert_array_equal(images.eval_transform(image, n), reference(image, n))


class _Draws(np.random.Generator):
    """Keeps the uniform numbers it gives, to play them to another sampler."""

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
    image, ours = picture("RGB", width, height), _Draws(seed)
    got = images.random_resized_crop(image, 16, ours, scale, ratio)
    numbers = iter(ours.log)

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
    want = transforms.functional.resized_crop(image, *box, [16, 16], BICUBIC)
    np.testing.assert_array_equal(got, np.asarray(want))


@pytest.mark.parametrize("factors", [(0.6, 1, 1), (1.5, 1, 1), (1, 0.4, 1), (1, 1.7, 1), (1, 1, 0)])
def test_color_adjustments_are_torchvisions(factors):
    """One factor at a time and then all three in our order."""
    from torchvision.transforms import functional

    from clip_jax.augment import adjust_colors

    rng = np.random.default_rng(0)
    x_BHWC = rng.uniform(size=(3, 9, 7, 3)).astype(np.float32)
    for each in (factors, (0.8, 1.3, 1.6)):
        want = torch.from_numpy(x_BHWC).permute(0, 3, 1, 2)
        want = functional.adjust_brightness(want, each[0])
        want = functional.adjust_contrast(want, each[1])
        want = functional.adjust_saturation(want, each[2])
        got = adjust_colors(jnp.asarray(x_BHWC), jnp.tile(jnp.array(each, jnp.float32), (3, 1)))
        # A few float32 roundings of values below 2.
        np.testing.assert_allclose(got, want.permute(0, 2, 3, 1).numpy(), atol=1e-6)
