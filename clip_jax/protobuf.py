"""The wire format of protocol buffers, read field by field without their schemas."""

from collections.abc import Iterator
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Message = bytes | memoryview


def fields(message: Message, wanted: int | None = None) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, value) of every field, or of those with one number.

    A varint's value is an int; of the other types it is the bytes, a view of the message.

    Raises:
      ValueError, IndexError: the bytes are no message.
    """
    data, at = memoryview(message), 0
    while at < len(data):
        tag, at = varint(data, at)
        number, wire = tag >> 3, tag & 7
        value: Any
        if wire == VARINT:
            value, at = varint(data, at)
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
            value, at = data[at : at + length], at + length
        elif wire == BYTES:
            length, at = varint(data, at)
            value, at = data[at : at + length], at + length
        else:
            raise ValueError(f"wire type {wire}")
        if at > len(data):
            raise ValueError("a field runs past the end")
        if wanted is None or number == wanted:
            yield number, wire, value


def varint(data: Message, at: int) -> tuple[int, int]:
    """The number that starts there, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a varint of more than ten bytes")


def varints(value: int | Message) -> list[int]:
    """The numbers of a repeated field's value: one by itself, or several packed."""
    if isinstance(value, int):
        return [value]
    found, at = [], 0
    while at < len(value):
        number, at = varint(value, at)
        found.append(number)
    return found
