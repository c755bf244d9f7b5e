"""How large the tiles of the tiled losses are, by rule."""

import dataclasses

TILE = {"cpu": 1024}
"""By platform. On a CPU a float32 tile of 4 MiB and what is computed from it stay in the cache."""
OTHER_TILE = 4096
"""64 MiB a float32 tile: products large enough to fill a GPU or TPU, in little of its memory."""
WHOLE_BYTES = 256 * 2**20
"""What the cosines of a single tile may take of a device, and its dloss/dlogits as much again: a
batch of 8,192 on one device, or 2,048 rows of a batch of 32,768."""
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


def choose_tiling(
    rows_a_device: int, batch: int, features: int, platform: str, tile_size: int = 0
) -> Tiling:
    """The tiling of a batch; with a `tile_size` that one, its cosines not kept.

    Keeping the cosines saves one of four matrix products. A device's are b x B float32 numbers,
    which grow with the square of the batch, and the tiles are there to prevent that: so they are
    kept while they take at most `KEPT_BYTES`. They are also kept up to b = 2 D, where they are no
    more than the gathered texts and their float32 gradient, 2 x B x D numbers on every device.

    Up to `WHOLE_BYTES` there is one tile: three large matrix products are quicker than many small
    ones, and what they leave to memory is what the dense form leaves, or less.
    """
    if tile_size:
        return Tiling(tile_size, keep=False)
    cosines = 4 * rows_a_device * batch
    if cosines <= WHOLE_BYTES:
        return Tiling(batch, keep=True)
    keep = cosines <= KEPT_BYTES or rows_a_device <= 2 * features
    return Tiling(TILE.get(platform, OTHER_TILE), keep)
