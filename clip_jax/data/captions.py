"""The caption of a training sample: of several kinds by their weights, some of its words dropped.

Both are functions of the seed, the epoch and the sample, whoever reads it.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from clip_jax.data.images import Chance
from clip_jax.data.shards import BadSampleError, Handles, Shard, caption_values
from clip_jax.errors import UserError

OWN = "*"
"""The kind of caption that a source has without being asked."""


class CaptionKind(NamedTuple):
    """One kind of caption: `OWN`, the name of a field, or with a dot the ending of a file."""

    key: str
    weight: float


def parse_captions(items: Sequence[str], field: str = "captions") -> tuple[CaptionKind, ...]:
    """Parse `KEY=WEIGHT`, one a kind; `field` of config.data has them.

    >>> parse_captions(["*=1", ".blip.txt=3"])
    (CaptionKind(key='*', weight=1.0), CaptionKind(key='.blip.txt', weight=3.0))

    Raises:
      UserError: an item is none, has a weight that is not above 0, or a key comes twice.
    """
    kinds = []
    for item in items:
        key, _, number = item.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not key or not 0 < weight < math.inf:
            raise UserError(
                f"config.data.{field} has {item!r:.80}; it takes KEY=WEIGHT with a weight above"
                ' 0, such as ("*=1", "synthetic=3")'
            )
        if not re.fullmatch(r"\*|\.([\w-]+\.)*txt|[^.].*", key):
            raise UserError(
                f"config.data.{field} has {key!r:.80}, which is no ending of text files: it takes"
                ' endings on ".txt", such as ".blip.txt"'
            )
        kinds.append(CaptionKind(key, weight))
    twice = [kind.key for i, kind in enumerate(kinds) if kind.key in {k.key for k in kinds[:i]}]
    if twice:
        raise UserError(f"config.data.captions has {twice[0]!r:.80} twice; give it once")
    return tuple(kinds)


def captions_of_kind(shard: Shard, key: str, i: int, handles: Handles) -> list[str]:
    """Return every caption of a kind that a sample has.

    Raises:
      BadSampleError: as `Shard.captions`; `no_caption` also where the format has no such kind.
    """
    if key == OWN:
        return shard.captions(i, handles)
    of_kind = getattr(shard, "captions_of_kind", None)  # a view of another shard has one
    if of_kind is not None:
        return of_kind(key, i, handles)
    if not key.startswith("."):
        return caption_values(shard.record(i, handles).get(key))
    beside = getattr(shard, "captions_beside", None)
    if beside is None:
        raise BadSampleError("no_caption", f"{key}: this format has no files beside its images")
    return beside(key[1:], i, handles)


def choose_negative(shard: Shard, key: str, i: int, handles: Handles, chance: float) -> str:
    """Return one of the texts of a kind, which the image does not show; "" where it has none."""
    try:
        texts = captions_of_kind(shard, key, i, handles)
    except (BadSampleError, OSError):  # what is the matter with a sample its image says
        return ""
    return texts[int(chance * len(texts))]


def choose_caption(
    shard: Shard, kinds: Sequence[CaptionKind], i: int, handles: Handles, chance: float
) -> str:
    """Return a caption of a sample, of the kinds that it has by their weights.

    Args:
      chance: a number in [0, 1), which chooses the kind and one of its captions.

    Raises:
      BadSampleError: the sample has none of them.
    """
    found: list[tuple[float, list[str]]] = []
    absent: BadSampleError | None = None
    for kind in kinds:
        try:
            found.append((kind.weight, captions_of_kind(shard, kind.key, i, handles)))
        except BadSampleError as e:
            if e.cause not in ("no_caption", "empty_caption"):
                raise
            absent = absent or e
    if not found:
        raise absent or BadSampleError("no_caption")
    place = chance * math.fsum(weight for weight, _ in found)
    for weight, captions in found[:-1]:
        if place < weight:
            return captions[min(int(place / weight * len(captions)), len(captions) - 1)]
        place -= weight
    weight, captions = found[-1]
    return captions[max(0, min(int(place / weight * len(captions)), len(captions) - 1))]


def drop_words(caption: str, share: float, rng: Chance) -> str:
    """Return a caption without about that share of its words; one stays at least."""
    words = caption.split()
    chances = [rng.random() for _ in words]
    kept = [word for word, chance in zip(words, chances, strict=True) if chance >= share]
    return " ".join(kept) if kept or not words else words[chances.index(max(chances))]
