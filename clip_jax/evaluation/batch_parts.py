"""Parts of whole batches, which any process can make by itself."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BatchParts:
    """The cut of samples into parts.

    Attributes:
      samples: of all parts.
      batch_size: of a batch.
      rows: the samples of a part, about.
    """

    samples: int
    batch_size: int
    rows: int

    @property
    def batches(self) -> int:
        """Return the batches of a part; the last one may have fewer."""
        return max(1, self.rows // self.batch_size)

    @property
    def sizes(self) -> list[int]:
        """Return the samples of each part."""
        rows = self.batches * self.batch_size
        return [min(rows, self.samples - start) for start in range(0, self.samples, rows)]
