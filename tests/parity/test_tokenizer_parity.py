"""CLIP's tokenizer against open_clip itself, over thousands of random Unicode strings.

The suite without torch compares with tests/golden/clip_bpe.json. To add a case, append its text
there with any ids and run this file with WRITE_GOLDEN=1 in the environment, which writes the ids.
"""

import json
import os
import random

import numpy as np
import pytest
import regex
from tokenizer_cases import GOLDEN, KINDS, random_any, random_caption

from clip_jax.tokenizers import make_clip_tokenizer
from clip_jax.tokenizers.clean import CLEANERS
from clip_jax.tokenizers.clip_bpe import clean

pytest.importorskip("open_clip")

# Either library's special tokens, in whatever case (the long s is an "s" then).
SPECIAL = regex.compile(r"<\|?(start|end)_?of_?text\|?>", regex.IGNORECASE)


def make_reference(literals: str):
    """Return open_clip's tokenizer, with its own specials and white space or OpenAI's."""
    from open_clip.tokenizer import SimpleTokenizer, basic_clean

    reference = SimpleTokenizer()
    if literals == "openai":
        reference.encoder |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
        reference.cache = {text: text for text in ("<|startoftext|>", "<|endoftext|>")}
        pattern = reference.pat.pattern
        pattern = pattern.replace("<start_of_text>", r"<\|startoftext\|>")
        pattern = pattern.replace("<end_of_text>", r"<\|endoftext\|>")
        reference.pat = regex.compile(pattern, regex.IGNORECASE)
        # open_clip collapses what `str.split` takes for space, OpenAI what `regex` does.
        spaces = regex.compile(r"\s+")
        reference.clean_fn = lambda text: spaces.sub(" ", basic_clean(text)).strip().lower()
    return reference


def assert_equal(texts: list[str], reference) -> None:
    tokens = make_clip_tokenizer()(texts)
    expected = reference(texts, 77).numpy()
    pairs = zip(texts, tokens, expected, strict=True)
    wrong = [repr(t) for t, a, b in pairs if not (a == b).all()]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ: {wrong[:3]}"


@pytest.mark.parametrize("literals", ["open_clip", "openai"])
def test_thousands_of_strings_of_every_kind(literals):
    """Zero differences from open_clip, but for how it spells the special tokens in a text."""
    rng = random.Random(len(literals))
    texts = [kind(rng) for kind, number in KINDS.items() for _ in range(number)]
    if literals == "open_clip":
        texts = [text for text in texts if not SPECIAL.search(" ".join(clean(text)))]
    else:
        texts = texts[::4]
    assert len(set(texts)) > (20_000 if literals == "open_clip" else 5000)
    assert_equal(texts, make_reference(literals))


def test_the_module_function_is_the_same_tokenizer():
    import open_clip

    rng = random.Random(5)
    texts = [random_caption(rng) for _ in range(300)]
    np.testing.assert_array_equal(make_clip_tokenizer()(texts), open_clip.tokenize(texts).numpy())
    short = open_clip.tokenize(texts, context_length=8).numpy()
    np.testing.assert_array_equal(make_clip_tokenizer()(texts, 8), short)


def test_every_code_point_alone():
    # Inside a word, so that a letter, a digit, a space and a mark each split in their own way.
    points = range(0, 0x30000, 7)
    assert_equal([f"a{chr(point)}b1" for point in points], make_reference("openai"))


def test_golden_file_is_what_the_reference_says():
    reference = make_reference("openai")
    texts = [case["text"] for case in json.loads(GOLDEN.read_text())]
    rows = [np.trim_zeros(reference([text], 77)[0].numpy(), "b").tolist() for text in texts]
    cases = [{"text": text, "ids": ids} for text, ids in zip(texts, rows, strict=True)]
    if "WRITE_GOLDEN" in os.environ:
        # ASCII with escapes: some of the texts are no valid UTF-8.
        GOLDEN.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    assert json.loads(GOLDEN.read_text()) == cases


@pytest.mark.parametrize("name", ["whitespace", "lower", "canonicalize"])
def test_cleaning(name):
    from open_clip.tokenizer import get_clean_fn

    rng, reference = random.Random(2), get_clean_fn(name)
    for text in ["A photo_of a  Dog's!", "", " (x) ", *(random_any(rng) for _ in range(1500))]:
        assert CLEANERS[name](text) == reference(text), repr(text)
