"""Random texts of every kind that captions come in, for comparisons between tokenizers."""

import html.entities
import json
import random
from pathlib import Path

from benchmarks.tokenizer import make_captions

GOLDEN = Path(__file__).parent / "golden" / "clip_bpe.json"
"""Hard cases with their ids, as OpenAI's tokenizer gives them."""

# Random strings are glued from the short hard cases and from random code points.
FRAGMENTS = [case["text"] for case in json.loads(GOLDEN.read_text()) if len(case["text"]) <= 24]
CAPTIONS = make_captions(12_000, seed=1)
ENTITIES = sorted(html.entities.html5)


def random_text(rng: random.Random) -> str:
    """Return fragments and code points (of every plane, some of them unassigned) in any order."""
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


def random_caption(rng: random.Random) -> str:
    """Return words and endings as the web writes them; see benchmarks/tokenizer.py."""
    return rng.choice(CAPTIONS)


def random_block(rng: random.Random) -> str:
    """Return letters, marks and spaces of one Unicode block of 128 code points, in short words."""
    start = rng.randrange(0, 0x110000, 128)
    points = [chr(start + rng.randrange(128)) for _ in range(rng.randint(1, 20))]
    return "".join(c + rng.choice(("", "", "", " ", "'s ", "1")) for c in points)


def random_entities(rng: random.Random) -> str:
    """Return named, decimal and hexadecimal references, escaped up to three times, some cut."""
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
    """Return UTF-8 read as some other encoding, once or twice."""
    text = "".join(
        rng.choice([*FRAGMENTS, "café ", "“it\u2019s” ", "naïve ", "日本 "]) for _ in range(4)
    )
    for _ in range(rng.randint(1, 2)):
        wrong = rng.choice(("latin-1", "cp1252", "cp1251", "mac_roman", "cp437"))
        text = text.encode("utf-8", "replace").decode(wrong, "replace")
    return text


def random_control(rng: random.Random) -> str:
    """Return control, format and odd space characters between letters and parts of specials."""
    odd = [chr(c) for c in (*range(33), *range(0x7F, 0xA1), 0xAD, 0x61C, 0x1680, 0x180E, 0xFEFF)]
    odd += [chr(c) for c in (*range(0x2000, 0x2010), *range(0x2028, 0x2030), 0x205F, 0x3000)]
    pieces = [*odd, "a", "B'", "7", "'ll", "<|", "|>", "_of_", "\x1b[31m", "\r\n"]
    return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 25)))


def random_forms(rng: random.Random) -> str:
    """Return emoji, full-width letters, ligatures, stacked combining marks, flags, cases."""
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
    """Return hundreds of words, or one word of thousands of letters."""
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
    """Return a string of any kind but the long ones."""
    return rng.choice(list(KINDS)[:-1])(rng)
