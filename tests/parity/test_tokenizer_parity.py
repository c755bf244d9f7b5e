"""CLIP's tokenizer against open_clip itself, over thousands of random Unicode strings.

The suite without torch compares with tests/golden/clip_bpe.json. To add a case, append its text
there with any ids and run this file with WRITE_GOLDEN=1 in the environment, which writes the ids.
"""

import html.entities
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import regex

from benchmarks.tokenizer import make_captions
from clip_jax.tokenizers import make_clip_tokenizer
from clip_jax.tokenizers.clean import CLEANERS
from clip_jax.tokenizers.clip_bpe import clean

pytest.importorskip("open_clip")

GOLDEN = Path(__file__).parents[1] / "golden" / "clip_bpe.json"

# Random strings are glued from the short hard cases and from random code points.
FRAGMENTS = [case["text"] for case in json.loads(GOLDEN.read_text()) if len(case["text"]) <= 24]
CAPTIONS = make_captions(12_000, seed=1)
# Either library's special tokens, in whatever case (the long s is an "s" then).
SPECIAL = regex.compile(r"<\|?(start|end)_?of_?text\|?>", regex.IGNORECASE)
ENTITIES = sorted(html.entities.html5)


def make_reference(literals: str):
    """open_clip's tokenizer, with its own specials and white space or OpenAI's."""
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


def random_caption(rng: random.Random) -> str:
    """Words and endings as the web writes them; see benchmarks/tokenizer.py."""
    return rng.choice(CAPTIONS)


def random_block(rng: random.Random) -> str:
    """Letters, marks and spaces of one Unicode block of 128 code points, in short words."""
    start = rng.randrange(0, 0x110000, 128)
    points = [chr(start + rng.randrange(128)) for _ in range(rng.randint(1, 20))]
    return "".join(c + rng.choice(("", "", "", " ", "'s ", "1")) for c in points)


def random_entities(rng: random.Random) -> str:
    """Named, decimal and hexadecimal references, escaped once to three times, some unfinished."""
    text = " ".join(
        rng.choice(
            (
                f"&{rng.choice(ENTITIES)}",
                f"&#{rng.randrange(0x110000 + 99)};",
                f"&#x{rng.randrange(0x3000):x}{rng.choice((';', '', ' '))}",
                "a&b",
                "<b>bold</b>",
            )
        )
        for _ in range(rng.randint(1, 6))
    )
    for _ in range(rng.randrange(3)):
        text = text.replace("&", "&amp;")
    return text


def random_mojibake(rng: random.Random) -> str:
    """UTF-8 read as some other encoding, once or twice."""
    text = "".join(
        rng.choice([*FRAGMENTS, "café ", "“it\u2019s” ", "naïve ", "日本 "]) for _ in range(4)
    )
    for _ in range(rng.randint(1, 2)):
        wrong = rng.choice(("latin-1", "cp1252", "cp1251", "mac_roman", "cp437"))
        text = text.encode("utf-8", "replace").decode(wrong, "replace")
    return text


def random_control(rng: random.Random) -> str:
    """Control, format and exotic space characters between letters and special tokens' parts."""
    odd = [chr(c) for c in (*range(33), *range(0x7F, 0xA1), 0xAD, 0x61C, 0x1680, 0x180E, 0xFEFF)]
    odd += [chr(c) for c in (*range(0x2000, 0x2010), *range(0x2028, 0x2030), 0x205F, 0x3000)]
    pieces = [*odd, "a", "B'", "7", "'ll", "<|", "|>", "_of_", "\x1b[31m", "\r\n"]
    return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 25)))


def random_forms(rng: random.Random) -> str:
    """Emoji sequences, full-width letters, ligatures, stacked combining marks, flags, cases."""
    pieces = [
        "😀",
        "👩\u200d👩\u200d👧",
        "🇩🇪",
        "1\ufe0f\u20e3",
        "👍🏽",
        "ﬁ",
        "ﬄ",
        "\u017f",
        "ẞ",
        "İ",
        "ǆ",
        "Ⅷ",
    ]
    pieces += [chr(0xFF01 + rng.randrange(94)), chr(0x300 + rng.randrange(112)) * rng.randint(1, 9)]
    pieces += [
        "e\u0301",
        "a\u0328\u0301",
        "'S",
        "'Ll",
        "ΑΣ",
        "½",
        "①",
        "٣",
        "๓",
        "한국어",
        "ภาษา",
        " ",
    ]
    return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 15)))


def random_long(rng: random.Random) -> str:
    """Hundreds of words, or one word of thousands of letters."""
    if rng.random() < 0.5:
        return " ".join(random_caption(rng) for _ in range(30))
    return rng.choice(("a", "xyz", "0", "!", "日", "é")) * rng.randint(500, 3000)


KINDS = {
    random_caption: 6000,
    random_text: 5000,
    random_block: 6000,
    random_entities: 2000,
    random_mojibake: 2000,
    random_control: 2000,
    random_forms: 2000,
    random_long: 60,
}


def random_any(rng: random.Random) -> str:
    """A string of any kind but the long ones."""
    return rng.choice(list(KINDS)[:-1])(rng)


@pytest.mark.parametrize("literals", ["open_clip", "openai"])
def test_thousands_of_strings_of_every_kind(literals):
    """Zero differences from open_clip, but for how it spells the special tokens in a text."""
    rng = random.Random(len(literals))
    texts = [kind(rng) for kind, number in KINDS.items() for _ in range(number)]
    if literals == "open_clip":
        texts = [text for text in texts if not SPECIAL.search(clean(text))]
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

    rng, theirs = random.Random(2), get_clean_fn(name)
    for text in ["A photo_of a  Dog's!", "", " (x) ", *(random_any(rng) for _ in range(1500))]:
        assert CLEANERS[name](text) == theirs(text), repr(text)
