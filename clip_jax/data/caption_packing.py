"""Captions packed: those of a device lie one behind another in a fixed number of rows.

In a batch of thousands one caption is always among the longest, so that trimming all to the longest
saves nothing. Here each device's captions fill segments of rows, as many as fit in each, and a
token attends to those before it in its own caption; a causal tower read at the end token gives a
caption the same features wherever it lies. The number of segments follows from the shares of the
lengths in the data, with room for chance; a batch that still does not fit, on any device of any
process, is taken at the full length by all. Krell et al. 2021 (arXiv:2107.02027) pack BERT's
sequences so.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int, Int32

from clip_jax.errors import UserError

AUTO, OFF = CHOICES = ("auto", "off")
"""What `config.data.caption_packing` may be, besides shares."""
COUNTED_LENGTHS = (*range(4, 33, 2), *range(36, 65, 4), *range(72, 129, 8))
"""Lengths whose shares are counted, besides the context's."""
SEGMENT_ROWS = 128
"""Rows of a segment come in multiples of this, a TPU's lanes: all its logits are computed."""
SEGMENT_MULTIPLE = 2
"""Segments of a device come in multiples of this: so many are one program of a TPU's kernel."""
ROOM = 5.0
"""Standard deviations of chance that there is room for: one batch in a million of a device does
not fit."""
RAREST = 0.001
"""Share of longer captions that there is always room for: fewer may be missed when they are
counted, and be in every batch."""
DRAWS = 64
"""Batches that are drawn and packed to find how many segments they take."""
MIN_CAPTIONS = 64
"""Captions of a device, in a micro-batch, from which on packing is worth its while by itself."""

Shares = Mapping[int, float]
"""Length -> the share of captions that are at most so long, in tokens with their end token."""


@dataclasses.dataclass(frozen=True)
class CaptionPacking:
    """Where one device's captions lie, in one micro-batch.

    Attributes:
      captions: their number.
      segments: their segments.
      segment_rows: the rows of each, a token a row.
      mean_length: tokens of a caption.
    """

    captions: int
    segments: int
    segment_rows: int
    mean_length: float

    @property
    def rows_per_caption(self) -> float:
        """The rows of a caption with its share of those that stay empty."""
        return self.segments * self.segment_rows / self.captions

    def __str__(self) -> str:
        return f"{self.segments} segments of {self.segment_rows} tokens"


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
                f"config.data.caption_packing is {text!r}; it takes auto, off, or lengths with the"
                " shares of captions that are at most so long, such as 16:0.64,32:0.85"
            )
    lengths, values = list(shares), list(shares.values())
    if lengths != sorted(set(lengths)) or lengths[0] < 2 or values != sorted(values):
        raise UserError(
            f"config.data.caption_packing is {text!r}; lengths, from 2 on, and shares must rise"
        )
    if not 0 <= values[0] <= values[-1] <= 1:
        raise UserError(f"config.data.caption_packing is {text!r}; a share is in 0..1")
    return shares


def format_shares(shares: Shares) -> str:
    """Return what `parse_shares` reads."""
    return ",".join(f"{length}:{share:g}" for length, share in shares.items())


def measured_shares(counts: Int[np.ndarray, " lengths"], context_length: int) -> Shares:
    """Return the shares of `COUNTED_LENGTHS`.

    Args:
      counts: captions of each length, from 0 on.
      context_length: longest caption, tokens.
    """
    total = max(1, int(counts.sum()))
    lengths = [length for length in COUNTED_LENGTHS if length < context_length]
    return {length: round(int(counts[: length + 1].sum()) / total, 4) for length in lengths}


def choose_packing(shares: Shares, captions: int, context_length: int) -> CaptionPacking:
    """Return the packing of captions whose lengths have these shares.

    A caption is taken to be as long as the next length of the shares. The segments are those of
    drawn batches, with room for chance; at most as many as captions of the full length take.

    Args:
      shares: of the data's captions.
      captions: of one device, in one micro-batch.
      context_length: longest caption, tokens.
    """
    rows = -(-context_length // SEGMENT_ROWS) * SEGMENT_ROWS
    below = {length: share for length, share in shares.items() if length < context_length}
    lengths = np.array([*below, context_length])
    probabilities = np.diff([*(min(share, 1 - RAREST) for share in below.values()), 1], prepend=0)
    draws = np.random.default_rng(0).choice(lengths, (DRAWS, captions), p=probabilities)
    counts = [1 + max(place_captions(draw, rows)[0]) for draw in draws]
    segments = math.ceil(np.mean(counts) + ROOM * np.std(counts))
    most = -(-captions // (rows // context_length))
    segments = -(-min(segments, most) // SEGMENT_MULTIPLE) * SEGMENT_MULTIPLE
    return CaptionPacking(captions, segments, rows, float(lengths @ probabilities))


def place_captions(
    lengths: Int[np.ndarray, " n"], segment_rows: int
) -> tuple[list[int], list[int]]:
    """Return the segment of each caption and its first row in it.

    The longest caption comes first, each into the segment with the least room that holds it.
    """
    segments, starts = [0] * len(lengths), [0] * len(lengths)
    by_room: list[list[int]] = [[] for _ in range(segment_rows + 1)]
    rooms = count = 0  # bit r of `rooms`: there is a segment with room for r rows
    sizes = lengths.tolist()
    for i in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[i]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            segment = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, segment = segment_rows, count
            count += 1
        segments[i], starts[i] = segment, segment_rows - room
        by_room[room - size].append(segment)
        rooms |= 1 << (room - size)
    return segments, starts


def trimmed_tokens(shares: Shares, batch_size: int, context_length: int) -> float:
    """Return the tokens of a caption where a whole batch is trimmed to its longest, in the mean."""
    below, tokens = 0.0, 0.0
    for length, share in [*shares.items(), (context_length, 1.0)]:
        longest = share**batch_size  # the chance that no caption is longer
        tokens += length * (longest - below)
        below = longest
    return tokens


def pack_captions(
    text: Int32[np.ndarray, "b L"], eot_id: int, packing: CaptionPacking
) -> dict[str, np.ndarray] | None:
    """Pack captions; None if those of some device's rows do not fit.

    Args:
      text: rows of token ids, those of one device and micro-batch after those of another. One
        without an end token is read at its first token, which is all of it that is kept.
      eot_id: the end token.
      packing: see above; its captions divide the text's.

    Returns:
      `text_tokens`: int32 [segments, rows], device by device as in `text`; zeros are empty rows.
      `text_positions`: int32 [segments, rows], the place of each token in its caption; else 0.
      `text_end`: int32 [b], the row of each caption's end token among all of its device's.
    """
    parts, rows = len(text) // packing.captions, packing.segment_rows
    lengths = (text == eot_id).argmax(axis=1) + 1
    starts = np.empty(len(text), np.int64)
    size = packing.segments * rows
    for part in range(parts):
        own = slice(part * packing.captions, (part + 1) * packing.captions)
        segments, first = place_captions(lengths[own], rows)
        if max(segments) >= packing.segments:
            return None
        starts[own] = part * size + np.array(segments) * rows + first
    caption = np.repeat(np.arange(len(text)), lengths)
    position = np.arange(len(caption)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    tokens, positions = np.zeros((2, parts * size), np.int32)
    tokens[starts[caption] + position] = text[caption, position]
    positions[starts[caption] + position] = position
    shape = (parts * packing.segments, rows)
    return {
        "text_tokens": tokens.reshape(shape),
        "text_positions": positions.reshape(shape),
        "text_end": ((starts + lengths - 1) % size).astype(np.int32),
    }
