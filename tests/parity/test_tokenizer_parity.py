"""CLIP's tokenizer against open_clip itself, over thousands of random Unicode strings.

The suite without torch compares with tests/golden/clip_bpe.json. To add a case, append its text
there with any ids and run this file with WRITE_GOLDEN=1 in the environment, which writes the ids.
"""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from clip_jax.tokenizers import make_clip_tokenizer
from clip_jax.tokenizers.sentencepiece import canonicalize

pytest.importorskip("open_clip")

GOLDEN = Path(__file__).parents[1] / "golden" / "clip_bpe.json"

# Random strings are glued from the short hard cases and from random code points.
FRAGMENTS = [case["text"] for case in json.loads(GOLDEN.read_text()) if len(case["text"]) <= 24]


def make_reference(literals: str):
    """open_clip's tokenizer, with its own specials and white space or OpenAI's."""
    from open_clip.tokenizer import SimpleTokenizer, basic_clean

    reference = SimpleTokenizer()
    if literals == "openai":
        import regex

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


def random_text(rng: random.Random) -> str:
    """Fragments and code points (of every plane, now and then unassigned ones) in any order."""
    pieces = []
    for _ in range(rng.randint(0, 12)):
        kind = rng.random()
        if kind < 0.6:
            pieces.append(rng.choice(FRAGMENTS))
        elif kind < 0.8:
            pieces.append(chr(rng.randrange(0x3000)))
        else:
            pieces.append(chr(rng.randrange(0x110000)))
    return "".join(pieces)


def assert_equal(texts: list[str], reference) -> None:
    ours = make_clip_tokenizer()(texts)
    theirs = reference(texts, 77).numpy()
    wrong = [repr(t) for t, a, b in zip(texts, ours, theirs, strict=True) if not (a == b).all()]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ: {wrong[:3]}"


def test_random_unicode_as_openai():
    rng = random.Random(0)
    assert_equal([random_text(rng) for _ in range(4000)], make_reference("openai"))


def test_random_unicode_as_open_clip():
    # open_clip spells the special tokens in another way; without "<" neither spelling appears.
    rng = random.Random(1)
    texts = [random_text(rng).replace("<", "(").replace("&lt", "") for _ in range(4000)]
    assert_equal([text.replace("&amp;lt", "") for text in texts], make_reference("open_clip"))


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


def test_siglip_cleaning():
    from open_clip.tokenizer import canonicalize_text

    rng = random.Random(2)
    for text in ["A photo_of a  Dog's!", "", " (x) ", *(random_text(rng) for _ in range(500))]:
        assert canonicalize(text) == canonicalize_text(text)
