"""CLIP's tokenizer against open_clip's `SimpleTokenizer`, side by side in one process.

    python -m benchmarks.tokenizer --captions 10000

The captions are made up to look like the web's: words drawn by rank (Zipf) from the merges, which
are sorted by frequency, in three spellings, one in twenty unknown to the merges, with punctuation
and numbers; one caption in ten has an accent, a curly quote, an emoji or an HTML entity. The two
tokenizers are interleaved, so that whatever else the machine does falls on both. "fresh" is a new
tokenizer on its first batch (making it is counted apart), "warm" the same batch again.
"""

import random
from collections.abc import Callable

import numpy as np

from benchmarks.interleaved import make_parser, ratio, report, spread, time_interleaved
from clip_jax.tokenizers import make_clip_tokenizer
from clip_jax.tokenizers.clip_bpe import END_OF_WORD, read_merges
from clip_jax.typing import Tokenizer

ODDITIES = (
    "café",
    "“quoted”",
    "it\u2019s",
    "Zürich",
    "&amp;",
    "&quot;",
    "😀",
    "naïve",
    "—",
    "日本",
)
ENDS = ("", "", "", ".", "!", ", 2019", " (4K)", " - Stock Photo", " | Etsy", " #3")


def make_captions(number: int, seed: int = 0) -> list[str]:
    """Return captions of 3 to 25 words, the same for the same seed."""
    rng = random.Random(seed)
    pairs = (a + b for a, b in read_merges())
    words = [w.removesuffix(END_OF_WORD) for w in pairs if w.endswith(END_OF_WORD)]
    words = [w for w in words if w.isascii() and w.isalpha()]
    weights = np.cumsum(1 / np.arange(10, 10 + len(words))).tolist()
    captions = []
    for _ in range(number):
        chosen = rng.choices(words, cum_weights=weights, k=rng.randint(3, 25))
        chosen = [w + rng.choice(words) if rng.random() < 0.05 else w for w in chosen]
        chosen = [rng.choice((w, w, w, w.capitalize(), w.upper())) for w in chosen]
        if rng.random() < 0.1:
            chosen[rng.randrange(len(chosen))] = rng.choice(ODDITIES)
        captions.append(" ".join(chosen) + rng.choice(ENDS))
    return captions


def main(argv: list[str] | None = None) -> None:
    """Measure and print one table."""
    parser = make_parser(__doc__, warmup=0, repeats=5)
    parser.add_argument("--captions", type=int, default=10_000)
    options = parser.parse_args(argv)
    makers: dict[str, Callable[[], Tokenizer]] = {"clip_jax": make_clip_tokenizer}
    try:
        from benchmarks.compare_open_clip import open_clip
    except ImportError:
        print("open_clip is not installed: clip_jax alone")
    else:
        makers["open_clip"] = open_clip.tokenizer.SimpleTokenizer
    captions = make_captions(options.captions)
    tokenizers, tokens = {}, {}
    calls = {}
    for name, make in makers.items():
        calls[name, "make"] = lambda name=name, make=make: tokenizers.__setitem__(name, make())
        for state in ("fresh", "warm"):
            calls[name, state] = lambda name=name: tokens.__setitem__(
                name, tokenizers[name](captions)
            )
    times = time_interleaved(calls, warmup=options.warmup, repeats=options.repeats)
    rows = []
    for state in ("make", "fresh", "warm"):
        row = {"": state} | {
            f"{name}, ms": spread(times[name, state]).scaled(1e3) for name in tokenizers
        }
        if "open_clip" in tokenizers:
            row["times faster"] = ratio(times["open_clip", state], times["clip_jax", state])
        rows.append(row)
    same = all(np.array_equal(np.asarray(t), tokens["clip_jax"]) for t in tokens.values())
    ids = float((tokens["clip_jax"] != 0).sum() / len(captions))
    report("tokenizer", options, rows, ids_a_caption=ids, ids_equal=same)


if __name__ == "__main__":
    main()
