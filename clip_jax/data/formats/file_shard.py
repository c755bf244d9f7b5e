"""The base of shards that are one file or folder."""

import os


class FileShard:
    """A file or folder whose samples are named by their numbers.

    Attributes:
      path: the file.
      size: its bytes.
    """

    def __init__(self, path: str, size: int):
        self.path, self.size = path, size

    @property
    def name(self) -> str:
        """The file name without its folder."""
        return os.path.basename(os.path.normpath(self.path))

    def key(self, i: int) -> str:
        """Return the sample's number, from 0."""
        return f"{i:08d}"

    def incomplete(self) -> dict[str, list[str]]:
        """Return nothing: what samples lack is only known when they are read."""
        return {}
