"""Captions in groups of fixed shape, by length: so many rows at 16 tokens, so many at 32, ...

In a batch of thousands one caption is always among the longest, so that trimming all to the longest
saves nothing. Here each device's rows are sorted by length and cut into groups of fixed sizes, each
trimmed to a length of its own; the loss does not care about order, and a causal tower read at the
end token gives a row the same features at any length that holds it. The sizes follow from the
shares of the lengths in the data, with room for chance; a batch that still does not fit, on any
device of any process, is taken at the full length by all.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, Int32

from clip_jax.errors import UserError

AUTO, OFF = CHOICES = ("auto", "off")
"""What `config.data.caption_groups` may be, besides shares."""
GROUP_LENGTHS = (8, 16, 24, 32, 48, 64)
"""Lengths that a group may have, besides the context's."""
MAX_GROUPS = 4
"""Groups at most: each reads the tower's weights anew, and adds up their gradients."""
ROOM = 5.0
"""Standard deviations of chance that the longer groups have room for: one batch in a million of a
device does not fit."""
RAREST = 0.001
"""Share of longer captions that there is always room for: fewer may be missed when they are
counted, and be in every batch."""
ROW_MULTIPLE = 8
"""Rows of a group come in multiples of this, the height of a tile in a TPU's registers, where a
device has at least `MIN_ROWS`."""
MIN_ROWS = 64
"""Rows of a device, in a micro-batch, from which on groups are worth their while by themselves."""

Shares = Mapping[int, float]
"""Length -> the share of captions that are at most so long, in tokens with their end token."""


@dataclasses.dataclass(frozen=True)
class CaptionGroups:
    """The groups of one device's rows, in one micro-batch; the shortest first.

    Attributes:
      lengths: tokens of each group's captions; the last is the context's.
      rows: captions of each group.
    """

    lengths: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def all_rows(self) -> int:
        """The rows of one device, in one micro-batch."""
        return sum(self.rows)

    @property
    def tokens(self) -> float:
        """The tokens of a caption, in the mean."""
        return sum(n * length for n, length in zip(self.rows, self.lengths, strict=True)) / (
            self.all_rows
        )

    def __str__(self) -> str:
        groups = zip(self.rows, self.lengths, strict=True)
        return ", ".join(f"{n} at {length}" for n, length in groups)


def parse_shares(text: str) -> Shares:
    """Parse "16:0.64,32:0.85": 64 % of the captions have at most 16 tokens, 85 % at most 32.

    Raises:
      UserError: it is not like this, or the shares do not rise with the lengths.
    """
    shares: dict[int, float] = {}
    for part in text.split(","):
        length, colon, share = part.partition(":")
        try:
            shares[int(length)] = float(share)
        except ValueError:
            colon = ""
        if not colon:
            raise UserError(
                f"config.data.caption_groups is {text!r}; it takes auto, off, or lengths with the"
                " shares of captions that are at most so long, such as 16:0.64,32:0.85"
            )
    lengths, values = list(shares), list(shares.values())
    if lengths != sorted(set(lengths)) or lengths[0] < 2 or values != sorted(values):
        raise UserError(
            f"config.data.caption_groups is {text!r}; lengths, from 2 on, and shares must rise"
        )
    if not 0 <= values[0] <= values[-1] <= 1:
        raise UserError(f"config.data.caption_groups is {text!r}; a share is in 0..1")
    return shares


def format_shares(shares: Shares) -> str:
    """Return what `parse_shares` reads."""
    return ",".join(f"{length}:{share:g}" for length, share in shares.items())


def measured_shares(counts: Int[np.ndarray, " lengths"], context_length: int) -> Shares:
    """Return the shares of the lengths that a group may have.

    Args:
      counts: captions of each length, from 0 on.
      context_length: longest caption, tokens.
    """
    total = max(1, int(counts.sum()))
    lengths = [length for length in GROUP_LENGTHS if length < context_length]
    return {length: round(int(counts[: length + 1].sum()) / total, 4) for length in lengths}


def choose_groups(shares: Shares, rows: int, context_length: int) -> CaptionGroups:
    """Return the groups with the fewest tokens, of at most `MAX_GROUPS` of the shares' lengths.

    Args:
      shares: of the data's captions.
      rows: of one device, in one micro-batch.
      context_length: the last group's length.
    """
    lengths = [length for length in shares if length < context_length]
    candidates = [
        _groups_of(shares, chosen, rows, context_length)
        for count in range(min(MAX_GROUPS, len(lengths) + 1))
        for chosen in itertools.combinations(lengths, count)
    ]
    # Of two with as many tokens the one with fewer groups, which comes first.
    return min(candidates, key=lambda groups: groups.tokens)


def _groups_of(
    shares: Shares, lengths: Sequence[int], rows: int, context_length: int
) -> CaptionGroups:
    """Return groups of these lengths; one that would have no rows is left out."""
    room = [rows, *(_room_for_longer(1 - shares[length], rows) for length in lengths), 0]
    sizes = [more - less for more, less in itertools.pairwise(room)]
    pairs = [(n, length) for n, length in zip(sizes, (*lengths, context_length), strict=True) if n]
    return CaptionGroups(tuple(length for _, length in pairs), tuple(n for n, _ in pairs))


def _room_for_longer(share: float, rows: int) -> int:
    """Return how many rows are set aside for captions that have this share of all."""
    share = max(share, RAREST)
    mean = share * rows
    room = math.ceil(mean + ROOM * math.sqrt(mean * (1 - share)))
    if rows >= MIN_ROWS:
        room = -(-room // ROW_MULTIPLE) * ROW_MULTIPLE
    return min(rows, room)


def trimmed_tokens(shares: Shares, batch_size: int, context_length: int) -> float:
    """Return the tokens of a caption where a whole batch is trimmed to its longest, in the mean."""
    below, tokens = 0.0, 0.0
    for length, share in [*shares.items(), (context_length, 1.0)]:
        longest = share**batch_size  # the chance that no caption is longer
        tokens += length * (longest - below)
        below = longest
    return tokens


def group_captions(
    text: Int32[np.ndarray, "b L"], lengths: Int[np.ndarray, " b"], groups: CaptionGroups
) -> dict[str, np.ndarray] | None:
    """Sort rows into groups; None if the captions of some device's rows are too long for that.

    Args:
      text: rows of token ids, those of one device and micro-batch after those of another.
      lengths: of the captions, tokens.
      groups: see above; their rows divide the text's.

    Returns:
      `text_0`, `text_1`, ...: int32 [rows of the group, its length], device by device as in `text`.
      `text_place`: int32 [b], where in its device's groups, one after another, each row stands.
    """
    parts = len(text) // groups.all_rows
    lengths_Pn = lengths.reshape(parts, groups.all_rows)
    order_Pn = np.argsort(lengths_Pn, axis=1, kind="stable")
    sorted_Pn = np.take_along_axis(lengths_Pn, order_Pn, axis=1)
    ends = np.cumsum(groups.rows)
    if any(
        (sorted_Pn[:, end - 1] > cut).any() for end, cut in zip(ends, groups.lengths, strict=True)
    ):
        return None
    text_PnL = text.reshape(parts, groups.all_rows, -1)
    arrays = {}
    for k, (end, size, cut) in enumerate(zip(ends, groups.rows, groups.lengths, strict=True)):
        chosen = order_Pn[:, end - size : end, None]
        group = np.take_along_axis(text_PnL[:, :, :cut], chosen, axis=1)
        arrays[f"text_{k}"] = group.reshape(parts * size, cut)
    place_Pn = np.empty_like(order_Pn)
    np.put_along_axis(place_Pn, order_Pn, np.arange(groups.all_rows)[None], axis=1)
    return arrays | {"text_place": place_Pn.astype(np.int32).reshape(-1)}
