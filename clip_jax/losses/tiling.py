"""How large the tiles of the tiled losses are, by rule."""

import dataclasses

TILE = {"cpu": 1024}
"""By platform. On a CPU a float32 tile of 4 MiB and what is computed from it stay in the cache."""
OTHER_TILE = 4096
"""64 MiB a float32 tile: products large enough to fill a GPU or TPU, in little of its memory."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tiles of at most `size` rows and `size` columns.

    Attributes:
      size: most rows, and most columns, of a tile.
      keep: hold the cosines of all tiles until the backward pass instead of computing them again.
    """

    size: int
    keep: bool


def choose_tiling(rows_a_device: int, features: int, platform: str) -> Tiling:
    """The tiling of a batch.

    The gathered texts and their float32 gradient are 2 x B x D numbers on every device, whatever
    the tiles are; its cosines are b x B. So up to b = 2 D keeping these at most doubles what the
    loss holds, and saves one of four matrix products. Above that the cosines would grow with the
    square of a device's rows, which is what the tiles are there to prevent.
    """
    return Tiling(TILE.get(platform, OTHER_TILE), keep=rows_a_device <= 2 * features)
