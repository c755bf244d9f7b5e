"""How large the tiles of the tiled losses are, by rule."""

import dataclasses

TILE = {"cpu": 1024}
"""By platform. On a CPU a float32 tile of 4 MiB and what is computed from it stay in the cache."""
OTHER_TILE = 4096
"""64 MiB a float32 tile: products large enough to fill a GPU or TPU, in little of its memory."""
KEPT_BYTES = 512 * 2**20
"""What kept cosines may take of a device: those of 4,096 rows of a batch of 32,768, or of a batch
of 11,585 on one device."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tiles of at most `size` rows and `size` columns.

    Attributes:
      size: most rows, and most columns, of a tile.
      keep: hold the cosines of all tiles until the backward pass instead of computing them again.
    """

    size: int
    keep: bool


def choose_tiling(rows_a_device: int, batch: int, features: int, platform: str) -> Tiling:
    """The tiling of a batch.

    Keeping the cosines saves one of four matrix products. A device's are b x B float32 numbers,
    which grow with the square of the batch, and the tiles are there to prevent that: so they are
    kept while they take at most `KEPT_BYTES`. They are also kept up to b = 2 D, where they are no
    more than the gathered texts and their float32 gradient, 2 x B x D numbers on every device.
    """
    small = 4 * rows_a_device * batch <= KEPT_BYTES
    keep = small or rows_a_device <= 2 * features
    return Tiling(TILE.get(platform, OTHER_TILE), keep)
