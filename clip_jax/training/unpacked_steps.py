"""How many of a run's steps took captions unpacked, because those of some device did not fit."""

from clip_jax.data.caption_packing import CaptionPacking

MANY = 0.03
"""Share of steps from which on a run says so: by chance it is one in a million of a device."""
LEAST = 3
"""Number of steps from which on a run says so: of few steps one is a large share."""
WINDOW = 100
"""Steps after which the share that is said begins anew; a longer log interval is one by itself."""


class UnpackedSteps:
    """Counts steps, and those whose captions came at the full length.

    Processes agree on the length of each batch, and all count the same.

    Args:
      packing: of the run.
      context_length: the full length, tokens.
    """

    def __init__(self, packing: CaptionPacking, context_length: int) -> None:
        self._packing, self._context_length = packing, context_length
        self._steps = self._unpacked = 0
        self._window_steps = self._window_unpacked = 0
        self._told = False

    def count(self, length: int | CaptionPacking) -> None:
        """Count a step by its captions' length, or how they were packed."""
        self._steps += 1
        self._unpacked += not isinstance(length, CaptionPacking)

    def report(self) -> tuple[float, str | None]:
        """Return the share of unpacked steps since the call before, in 0..1, and a line to print.

        There is a line once, where they are too many.
        """
        steps, unpacked = self._steps, self._unpacked
        self._steps = self._unpacked = 0
        if self._window_steps >= WINDOW:
            self._window_steps = self._window_unpacked = 0
        self._window_steps += steps
        self._window_unpacked += unpacked
        line = None
        if not self._told and self._window_unpacked >= max(LEAST, MANY * self._window_steps):
            self._told = True
            line = (
                f"captions of {self._window_unpacked} of {self._window_steps} steps did not fit "
                f"into {self._packing} a device and took all {self._context_length} tokens each: "
                "more of them are long than the shares in config.json say; set "
                "config.data.caption_packing to shares of what python -m clip_jax.data.inspect "
                'counts, or to "off"'
            )
        return unpacked / max(1, steps), line
