"""The wire format of protocol buffers, read field by field without their schemas."""

from collections.abc import Iterator
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Message = bytes | memoryview


def fields(message: Message, wanted: int | None = None) -> Iterator[tuple[int, int, Any]]:
    """Yield (number, wire type, value) of every field, or of those with the number `wanted`.

    A varint's value is an int; of the other types it is the bytes, a view of the message.

    Raises:
      ValueError, IndexError: the bytes are no message.
    """
    data, offset = memoryview(message), 0
    while offset < len(data):
        tag, offset = varint(data, offset)
        number, wire = tag >> 3, tag & 7
        value: Any
        if wire == VARINT:
            value, offset = varint(data, offset)
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
            value, offset = data[offset : offset + length], offset + length
        elif wire == BYTES:
            length, offset = varint(data, offset)
            value, offset = data[offset : offset + length], offset + length
        else:
            raise ValueError(f"wire type {wire}")
        if offset > len(data):
            raise ValueError("a field runs past the end")
        if wanted is None or number == wanted:
            yield number, wire, value


def varint(data: Message, offset: int) -> tuple[int, int]:
    """Return the number that starts at an offset, and the offset where it ends."""
    value = shift = 0
    while True:
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            return value, offset
        if shift > 63:
            raise ValueError("a varint of more than ten bytes")


def varints(value: int | Message) -> list[int]:
    """Return the numbers of a repeated field's value: one by itself, or several packed."""
    if isinstance(value, int):
        return [value]
    numbers, offset = [], 0
    while offset < len(value):
        number, offset = varint(value, offset)
        numbers.append(number)
    return numbers
