"""CLIP's tokenizer against open_clip's `SimpleTokenizer`, side by side in one process.

    python -m benchmarks.tokenizer --captions 10000

The captions are made up to look like the web's: words drawn by rank (Zipf) from the merges, which
are sorted by frequency, in three spellings, one in twenty unknown to the merges, with punctuation
and numbers; one caption in ten has an accent, a curly quote, an emoji or an HTML entity. The two
tokenizers take turns, so that whatever else the machine does falls on both; the best of the
repeats counts. "fresh" is a new tokenizer on its first batch (making it is counted apart),
"warm" the same batch again.
"""

import argparse
import random
import time
from collections.abc import Callable

import numpy as np

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
    """Captions of 3 to 25 words, the same for the same seed."""
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


def seconds(call: Callable) -> tuple[float, object]:
    """One call and what it returned."""
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    makers: dict[str, Callable[[], Tokenizer]] = {"clip_jax": make_clip_tokenizer}
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        print("open_clip is not installed: clip_jax alone")
    else:
        makers["open_clip"] = SimpleTokenizer
    captions = make_captions(options.captions)
    times: dict[tuple[str, str], list[float]] = {}
    tokens = {}
    for _ in range(options.repeats):
        for name, make in makers.items():
            took, tokenizer = seconds(make)
            times.setdefault((name, "make"), []).append(took)
            for state in ("fresh", "warm"):
                took, tokens[name] = seconds(lambda call=tokenizer: call(captions))
                times.setdefault((name, state), []).append(took)
    best = {key: min(values) for key, values in times.items()}
    mean = (tokens["clip_jax"] != 0).sum() / len(captions)
    print(f"{len(captions):,} captions of {mean:.1f} ids, best of {options.repeats}")
    print(f"{'':<10}" + "".join(f"{name + ' ms':>14}" for name in makers) + f"{'ratio':>8}")
    for state in ("make", "fresh", "warm"):
        row = [1e3 * best[name, state] for name in makers]
        ratio = f"{row[1] / row[0]:>8.1f}" if len(row) > 1 else ""
        print(f"{state:<10}" + "".join(f"{ms:>14.1f}" for ms in row) + ratio)
    if "open_clip" in tokens:
        same = (np.asarray(tokens["open_clip"]) == tokens["clip_jax"]).all()
        print("ids equal:", bool(same))


if __name__ == "__main__":
    main()
