"""RandAugment's operations against torchvision's bytes; erased boxes and paths against timm's."""

import conftest  # noqa: F401  (before torchvision is imported)
import jax.numpy as jnp
import numpy as np
import pytest
from data_cases import make_image

from clip_jax.data.rand_augment import OPERATIONS, STRENGTHS, magnitude_of
from clip_jax.training.device_augment import drop_path_rates, erased_boxes

torch = pytest.importorskip("torch")
transforms = pytest.importorskip("torchvision.transforms")
timm = pytest.importorskip("timm")

SIZES = ((224, 224), (37, 53), (32, 32))


def theirs(name):
    return {"autocontrast": "AutoContrast"}.get(name, name.title().replace("_", ""))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_at_every_strength_is_torchvisions_to_the_byte(name):
    from torchvision.transforms.autoaugment import RandAugment, _apply_op

    for size in SIZES:
        image = make_image("RGB", *size, seed=3)
        space = RandAugment()._augmentation_space(STRENGTHS, (size[1], size[0]))
        assert list(space) == [theirs(each) for each in OPERATIONS]
        magnitudes, is_signed = space[theirs(name)]
        assert is_signed == OPERATIONS[name].is_signed
        for strength in range(STRENGTHS) if magnitudes.ndim else [9]:
            for sign in (1, -1) if is_signed else (1,):
                value = float(magnitudes[strength].item()) if magnitudes.ndim else 0.0
                ours = magnitude_of(name, strength, size)
                ours = round(ours) if name == "posterize" else ours
                assert ours == pytest.approx(value, rel=1e-6, abs=1e-6)
                wanted = _apply_op(
                    image,
                    theirs(name),
                    sign * value,
                    interpolation=transforms.InterpolationMode.NEAREST,
                    fill=None,
                )
                changed = OPERATIONS[name].apply(image, sign * value)
                assert changed.tobytes() == wanted.tobytes(), (size, strength, sign)


def test_erased_boxes_are_timms_for_the_same_draws(monkeypatch):
    from timm.data import random_erasing

    rng = np.random.default_rng(0)
    height, width, count = 40, 24, 300
    boxes = rng.random((count, 10, 4)).astype(np.float32)
    is_erased = jnp.ones(count, bool)
    ours = np.asarray(erased_boxes(is_erased, jnp.asarray(boxes), height, width))
    erase = random_erasing.RandomErasing(probability=1.0, mode="const", device="cpu")
    different = 0
    for k in range(count):
        tries = iter(boxes[k])
        current = {}

        def uniform(low, high, tries=tries, current=current):
            if "area" not in current:
                current["box"], current["area"] = next(tries), True
                return low + (high - low) * float(current["box"][0])
            del current["area"]
            return low + (high - low) * float(current["box"][1])

        places = iter((2, 3))

        def randint(low, high, places=places, current=current):
            return low + int(float(current["box"][next(places)]) * (high - low + 1))

        monkeypatch.setattr(random_erasing.random, "random", lambda: 0.0)
        monkeypatch.setattr(random_erasing.random, "uniform", uniform)
        monkeypatch.setattr(random_erasing.random, "randint", randint)
        image = erase(torch.ones(3, height, width)).numpy()
        different += not np.array_equal(image[0] == 0, ours[k])
    assert different == 0
    assert ours.any(axis=(1, 2)).all()


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_rates_of_the_blocks_are_timms(layers):
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=layers, drop_path_rate=0.3, num_classes=0
    )
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    np.testing.assert_allclose(drop_path_rates(0.3, layers), rates, atol=1e-7)
