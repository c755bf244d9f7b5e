"""Whatever a notebook hands over is taken, or ends in one line, never in a traceback."""

import collections
import dataclasses
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import VIT

import clip_jax
from clip_jax.api import LoadedCLIP
from clip_jax.errors import UserError
from clip_jax.models import zoo


class Column(collections.UserList):
    """A column as pandas has it: a collection with `__array__`."""

    def __array__(self, dtype=None, copy=None):
        return np.array(self.data, object)

    @property
    def dtype(self):
        return np.dtype(object)


class Hidden:
    """An array that its library does not give."""

    dtype, ndim = np.dtype(np.float32), 4

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


@pytest.fixture(scope="module")
def clip():
    text = dataclasses.replace(VIT.text, context_length=16, vocab_size=49_408, eot_id=49_407)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(zoo.MODELS, "tiny", dataclasses.replace(VIT, text=text))
        yield clip_jax.create("tiny")


@pytest.fixture
def stub(clip, monkeypatch):
    """Return the model with towers that compute nothing: what they are given is what is tested."""
    zeros = lambda variables, rows, *rest: jnp.zeros((len(rows), 16))  # noqa: E731
    for name in ("_encode_image", "_encode_text", "_relevance"):
        monkeypatch.setattr(clip, name, zeros)
    monkeypatch.setattr(clip, "_states", collections.defaultdict(lambda: zeros))
    monkeypatch.setattr(clip, "_unit_length", lambda z: z)
    return clip


@pytest.fixture(scope="module")
def image():
    return Image.new("RGB", (40, 30), "red")


def odd_values(image):
    pixels = np.asarray(image)
    return {
        "none": None, "int": 3, "float": 2.5, "bool": True, "str": "a cat", "bytes": b"abc",
        "empty str": "", "empty": [], "tuple": (), "dict": {"a": 1}, "set": {"a", "b"},
        "keys": {"a": 1, "b": 2}.keys(), "generator": (x for x in ("a", "b")), 
        "nan": [float("nan")], "None in it": ["a", None], "mixed": ["a", 3],
        "ragged": [[1, 2], [3]], "column": Column("ab"),
        "names": np.array(["a", "b"]), "objects": np.array(["a", 3], object), "name": np.str_("a"),
        "0-d": np.array("a"), "no rows": np.zeros((0, 32, 32, 3), np.uint8), "floats": np.ones(4),
        "ids": [1, 2, 3], "negative": [[-1, 2]], "high": [[10**6]], "bool ids": [[True]],
        "image": image, "images": [image, image], "pixels": pixels, "gray": pixels[..., 0],
        "chw": pixels.transpose(2, 0, 1), "float pixels": pixels / 255.0, "batch": pixels[None],
        "flat": np.zeros((0, 5, 3), np.uint8), "jax": jnp.asarray(pixels), "path": "nowhere.png",
        "pathlib": pathlib.Path("nowhere.png"), "folder": pathlib.Path("/"),
        "file": io.BytesIO(b"x"),
        "image and word": [image, "a"], "images of columns": Column([image]), "hidden": Hidden(),
        "type": int, "function": len, "complex": np.ones((32, 32, 3), complex), "object": object(),
        "right floats": np.full((32, 32, 3), np.nan, np.float32),
        "0..255": 255.0 * np.ones((32, 32, 3)),
        "two types": [np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32, 3), np.float32)],
    }  # fmt: skip


NAMES = list(odd_values(Image.new("RGB", (1, 1))))


@pytest.mark.parametrize("name", NAMES)
def test_every_public_method_takes_a_value_or_says_what_it_takes(stub, image, name):
    clip = stub
    x = clip.preprocess(image)

    def value():
        return odd_values(image)[name]

    calls = {
        "preprocess": lambda: clip.preprocess(value()),
        "tokenize": lambda: clip.tokenize(value()),
        "encode_image": lambda: clip.encode_image(value()),
        "encode_text": lambda: clip.encode_text(value()),
        "logits": lambda: clip.logits(value(), "a"),
        "probabilities": lambda: clip.probabilities(x, value()),
        "classify": lambda: clip.classify(value(), ["a", "b"]),
        "class names": lambda: clip.classify(x, value()),
        "templates": lambda: clip.classify(x, ["a"], templates=value()),
        "image_states": lambda: clip.image_states(value()),
        "text_states": lambda: clip.text_states(value()),
        "blocks": lambda: clip.image_states(x, value()),
        "relevance": lambda: clip.relevance(value(), "a"),
        "relevance's text": lambda: clip.relevance(x, value()),
        "create": lambda: clip_jax.create(value()) if name != "str" else None,
        "load": lambda: clip_jax.load(value() if name != "folder" else "/nowhere"),
        "load's model": lambda: clip_jax.load("nowhere.pt", model=value()),
        "load's tokenizer": lambda: clip_jax.load("nowhere.pt", tokenizer=value()),
        "load's size": lambda: clip_jax.load("nowhere.pt", image_size=value()),
        "load's mesh": lambda: clip_jax.load("nowhere.pt", mesh=value()),
        "load's dtype": lambda: clip_jax.load("nowhere.pt", dtype=value()),
        "clip_jax.tokenize": lambda: clip_jax.tokenize(value()),
        "its length": lambda: clip_jax.tokenize("a", value()),
        "load's towers": lambda: clip_jax.load("nowhere.pt", towers=value()),
    }
    public = {
        n for n in vars(LoadedCLIP) if not n.startswith("_") and callable(getattr(LoadedCLIP, n))
    }
    assert public - {"known_tokenizer", "encoders_of_variables"} <= calls.keys()
    for method, call in calls.items():
        try:
            call()
        except UserError as error:
            assert len(str(error).splitlines()) == 1, (method, str(error))


def test_what_is_clear_is_taken(clip, image, tmp_path):
    image.save(tmp_path / "a.png")
    x = clip.preprocess(image)
    path = tmp_path / "a.png"
    file = io.BytesIO(path.read_bytes())
    for value in (
        path, str(path), path.read_bytes(), file, [path], (p for p in [image]), Column([image]),
        np.asarray(image), jnp.asarray(image), np.asarray(image.convert("RGBA")),
        np.asarray(image)[None],
    ):  # fmt: skip
        np.testing.assert_array_equal(clip.preprocess(value), x)
    assert clip.preprocess(np.full((9, 9, 1), 7, np.uint8)).shape == (1, 32, 32, 3)
    np.testing.assert_array_equal(clip.encode_image(path), clip.encode_image(x))
    z = clip.encode_text(["a", "b"])
    for value in (
        ("a", "b"), {"a": 1, "b": 2}.keys(), np.array(["a", "b"]), np.array(["a", "b"], object),
        Column(["a", "b"]), (n for n in "ab"), clip.tokenize(["a", "b"]).tolist(),
    ):  # fmt: skip
        np.testing.assert_array_equal(clip.encode_text(value), z)
    p = clip.classify(x, ["a", "b"], templates=["a photo of a {}."])
    for names in (np.array(["a", "b"]), Column(["a", "b"]), {"a": 1, "b": 2}.keys()):
        for templates in ("a photo of a {}.", "a photo of a {c}.", "photo", np.array(["photo"])):
            np.testing.assert_array_equal(clip.classify(x, names, templates), p)
    assert clip.classify(x, "pizza").shape == (1, 1)
    assert clip.image_states(x, -1).blocks[0].shape == clip.image_states(x, [-1]).blocks[0].shape


@pytest.mark.parametrize(
    "method, value, message",
    [
        ("tokenize", b"abc", "takes texts, and number 1 of 1 is b'abc', a bytes"),
        ("tokenize", [float("nan")], "number 1 of 1 is nan, a float"),
        ("preprocess", [], "preprocess got no image"),
        ("preprocess", Image.new("I;16", (9, 9)), "of I;16 values, which are no 8 bits"),
        ("preprocess", Image.new("F", (9, 9)), "of F values, which are no 8 bits"),
        ("preprocess", "nowhere.png", "'nowhere.png' cannot be read: No such file"),
        ("preprocess", b"abc", "is no image that can be read"),
        ("preprocess", Hidden(), "can't convert cuda:0"),
        ("encode_image", np.zeros((0, 32, 32, 3), np.uint8), "got no image"),
        ("encode_image", 255.0 * np.ones((32, 32, 3)), "values from 255 to 255; give pixels"),
        ("encode_image", np.full((32, 32, 3), np.inf), "not finite"),
        ("encode_text", [], "got no text"),
        ("encode_text", [[49_408]], "another tokenizer made them"),
        ("encode_text", [[0.5]], "whole token ids and got float64"),
        ("encode_text", {"a": 1}, "got a dict"),
        ("encode_text", {"a", "b"}, "got a set, which has no order"),
    ],
)
def test_mistakes_say_what_to_give(clip, method, value, message):
    with pytest.raises(UserError, match=message):
        getattr(clip, method)(value)


def test_class_names_that_are_none(clip, image):
    for names, message in (
        ([], "no class names"),
        (["a", " "], "name 2 of 2 is blank"),
        ([1], "is 1, a int"),
    ):
        with pytest.raises(UserError, match=message):
            clip.classify(image, names)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("path", [("logit_scale",), ("visual", "class_embedding")])
def test_weights_that_are_not_finite_give_no_figures(clip, image, bad, path):
    variables = jax.tree.map(lambda x: x, {"params": clip.params, "batch_stats": clip.batch_stats})
    inner = variables["params"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = inner[path[-1]] * bad
    broken = LoadedCLIP("broken", clip.config, variables, tokenizer_spec=clip.tokenizer_spec)
    for call in (
        lambda: broken.encode_image(image),
        lambda: broken.encode_text("a"),
        lambda: broken.classify(image, ["a", "b"]),
        lambda: broken.logits(image, "a"),
        lambda: broken.image_states(image),
        lambda: broken.relevance(image, "a"),
    ):
        with pytest.raises(UserError, match=f"broken: 1 of .* not finite.*{path[-1]}"):
            call()


def test_the_check_of_weights_can_stand_inside_a_traced_function(clip, image):
    fresh = LoadedCLIP("fresh", clip.config, {"params": clip.params})
    x = jnp.asarray(clip.preprocess(image))
    np.testing.assert_allclose(jax.jit(fresh.encode_image)(x), clip.encode_image(x), atol=1e-6)
