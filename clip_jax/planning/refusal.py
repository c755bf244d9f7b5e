"""A TPU compiler's refusal of a program that does not fit, as a value."""

import re
from typing import NamedTuple


class Buffer(NamedTuple):
    """One array of a program that does not fit.

    Attributes:
      bytes: as it lies in memory, padded.
      shape: as XLA writes it, "f32[128,12,197,197]" say.
      op_name: the path of scopes that it was traced in, "" where the compiler made it.
    """

    bytes: int
    shape: str
    op_name: str


class Refusal(NamedTuple):
    """What a program that does not fit would take.

    Attributes:
      used: the bytes that it takes.
      available: the bytes that a program can have.
      temporaries: the bytes of its temporaries, None where the compiler does not say.
      buffers: the largest of its arrays.
    """

    used: int
    available: int
    temporaries: int | None
    buffers: tuple[Buffer, ...]


class DoesNotFitError(Exception):
    """The compiler refused a program because it does not fit the device's memory."""

    def __init__(self, refusal: Refusal) -> None:
        """Hold the refusal."""
        super().__init__(f"{refusal.used} bytes of {refusal.available}")
        self.refusal = refusal


_SIZE = r"([\d.]+)([KMGT]?)"
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
# Where temporaries alone exceed the memory, there is no table of arrays.
_EXCEEDS = re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_TEMPORARIES = re.compile(rf"HLO temp\s+{_SIZE}")
_BUFFER = re.compile(rf"^\s*\d+\. Size: {_SIZE}\s*$", re.MULTILINE)
_OPERATOR = re.compile(r'op_name="([^"]*)"')
_SHAPE = re.compile(r"Shape: (\w+\[[\d,]*\])")


def parse_refusal(message: str) -> Refusal | None:
    """Return the refusal in a compiler's message; None where it is another error's."""
    used = _USED.search(message)
    if not used:
        exceeds = _EXCEEDS.search(message)
        if not exceeds:
            return None
        size = _bytes(*exceeds.groups()[:2])
        return Refusal(size, _bytes(*exceeds.groups()[2:]), size, ())
    temporaries = _TEMPORARIES.search(message)
    starts = list(_BUFFER.finditer(message))
    ends = [*(start.start() for start in starts[1:]), len(message)]
    buffers = []
    for start, end in zip(starts, ends, strict=True):
        entry = message[start.end() : end]
        shape, operator = _SHAPE.search(entry), _OPERATOR.search(entry)
        buffers.append(
            Buffer(
                _bytes(*start.groups()),
                shape.group(1) if shape else "",
                operator.group(1) if operator else "",
            )
        )
    return Refusal(
        _bytes(*used.groups()[:2]),
        _bytes(*used.groups()[2:]),
        _bytes(*temporaries.groups()) if temporaries else None,
        tuple(sorted(buffers, key=lambda b: -b.bytes)),
    )


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))
